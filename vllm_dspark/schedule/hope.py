"""What drafts could bring at best, while hardly anything is known of them.

An engine that starts knows what steps cost, but not what will be accepted. Drafting
everything until that is known loses throughput wherever no drafter could be good enough
for the load, and loses more of it the longer a bad one is given. So at the start drafts
are made as far as they pay if acceptance is as good as what was seen leaves it to be.

Verification trims unlikely drafts, so verified ones flatter the others; for these their
calibrated confidence is taken, as in `calibration.online`. Lossless: all of it belongs
to earlier rounds.
"""

from __future__ import annotations

import numpy as np

from vllm_dspark.calibration.online import Prediction
from vllm_dspark.schedule.step import Floats, Ints

# Standard deviations up to the limit: one in twenty is beyond.
_WIDE = 1.64


class Hope:
    """Upper limits of the survivals a_1..a_γ of drafts.

    Args:
        width: γ.
        rate: share of the drafts at each position, given those before it, that are
            accepted at best.
    """

    def __init__(self, width: int, rate: float) -> None:
        self._position = np.arange(1, width + 1)
        self._best: Floats = np.float64(rate) ** self._position
        self._rounds, self._survived = np.zeros((2, width))

    def observe(self, made: Prediction, verified: Ints, accepted: Ints) -> None:
        """Note a step's outcomes, and what confidences say of drafts that have none.

        Args:
            made: what was expected of the drafts.
            verified: ``[R]`` of them verified, and how many were
            accepted: ``[R]``.
        """
        width = made.survival.shape[1]
        position = self._position[:width]
        known = verified[:, None] >= position
        hit = accepted[:, None] >= position
        alive = np.cumprod(np.where(known, hit, made.conditional), axis=1)
        counted = known | made.usable
        self._rounds[:width] += counted.sum(axis=0)
        self._survived[:width] += (counted * alive).sum(axis=0)

    def survival(self) -> Floats:
        """``[γ]`` falling: the upper limit of Wilson's interval, at most the best."""
        n = np.maximum(self._rounds, 1)
        share, z = self._survived / n, _WIDE**2 / n
        spread = _WIDE * np.sqrt((share * (1 - share) + z / 4) / n)
        upper = (share + z / 2 + spread) / (1 + z)
        limits = np.where(self._rounds > 0, np.minimum(upper, self._best), self._best)
        falling: Floats = np.minimum.accumulate(limits)
        return falling
