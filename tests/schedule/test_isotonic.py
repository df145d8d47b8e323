"""Pooling adjacent violators against the definition of what it computes."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.optimize import isotonic_regression

from vllm_dspark.schedule.isotonic import isotonic, isotonic_grid


def test_by_hand() -> None:
    assert isotonic([1, 3, 2, 4]).tolist() == [1, 2.5, 2.5, 4]
    assert isotonic([3, 2, 1]).tolist() == [2, 2, 2]
    assert isotonic([5]).tolist() == [5]
    # The trusted value stays nearly where it is.
    assert isotonic([3, 1], [1, 99]).tolist() == pytest.approx([1.02, 1.02])


@pytest.mark.parametrize("seed", range(20))
def test_equals_scipys(seed: int) -> None:
    random = np.random.default_rng(seed)
    y, w = random.normal(size=30).cumsum(), random.uniform(0.1, 5, 30)
    np.testing.assert_allclose(isotonic(y, w), isotonic_regression(y, weights=w).x)


@pytest.mark.parametrize("seed", range(20))
def test_a_grid_rises_along_both_axes(seed: int) -> None:
    random = np.random.default_rng(seed)
    grid = random.normal(size=(6, 5))
    fit = isotonic_grid(grid)
    assert (np.diff(fit, axis=0) >= 0).all() and (np.diff(fit, axis=1) >= 0).all()
    assert fit.mean() == pytest.approx(grid.mean())  # pooling keeps the mean
    np.testing.assert_array_equal(isotonic_grid(fit), fit)


def test_the_argument_is_not_written_to() -> None:
    y = np.array([1.0, 2.0])
    isotonic(y)[0] = 7
    isotonic_grid(y[None])[0, 0] = 7
    assert y.tolist() == [1, 2]
