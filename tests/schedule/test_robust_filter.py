"""The filter's treatment of surprises, one at a time."""

from __future__ import annotations

import math

import numpy as np
import pytest

from vllm_dspark.schedule.robust_filter import RobustFilter

HERE, THERE = np.array([1.0, 0.0]), np.array([0.0, 1.0])
PRIOR = np.array([[0.5, 0.4], [0.4, 0.5]])


def settled(seed: int = 0) -> RobustFilter:
    """After many observations of 0 with noise 0.05, at both places."""
    found, random = RobustFilter(PRIOR), np.random.default_rng(seed)
    for _ in range(300):
        for place, row in enumerate((HERE, THERE)):
            surprise = 0.05 * random.standard_normal() - float(row @ found.x)
            found.update(row, surprise, place)
    return found


def moved(surprise: float, times: int = 1) -> float:
    found = settled()
    before = found.x[0]
    for _ in range(times):
        found.update(HERE, surprise, 0)
    return float(found.x[0] - before)


def test_the_first_observation_is_believed() -> None:
    found = RobustFilter(PRIOR)
    found.update(HERE, 0.7, 0)
    assert found.x[0] == pytest.approx(0.7, rel=0.01)
    assert found.x[1] == pytest.approx(0.7 * 0.4 / 0.5, rel=0.01)


def test_the_three_parts() -> None:
    """In full up to 2.5 standard deviations (0.13), cut, less and less, not at all."""
    full, cut, less, none = (moved(s) for s in (0.10, 0.20, 0.35, 0.70))
    assert 0.01 < full < 0.04  # a gain of a quarter
    assert full < cut < 0.16 / 0.10 * full
    assert 0 < less < cut
    assert none == 0


def test_surprises_in_a_row_are_believed_at_the_fourth() -> None:
    assert moved(0.7, times=3) == 0
    assert moved(0.7, times=4) > 0.6
    assert moved(-0.7, times=4) < -0.6


def test_huge_ones_at_the_eighth() -> None:
    assert moved(math.log(20), times=7) == 0
    assert moved(math.log(20), times=8) > 2.5


@pytest.mark.parametrize("other", [-0.7, 0.0])
def test_a_row_that_is_broken_starts_anew(other: float) -> None:
    found = settled()
    before = found.x.copy()
    for surprise in (0.7, 0.7, 0.7, other, 0.7, 0.7, 0.7, other):
        found.update(HERE, surprise, 0)
    np.testing.assert_array_equal(found.x, before)


def test_six_in_a_row_anywhere() -> None:
    eye = np.eye(6)
    wide = RobustFilter(np.full((6, 6), 0.4) + 0.1 * eye)
    for i in range(600):  # each at a place of its own: no four in one place
        row = eye[i % 6]
        wide.update(row, -float(row @ wide.x), i % 6)
    for i in range(5):
        wide.update(eye[i], 0.7, i)
    assert np.abs(wide.x).max() < 0.01
    wide.update(eye[5], 0.7, 5)
    assert wide.x[5] > 0.6 and wide.x[:5].min() > 0.4


def test_the_noise_is_learned() -> None:
    """With three times the noise, what was a surprise is none."""
    found, random = settled(), np.random.default_rng(1)
    for _ in range(300):
        found.update(HERE, 0.15 * random.standard_normal() - float(found.x[0]), 0)
    before = found.x[0]
    found.update(HERE, 0.7, 0)
    assert found.x[0] - before > 0.01 and moved(0.7) == 0


def test_small_surprises_are_no_change_however_often_they_come() -> None:
    """Followed step by step; the covariance, and with it all else, stays as it is."""
    found = settled()
    spread = found.covariance.copy()
    for _ in range(12):
        found.update(HERE, 0.2, 0)
    assert (found.covariance.diagonal() < 1.5 * spread.diagonal()).all()
    assert found.x[0] > 0.2


def test_a_change_in_another_kind_stays_there() -> None:
    kinds = np.array([0, 1])
    for place, row in enumerate((HERE, THERE)):
        found = RobustFilter(PRIOR, kinds)
        for _ in range(300):
            for at, other in enumerate((HERE, THERE)):
                found.update(other, -float(other @ found.x), at)
        for _ in range(4):
            found.update(row, 0.7, place)
        assert found.x[place] > 0.6
        assert (found.x[1 - place] > 0.3) == (place == 0)
