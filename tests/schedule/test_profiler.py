"""Profiling on a made-up machine whose clock moves only when it works.

Tolerances: 5% noise leaves the lower median of two or three samples (all that the
budget allows of the large points) within 15% of the truth, of more within 5%; and low
by some percent, since of two samples the smaller counts.
"""

from __future__ import annotations

import numpy as np
import pytest

from tests.schedule.machine import SHARE, SLOPE, Machine, draft_time, step_time
from vllm_dspark.schedule.profile_points import Limits, midpoints, powers
from vllm_dspark.schedule.profiler import PROFILE_SECONDS, Profile, profile

LIMITS = Limits(batch_tokens=512, requests=64, positions=7, context_tokens=20_000)


def run(
    machine: Machine, limits: Limits = LIMITS, budget: float = PROFILE_SECONDS
) -> Profile:
    times = machine.time_step, machine.time_prompt, machine.time_draft
    return profile(*times, limits, budget, machine.clock)


def test_the_points() -> None:
    assert powers(12) == [1, 2, 4, 8, 12] and powers(8) == [1, 2, 4, 8]
    assert midpoints(12) == [3, 6] and midpoints(13) == [3, 6, 12]
    table = run(Machine(), budget=20.0).table
    assert list(table.tokens) == sorted(powers(512) + midpoints(512))
    assert list(table.requests) == powers(64) and table.positions == (0, 1, 4, 7)


def test_exact_without_noise() -> None:
    table = run(Machine()).table
    np.testing.assert_allclose(table.step, step_time(table.tokens))
    assert table.per_context_token == pytest.approx(SLOPE)
    assert table.draft_seconds(16, 4) == pytest.approx(draft_time(16, 4))
    # Between two points of a curve that is no line.
    assert table.prompt_share == pytest.approx(SHARE, rel=0.03)


@pytest.mark.parametrize("seed", range(10))
def test_noise_pauses_and_slow_first_calls(seed: int) -> None:
    machine = Machine(0.05, pauses=0.03, longest=0.5, first=0.05, start=1.0, seed=seed)
    table = run(machine, budget=20.0).table
    assert table.tokens[-1] == 512 and table.requests[-1] == 64
    error = np.abs(np.array(table.step) / step_time(table.tokens) - 1)
    assert error.max() < 0.16 and np.median(error) < 0.06
    # The context's own time is 40 ms, that of a step at least 25.
    assert table.per_context_token == pytest.approx(SLOPE, rel=0.15)
    for r in table.requests:
        for k in table.positions:
            true = draft_time(r, k)
            # Where all that counted had pauses, up to a fifth above a neighbour.
            assert table.draft_seconds(r, k) == pytest.approx(true, rel=0.2)


@pytest.mark.parametrize("budget", [0.5, 1.0, 3.0, 10.0, 30.0])
def test_it_ends_in_the_budget(budget: float) -> None:
    machine = Machine(noise=0.05)
    found = run(machine, budget=budget)
    spent = machine.now - 1000
    # The smallest points are measured whatever the budget: 0.1 s.
    assert spent < budget + 0.1
    assert found.measured["seconds"] == pytest.approx(spent, abs=1e-3)
    # It is used, too, unless every point has its 9 samples.
    assert spent > 0.85 * budget or found.measured["samples_per_point"][0] == 9


def test_a_small_budget_measures_less_far_and_goes_on_in_a_line() -> None:
    found = run(Machine(), budget=2.0)
    last = found.table.tokens[-1]
    assert 16 <= last < 512 and found.measured["batch_tokens"] == [512, last]
    assert found.table.step_seconds(512) == pytest.approx(step_time(512), rel=0.15)
    # Beyond the curve nothing says what a prompt's time is worth.
    assert found.table.prompt_share == 1.0


def test_no_budget_still_gives_a_table() -> None:
    machine = Machine()
    table = run(machine, budget=0.0).table
    assert table.tokens == (1, 2) and table.requests == (1,)
    assert table.positions == (0, 1, 4, 7) and len(machine.calls) == 8


def test_one_pause_does_not_end_the_first_pass() -> None:
    class OnePause(Machine):
        def noisy(self, true: float) -> float:
            return true * (20 if len(self.calls) == 12 else 1)

    machine = OnePause()
    table = run(machine).table
    assert table.tokens[-1] == 512
    np.testing.assert_allclose(table.step, step_time(table.tokens))


def test_a_point_that_only_ever_paused_is_seen_by_its_neighbours() -> None:
    class Unlucky(Machine):
        def time_step(self, batch_tokens: int, context_tokens: int) -> float:
            true = super().time_step(batch_tokens, context_tokens)
            return true * (20 if batch_tokens == 12 else 1)

    table = run(Unlucky()).table
    assert table.step_seconds(12) == pytest.approx(step_time(16), rel=0.2)
    others = [8, 24, 32]
    np.testing.assert_allclose(table.step_seconds(others), step_time(others))


def test_points_are_interleaved() -> None:
    machine = Machine()
    run(machine)
    ones = [i for i, call in enumerate(machine.calls) if call == ("step", 1, 0)]
    assert len(ones) >= 3 and min(np.diff(ones)[1:]) > 1
    # A machine that slows down meanwhile: no repeat is in the order of size.
    last = machine.calls[ones[1] :]
    assert last != sorted(last)


def test_the_same_calls_every_time() -> None:
    one, other = Machine(noise=0.1), Machine(noise=0.1)
    assert run(one) == run(other) and one.calls == other.calls


def test_the_smallest_engine() -> None:
    table = run(Machine(), Limits(batch_tokens=2, requests=1, positions=1)).table
    assert table.tokens == (1, 2) and table.per_context_token == 0
    assert table.requests == (1,) and table.positions == (0, 1)


def test_a_prompt_that_takes_longer_than_its_tokens_had_a_pause() -> None:
    class Paused(Machine):
        def time_prompt(self, tokens: int) -> float:
            return 1.5 * super().time_prompt(tokens)

    assert run(Paused()).table.prompt_share == 1.0


def test_a_real_clock() -> None:
    found = profile(
        lambda b, c: 0.001, lambda b: 0.001, lambda r, k: 0.001, LIMITS, budget=60.0
    )
    assert 0 < found.measured["seconds"] < 60
    assert set(found.table.step) == {0.001}


@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), float("inf")])
def test_a_time_that_is_none(value: float) -> None:
    with pytest.raises(ValueError, match=r"time_step\(1, 0\) gave "):
        profile(lambda b, c: value, lambda b: 1.0, lambda r, k: 1.0, LIMITS)


@pytest.mark.parametrize(
    ("name", "value"),
    [("batch_tokens", 1), ("requests", 0), ("positions", 0), ("context_tokens", -1)],
)
def test_limits(name: str, value: int) -> None:
    good = {"batch_tokens": 8, "requests": 1, "positions": 1, "context_tokens": 0}
    with pytest.raises(ValueError, match=f"{name} {value}"):
        Limits(**{**good, name: value})
