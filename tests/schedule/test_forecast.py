"""When a forecast is made anew; steps without drafts are planned in no time."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

from tests.schedule.simulated import DEMO, WIDTH
from vllm_dspark.calibration.online import OnlineSurvival
from vllm_dspark.schedule import planner
from vllm_dspark.schedule.controller import Controller
from vllm_dspark.schedule.drafting import Reason
from vllm_dspark.schedule.facts import Batch
from vllm_dspark.schedule.forecast import Forecaster
from vllm_dspark.schedule.pricing import Pricing
from vllm_dspark.schedule.step import Stop


def batch(num_reqs: int = 2, drafts: int = 0, goal: float = 0.0) -> Batch:
    return Batch(
        tuple(map(str, range(num_reqs))),
        (0.0,) * num_reqs,
        np.full(num_reqs, drafts),
        np.full((num_reqs, drafts), 0.8) if drafts else None,
        0,
        100 * num_reqs,
        np.full(num_reqs, goal),
    )


class Forecasts:
    """Counts how often costs were asked for: once for each forecast that is made."""

    def __init__(self) -> None:
        self._forecaster = Forecaster(OnlineSurvival(WIDTH))
        self._prices = Pricing(DEMO)
        self.table, self.made = DEMO, 0

    def _costs(self, of: Batch):
        self.made += 1
        return self._prices.costs(of)

    def ahead(self, of: Batch, news: bool = False) -> int:
        """How many forecasts are made ahead."""
        before = self.made
        self._forecaster.ahead(of, news, self.table, self._costs)
        return self.made - before

    def steps(self, n: int, of: Batch, news: bool = False, urgent: bool = False) -> int:
        """How many forecasts so many steps take."""
        before = self.made
        for _ in range(n):
            self._forecaster.of(of, news, urgent, self.table, self._costs)
        return self.made - before


def test_a_forecast_is_kept_for_a_few_steps() -> None:
    forecasts = Forecasts()
    assert forecasts.steps(8, batch()) == 1
    assert forecasts.steps(16, batch()) == 2
    assert forecasts.steps(8, batch(), news=True) == 2


def test_a_forecast_made_ahead_is_that_of_the_next_step() -> None:
    forecasts = Forecasts()
    assert forecasts.ahead(batch()) == 1
    for _ in range(6):
        assert forecasts.steps(1, batch()) == 0
        assert forecasts.ahead(batch()) == 0
    assert forecasts.steps(1, batch()) == 0
    # As often as without, but all of them ahead of the step that would make them.
    assert forecasts.ahead(batch()) == 1
    assert forecasts.steps(1, batch()) == 0
    assert forecasts.ahead(batch(3)) == 1
    assert forecasts.steps(1, batch(3)) == 0
    assert forecasts.steps(1, batch(4)) == 1


def test_news_that_are_waited_for_are_taken_in_at_once() -> None:
    forecasts = Forecasts()
    forecasts.steps(1, batch())
    assert forecasts.steps(3, batch(), urgent=True) == 0
    assert forecasts.steps(3, batch(), news=True, urgent=True) == 3
    # Also those of the step before, which were not waited for then.
    assert forecasts.steps(1, batch(), news=True) == 0
    assert forecasts.steps(1, batch(), urgent=True) == 1


def test_another_batch_or_table_is_news() -> None:
    forecasts = Forecasts()
    forecasts.steps(1, batch())
    assert forecasts.steps(1, batch(3)) == 1
    assert forecasts.steps(1, replace(batch(3), prefill_tokens=5)) == 1
    assert forecasts.steps(1, replace(batch(3), prefill_tokens=5)) == 0
    forecasts.table = replace(DEMO)
    assert forecasts.steps(1, replace(batch(3), prefill_tokens=5)) == 1


def test_in_a_large_batch_requests_come_and_go() -> None:
    forecasts = Forecasts()
    forecasts.steps(1, batch(32))
    other = replace(batch(32), ids=tuple(map(str, range(1, 33))))
    assert forecasts.steps(1, other) == forecasts.steps(1, batch(36)) == 0
    assert forecasts.steps(1, batch(37)) == 1
    assert forecasts.steps(1, batch(36, goal=5.0)) == 1  # whose goal is whose?
    assert forecasts.steps(1, batch(15)) == forecasts.steps(1, batch(14)) == 1


def test_a_probe_is_judged_by_its_own_outcomes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forecasts are made in each step that follows one of a probe's."""
    controller = Controller(WIDTH)
    controller.price(DEMO)
    seen: list[tuple[bool, bool]] = []
    of = controller._forecaster.of

    def watched(one: Batch, news: bool, urgent: bool, *rest):
        seen.append((news, urgent))
        return of(one, news, urgent, *rest)

    monkeypatch.setattr(controller._forecaster, "of", watched)
    for reason in (Reason.PROBE, Reason.PAYS, Reason.COST, Reason.NO_HISTORY):
        controller._choice = replace(controller._choice, reason=reason)
        controller.draft(batch())
    assert [urgent for _, urgent in seen] == [True, False, False, True]


@pytest.mark.parametrize("priced", [True, False])
def test_without_drafts_nothing_is_priced(
    priced: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    controller = Controller(WIDTH)
    controller.price(DEMO)
    asked: list[Batch] = []
    costs = controller.prices.costs  # type: ignore[union-attr]
    monkeypatch.setattr(
        controller.prices, "costs", lambda of: (asked.append(of), costs(of))[1]
    )
    rests: list[int] = []
    monkeypatch.setattr(controller.survival, "rest", lambda: rests.append(1))
    # A goal may be missed: that takes a price.
    plan, made = controller.verify(batch(goal=1e6 if priced else 0.0), 0)
    assert made is None and plan.verify_lens.tolist() == [0, 0] and rests == [1]
    assert len(asked) == priced and math.isnan(plan.seconds) != priced
    assert plan.reason is (Stop.GOAL_MISSED if priced else Stop.ALL)
    counted = controller.totals
    assert (counted.trimmed, counted.steps, counted.bypassed_steps) == (0, 1, 1)
    assert dict(counted.verify_lens) == {0: 2}


def test_unpriced_is_the_plan_without_drafts() -> None:
    """Of everything but the seconds."""
    step = planner.VerifyStep(np.zeros((3, 0)), 3, lambda tokens: 0.1 * tokens)
    priced, unpriced = planner.nothing(step), planner.unpriced(3)
    assert unpriced.verify_lens.tolist() == priced.verify_lens.tolist()
    assert (unpriced.tokens, unpriced.reason) == (priced.tokens, priced.reason)
    assert unpriced.invalid == priced.invalid == 0
