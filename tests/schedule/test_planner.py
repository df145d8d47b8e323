"""Plans against all plans there are, and the inputs that are easy to get wrong."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest

from tests.schedule.curves import (
    best_speed,
    curve,
    is_consistent,
    random_step,
    speed,
    speeds_along,
)
from vllm_dspark.schedule.planner import (
    Budget,
    find_budget,
    fixed,
    nothing,
    plan,
    plan_within,
    threshold,
)
from vllm_dspark.schedule.step import Ints, Stop, VerifyPlan, VerifyStep

SAME = 1e-12  # a different order of the same sums


def within_own_budget(step: VerifyStep) -> VerifyPlan:
    return plan_within(step, find_budget(step))


EVERY_POLICY: dict[str, Callable[[VerifyStep], VerifyPlan]] = {
    "plan": plan,
    "plan_within": within_own_budget,
    "fixed": fixed,
    "threshold": lambda step: threshold(step, 0.5),
}


def rising(b: Ints) -> np.ndarray:
    """A plain convex cost."""
    return 1.0 + 0.1 * b + 0.01 * b**2


def test_optimal_where_throughput_has_one_peak() -> None:
    random = np.random.default_rng(0)
    checked = inside = bent = 0
    while checked < 1000:
        seconds = 0.5 + np.cumsum(random.exponential(0.2, size=16) ** 2)
        step = random_step(random, seconds)
        along = np.sign(np.diff(speeds_along(step)))
        if (np.diff(along) > 0).any():
            continue  # falls and rises again
        found = plan(step)
        assert found.throughput == pytest.approx(best_speed(step), rel=SAME)
        assert is_consistent(step, found)
        checked += 1
        total = int(found.verify_lens.sum())
        inside += 0 < total < int(step.num_drafts.sum())
        bent += bool((np.diff(seconds, 2) < 0).any())
    # One peak, but not because the costs are convex; and the peak is not at an end.
    assert inside > 150 and bent > 900


def test_gap_on_jagged_costs(record_property: Callable[[str, object], None]) -> None:
    random = np.random.default_rng(0)
    gaps = []
    for _ in range(500):
        tile = int(random.integers(2, 5))  # tokens that cost as much as one
        stairs = (np.arange(16) + random.integers(tile)) // tile
        seconds = 1.0 + stairs * random.uniform(0.1, 0.8) + 0.02 * np.arange(16)
        step = random_step(random, seconds)
        best = best_speed(step)
        gaps.append(1 - plan(step).throughput / best)
        # A global search needs no single peak.
        assert within_own_budget(step).throughput == pytest.approx(best, rel=SAME)
    figures = {
        "optimal": float(np.mean(np.array(gaps) < SAME)),
        "mean gap": float(np.mean(gaps)),
        "worst gap": float(np.max(gaps)),
    }
    for name, value in figures.items():
        record_property(name, value)
    print("early stop on jagged costs:", figures)
    assert min(gaps) > -SAME  # all plans were tried
    assert 0.001 < figures["mean gap"] < 0.04
    assert figures["worst gap"] < 0.5
    assert 0.6 < figures["optimal"] < 1


def test_by_hand() -> None:
    # Θ: 2/3, 2.9/3.5, 3.7/4, 4.2/6.
    step = VerifyStep(
        np.array([[0.9, 0.5], [0.8, 0.1]]), 2, curve([9, 3, 3.5, 4, 6, 9])
    )
    found = plan(step)
    assert found.verify_lens.tolist() == [1, 1] and found.reason is Stop.DROP
    assert found.tokens == pytest.approx(3.7) and found.seconds == pytest.approx(4)
    assert found.throughput == pytest.approx(3.7 / 4)
    assert found.accepted_length == pytest.approx(1.85)
    # What drafting cost makes tokens cheap by comparison: Θ 2/9, …, 4.2/12, 4.3/15.
    dear = VerifyStep(step.survival, 2, step.cost, extra_seconds=6.0)
    assert plan(dear).verify_lens.tolist() == [1, 1]
    dear = VerifyStep(step.survival, 2, step.cost, extra_seconds=60.0)
    assert plan(dear).verify_lens.tolist() == [2, 1]


def test_flat_cost_verifies_all_that_may_be_accepted() -> None:
    step = VerifyStep(np.array([[0.5, 0.2], [0.9, 0.0]]), 2, curve([1.0] * 9))
    assert plan(step).verify_lens.tolist() == [2, 1]
    assert within_own_budget(step).verify_lens.tolist() == [2, 1]
    assert plan(VerifyStep(step.survival[:1], 1, step.cost)).reason is Stop.ALL


def test_ties_keep_rows_in_order_and_prefixes() -> None:
    step = VerifyStep(np.full((3, 3), 0.5), 3, rising)
    for count in range(10):
        budget = Budget(np.zeros(3, int), count, Stop.BUDGET)
        lens = plan_within(step, budget).verify_lens.tolist()
        assert lens == [min(3, max(0, count - 3 * r)) for r in range(3)]
    # A row that ties within itself and with another, in float32.
    survival = np.array([[0.25, 0.25], [0.5, 0.25]], dtype=np.float32)
    two = Budget(np.zeros(2, int), 2, Stop.BUDGET)
    lens = plan_within(VerifyStep(survival, 2, rising), two).verify_lens
    assert lens.tolist() == [1, 1]


def test_many_ties() -> None:
    # Small arrays are sorted stably whatever is asked for; this one is not.
    random = np.random.default_rng(0)
    survival = np.cumprod(random.choice([1.0, 0.5], size=(40, 7)), axis=1)
    keys = sorted((-survival[r, k], r, k) for r in range(40) for k in range(7))
    for count in range(0, 281, 7):
        budget = Budget(np.zeros(40, int), count, Stop.BUDGET)
        found = plan_within(VerifyStep(survival, 40, rising), budget)
        rows = [r for _, r, _ in keys[:count]]
        assert found.verify_lens.tolist() == [rows.count(r) for r in range(40)]


@pytest.mark.parametrize("policy", EVERY_POLICY)
def test_ragged_rows(policy: str) -> None:
    survival = np.array([[0.9, 0.8, 0.7], [0.9, math.nan, 7.0], [0.9, 0.8, 0.7]])
    drafts = np.array([3, 1, 0])
    step = VerifyStep(survival, 5, lambda b: np.ones(len(b)), 0.0, drafts)
    found = EVERY_POLICY[policy](step)
    assert found.verify_lens.tolist() == [3, 1, 0]
    assert found.invalid == 0  # what lies beyond a row's drafts is nobody's fault
    assert found.tokens == pytest.approx(3 + 0.9 + 0.8 + 0.7 + 0.9)


@pytest.mark.parametrize("rows", [0, 1, 3])
@pytest.mark.parametrize("goal", [0.0, 0.01, 100.0])
def test_the_plan_of_nothing_is_that_of_a_step_without_drafts(
    rows: int, goal: float
) -> None:
    step = VerifyStep(np.zeros((rows, 0)), rows + 7, rising, 0.5, slo_tps=goal)
    found, same = nothing(step), plan(step)
    assert found.verify_lens.tolist() == same.verify_lens.tolist()
    assert (found.tokens, found.seconds) == (same.tokens, same.seconds)
    assert found.reason is same.reason


@pytest.mark.parametrize("policy", EVERY_POLICY)
@pytest.mark.parametrize("shape", [(0, 4), (0, 0), (3, 0)])
def test_nothing_to_verify(policy: str, shape: tuple[int, int]) -> None:
    # (0, 4) with base tokens is a step of prefill only.
    found = EVERY_POLICY[policy](VerifyStep(np.zeros(shape), shape[0] + 7, rising))
    assert found.verify_lens.tolist() == [0] * shape[0]
    assert found.tokens == shape[0]
    assert found.seconds == pytest.approx(rising(shape[0] + 7))
    assert math.isnan(found.accepted_length) == (shape[0] == 0)
    assert found.throughput == pytest.approx(shape[0] / rising(shape[0] + 7))


@pytest.mark.parametrize("seconds", [[1.0] * 9, [1.0 + 0.1 * b for b in range(9)]])
def test_survival_of_zero_is_never_worth_it(seconds: list[float]) -> None:
    step = VerifyStep(np.zeros((2, 3)), 2, curve(seconds))
    assert plan(step).verify_lens.tolist() == [0, 0]
    assert within_own_budget(step).verify_lens.tolist() == [0, 0]
    assert threshold(step, 0.01).verify_lens.tolist() == [0, 0]
    assert threshold(step, 0.0).verify_lens.tolist() == [3, 3]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -0.1, 1.1])
def test_what_is_no_probability_counts_as_zero(bad: float) -> None:
    survival = np.array([[0.9, bad, 0.8], [bad, 0.9, 0.9], [0.9, 0.8, 0.7]])
    step = VerifyStep(survival, 3, curve([1.0] * 13))
    found = plan(step)
    assert found.verify_lens.tolist() == [1, 0, 3] and found.invalid == 2
    assert found.tokens == pytest.approx(3 + 0.9 + 0.9 + 0.8 + 0.7)
    assert np.isnan(survival[0, 1]) == math.isnan(bad)  # the argument is left alone


def test_more_load_shortens_the_plan_where_costs_grow_ever_faster() -> None:
    # Ever faster in proportion, that is: log-convex costs, extra seconds included.
    random = np.random.default_rng(0)
    changes = 0
    for _ in range(200):
        survival = np.cumprod(random.random((4, 4)), axis=1)
        growth = np.cumsum(random.exponential(0.003, size=60))
        cost = curve(np.exp(np.cumsum(growth)))
        totals = [
            int(plan(VerifyStep(survival, base, cost)).verify_lens.sum())
            for base in range(4, 44, 3)
        ]
        assert totals == sorted(totals, reverse=True)
        changes += totals[0] > totals[-1] + 3
    assert changes > 150


def test_more_prefill_can_lengthen_the_plan_on_convex_costs() -> None:
    # Where each token costs the same, a draft is cheap beside a long prefill: Θ goes
    # from 1/2 to 1.4/3 for one anchor, from 1/101 to 1.4/102 with 99 prefill tokens.
    lens = [
        int(plan(VerifyStep(np.array([[0.4]]), base, lambda b: 1.0 + b)).verify_lens[0])
        for base in (1, 100)
    ]
    assert lens == [0, 1]


def test_more_requests_shorten_the_verify_length() -> None:
    random = np.random.default_rng(0)
    falls = 0
    for _ in range(50):
        few = np.cumprod(random.random((4, 5)), axis=1)
        means = []
        for copies in (1, 2, 4, 8, 16):
            survival = np.tile(few, (copies, 1))
            step = VerifyStep(survival, len(survival), lambda b: 10.0 + b)
            means.append(plan(step).verify_lens.mean())
        assert means == sorted(means, reverse=True)
        falls += means[0] > means[-1]
    assert falls > 40


def test_budget_of_earlier_rounds_goes_to_the_best_of_now() -> None:
    cost = curve([9, 3, 3.5, 4, 6, 9])
    earlier = VerifyStep(np.array([[0.9, 0.5], [0.8, 0.1]]), 2, cost)
    budget = find_budget(earlier)
    assert budget.drafts == 2 and budget.reason is Stop.BUDGET
    now = VerifyStep(np.array([[0.2, 0.1], [0.6, 0.5]]), 2, cost)
    found = plan_within(now, budget)
    assert found.verify_lens.tolist() == [0, 2] and found.reason is Stop.BUDGET
    assert found.throughput == pytest.approx(speed(now, [0, 2]))
    few = VerifyStep(now.survival, 2, cost, num_drafts=np.array([1, 0]))
    assert plan_within(few, budget).verify_lens.tolist() == [1, 0]
    assert plan_within(few, budget).reason is Stop.ALL


def test_fixed_and_threshold() -> None:
    step = VerifyStep(
        np.array([[0.9, 0.5, 0.4], [0.4, 0.3, 0.2]]), 2, rising, 0.5, np.array([3, 1])
    )
    assert fixed(step).verify_lens.tolist() == [3, 1]
    assert fixed(step, 2).verify_lens.tolist() == [2, 1]
    assert fixed(step, 0).verify_lens.tolist() == [0, 0]
    assert threshold(step, 0.5).verify_lens.tolist() == [2, 0]
    assert threshold(step, 0.4).verify_lens.tolist() == [3, 1]
    found = threshold(step, 0.5)
    assert found.throughput == pytest.approx(3.4 / (rising(4) + 0.5))
    assert found.reason is Stop.THRESHOLD and fixed(step).reason is Stop.FIXED


def test_errors_name_the_value() -> None:
    survival = np.zeros((2, 3))

    def step(**changed: object) -> VerifyStep:
        given = {"survival": survival, "base_tokens": 2, "cost": rising}
        return VerifyStep(**{**given, **changed})  # type: ignore[arg-type]

    for changed, match in (
        ({"survival": np.zeros(3)}, r"shape \(3,\): give \[R, K\]"),
        ({"base_tokens": 1}, "base_tokens 1 for 2 requests"),
        ({"extra_seconds": -1.0}, "extra_seconds -1.0"),
        ({"extra_seconds": math.nan}, "extra_seconds nan"),
        ({"num_drafts": np.array([1])}, r"num_drafts \[1\]: give 2 numbers in 0..3"),
        ({"num_drafts": np.array([4, 0])}, r"num_drafts \[4 0\]"),
        ({"num_drafts": np.array([0, -1])}, r"num_drafts \[ 0 -1\]"),
        ({"slo_tps": -1.0}, "slo_tps -1.0: give one number or 2"),
        ({"slo_tps": np.array([1.0, math.nan])}, r"slo_tps \[ 1. nan\]"),
        ({"slo_tps": np.ones(3)}, r"slo_tps \[1. 1. 1.\]"),
    ):
        with pytest.raises(ValueError, match=match):
            step(**changed)
    for seconds in (0.0, -1.0, math.nan, math.inf):
        bad = step(cost=lambda b, s=seconds: np.where(b == 4, s, 1.0))
        with pytest.raises(ValueError, match=f"step of 4 tokens takes {seconds} sec"):
            plan(bad)
    with pytest.raises(ValueError, match="a budget for 3 requests, a step of 2"):
        plan_within(step(), Budget(np.zeros(3, int), 1, Stop.BUDGET))
    with pytest.raises(ValueError, match="length -1"):
        fixed(step(), -1)
    for least in (-0.1, 1.1, math.nan):
        with pytest.raises(ValueError, match=f"threshold {least}"):
            threshold(step(), least)
