"""No policy changes what comes out; planners that look ahead do, and are caught.

Distributions are sums over all drafts, not samples: 1e-12 is rounding.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from tests.schedule.curves import curve
from tests.schedule.exact import (
    Policy,
    Request,
    bias,
    distribution,
    naive_global,
    over_plateaus,
    random_request,
    ties_by_later,
)
from vllm_dspark.schedule import goal, planner
from vllm_dspark.schedule.planner import (
    VerifyStep,
    find_budget,
    fixed,
    plan,
    plan_within,
    threshold,
)

ROUNDING = 1e-12
A, B = 0, 1
# Appendix A: p_t = (0.7, 0.3), p_d = (0.5, 0.5), SPS(1, 2, 3) = 1, 0.5, 0.45. What the
# second position holds is not told there and does not matter to the first token.
APPENDIX_A = Request(
    target={(): 0.7} | dict.fromkeys([(A,), (B,), (A, A), (A, B), (B, A), (B, B)], 0.5),
    draft={(): 0.5, (A,): 0.5, (B,): 0.5},
    confidence={(): 0.8, (A,): 0.9, (B,): 0.0},
)
APPENDIX_A_COST = curve([1 / 1.0, 1 / 0.5, 1 / 0.45])


def first_token(policy: Policy) -> float:
    """P(the first token is A) in the counterexample."""
    return float(distribution([APPENDIX_A], policy)[:4].sum())


def by_plan(cost=APPENDIX_A_COST, **more) -> Policy:
    return lambda s: plan(VerifyStep(s, len(s), cost, **more)).verify_lens


def test_appendix_a() -> None:
    assert first_token(by_plan()) == pytest.approx(0.7, abs=ROUNDING)
    assert bias([APPENDIX_A], by_plan()) < ROUNDING


def test_appendix_a_without_the_early_stop(monkeypatch: pytest.MonkeyPatch) -> None:
    # The paper's figure, from the naive planner and from ours with its stop removed.
    naive = naive_global(APPENDIX_A_COST, 1)
    assert naive(APPENDIX_A.survival((A, A))[None]).tolist() == [2]
    assert naive(APPENDIX_A.survival((B, A))[None]).tolist() == [0]
    assert first_token(naive) == pytest.approx(0.85, abs=ROUNDING)
    monkeypatch.setattr(planner, "first_drop", lambda speed: int(np.argmax(speed)))
    assert first_token(by_plan()) == pytest.approx(0.85, abs=ROUNDING)
    with pytest.raises(AssertionError):
        test_appendix_a()


def test_a_plateau_stops() -> None:
    # Θ = 1, then 1.5/1.5, then 2/1.6 or, if c_2 is 0, less than 1.
    request = Request(
        APPENDIX_A.target, APPENDIX_A.draft, {(): 0.5, (A,): 1.0, (B,): 0.0}
    )
    cost = curve([1.0, 1.5, 1.6])
    assert bias([request], over_plateaus(cost, 1)) > 0.1
    assert bias([request], by_plan(cost)) < ROUNDING


def test_equals_keep_their_order() -> None:
    requests = [
        Request(APPENDIX_A.target, APPENDIX_A.draft, {(): 0.5, (A,): 0.9, (B,): 0.5})
        for _ in range(2)
    ]

    def within(survival: np.ndarray) -> np.ndarray:
        return plan_within(
            VerifyStep(survival, 2, curve([1.0] * 7)), budget
        ).verify_lens

    budget = planner.Budget(np.zeros(2, int), 1, planner.Stop.BUDGET)
    assert bias(requests, ties_by_later(1)) > 0.05
    assert bias(requests, within) < ROUNDING


def random_costs(random: np.random.Generator, most: int) -> np.ndarray:
    """Seconds of 1..most tokens: stairs, or anything with flat pieces and falls."""
    if random.random() < 0.5:
        tile = int(random.integers(2, 4))
        stairs = (np.arange(most) + random.integers(tile)) // tile
        return 1.0 + stairs * random.uniform(0.3, 0.8)
    rises = random.choice([0.0, 0.05, 0.3, 1.0, -0.2], size=most)
    return np.maximum(1.0 + np.cumsum(rises), 0.3)


Make = Callable[[np.ndarray, np.random.Generator], Policy]


def adaptive_with_goals(seconds: np.ndarray, random: np.random.Generator) -> Policy:
    return by_plan(curve(seconds), slo_tps=random.choice([0.0, 0.5, 1.0, 1.5], 2))


def asynchronous(seconds: np.ndarray, random: np.random.Generator) -> Policy:
    cost, slo = curve(seconds), random.choice([0.0, 0.5, 1.0], 2)
    earlier = np.cumprod(random.random((2, 2)), axis=1)
    budget = find_budget(VerifyStep(earlier, 2, cost, slo_tps=slo))
    return lambda s: plan_within(VerifyStep(s, 2, cost), budget).verify_lens


MAKE: dict[str, Make] = {
    "adaptive": lambda seconds, random: by_plan(curve(seconds)),
    "adaptive with goals": adaptive_with_goals,
    "asynchronous": asynchronous,
    "threshold": lambda seconds, random: (
        lambda s: threshold(VerifyStep(s, 2, curve(seconds)), 0.4).verify_lens
    ),
    "fixed": lambda seconds, random: (
        lambda s: fixed(VerifyStep(s, 2, curve(seconds)), 1).verify_lens
    ),
}


def biases(make: Make) -> tuple[list[float], set[tuple[int, ...]]]:
    """A policy's bias in many cases, and the verify lengths it chose."""
    random = np.random.default_rng(0)
    found, seen = [], set()
    for _ in range(300):
        requests = [random_request(random, 2) for _ in range(2)]
        policy = make(random_costs(random, 8), random)

        def watched(survival: np.ndarray, policy: Policy = policy) -> np.ndarray:
            lens = policy(survival)
            seen.add(tuple(lens.tolist()))
            return lens

        found.append(bias(requests, watched))
    return found, seen


@pytest.mark.parametrize("name", MAKE)
def test_two_requests_on_jagged_costs(name: str) -> None:
    found, seen = biases(MAKE[name])
    assert max(found) < ROUNDING
    assert len(seen) >= (1 if name == "fixed" else 5)  # it did choose


def test_the_cases_can_tell(monkeypatch: pytest.MonkeyPatch) -> None:
    naive, _ = biases(lambda seconds, random: naive_global(curve(seconds), 2))
    assert sum(b > 1e-3 for b in naive) >= 15  # of 300; it was 21
    assert max(naive) > 0.05
    # The reservation for goals needs its stop as well, apart from the search after it.
    monkeypatch.setattr(goal, "first_drop", lambda speed: int(np.argmax(speed)))
    without, _ = biases(MAKE["adaptive with goals"])
    assert max(without) > 0.01
