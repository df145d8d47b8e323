"""What a step is said to cost: the worker's time, what lies around it, prompts."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from tests.schedule.simulated import DEMO
from vllm_dspark.schedule.facts import Batch, StepTimes
from vllm_dspark.schedule.pricing import Pricing

BATCH = Batch(("a", "b"), (0.0, 0.0), np.zeros(2, np.int64), None, 0, 100, np.zeros(2))
POSITIONS = np.array([0, 1, 7])


def true(b: int) -> float:
    return float(DEMO.step_seconds(b, 100))


def outside(prices: Pricing, seconds: float, after_drafts: bool, steps: int) -> None:
    """So many steps that took so long outside of the worker, as the table has it else.

    At one size, so that the table stays."""
    for _ in range(steps):
        prices.learn(
            StepTimes(2, 100, true(2), overhead=seconds, after_drafts=after_drafts)
        )


def test_the_seconds_of_a_step_are_those_of_its_parts() -> None:
    prices = Pricing(DEMO)
    drafting = float(DEMO.draft_seconds(2, 3))
    assert prices.predicted_seconds(9, 100, 2, 3) == true(9) + drafting
    assert prices.predicted_seconds(9, 100, 0, 3) == true(9)


def test_drafts_pay_for_what_they_add_outside_of_the_worker() -> None:
    prices = Pricing(DEMO)
    step, drafting = prices.costs(BATCH)
    bare, made = step(np.array([2]))[0], drafting(2, POSITIONS)
    assert bare == true(2)
    np.testing.assert_array_equal(made, DEMO.draft_seconds(2, POSITIONS))
    outside(prices, 0.003, False, 20)
    outside(prices, 0.010, True, 7)  # too few to say how much drafts add
    assert prices.overhead == 0.003 and prices.draft_overhead == 0.0
    outside(prices, 0.010, True, 7)
    assert prices.draft_overhead == pytest.approx(0.007)
    step, drafting = prices.costs(BATCH)
    assert step(np.array([2]))[0] == pytest.approx(bare + 0.003)
    np.testing.assert_allclose(drafting(2, POSITIONS) - made, [0.0, 0.007, 0.007])
    # Drafts do not get cheaper by a step without them that took longer.
    outside(prices, 0.020, False, 64)
    assert prices.overhead == 0.020 and prices.draft_overhead == 0.0


def test_pauses_are_no_overhead() -> None:
    prices = Pricing(DEMO)
    for i in range(50):
        outside(prices, 9.0 if i % 6 == 0 else 0.001, i % 2 == 0, 1)
    assert prices.overhead == 0.001 and prices.draft_overhead == 0.0
    prices.learn(StepTimes(2, 100, true(2)))  # the engine idled
    prices.learn(StepTimes(2, 100, true(2), overhead=-1.0))  # a clock that jumped
    assert prices.overhead == 0.001


def test_drafts_pay_for_the_prompts_rows_of_context() -> None:
    """30 prompt tokens make the upkeep that of 32 rows, if anything is drafted."""
    prices = Pricing(DEMO)
    with_prompts = replace(BATCH, prefill_tokens=30)
    rows = float(DEMO.draft_seconds(32, 0) - DEMO.draft_seconds(2, 0))
    assert rows > 0
    made = prices.costs(with_prompts)[1](2, POSITIONS)
    alone = prices.costs(BATCH)[1](2, POSITIONS)
    np.testing.assert_allclose(made - alone, [0.0, rows, rows])


def test_prompts_are_due_whatever_is_verified_but_a_goal_has_to_wait_for_them() -> None:
    prices = Pricing(DEMO)
    with_prompts = replace(BATCH, prefill_tokens=62)
    step, _ = prices.costs(with_prompts)
    assert step(np.array([64]))[0] == pytest.approx(true(2))
    more = step(np.array([64, 80]))
    assert more[1] - more[0] == pytest.approx(true(80) - true(64))
    hurried = replace(with_prompts, slo_tps=np.array([5.0, 0.0]))
    assert prices.costs(hurried)[0](np.array([64]))[0] == pytest.approx(true(64))
