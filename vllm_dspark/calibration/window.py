"""The calibration error of the last rounds, by position, for metrics.

The same ECE as `reliability` (equal bins of the survival a_k, against "draft k was
accepted"), over a window of steps. Only rounds that verified k drafts enter at
position k: whether they did depends on predictions, never on the outcome.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from vllm_dspark.calibration.reliability import BINS, bin_of
from vllm_dspark.calibration.rounds import Floats, Ints


class CalibrationWindow:
    """Bins of the last steps' predictions.

    Args:
        width: K, positions.
        steps: how many steps the window holds.
    """

    def __init__(self, width: int, steps: int) -> None:
        self._width, self._size = width, width * BINS
        # Per step, position and bin: rounds, hits minus predictions, Σ a(1 − a).
        self._cells = np.zeros((steps, 3, self._size), dtype=np.float32)
        self._next = 0

    def add(
        self, survival: Floats, verified: NDArray[np.bool_], hit: NDArray[np.bool_]
    ) -> None:
        """Enter one step.

        Args:
            survival: ``[R, k]`` what the scheduler went by.
            verified: ``[R, k]`` which of these positions were verified.
            hit: ``[R, k]`` which were accepted.
        """
        position = np.arange(verified.shape[1])
        # Unverified positions fall into a cell past the last one, which is left out.
        cell = np.where(verified, bin_of(survival) + position * BINS, self._size)
        cell = cell.ravel()
        step = self._cells[self._next]
        for row, values in enumerate(
            (None, (hit - survival).ravel(), (survival * (1 - survival)).ravel())
        ):
            step[row] = np.bincount(cell, values, self._size + 1)[:-1]
        self._next = (self._next + 1) % len(self._cells)

    def _sums(self) -> Floats:
        total: Floats = self._cells.sum(axis=0, dtype=np.float64)
        return total.reshape(3, self._width, BINS)

    def counts(self) -> Ints:
        """``[K]`` rounds in the window that verified position k."""
        counts: Ints = self._sums()[0].sum(axis=1).round().astype(np.int64)
        return counts

    def ece(self) -> Floats:
        """``[K]`` expected calibration error; NaN where nothing was verified."""
        count, excess, _ = self._sums()
        return _share(np.abs(excess).sum(axis=1), count.sum(axis=1))

    def floor(self) -> Floats:
        """``[K]`` what perfect predictions would show on as many rounds."""
        count, _, spread = self._sums()
        expected = np.sqrt(2 / math.pi * spread).sum(axis=1)
        return _share(expected, count.sum(axis=1))


def _share(total: Floats, count: Floats) -> Floats:
    with np.errstate(invalid="ignore"):
        share: Floats = total / np.where(count > 0, count, np.nan)
    return share
