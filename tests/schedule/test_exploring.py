"""Exploring: a made-up corner of the cost curve does not keep verification for ever."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from tests.schedule.simulated import DEMO, Engine
from vllm_dspark.schedule import controller as controllers
from vllm_dspark.schedule.controller import Controller
from vllm_dspark.schedule.cost import CostTable
from vllm_dspark.schedule.exploring import Exploring
from vllm_dspark.schedule.planner import plan
from vllm_dspark.schedule.step import Stop, VerifyStep

# At B = 16 and 32 a pause had met the measurement.
CORNER = replace(
    DEMO, tokens=(1, 2, 4, 8, 12, 16, 32, 64, 128),
    step=(0.026, 0.027, 0.027, 0.034, 0.04, 0.09, 0.1, 0.139, 0.272),
)  # fmt: skip


def served(table: CostTable) -> tuple[Controller, float]:
    """A controller that was handed a table, after some time, and its tokens/s."""
    controller = Controller(7)
    controller.price(table)
    engine = Engine(controller, accept=0.9)
    engine.run(8, 300)
    return controller, engine.run(8, 300)


def seconds_at_24(controller: Controller) -> float:
    assert controller.live is not None
    return float(controller.live.snapshot().step_seconds(24))


def test_a_corner_is_passed() -> None:
    _, right = served(DEMO)
    controller, speed = served(CORNER)
    assert speed > 0.97 * right
    assert seconds_at_24(controller) < 1.1 * float(DEMO.step_seconds(24))
    assert controller.totals.stops[Stop.EXPLORE.value] > 0


def test_without_exploring_it_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    class Never(Exploring):
        def budget(self, step: VerifyStep) -> None:
            return None

    monkeypatch.setattr(controllers, "Exploring", Never)
    _, right = served(DEMO)
    controller, speed = served(CORNER)
    assert speed < 0.95 * right
    assert seconds_at_24(controller) > 1.3 * float(DEMO.step_seconds(24))


def test_how_often_and_how_much() -> None:
    """One of 32 trimmed steps, in turn half-way and everything; none with a goal."""
    survival = np.tile(0.5 ** np.arange(1, 8), (8, 1))
    counts = np.full(8, 7)
    step = VerifyStep(survival, 8, lambda b: 1.0 + b / 8, num_drafts=counts)
    exploring, made = Exploring(), []
    for i in range(100):
        budget = exploring.budget(step)
        if budget is None:
            planned = plan(step)
            exploring.saw(step, int(planned.verify_lens.sum()))
        else:
            made.append((i, budget.drafts))
    # B is 8 for the plan and 64 for everything: half-way is 23, 15 drafts.
    assert planned.verify_lens.sum() == 0
    assert made == [(8, 15), (41, 56), (74, 15)]
    with_goal = replace(step, slo_tps=1.0)
    for _ in range(100):
        exploring.saw(with_goal, int(plan(with_goal).verify_lens.sum()))
        assert exploring.budget(with_goal) is None
    bare = replace(step, num_drafts=np.zeros(8, np.int64))
    assert exploring.budget(bare) is None
