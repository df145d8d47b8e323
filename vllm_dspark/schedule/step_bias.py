"""Whether steps with drafts are judged as rightly as steps without.

What a table says of single steps is off by some percent, and half of that is taken off
what drafting promises. But a choice is about the mean of many steps, and where some
have drafts and some have none, both means can be seen: how far the one kind is
misjudged against the other is known ever better, and stands in for the doubt.
"""

from __future__ import annotations

import math
import statistics
from collections import deque

# Steps of each kind that count, none of them older than so many steps: speed and load
# move on.
_STEPS = 64
_RECENT = 256
_FEW = 16  # of each kind, before a mean says anything
_EVERY = 8  # steps until means are found anew
# A machine that wavers does so for a few steps at a time: so many tell as much as one.
_ALIKE = 2.0
# Medians and median deviations, as means and standard deviations of a normal one.
_OF_MEDIAN, _OF_DEVIATION = 1.25, 1.48


class StepBias:
    """Log of observed / predicted seconds of steps with drafts, and of those without.

    Example:
        >>> bias = StepBias()
        >>> for _ in range(32):
        ...     bias.saw(True, 0.02)
        ...     bias.saw(False, -0.01)
        >>> round(bias.doubt(0.10), 3)
        0.03
        >>> StepBias().doubt(0.10)
        0.05
    """

    def __init__(self) -> None:
        self._seen = 0
        self._kinds: dict[bool, deque[tuple[int, float]]] = {
            drafts: deque(maxlen=_STEPS) for drafts in (False, True)
        }
        self._found: float | None = None

    def saw(self, drafts: bool, surprise: float) -> None:
        """Note a step: whether drafts were in it, log of observed / predicted."""
        self._seen += 1
        self._kinds[drafts].append((self._seen, surprise))
        if self._seen % _EVERY == 0:
            self._found = self._difference()

    def doubt(self, error: float) -> float:
        """Log throughput to take off what drafting promises.

        Args:
            error: typical relative error of the prediction for one step.

        Returns:
            Half of that error while too little was seen of either kind; else how much
            longer steps with drafts take than predicted, against the others, and a
            standard error of it, within ± that half.
        """
        half = error / 2
        return half if self._found is None else min(max(self._found, -half), half)

    def _difference(self) -> float | None:
        with_drafts, without = self._recent(True), self._recent(False)
        if min(len(with_drafts), len(without)) < _FEW:
            return None
        (middle, one), (bare, other) = _mean(with_drafts), _mean(without)
        return middle - bare + math.hypot(one, other)

    def _recent(self, drafts: bool) -> list[float]:
        after = self._seen - _RECENT
        return [surprise for at, surprise in self._kinds[drafts] if at > after]


def _mean(values: list[float]) -> tuple[float, float]:
    """A mean that pauses do not move, and its standard error."""
    middle = statistics.median(values)
    spread = _OF_DEVIATION * statistics.median(abs(v - middle) for v in values)
    return middle, _OF_MEDIAN * spread * math.sqrt(_ALIKE / len(values))
