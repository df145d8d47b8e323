"""Confidences mixed with certainties: known weights, files, engines, bad files."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from tests.calibration.synthetic import make_rounds
from vllm_dspark.calibration import file
from vllm_dspark.calibration.fitting import fit
from vllm_dspark.calibration.mixing import fit_mixing
from vllm_dspark.calibration.online import OnlineSurvival
from vllm_dspark.calibration.rounds import PromptRounds, Rounds, collect
from vllm_dspark.calibration.scaling import Mixing, Scaling, logit, sigmoid
from vllm_dspark.calibration.summary import summarise
from vllm_dspark.types import StepRecord

WEIGHT, SHARE, BIAS = (0.5, 1.0, 0.8), (0.9, 0.6, 0.0), (-0.3, 0.2, 0.4)
HASH = "f" * 64


def mixed_rounds(count: int, seed: int = 0, share: tuple[float, ...] = SHARE) -> Rounds:
    """Rounds whose outcomes follow the mixing of WEIGHT, share, BIAS."""
    random = np.random.default_rng(seed)
    x, z = random.normal(0.3, 1.0, (2, count, 3))
    truth = sigmoid(x * WEIGHT + z * share + np.array(BIAS))
    survives = random.random((count, 3)) < truth
    plain = make_rounds(count, [1.0] * 3, seed=seed, prompts=80)
    accepted = np.cumprod(survives, axis=1).sum(axis=1)
    return replace(plain, confidence=sigmoid(x), accepted=accepted, certainty=z)


def test_recovers_the_weights() -> None:
    found = fit_mixing(mixed_rounds(40000))
    assert found.weight == pytest.approx(WEIGHT, abs=0.06)
    assert found.certainty == pytest.approx(SHARE, abs=0.06)
    assert found.bias == pytest.approx(BIAS, abs=0.06)


def test_better_auc_and_as_right_as_before_on_other_prompts() -> None:
    found = fit(mixed_rounds(6000))
    mixing = found.scaling.mixing
    assert mixing is not None and mixing.certainty == pytest.approx(SHARE, abs=0.2)
    assert found.auc_after[0] > found.auc_before[0] + 0.05
    others = mixed_rounds(20000, seed=1)
    known = found.scaling.apply(others.confidence, others.certainty)
    alone = found.scaling.apply(others.confidence)
    with_it, without = summarise(others, known), summarise(others, alone)
    assert max(with_it.ece_calibrated) < 0.02
    assert with_it.auc_calibrated[0] > without.auc_calibrated[0] + 0.05
    assert with_it.brier_calibrated[2] < without.brier_calibrated[2]
    # What is said of held-out prompts is true of others.
    assert found.auc_after == pytest.approx(with_it.auc_calibrated, abs=0.03)


def test_certainties_that_say_nothing_are_left_out() -> None:
    rounds = make_rounds(3000, [1.0, 1.0, 1.0])
    noise = np.random.default_rng(3).normal(size=rounds.confidence.shape)
    found = fit(replace(rounds, certainty=noise))
    assert found.scaling.mixing is None
    assert found.ece_after == found.ece_alone
    assert fit(rounds).scaling == found.scaling


def test_without_certainty_the_maps_of_confidences_alone() -> None:
    scaling = Scaling(
        (2.0,) * 2, (0.0,) * 2, Mixing((1.0,) * 2, (1.0,) * 2, (0.5,) * 2)
    )
    confidence = np.array([[0.8, 0.7], [0.8, 0.7]])
    certainty = np.array([[1.0, np.nan], [np.inf, -1.0]])
    found = scaling.apply(confidence, certainty)
    mixed = sigmoid(logit(confidence) + np.array([[1.0, 0], [0, -1.0]]) + 0.5)
    plain = scaling.apply(confidence)
    assert found == pytest.approx(
        np.array([[mixed[0, 0], plain[0, 1]], [plain[1, 0], mixed[1, 1]]])
    )


def test_file_there_and_back(tmp_path: Path) -> None:
    path = tmp_path / file.NAME
    found = fit(mixed_rounds(3000))
    file.write(path, HASH, [file.setting(0.0, found)], {"label": "x"}, {})
    assert file.read(path, HASH).settings[0.0] == found.scaling
    # An older reader finds what it knows, and those are the maps without certainty.
    row = json.loads(path.read_text())["settings"][0]
    assert tuple(row["temperature"]) == found.scaling.temperature
    assert row["ece_after"] == pytest.approx(found.ece_alone)
    assert row["with_certainty"]["ece_after"] == pytest.approx(found.ece_after)


@pytest.mark.parametrize(
    "bad, message",
    [
        (3, "expected an object"),
        ({"weight": [1.0] * 3, "certainty": [1.0] * 3}, "no list of numbers"),
        (
            {"weight": [1.0] * 2, "certainty": [1.0] * 2, "bias": [0.0] * 2},
            "does not cover the 3 positions",
        ),
        (
            {"weight": [1e9] * 3, "certainty": [1.0] * 3, "bias": [0.0] * 3},
            "is no number from -100 to 100",
        ),
    ],
)
def test_damaged_files_are_refused(tmp_path: Path, bad: object, message: str) -> None:
    path = tmp_path / file.NAME
    file.write(path, HASH, [file.setting(0.0, fit(mixed_rounds(900)))], {}, {})
    raw = json.loads(path.read_text())
    raw["settings"][0]["with_certainty"] = bad
    path.write_text(json.dumps(raw))
    with pytest.raises(ValueError, match=message):
        file.read(path)


def test_an_engine_predicts_what_the_file_says() -> None:
    """Requests of two settings, one of which mixes; certainties known and not."""
    mixing = Mixing(WEIGHT, SHARE, BIAS)
    greedy = Scaling((2.0, 1.0, 1.0), (0.1, 0.2, 0.3), mixing)
    sampled = Scaling((1.5, 1.5, 1.5), (0.0, 0.0, 0.1))
    calibration = file.Calibration(HASH, {0.0: greedy, 1.0: sampled}, "")
    survival = OnlineSurvival(3, calibration)
    confidence = np.array([[0.8, 0.6, 0.7]] * 3, dtype=np.float32)
    certainty = np.array([[1.0, 0.5, -1.0], [1.0, np.nan, 0.5], [2.0, 2.0, 2.0]])
    ids, temperatures = ("a", "b", "c"), (0.0, 0.0, 1.0)
    made = survival.apply(ids, temperatures, confidence, certainty)
    c64 = confidence.astype(np.float64)
    expected = np.concatenate(
        [
            greedy.apply(c64[:2], certainty[:2]),
            sampled.apply(c64[2:], certainty[2:]),
        ]
    )
    assert made.conditional == pytest.approx(expected, abs=1e-6)
    alone = survival.apply(ids, temperatures, confidence)
    assert alone.conditional[:2] == pytest.approx(greedy.apply(c64[:2]), abs=1e-6)
    # Of another shape: no certainty.
    other = survival.apply(ids, temperatures, confidence, certainty[:, :2])
    assert np.array_equal(other.conditional, alone.conditional)


def test_recorded_rounds_keep_their_certainties() -> None:
    steps = (
        StepRecord(5, 9, (1, 2), 1, (0.5, 0.25), (1.5, -0.5)),
        StepRecord(7, 3, (4,), 0, (0.5,), (0.5,)),
    )
    rounds = collect([PromptRounds(0, "d", 4, (1,), steps)], 3)
    assert rounds.certainty is not None
    expected = np.array([[1.5, -0.5, np.nan], [0.5, np.nan, np.nan]])
    assert np.array_equal(rounds.certainty, expected, equal_nan=True)
    assert rounds.select(np.array([1])).certainty is not None
    old = [PromptRounds(0, "d", 4, (1,), (StepRecord(5, 9, (1,), 1, (0.5,)),))]
    assert collect(old, 3).certainty is None
