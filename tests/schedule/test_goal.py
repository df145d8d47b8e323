"""Goals for single requests, against all plans there are."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from tests.schedule.curves import (
    curve,
    every_plan,
    is_consistent,
    random_step,
    speed,
    tokens_and_seconds,
)
from vllm_dspark.schedule.planner import find_budget, plan, plan_within
from vllm_dspark.schedule.step import Stop, VerifyPlan, VerifyStep


def shares(step: VerifyStep, lens: tuple[int, ...]) -> np.ndarray:
    """``[R]`` how far each request has its goal, 0..1, by hand."""
    tokens, seconds = tokens_and_seconds(step, lens)
    goal = np.broadcast_to(np.asarray(step.slo_tps), tokens.shape)
    return np.minimum(tokens / seconds / np.where(goal > 0, goal, 1e-9), 1.0)


def with_goals(step: VerifyStep, slo_tps: float | np.ndarray) -> VerifyStep:
    return VerifyStep(
        step.survival,
        step.base_tokens,
        step.cost,
        step.extra_seconds,
        step.num_drafts,
        slo_tps,
    )


def both(step: VerifyStep) -> list[VerifyPlan]:
    return [plan(step), plan_within(step, find_budget(step))]


def test_a_goal_caps_the_step() -> None:
    # Row 1 has no chance of a second token; Θ alone would verify three drafts and take
    # 3.3 s, which leaves it 0.303 tokens/s.
    survival = np.array([[0.9, 0.8, 0.7], [0.0, 0.0, 0.0]])
    cost = curve([1, 2.4, 2.7, 3, 3.3, 9, 9, 9])
    assert plan(VerifyStep(survival, 2, cost)).verify_lens.tolist() == [3, 0]
    step = VerifyStep(survival, 2, cost, slo_tps=np.array([0.0, 0.35]))
    for found in both(step):
        assert found.verify_lens.tolist() == [1, 0] and found.reason is Stop.GOAL
    for found in both(with_goals(step, np.array([0.0, 0.3]))):
        assert found.verify_lens.tolist() == [3, 0]


def test_a_goal_comes_before_throughput() -> None:
    # Θ alone verifies nothing; the second request needs 1.4 tokens in 2.6 s.
    survival = np.array([[0.5, 0.4], [0.45, 0.1]])
    cost = curve([1, 2, 2.6, 3.6, 5, 7])
    assert plan(VerifyStep(survival, 2, cost)).verify_lens.tolist() == [0, 0]
    for found in both(VerifyStep(survival, 2, cost, slo_tps=np.array([0, 0.53]))):
        assert found.verify_lens.tolist() == [0, 1]
        assert found.reason in (Stop.DROP, Stop.BUDGET)
    # One of its goals cannot be had, and says so.
    for found in both(VerifyStep(survival, 2, cost, slo_tps=np.array([0, 5.0]))):
        assert found.verify_lens.tolist() == [0, 1]
        assert found.reason is Stop.GOAL_MISSED


def test_an_unreachable_goal_for_all_is_throughput() -> None:
    random = np.random.default_rng(0)
    chosen = set()
    for _ in range(200):
        step = random_step(random, 1.0 + 0.2 * np.arange(16) ** 1.2)
        found = plan(with_goals(step, 1e6))
        assert found.verify_lens.tolist() == plan(step).verify_lens.tolist()
        assert found.reason is Stop.GOAL_MISSED
        chosen.add(tuple(found.verify_lens.tolist()))
    assert len(chosen) > 20


def test_goals_that_all_have_anyway_change_nothing() -> None:
    random = np.random.default_rng(0)
    for _ in range(200):
        step = random_step(random, 1.0 + 0.2 * np.arange(16) ** 1.2)
        for found, free in zip(both(with_goals(step, 1e-6)), both(step), strict=True):
            assert found.verify_lens.tolist() == free.verify_lens.tolist()
            assert found.reason is free.reason


def test_against_all_plans(record_property: Callable[[str, object], None]) -> None:
    random = np.random.default_rng(0)
    reachable = missed = 0
    slower, further = [], []
    for _ in range(600):
        plain = random_step(random, 1.0 + 0.2 * np.arange(16) ** 1.2)
        fair = 1 / plain.cost(np.array([plain.base_tokens + 1]))[0]
        goals = fair * random.choice([0.0, 0.7, 0.9, 1.1, 1.4], plain.num_reqs)
        step = with_goals(plain, goals)
        tried = every_plan(step)
        held = [lens for lens in tried if shares(step, lens).min() >= 1]
        for found in both(step):
            mine = shares(step, tuple(found.verify_lens.tolist()))
            assert is_consistent(step, found)
            assert (found.reason is Stop.GOAL_MISSED) == (mine.min() < 1)
            nearest = max(shares(step, lens).sum() for lens in tried)
            further.append(1 - mine.sum() / nearest)
            if held:
                reachable += 1
                missed += found.reason is Stop.GOAL_MISSED
            if held and mine.min() >= 1:
                best = max(speed(step, lens) for lens in held)
                slower.append(1 - found.throughput / best)
    figures = {
        "reachable": reachable,
        "missed though reachable": missed,
        "mean distance from the nearest": float(np.mean(further)),
        "mean loss of throughput": float(np.mean(slower)),
        "worst loss of throughput": float(np.max(slower)),
    }
    for name, value in figures.items():
        record_property(name, value)
    print("goals:", figures)
    assert min(slower) > -1e-12 and min(further) > -1e-12  # all plans were tried
    assert missed <= 0.03 * reachable
    assert figures["mean distance from the nearest"] < 0.01
    assert figures["mean loss of throughput"] < 0.01
    assert figures["worst loss of throughput"] < 0.3


def test_many_goals_go_portion_by_portion() -> None:
    # More drafts than one portion, and a step that grows while they are served.
    random = np.random.default_rng(0)
    survival = np.cumprod(random.uniform(0.85, 1.0, (64, 7)), axis=1)
    step = VerifyStep(survival, 64, lambda b: 1.0 + b / 400, slo_tps=2.0)
    for found in both(step):
        assert found.reason is not Stop.GOAL_MISSED
        assert shares(step, tuple(found.verify_lens.tolist())).min() == 1
        assert found.verify_lens.sum() > 2 * 64
    found, free = plan(with_goals(step, 1e3)), plan(with_goals(step, 0.0))
    assert found.verify_lens.tolist() == free.verify_lens.tolist()
