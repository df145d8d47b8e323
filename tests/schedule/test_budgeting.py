"""The controller's asynchronous form: budgets by earlier rounds, late outcomes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from vllm_dspark.config import DSparkOptions
from vllm_dspark.schedule import planner
from vllm_dspark.schedule.budgeting import BudgetController
from vllm_dspark.schedule.cost import CostTable
from vllm_dspark.schedule.drafting import DraftingChoice, Reason
from vllm_dspark.schedule.facts import Batch
from vllm_dspark.schedule.step import Stop, VerifyStep

WIDTH = 3
# A step up at 5 tokens: behind it drafts are cheap again.
JAGGED = CostTable(
    (1, 4, 5, 64), (1.0, 1.1, 1.6, 2.2), 0.0, (1, 8), (0, 3), ((0.1, 0.3), (0.1, 0.3))
)


def batch(confidence: Any, num_drafts: Any = None, slo: float = 0.0) -> Batch:
    values = np.asarray(confidence, dtype=np.float64)
    n = len(values)
    drafts = np.full(n, WIDTH) if num_drafts is None else np.asarray(num_drafts)
    ids = tuple(f"r{i}" for i in range(n))
    return Batch(ids, (0.0,) * n, drafts, values, 0, 0, np.full(n, slo))


def priced(**policy: Any) -> BudgetController:
    controller = BudgetController(WIDTH, DSparkOptions(**policy))
    controller.price(JAGGED)
    return controller


def test_a_budget_is_that_of_the_search_behind_every_jag() -> None:
    controller = priced()
    earlier = batch([[0.9, 0.8, 0.7], [0.9, 0.6, 0.5]])
    found = controller.budget(earlier, 3)
    made = controller.survival.apply(earlier.ids, (0.0, 0.0), earlier.confidence)
    step = VerifyStep(made.survival, 2, JAGGED.step_seconds, 0.3)
    expected = planner.find_budget(step)
    assert found.drafts == expected.drafts > 2
    # Algorithm 1 would have stopped before the step up.
    assert planner.plan(step).verify_lens.sum() < found.drafts
    assert controller.totals.stops[Stop.BUDGET] == 1


def test_drafting_is_paid_for() -> None:
    """What is verified must pay for the drafting that goes with the round."""
    dear = CostTable(
        (1, 64), (1.0, 40.0), 0.0, (1, 8), (0, 3), ((0.1, 50.0), (0.1, 50.0))
    )
    controller = BudgetController(WIDTH)
    controller.price(dear)
    some = batch([[0.9, 0.5, 0.4]])
    assert controller.budget(some, 0).drafts < controller.budget(some, 3).drafts == 3


@pytest.mark.parametrize(
    ("policy", "expected", "reason"),
    [
        ({"policy": "fixed"}, 6, Stop.FIXED),
        ({"policy": "threshold", "threshold": 0.6}, 3, Stop.THRESHOLD),
    ],
)
def test_other_policies(policy: dict[str, Any], expected: int, reason: Stop) -> None:
    found = priced(**policy).budget(batch([[0.9, 0.8, 0.7], [0.9, 0.5, 0.5]]), 3)
    assert (found.drafts, found.reason) == (expected, reason)


def test_everything_before_costs_are_known() -> None:
    found = BudgetController(WIDTH).budget(batch([[0.1, 0.1, 0.1]], [2]), 3)
    assert found.drafts == 2


def test_a_probe_verifies_one_of_each() -> None:
    dear = CostTable(
        (1, 64), (1.0, 900.0), 0.0, (1, 8), (0, 3), ((0.1, 0.2), (0.1, 0.2))
    )
    controller = BudgetController(WIDTH)
    controller.price(dear)
    some = batch([[0.1, 0.1, 0.1]] * 2, [3, 0])
    assert controller.budget(some, 1).drafts == 0
    controller._choice = DraftingChoice(1, Reason.PROBE)
    found = controller.budget(some, 1)
    assert found.reserved.tolist() == [1, 0] and found.drafts == 0


def test_goals_are_set_aside() -> None:
    controller = priced()
    found = controller.budget(batch([[0.9, 0.8, 0.7]] * 2, slo=1.2), 3)
    assert found.reserved.sum() > 0


def test_more_is_verified_now_and_then() -> None:
    dear = CostTable(
        (1, 64), (1.0, 40.0), 0.0, (1, 8), (0, 3), ((0.1, 0.2), (0.1, 0.2))
    )
    controller = BudgetController(WIDTH)
    controller.price(dear)
    found = [controller.budget(batch([[0.5, 0.4, 0.3]]), 0) for _ in range(50)]
    explored = [f.drafts for f in found if f.reason is Stop.EXPLORE]
    usual = {f.drafts for f in found if f.reason is Stop.BUDGET}
    assert len(explored) == 2 and min(explored) > max(usual)


def test_outcomes_are_learned_from_the_drafts_own_confidences() -> None:
    controller = priced()
    earlier, ids = batch([[0.9, 0.9, 0.9]]), ("r0",)
    controller.budget(earlier, 3)
    assert controller.totals.trimmed == controller.totals.verified == 0
    own = np.array([[0.5, 0.5, 0.5]])
    verified = np.array([2])
    made = controller.outcome(ids, (0.0,), own, np.array([3]), verified)
    np.testing.assert_allclose(made.survival, [[0.5, 0.25, 0.125]])
    controller.observe(made, verified, np.array([1]), np.array([1]))
    totals = controller.totals
    assert (totals.trimmed, totals.verified, totals.accepted) == (1, 2, 1)
    assert totals.verify_lens == {2: 1} and totals.expected == pytest.approx(0.75)
