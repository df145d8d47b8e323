"""A Kalman filter over logarithms of factors, deaf to outliers but not to changes.

State: x [n], the logarithm of how wrong each part of a cost table is. What is known
beforehand is a covariance: parts that are likely wrong together share it, so that one
observation moves all of them, each as far as it is likely concerned.

A surprise beyond a few standard deviations is cut to that length, and far beyond it is
ignored (Hampel's three parts): one step that a pause made twenty times too slow moves
little. If such surprises come in a row, all to one side, it is the world that changed:
the covariance is widened by the smallest of them and what follows counts in full.
"""

from __future__ import annotations

import math

import numpy as np

from vllm_dspark.schedule.step import Floats, Ints, Mask

# Standard deviations from which a surprise is cut, counts less and less, is ignored.
_CUT, _LESS, _IGNORED = 2.5, 5.0, 8.0
# Surprises in a row, in one place and in one kind, that are no chance: with 5% outliers
# 6 in a million and 2 in a hundred million.
_STREAK_HERE = 4
_STREAK_ANYWHERE = 6
# A machine may get five times slower for good, but rather something holds it up for a
# few steps: twice as many are asked for.
_HUGE = math.log(5.0)
# What is no larger is followed step by step, however often it comes: a misfit that the
# factors cannot express, or a clock rate that wavers, is no change of the world.
_LARGE = math.log(1.25)
# What may change with nothing special going on, per observation and as a share of the
# prior's variance: about 1% for a prior factor of 2.
_DRIFT = 1.5e-4
_DRIFT_EVERY = 8  # added in portions, to save time
# The noise of single observations, a variance: start, limits, and how fast it adapts.
# The least of it is how well the factors can fit at all.
_NOISE = 0.05**2
_NOISE_LIMITS = (0.03**2, 0.5**2)
_NOISE_STEP = 1.02


class RobustFilter:
    """x, its covariance, and the noise, updated by one observation at a time.

    Args:
        prior: [n, n] covariance of x before any observation.
        kinds: [n] of each part; None: all are of kind 0. Each has a noise of its own.
            A change that is noticed in kind 0 may concern everything; one in another
            kind only that kind.
        steady: [n] bool of parts that no change of the world concerns; None: there are
            none.
    """

    def __init__(
        self, prior: Floats, kinds: Ints | None = None, steady: Mask | None = None
    ) -> None:
        self.x: Floats = np.zeros(len(prior))
        self.covariance: Floats = prior.copy()
        self._kinds: Ints = np.zeros(len(prior), np.int64) if kinds is None else kinds
        shape = prior / prior.diagonal().max()
        if steady is not None:
            shape[steady] = shape[:, steady] = 0.0
        self._shapes: list[Floats] = [
            shape * np.outer(of, of) if kind else shape
            for kind in range(int(self._kinds.max()) + 1)
            for of in [self._kinds == kind]
        ]
        self._drift: Floats = prior * (_DRIFT * _DRIFT_EVERY)
        self._noise = [_NOISE] * len(self._shapes)
        self._updates = 0
        # By place and by kind: surprises in a row (negative: downwards), the smallest.
        self._streaks: dict[int, tuple[int, float]] = {}
        self._buffer: Floats = np.empty_like(prior)

    def update(self, row: Floats, surprise: float, place: int) -> None:
        """Learn from one observation.

        Args:
            row: [n], what the observation is of x (its derivative).
            surprise: observed minus predicted.
            place: the part that it mostly is of: which streak it may continue.
        """
        kind = int(self._kinds[place])
        self._updates += 1
        if self._updates % _DRIFT_EVERY == 0:
            # Towards the prior, not beyond: what nobody visits stays a guess, and
            # does not become able to be anything.
            self.covariance *= 1 - _DRIFT * _DRIFT_EVERY
            self.covariance += self._drift
        # Methods, not `@`: they take half the time on vectors of this size.
        spread = self.covariance.dot(row)
        variance = float(row.dot(spread)) + self._noise[kind]
        if self._changed(surprise, surprise * surprise > _CUT * _CUT * variance, place):
            spread = self.covariance.dot(row)
            variance = float(row.dot(spread)) + self._noise[kind]
        # Half of all surprises are within 0.67 standard deviations.
        wide = surprise * surprise > 0.455 * variance
        noise = self._noise[kind] * (_NOISE_STEP if wide else 1 / _NOISE_STEP)
        self._noise[kind] = min(max(noise, _NOISE_LIMITS[0]), _NOISE_LIMITS[1])
        sigmas = abs(surprise) / math.sqrt(variance)
        if sigmas >= _IGNORED:
            return
        if sigmas > _CUT:
            surprise *= _CUT / sigmas * min((_IGNORED - sigmas) / (_IGNORED - _LESS), 1)
        gain = spread / variance
        self.x += gain * surprise
        np.multiply(gain[:, None], spread, out=self._buffer)
        self.covariance -= self._buffer

    def _changed(self, surprise: float, cut: bool, place: int) -> bool:
        """Count surprises in a row; after enough of them widen the covariance."""
        found, kind = False, int(self._kinds[place])
        size, side = abs(surprise), 1 if surprise > 0 else -1
        for key, enough in ((place, _STREAK_HERE), (-1 - kind, _STREAK_ANYWHERE)):
            if not cut:
                self._streaks.pop(key, None)
                continue
            count, least = self._streaks.get(key, (0, math.inf))
            if count * side <= 0:  # the first, or the other side
                count, least = 0, math.inf
            count, least = count + side, min(least, size)
            self._streaks[key] = count, least
            enough *= 2 if least > _HUGE else 1
            if least >= _LARGE and abs(count) >= enough and not found:
                self.covariance += self._shapes[kind] * (least * least)
                found = True
        return found
