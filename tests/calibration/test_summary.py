"""Figures of rounds: acceptance, macro average, thresholds, simulated throughput."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from tests.calibration.synthetic import make_rounds, rounds_of
from vllm_dspark.calibration.fitting import fit
from vllm_dspark.calibration.report import bias, conditionals, drift, groups
from vllm_dspark.calibration.rounds import PromptRounds, collect, survival
from vllm_dspark.calibration.summary import macro, summarise
from vllm_dspark.calibration.threshold import cut, sweep, verify_lengths
from vllm_dspark.calibration.throughput import (
    DEMO_COST,
    CostCurve,
    parse_curve,
    plan,
    simulate,
)
from vllm_dspark.types import StepRecord

HAND = rounds_of(
    [[0.9, 0.5], [0.8, 0.2], [0.7, math.nan], [math.nan, math.nan]],
    accepted=[2, 0, 1, 0],
    num_drafts=[2, 2, 1, 0],
)


def test_rounds_from_records() -> None:
    steps = (StepRecord(5, 9, (1, 2), 1, (0.5, 0.25)), StepRecord(7, 3, (), 0, ()))
    found = collect([PromptRounds(4, "d", 5, (9, 1, 3), steps)], width=3)
    assert found.confidence[0].tolist() == pytest.approx([0.5, 0.25, math.nan],
                                                         nan_ok=True)  # fmt: skip
    assert found.depth.tolist() == [0, 2] and found.prompt.tolist() == [4, 4]
    assert found.num_drafts.tolist() == [2, 0] and found.accepted.tolist() == [1, 0]
    with pytest.raises(ValueError, match="2 drafts, more than 1"):
        collect([PromptRounds(4, "d", 5, (), steps)], width=1)


def test_acceptance_by_hand() -> None:
    found = summarise(HAND)
    assert found.tau == pytest.approx((3 + 1 + 2 + 1) / 4)
    assert found.acceptance_cumulative == pytest.approx((2 / 3, 1 / 2))
    assert found.acceptance_conditional == pytest.approx((2 / 3, 1.0))
    assert found.rounds == 4
    assert all(map(math.isnan, found.ece_calibrated))
    with pytest.raises(ValueError, match="no decoding round"):
        summarise(HAND.select(np.zeros(4, dtype=bool)))


def test_without_a_confidence_head() -> None:
    found = summarise(rounds_of([[math.nan]] * 2, [1, 0]))
    assert found.tau == 1.5 and found.acceptance_cumulative == (0.5,)
    assert math.isnan(found.ece_raw[0]) and math.isnan(found.auc[0])


def test_macro_counts_every_dataset_the_same() -> None:
    one = summarise(rounds_of([[0.5]] * 6, [1] * 6))
    two = summarise(rounds_of([[0.5]] * 2, [0] * 2))
    found = macro([one, two])
    assert found.tau == 1.5 and found.rounds == 8
    assert found.acceptance_cumulative == (0.5,)
    assert math.isnan(found.auc[0])


def test_threshold_by_hand() -> None:
    # Survivals .9 .45 | .8 .16 | .7 | none: at ½ one draft is left of three rounds.
    lengths = verify_lengths(HAND, HAND.confidence, 0.5)
    assert lengths.tolist() == [1, 1, 1, 0]
    found = cut(HAND, lengths, 0.5)
    assert found.tau == pytest.approx((2 + 1 + 2 + 1) / 4)
    assert found.acceptance == pytest.approx(2 / 3) and found.verified == 0.75


def test_the_sweep_starts_with_everything_and_falls() -> None:
    rounds = make_rounds(2000, [1.0, 1.0, 1.0])
    line = sweep(rounds, rounds.confidence)
    assert line[0].verified == 3
    assert line[0].tau == pytest.approx(summarise(rounds).tau)
    assert all(a.verified >= b.verified for a, b in itertools.pairwise(line))
    assert line[12].acceptance > line[0].acceptance + 0.2


def test_algorithm_1_by_hand() -> None:
    # The paper's appendix A: SPS 1, ½, 0.45 at 1, 2, 3 tokens; drafting is free.
    cost = CostCurve(((1, 1000), (2, 2000), (3, 1000 / 0.45)), ((1, 1), (2, 1)))
    # Position 1 alone lowers the throughput: 1.8·½ < 1. It stops there, whatever
    # position 2 would bring (2.52·0.45 > 1).
    assert plan(np.array([[0.8, 0.72]]), cost, 0.0).tolist() == [0]
    flat = CostCurve(((1, 10), (99, 10)), ((1, 1), (2, 1)))
    assert plan(np.array([[0.8, 0.7], [0.1, 0.05]]), flat, 0.0).tolist() == [2, 2]
    steep = CostCurve(((1, 1), (101, 101)), ((1, 1), (2, 1)))
    # A token costs 1 and the step's start 8: worth it while a > τ / cost.
    assert plan(np.array([[0.9, 0.5], [0.1, 0.01]]), steep, 8.0).tolist() == [2, 0]


def test_the_oracle_is_fastest_and_calibration_helps() -> None:
    rounds = make_rounds(4000, [3.0] * 4, [-1.0] * 4)
    truth = fit(rounds).scaling.apply(rounds.confidence)
    speeds = simulate(
        rounds, truth, 8, CostCurve(((1, 10), (100, 110)), ((1, 1), (8, 1)))
    )
    assert max(speeds, key=lambda name: speeds[name]) == "oracle"
    assert speeds["calibrated"] >= speeds["raw"]
    assert set(speeds) == {"none", "raw", "calibrated", "oracle",
                           *(f"fixed {k}" for k in range(1, 5))}  # fmt: skip
    assert simulate(rounds, truth, 1, DEMO_COST)["none"] == pytest.approx(1000 / 23.02)


def test_cost_curves() -> None:
    assert parse_curve("1:23.0,8:24") == ((1, 23), (8, 24))
    for text in ("1:23,8", "x:1,2:3", ""):
        with pytest.raises(ValueError, match="tokens:milliseconds"):
            parse_curve(text)
    with pytest.raises(ValueError, match="positive and increasing"):
        CostCurve(((8, 1), (1, 2)), ((1, 1), (2, 2)))
    assert DEMO_COST.step_ms(np.array([1.0, 6.0, 300.0])) == pytest.approx(
        [23.02, 23.695, 79.81 + 44 * (79.81 - 23.80) / 248]
    )


def test_bias_by_group() -> None:
    rounds = make_rounds(3000, [1.0, 1.0], [0.8, 0.8])
    raw = survival(rounds.confidence)
    masks = groups(rounds)
    assert list(masks)[:3] == ["even", "odd", "tokens 0 to 15"]
    assert sum(int(m.sum()) for n, m in masks.items() if n.startswith("tokens")) == 3000
    # Confidences are too low by 0.8 logits: underconfident, so negative.
    assert all(value < -0.05 for value in bias(rounds, raw))
    assert conditionals(raw) == pytest.approx(rounds.confidence)


def test_drift_table() -> None:
    rounds = make_rounds(1500, [2.0, 2.0], prompts=40)
    table = drift(rounds, fit(rounds), allow_bias=True)
    assert list(table) == ["raw", "even", "odd", "all"]
    assert all(len(row) == 2 for row in table.values())
    assert table["even"][1] < table["raw"][1]
    few = rounds.select(rounds.prompt < 12)
    assert all(map(math.isnan, drift(few, fit(few), True)["even"]))
