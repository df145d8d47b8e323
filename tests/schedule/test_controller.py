"""The controller against a simulated engine: what it settles on, and how soon."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from tests.schedule.simulated import DEMO, WIDTH, Engine, without
from vllm_dspark.config import DSparkOptions
from vllm_dspark.schedule.controller import Controller
from vllm_dspark.schedule.cost import CostTable
from vllm_dspark.schedule.drafting import Reason
from vllm_dspark.schedule.facts import Batch, StepTimes


def engine(policy: DSparkOptions | None = None, **settings: object) -> Engine:
    controller = Controller(WIDTH, policy)
    controller.price(DEMO)
    return Engine(controller, **settings)  # type: ignore[arg-type]


def batch(confidence: np.ndarray | None, rows: int) -> Batch:
    width = 3 if confidence is None else confidence.shape[1]
    return Batch(
        tuple(map(str, range(rows))),
        (0.0,) * rows,
        np.full(rows, width),
        confidence,
        0,
        0,
        np.zeros(rows),
    )


def test_without_costs_everything_is_drafted_and_verified() -> None:
    controller = Controller(WIDTH)
    step = batch(np.full((4, 3), 0.01), 4)
    assert controller.draft(step).positions == WIDTH
    plan, _ = controller.verify(step, WIDTH)
    assert plan.verify_lens.tolist() == [3] * 4
    assert not controller.adapts


def test_fixed_and_threshold_do_as_they_are_told() -> None:
    survival = np.array([[0.9, 0.9, 0.9], [0.6, 0.4, 0.9]])
    for policy, lens in (
        (DSparkOptions(policy="fixed"), [3, 3]),
        (DSparkOptions(policy="threshold", threshold=0.75), [2, 0]),
        (DSparkOptions(policy="threshold", threshold=0.5), [3, 1]),
    ):
        controller = Controller(WIDTH, policy)
        controller.price(DEMO)
        step = batch(survival, 2)
        assert controller.draft(step).positions == WIDTH
        plan, _ = controller.verify(step, WIDTH)
        assert plan.verify_lens.tolist() == lens


def test_long_drafts_for_one_and_none_where_they_do_not_pay() -> None:
    one, many, poor = engine(), engine(), engine(accept=0.2)
    one.run(1, 200)
    assert np.mean(one.lengths[-50:]) >= 3
    many.run(64, 200)
    assert np.mean(many.verified[-50:]) < 0.6 * np.mean(one.verified[-50:])
    poor.run(64, 300)
    assert np.mean(np.array(poor.lengths[-100:]) == 0) > 0.9
    assert poor.controller.totals.bypassed_steps > 100


def test_a_probe_of_a_bypass_drafts_for_some_requests_only() -> None:
    """As many as it takes; the same ones in its next step, to learn what became."""
    poor = engine(accept=0.2)
    poor.run(64, 300)
    controller, step = poor.controller, batch(None, 64)
    most = controller.drafting.options.probe_rounds
    plans = [controller.draft(step) for _ in range(1100)]
    probes = [plan for plan in plans if plan.positions]
    assert probes and all(plan.reason is Reason.PROBE for plan in probes)
    drafted = {frozenset(step.ids) - plan.skip for plan in probes}
    assert [len(ids) for ids in drafted] == [most]
    # Old and new requests alike, and whoever is there where there are few.
    assert {"0", "63"} < next(iter(drafted))
    few = batch(None, most - 1)
    plans = [controller.draft(few) for _ in range(1100)]
    assert any(plan.positions for plan in plans) and not any(p.skip for p in plans)


@pytest.mark.parametrize("with_confidence", [True, False])
@pytest.mark.parametrize("accept", [0.2, 0.5, 0.8])
@pytest.mark.parametrize("load", [1, 4, 16, 64])
def test_not_slower_than_without(
    load: int, accept: float, with_confidence: bool
) -> None:
    running = engine(accept=accept, with_confidence=with_confidence)
    running.run(load, 150)  # the first steps draft to learn
    speed = running.run(load, 400)
    # What is left is the upkeep of the context K/V and a few probes.
    upkeep = float(DEMO.draft_seconds(load, 0)) / float(DEMO.step_seconds(load))
    assert speed > (1 - upkeep - 0.02) * without(load)


def test_faster_than_any_fixed_length() -> None:
    for load in (1, 8, 32):
        adaptive = engine(accept=0.7)
        adaptive.run(load, 100)
        best = 0.0
        for length in range(1, WIDTH + 1):
            running = engine(DSparkOptions(policy="fixed"), accept=0.7)
            running.controller.width = length
            running.run(load, 20)
            best = max(best, running.run(load, 300))
        assert adaptive.run(load, 300) > 0.97 * best


def test_a_jump_of_the_load_is_followed_within_50_steps() -> None:
    running = engine(accept=0.6)
    running.run(1, 300)
    before = np.mean(running.verified[-50:])
    running.run(64, 50)
    running.run(64, 250)
    busy = running.verified[300:]
    assert abs(np.mean(busy[50:100]) - np.mean(busy[-100:])) < 0.35
    running.run(1, 50)
    running.run(1, 100)
    again = np.mean(running.verified[-50:])
    assert abs(again - before) < 1.0
    assert np.mean(busy[-100:]) < 0.7 * before


def test_a_drafter_that_becomes_good_again_is_noticed() -> None:
    running = engine(accept=0.05)
    running.run(4, 400)
    assert np.mean(np.array(running.lengths[-100:]) == 0) > 0.9
    running.accept = 0.9
    running.run(4, 1000)
    assert np.mean(running.lengths[-50:]) > 2


def test_a_goal_shortens_the_round() -> None:
    free, bound = engine(accept=0.9), engine(accept=0.9)
    free.run(32, 300)
    # More than the throughput's best gives each, within reach of shorter rounds.
    bound.run(32, 300, goal=1.05 * free.tokens / free.seconds / 32)
    assert (
        bound.controller.totals.stops["goal"]
        + (bound.controller.totals.stops["goal_missed"])
    )
    assert not free.controller.totals.stops["goal"]


def test_step_times_are_followed() -> None:
    slow = CostTable(
        DEMO.tokens,
        tuple(2 * s for s in DEMO.step),
        0.0,
        DEMO.requests,
        DEMO.positions,
        DEMO.draft,
    )
    running = engine(costs=slow)
    running.run(16, 200)
    assert running.controller.live is not None
    table = running.controller.live.snapshot()
    b = 16 + round(16 * running.verified[-1])
    assert float(table.step_seconds(b)) == pytest.approx(
        float(slow.step_seconds(b)), rel=0.1
    )


def test_requests_that_ended_are_forgotten() -> None:
    running = engine()
    running.run(32, 20)
    assert len(running.controller.survival) == 32
    running.controller.forget([f"request {i}" for i in range(32)])
    assert len(running.controller.survival) == 0
    running.run(8, 5)
    assert len(running.controller.survival) == 8


def test_the_time_between_steps_counts() -> None:
    """A large fixed cost per step makes longer drafts worth while."""
    lean, heavy = engine(accept=0.7), engine(accept=0.7)
    for running, overhead in ((lean, 0.0), (heavy, 0.2)):
        for _ in range(200):
            running.run(32, 1)
            running.controller.timed(StepTimes(32, 0, 0.075, overhead=overhead))
    assert heavy.controller.overhead > 0.0
    assert np.mean(heavy.verified[-50:]) > np.mean(lean.verified[-50:])


def test_prompts_in_a_step_do_not_make_drafts_look_cheap() -> None:
    """Drafts of little hope are verified neither alone nor beside 200 prompt tokens.

    Each draft adds 2 ms either way. With the prompts' time counted in, a quarter of a
    token for it would look better than the step's average, 4 tokens in 0.4 s.
    """
    controller = Controller(WIDTH)
    tokens = (1, 4, 8, 400)
    controller.price(
        CostTable(
            tokens,
            tuple(0.02 + 0.002 * b for b in tokens),
            0.0,
            (1,),
            (0, WIDTH),
            ((1e-6, 1e-6),),
        )
    )
    for prompts, verified in ((0, 0), (200, 0)):
        step = replace(batch(np.full((4, 3), 0.25), 4), prefill_tokens=prompts)
        plan, _ = controller.verify(step, 0)
        assert plan.verify_lens.sum() == verified, prompts
    # Good ones are.
    good = replace(batch(np.full((4, 3), 0.9), 4), prefill_tokens=200)
    assert controller.verify(good, 0)[0].verify_lens.sum() > 0


def test_one_requests_goal_ends_a_bypass_and_its_drafts_come_first() -> None:
    """At 32 requests drafts do not pay, and 13 tokens/s is what each gets; one gets
    more when its drafts are verified, whatever the others' are worth."""
    running = engine(accept=0.7)
    running.run(32, 300)
    assert set(running.lengths[-20:]) == {0}
    goals = np.zeros(32)
    goals[5] = 16.0
    running.run(32, 40, goals)
    later = np.array(running.verify_lens[-20:])
    assert min(running.lengths[-20:]) > 0
    assert later[:, 5].min() >= 1
    assert np.delete(later, 5, axis=1).mean() < 0.3
    assert running.controller.drafting.counts[Reason.SLO] > 10
    running.run(32, 60)
    assert set(running.lengths[-20:]) == {0}  # and without it, the bypass again
