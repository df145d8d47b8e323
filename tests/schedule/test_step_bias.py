"""What drafting has to promise beyond a bypass: half an error, or what was seen."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from tests.schedule.machine import Machine, step_time, true_table
from vllm_dspark.schedule.facts import StepTimes
from vllm_dspark.schedule.pricing import Pricing
from vllm_dspark.schedule.step_bias import StepBias

ERROR = 0.16


def seen(
    with_drafts: float, without: float, steps: int = 200, noise: float = 0.08
) -> StepBias:
    """Both kinds in turn, off by these means."""
    bias, random = StepBias(), np.random.default_rng(0)
    for i in range(steps):
        drafts = i % 20 < 10
        mean = with_drafts if drafts else without
        bias.saw(drafts, mean + noise * float(random.standard_normal()))
    return bias


def test_little_was_seen() -> None:
    assert StepBias().doubt(ERROR) == ERROR / 2
    assert seen(0.0, 0.0, steps=30).doubt(ERROR) == ERROR / 2  # 10 without drafts
    only = StepBias()
    for _ in range(200):
        only.saw(True, 0.01)
    assert only.doubt(ERROR) == ERROR / 2


def test_both_kinds_are_judged_rightly() -> None:
    """A standard error remains, of a fifth of the noise of single steps."""
    assert 0.0 < seen(0.0, 0.0).doubt(ERROR) < 0.04
    assert seen(0.03, 0.03).doubt(ERROR) == pytest.approx(seen(0, 0).doubt(ERROR))


def test_one_kind_is_misjudged() -> None:
    alike = seen(0.0, 0.0).doubt(ERROR)
    assert seen(0.03, 0.0).doubt(ERROR) == pytest.approx(alike + 0.03)
    assert seen(0.0, 0.05).doubt(ERROR) == pytest.approx(alike - 0.05)
    # Never more than single steps are off.
    assert seen(0.5, 0.0).doubt(ERROR) == ERROR / 2
    assert seen(0.0, 0.5).doubt(ERROR) == -ERROR / 2


def test_what_is_long_ago_does_not_count() -> None:
    bias = seen(0.05, 0.0)
    for _ in range(240):
        bias.saw(False, 0.0)
    assert bias.doubt(ERROR) == ERROR / 2


def test_pauses_do_not_count() -> None:
    bias, steady = StepBias(), StepBias()
    for i in range(160):
        bias.saw(i % 2 == 0, 3.0 if i % 20 == 0 else 0.001 * (i % 3))
        steady.saw(i % 2 == 0, 0.001 * (i % 3))
    assert bias.doubt(ERROR) == pytest.approx(steady.doubt(ERROR), abs=0.002)


def test_prices_tell_the_kinds_apart() -> None:
    """Steps with drafts take longer than their tokens do in steps without: the table
    cannot know, and ends in between."""
    prices, machine = Pricing(true_table()), Machine(0.02)
    assert prices.doubt() == 0.0  # nothing was seen
    for i in range(200):
        verified = 64 * (i % 2)
        true = float(step_time(128)) * (1.1 if verified else 1.0)
        times = StepTimes(128, 0, machine.noisy(true))
        prices.learn(replace(times, verified=verified))
        if i == 10:
            assert prices.doubt() == pytest.approx(min(prices.live.error(), 0.3) / 2)
    error = prices.live.error()
    assert 0.03 < error < 0.08
    assert prices.doubt() == pytest.approx(error / 2)  # it is 0.1, but no further
