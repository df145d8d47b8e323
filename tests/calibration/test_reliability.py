"""ECE, AUROC and Brier score against figures worked out by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest

from tests.calibration.synthetic import rounds_of
from vllm_dspark.calibration.reliability import (
    auroc,
    brier,
    conditional_pairs,
    ece,
    ece_floor,
    reliability,
    survival_pairs,
)

NONE = np.array([]), np.array([], dtype=bool)


def bools(*values: int) -> np.ndarray:
    return np.array(values, dtype=bool)


def test_ece_by_hand() -> None:
    # Bin 0: 0.05, 0.05 with one hit; bin 6: 0.62, 0.68 with two; bin 9: 1.0, missed.
    predicted = np.array([0.05, 0.05, 0.62, 0.68, 1.0])
    hit = bools(1, 0, 1, 1, 0)
    by_hand = (abs(1 - 0.10) + abs(2 - 1.30) + abs(0 - 1.0)) / 5
    assert ece(predicted, hit) == pytest.approx(by_hand)


def test_a_bins_errors_cancel() -> None:
    assert ece(np.array([0.41, 0.49]), bools(1, 0)) == pytest.approx(0.05)


def test_brier_by_hand() -> None:
    by_hand = (0.2**2 + 0.4**2 + 0.9**2) / 3
    assert brier(np.array([0.8, 0.4, 0.1]), bools(1, 0, 1)) == pytest.approx(by_hand)


def test_auroc_by_hand() -> None:
    # Hits 0.8, 0.5; misses 0.5, 0.2, 0.6: pairs won 3 + (½ + 1 + 0) of 6.
    predicted = np.array([0.8, 0.5, 0.5, 0.2, 0.6])
    assert auroc(predicted, bools(1, 1, 0, 0, 0)) == pytest.approx(4.5 / 6)


def test_auroc_of_perfect_inverted_and_constant() -> None:
    rising, hit = np.array([0.1, 0.2, 0.8, 0.9]), bools(0, 0, 1, 1)
    assert auroc(rising, hit) == 1
    assert auroc(rising[::-1], hit) == 0
    assert auroc(np.full(4, 0.3), hit) == 0.5


def test_what_cannot_be_had_is_nan() -> None:
    assert math.isnan(ece(*NONE)) and math.isnan(brier(*NONE))
    assert math.isnan(ece_floor(NONE[0]))
    assert math.isnan(auroc(np.array([0.1, 0.2]), bools(1, 1)))


def test_the_floor_is_the_ece_of_perfect_predictions() -> None:
    random = np.random.default_rng(0)
    predicted = random.random(500)
    drawn = [ece(predicted, random.random(500) < predicted) for _ in range(300)]
    # 300 draws of a figure that scatters by a quarter of itself: 1.5%.
    assert np.mean(drawn) == pytest.approx(ece_floor(predicted), rel=0.06)


def test_reliability_diagram() -> None:
    found = reliability(np.array([0.11, 0.19, 1.0]), bools(1, 0, 1))
    assert found.count.tolist() == [0, 2, 0, 0, 0, 0, 0, 0, 0, 1]
    assert found.predicted[1] == pytest.approx(0.15)
    assert found.observed[1] == 0.5 and found.observed[9] == 1
    assert np.isnan(found.observed[0])


def test_pairs_take_the_right_rounds() -> None:
    rounds = rounds_of(
        [[0.9, 0.5], [0.8, 0.25], [0.7, math.nan], [0.6, 0.5]],
        accepted=[2, 0, 1, 1],
        num_drafts=[2, 2, 1, 2],
    )
    predicted, hit = survival_pairs(rounds, rounds.confidence, 2)
    assert predicted.tolist() == pytest.approx([0.45, 0.2, 0.3])
    assert hit.tolist() == [True, False, False]
    predicted, hit = conditional_pairs(rounds, rounds.confidence, 2)
    assert predicted.tolist() == [0.5, 0.5] and hit.tolist() == [True, False]
