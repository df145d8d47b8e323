"""What may be accepted at best, by few outcomes."""

from __future__ import annotations

import numpy as np
import pytest

from vllm_dspark.calibration.online import Prediction
from vllm_dspark.schedule.hope import Hope

WIDTH = 5


def observe(
    hope: Hope,
    verified: np.ndarray,
    accepted: np.ndarray,
    confidence: float | None = None,
) -> None:
    """A step of drafts with such calibrated confidences, or with none."""
    shape = len(verified), WIDTH
    conditional = np.full(shape, 0.99 if confidence is None else confidence)
    made = Prediction(
        tuple(range(len(verified))),
        np.cumprod(conditional, axis=1),
        conditional,
        np.zeros(shape),
        np.full(shape, confidence is not None),
        np.arange(len(verified)),
        0,
    )
    hope.observe(made, verified, accepted)


def rounds(rng: np.random.Generator, rate: float, count: int) -> np.ndarray:
    """Accepted drafts of so many rounds in which everything is verified."""
    return np.cumprod(rng.random((count, WIDTH)) < rate, axis=1).sum(axis=1)


def test_before_any_outcome_it_is_the_rate() -> None:
    np.testing.assert_allclose(Hope(WIDTH, 0.9).survival(), 0.9 ** np.arange(1, 6))


def test_few_rejections_end_much_hope() -> None:
    hope, all_verified = Hope(WIDTH, 0.9), np.full(8, WIDTH)
    observe(hope, all_verified, np.zeros(8, np.int64))
    assert hope.survival()[0] < 0.3
    observe(hope, np.repeat(all_verified, 8), np.zeros(64, np.int64))
    assert hope.survival()[0] < 0.05


def test_what_was_not_verified_says_nothing() -> None:
    hope = Hope(WIDTH, 0.9)
    observe(hope, np.full(20, 2), np.array([2, 1] * 10))
    limits = hope.survival()
    assert limits[0] == pytest.approx(0.9)
    assert 0.5 < limits[1] < 0.81
    # Later drafts can survive no more often than those before them.
    assert limits[2] == limits[1] and limits[3] == pytest.approx(0.9**4)
    before = limits.copy()
    observe(hope, np.zeros(50, np.int64), np.zeros(50, np.int64))
    assert (hope.survival() == before).all()


def test_confidences_stand_in_for_outcomes_that_are_missing() -> None:
    hope, none = Hope(WIDTH, 0.9), np.zeros(16, np.int64)
    observe(hope, none, none, confidence=0.1)
    assert hope.survival()[0] < 0.3
    hope = Hope(WIDTH, 0.9)
    observe(hope, np.ones(16, np.int64), np.ones(16, np.int64), confidence=0.2)
    limits = hope.survival()  # of the first the outcome counts, not the confidence
    assert limits[0] == pytest.approx(0.9) and limits[1] < 0.5


@pytest.mark.parametrize("count", [8, 16, 64])
@pytest.mark.parametrize("rate", [0.1, 0.4, 0.7])
def test_the_truth_is_seldom_above_it(rate: float, count: int) -> None:
    truth = rate ** np.arange(1, WIDTH + 1)
    above = np.zeros(WIDTH)
    for seed in range(200):
        hope = Hope(WIDTH, 0.9)
        accepted = rounds(np.random.default_rng(seed), rate, count)
        observe(hope, np.full(count, WIDTH), accepted)
        above += hope.survival() < truth
    assert (above <= 0.1 * 200).all()
