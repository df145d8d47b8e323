"""Draft lengths other than the chosen one, for a few steps, to learn about them.

What is not drafted has no confidence and no outcome, and a length that was right once
would stay: all γ positions are drafted now and then. What a step without drafts takes
is known from such steps alone, and a wrong guess would keep a loss for a gain: they are
made as well, the oftener the less drafting seems to gain, so that what they cost is the
same small share of throughput whatever is gained.

Lossless: steps are counted, nothing else; no clock and no random numbers.
"""

from __future__ import annotations

from vllm_dspark.schedule.drafting_options import DraftingOptions

# Steps of drafting at another load after which none is drafted first: what a step
# without drafts takes there was learned elsewhere, if at all.
_EARLY = 6


class OtherLengths:
    """What to draft instead of the chosen length, step by step.

    Args:
        width: γ.
        options: intervals, and the share that steps without drafts may cost.
    """

    def __init__(self, width: int, options: DraftingOptions) -> None:
        self._width, self._options = width, options
        self._drafting = 0  # steps since drafting began, or the load became another
        self._since_none = 0  # of those, since steps without drafts were made
        self._bypassed = False  # at this load, so that its steps alone are known

    def jumped(self) -> None:
        """The load is another one: what its steps take is not known."""
        self._drafting = self._since_none = 0
        self._bypassed = False

    def bypassing(self) -> None:
        """Take in a step of bypass, in which steps without drafts are what is seen."""
        self._drafting = self._since_none = 0
        self._bypassed = True

    def next(self, length: int, gain: float) -> int | None:
        """Positions to draft in this step instead of ``length``, or None.

        Args:
            length: chosen, at least 1.
            gain: log throughput that it is predicted to gain over none.
        """
        options = self._options
        self._drafting += 1
        self._since_none += 1
        if length < self._width:
            at = self._drafting % options.explore_interval
            if at < options.explore_steps <= self._drafting:
                return self._width
        if not options.bypass or gain <= 0:
            return None  # at a loss a bypass comes, or a goal rules
        over = self._since_none - self._until_none(gain)
        if over < 0:
            return None
        if over >= options.explore_steps - 1:
            self._since_none, self._bypassed = 0, True
        return 0

    def _until_none(self, gain: float) -> int:
        """Steps of drafting from one without drafts to the next."""
        options = self._options
        apart = options.explore_steps * gain / options.explore_share
        limits = options.min_explore_interval, options.max_explore_interval
        usual = round(min(max(apart, limits[0]), limits[1]))
        return usual if self._bypassed else min(usual, _EARLY)
