"""Sequential temperature scaling on rounds whose right answer is known."""

from __future__ import annotations

import numpy as np
import pytest

from tests.calibration.synthetic import make_rounds, rounds_of
from vllm_dspark.calibration import fitting
from vllm_dspark.calibration.fitting import assign_folds, fit
from vllm_dspark.calibration.rounds import Rounds, survival
from vllm_dspark.calibration.scaling import (
    TEMPERATURES,
    Scaling,
    fit_position,
    identity,
    scale,
)
from vllm_dspark.calibration.summary import summarise

SHARP = [2.0, 1.5, 1.5]


def errors(rounds: Rounds, scaling: Scaling) -> tuple[np.ndarray, np.ndarray]:
    """ECE by position on these rounds, raw and calibrated."""
    found = summarise(rounds, scaling.apply(rounds.confidence))
    return np.array(found.ece_raw), np.array(found.ece_calibrated)


def test_recovers_temperatures() -> None:
    found = fit(make_rounds(6000, SHARP), allow_bias=False)
    assert found.kinds == ("temperature",) * 3
    # The ECE is flat near its minimum: a quarter either way.
    assert found.scaling.temperature == pytest.approx(SHARP, rel=0.25)
    assert found.scaling.bias == (0, 0, 0)
    raw, after = errors(make_rounds(20000, SHARP, seed=1), found.scaling)
    assert (raw > 0.05).all() and (after < 0.015).all()


def test_recovers_a_bias() -> None:
    bias = [0.8, 0.6]
    found = fit(make_rounds(6000, [1.0, 1.0], bias))
    assert found.kinds == ("bias", "bias")
    assert found.scaling.bias == pytest.approx(bias, abs=0.2)
    raw, after = errors(make_rounds(20000, [1.0, 1.0], bias, seed=1), found.scaling)
    assert (raw > 0.05).all() and (after < 0.015).all()


def test_what_is_right_stays_as_it_is() -> None:
    found = fit(make_rounds(3000, [1.0, 1.0, 1.0]))
    assert found.scaling == identity(3)
    assert "temperature 1" in found.note
    assert found.ece_after == found.ece_before


@pytest.mark.parametrize("seed", range(3))
def test_never_worse_on_held_out_prompts(seed: int) -> None:
    random = np.random.default_rng(seed)
    temperature, bias = random.uniform(0.8, 1.25, 3), random.normal(0, 0.1, 3)
    found = fit(make_rounds(3000, temperature, bias, seed=seed, prompts=100))
    # By position no worse than chance makes it, and better on the whole.
    worse = np.array(found.ece_after) - np.array(found.ece_before)
    assert (worse < found.ece_floor).all() and worse.sum() <= 0
    raw, after = errors(
        make_rounds(20000, temperature, bias, seed=seed + 100), found.scaling
    )
    # From 3000 rounds a map is known to about this much.
    assert (after <= raw + 0.01).all()


def test_a_scaling_that_hurts_is_thrown_away(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*arguments: object) -> tuple[float, float]:
        return 5.0, 2.0

    def gullible(self: object, one: object, other: object, k: int) -> bool:
        return True

    monkeypatch.setattr(fitting, "fit_position", broken)
    monkeypatch.setattr(fitting._CrossValidation, "_surely_better", gullible)
    found = fit(make_rounds(900, [1.0, 1.0]))
    assert found.kinds == ("none", "none")
    assert "makes held-out prompts worse" in found.note
    assert found.ece_after == found.ece_before
    assert np.array_equal(
        found.held_out, survival(make_rounds(900, [1.0, 1.0]).confidence)
    )


def test_held_out_means_other_prompts() -> None:
    rounds = make_rounds(600, SHARP, prompts=23)
    fold = assign_folds(rounds, 5)
    for prompt in range(23):
        assert len(set(fold[rounds.prompt == prompt])) == 1
    for name in ("even", "odd"):
        assert len(set(fold[rounds.dataset == name])) == 5


@pytest.mark.parametrize("kind", ["temperature", "bias"])
def test_the_order_within_a_position_stays(kind: str) -> None:
    rounds = make_rounds(500, [0.5])
    found = fit_position(
        np.ones(500), rounds.confidence[:, 0], rounds.accepted > 0, kind
    )
    rising = np.linspace(0.0, 1.0, 101)
    assert (np.diff(scale(rising, *found)) > 0).all()


def test_the_grid_has_one_exactly() -> None:
    assert 1.0 in TEMPERATURES.tolist()
    confidence = np.array([0.0, 0.3, 1.0])
    assert scale(confidence, 1.0, 0.0) is confidence


def test_scaling_by_hand() -> None:
    # logit(0.8) = log 4; half of it is log 2, so σ = 2/3; minus log 2, so ½.
    assert scale(np.array([0.8]), 2.0, 0.0)[0] == pytest.approx(2 / 3)
    assert scale(np.array([0.8]), 2.0, -np.log(2))[0] == pytest.approx(0.5)
    assert np.isnan(Scaling((2.0,), (0.0,)).apply(np.array([[np.nan]]))).all()


def test_more_positions_than_calibrated_are_refused() -> None:
    with pytest.raises(ValueError, match=r"covers 2 positions.* confidences of 3"):
        identity(2).apply(np.full((4, 3), 0.5))
    assert identity(3).apply(np.full((4, 2), 0.5)).shape == (4, 2)


def test_rounds_with_fewer_drafts_count_where_they_have_some() -> None:
    full = make_rounds(2000, SHARP)
    short = np.arange(2000) % 2 == 0
    confidence = full.confidence.copy()
    confidence[short, 1:] = np.nan
    cut = Rounds(
        confidence,
        np.where(short, 1, 3),
        np.where(short, np.minimum(full.accepted, 1), full.accepted),
        full.prompt,
        full.depth,
        full.dataset,
    )
    assert fit(cut, allow_bias=False).fit_size == (2000, 1000, 1000)


def test_what_cannot_be_fitted() -> None:
    with pytest.raises(ValueError, match="3 prompts are too few"):
        fit(rounds_of([[0.5], [0.4], [0.3]], [1, 0, 1]))
    with pytest.raises(ValueError, match="no confidence head"):
        fit(rounds_of([[np.nan]] * 8, [1] * 8))
