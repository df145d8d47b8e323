"""An engine's first steps: drafts as far as they may pay, before anything is known."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from tests.schedule.simulated import DEMO, WIDTH, Engine, without
from vllm_dspark.config import DSparkOptions
from vllm_dspark.schedule.controller import Controller
from vllm_dspark.schedule.drafting import Reason
from vllm_dspark.schedule.drafting_options import DraftingOptions
from vllm_dspark.schedule.facts import Batch

# Nothing is ever believed: what is drafted is the start's.
ENDLESS = DraftingOptions(warmup_rounds=10**6, warmup_steps=10**6)


def engine(accept: float, seed: int = 0, **settings: object) -> Engine:
    controller = Controller(WIDTH, **settings)  # type: ignore[arg-type]
    controller.price(DEMO)
    return Engine(controller, accept, random=np.random.default_rng(seed))


def test_no_draft_where_no_drafter_could_pay() -> None:
    """At 64 requests; but the probes of a bypass, which find out all the same."""
    found = engine(0.2)
    speed = found.run(64, 100)
    interval = DraftingOptions().probe_interval
    assert set(found.lengths[: interval - 1]) == {0}
    assert any(found.lengths[interval - 1 : interval + 1])
    counts = found.controller.drafting.counts
    assert counts[Reason.PROBE] >= 1 and counts[Reason.NO_HISTORY] == 0
    # A bypass keeps the drafter's context up, which is all that it costs.
    kept_up = without(64) * (0.139 / (0.139 + 0.008))
    assert speed > 0.97 * kept_up


def test_as_many_positions_as_may_pay() -> None:
    first = {}
    for load in (1, 8, 16, 32):
        found = engine(0.6, drafting=ENDLESS)
        found.run(load, 1)
        first[load] = found.lengths[0]
    assert first[1] == WIDTH > first[8] > first[16] >= first[32]
    assert first[8] > 0


@pytest.mark.parametrize("with_confidence", [True, False])
@pytest.mark.parametrize("seed", range(3))
def test_a_bad_drafter_does_not_get_all_rounds(
    seed: int, with_confidence: bool
) -> None:
    """What leaves little hope ends the start, however few rounds it are."""
    found = engine(0.02, seed, drafting=ENDLESS)
    found.with_confidence = with_confidence
    found.run(8, 20)
    assert not found.controller.drafting.starting
    assert np.flatnonzero(found.lengths).max() < 4 and found.lengths[0] > 0


@pytest.mark.parametrize("load", [1, 2])
def test_few_positions_for_a_bad_drafter(load: int) -> None:
    """Where one draft may still pay, seven do not for all rounds."""
    found = engine(0.1, drafting=ENDLESS)
    found.run(load, 40)
    assert found.lengths[0] == WIDTH
    assert sum(found.lengths[20:]) < 0.5 * 20 * WIDTH


def test_a_good_drafter_keeps_its_rounds() -> None:
    found = engine(0.85, drafting=ENDLESS)
    found.run(1, 200)
    assert found.controller.drafting.starting
    assert min(found.lengths) >= 5


def test_an_end_of_the_load_is_noticed() -> None:
    """A start in a bypass is no worse a start for what comes after."""
    found = engine(0.8)
    found.run(64, 20)
    assert set(found.lengths) == {0}
    found.run(1, 60)
    assert min(found.lengths[-10:]) >= 4


def test_a_goal_is_not_given_up_for_throughput() -> None:
    """One request's goal may need drafts that do not pay for all."""
    found = engine(0.6)
    found.run(64, 1, goal=5.0)
    assert found.lengths == [WIDTH]


def test_without_a_bypass_one_position_is_drafted() -> None:
    found = engine(0.2, policy=DSparkOptions(bypass=False))
    found.run(64, 20)
    assert found.lengths[0] == 1 and min(found.lengths) >= 1


def test_it_looks_at_no_draft_of_the_step() -> None:
    """Lossless: confidences at hand decide nothing about the next drafts."""
    two = [engine(0.6, drafting=ENDLESS) for _ in range(2)]
    for found in two:
        found.run(8, 5)
    ids = tuple(f"request {i}" for i in range(8))
    confidence = np.full((8, WIDTH), 0.98)
    batch = Batch(ids, (0.0,) * 8, np.full(8, WIDTH), confidence, 0, 800, np.zeros(8))
    other = dataclasses.replace(batch, confidence=0.1 * confidence)
    plans = [f.controller.draft(b) for f, b in zip(two, (batch, other), strict=True)]
    assert plans[0].positions == plans[1].positions > 0
