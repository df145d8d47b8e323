"""Least-squares fits that never fall: more tokens never cost less time."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from vllm_dspark.schedule.step import Floats


def isotonic(values: ArrayLike, weights: ArrayLike | None = None) -> Floats:
    """The non-decreasing sequence nearest to ``values`` (pool adjacent violators).

    Neighbours in the wrong order are replaced by their weighted mean, again and again
    until none is left, which is the weighted least-squares solution.

    Args:
        values: [N].
        weights: [N], positive; how much each value is trusted. Alike by default.

    Returns:
        [N].
    """
    y = np.asarray(values, dtype=np.float64)
    if (y[1:] >= y[:-1]).all():  # as nearly always: spare the loop
        return y.copy()
    w = np.ones_like(y) if weights is None else np.asarray(weights, dtype=np.float64)
    means: list[float] = []
    masses: list[float] = []
    counts: list[int] = []
    for value, weight in zip(y.tolist(), w.tolist(), strict=True):
        mean, mass, count = value, weight, 1
        while means and means[-1] > mean:
            left = masses.pop()
            mean = (means.pop() * left + mean * mass) / (left + mass)
            mass += left
            count += counts.pop()
        means.append(mean)
        masses.append(mass)
        counts.append(count)
    return np.repeat(np.array(means), np.array(counts, dtype=np.int64))


def isotonic_grid(values: ArrayLike) -> Floats:
    """The same along both axes of a grid: columns first, then rows.

    The second pass keeps the order that the first one made: of two sequences with
    equal weights, the one that is smaller everywhere has the smaller fit everywhere.

    Args:
        values: [N, M].

    Returns:
        [N, M].
    """
    y = np.asarray(values, dtype=np.float64)
    for axis in (0, 1):
        if (np.diff(y, axis=axis) < 0).any():
            y = np.apply_along_axis(isotonic, axis, y)
    # Means of the two passes are rounded: what should be equal may be 1e-16 apart.
    return np.maximum.accumulate(np.maximum.accumulate(y, axis=0), axis=1)
