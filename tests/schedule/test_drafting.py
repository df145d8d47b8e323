"""Draft length and bypass on simulated loads (costs as in `tests.schedule.loads`).

With acceptance 0.7 drafting 6 is best for one request, and none for 64; near 8
requests at 0.6 it breaks even.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from tests.schedule.loads import WIDTH, Engine, throughput
from vllm_dspark.schedule.drafting import Drafting, Reason, StepFacts
from vllm_dspark.schedule.drafting_options import DraftingOptions


def opened(lengths: list[int], steps: int = 50) -> int:
    """First step from which drafting goes on for at least ``steps``."""
    for i in range(len(lengths) - steps):
        if all(lengths[i : i + steps]):
            return i
    raise AssertionError("drafting never opened")


def test_follows_a_jump_within_50_steps() -> None:
    engine = Engine(0.7)
    engine.run([1] * 200)
    up = engine.run([64] * 400)
    down = engine.run([1] * 400)
    # Steady: no drafts but probes, at 64; the best length, at 1.
    assert engine.best(64) == 0 and engine.loss(64, up[50:]) < 0.01
    # Now and then all positions are drafted, to learn about the last ones, or none.
    others = [n for n in down[50:] if n != down[-1]]
    assert len(others) < 0.03 * 350 and set(others) <= {0, WIDTH}
    assert engine.loss(1, down[50:]) < 0.01
    # In fact at once, as the predictions are of the load at hand.
    assert up[0] == 0 and down[0] == down[-1]
    assert engine.drafting.changes <= 4


def test_follows_a_jump_while_choices_did_not_last() -> None:
    """The long holds of a noisy border must not delay what follows."""
    engine = Engine(0.6, noise=0.05)
    engine.run([8] * 1000)
    engine.noise = 0
    for load in (64, 1, 4, 1):  # from 1 to 4 is no jump, but followed all the same
        lengths = engine.run([load] * 200)
        assert engine.loss(load, lengths[50:]) < 0.02, load


def test_a_jump_ends_long_holds() -> None:
    """With the hold of a bypass at its longest a jump frees within the shortest one."""
    options = DraftingOptions(warmup_rounds=1, average=1)
    drafting = Drafting(WIDTH, options)
    on, off = (np.array([1.0] + [x] * WIDTH) for x in (1.5, 0.5))

    def push(load: int) -> int:
        """A step in which the other side is far better."""
        wanted = off if drafting._length else on
        return drafting.choose(StepFacts(wanted, load, 1, 0.5)).positions

    for _ in range(300):
        push(1)
    assert drafting._hold == options.max_hold
    last = drafting.changes
    while drafting.changes == last or drafting._length:
        push(1)
    assert {push(1) for _ in range(options.hold + 1)} == {0}
    assert push(64)


@pytest.mark.parametrize("seed", range(5))
def test_does_not_flap_at_break_even(seed: int) -> None:
    """Predictions waver by 5 %: a choice by the best one changes all the time."""
    engine = Engine(0.6, noise=0.05, seed=seed)
    steps = 4000
    engine.run([8] * steps)
    assert engine.drafting.changes <= steps // 40
    assert engine.loss(8, engine.lengths[100:]) < 0.03
    free = DraftingOptions(margin=0, hold=1, max_hold=1, average=1)
    loose = Engine(0.6, free, noise=0.05, seed=seed)
    loose.run([8] * steps)
    assert loose.drafting.changes > steps // 10


def test_slow_ramp_is_followed_without_flapping() -> None:
    ramp = [n for n in range(1, 65) for _ in range(20)]
    engine = Engine(0.7)
    for loads in (ramp, ramp[::-1]):
        before = engine.drafting.changes
        lengths = engine.run(loads)
        assert engine.drafting.changes - before <= 8
        for load in (1, 2, 4, 8, 32, 64):
            at = [length for length, n in zip(lengths, loads, strict=True) if n == load]
            # Within the margin, a probe and two steps without drafts among 20, and
            # what hold delays.
            assert engine.loss(load, at) < 0.08, load


def test_load_that_wavers_is_no_jump() -> None:
    random = np.random.default_rng(0)
    engine = Engine(0.6, noise=0.02)
    engine.run([int(n) for n in random.integers(6, 11, 3000)])
    assert engine.drafting.changes <= 60


def test_requests_that_come_and_go() -> None:
    """Between 1 and 64, memoryless, for long: near the best throughout."""
    random = np.random.default_rng(1)
    loads, load = [], 8
    for _ in range(6000):
        load = int(np.clip(load + random.integers(-2, 3), 1, 64))
        loads.append(load)
    engine = Engine(0.65, noise=0.02)
    lengths = engine.run(loads)
    tables = {n: throughput(n, np.full(WIDTH, engine.rate)) for n in set(loads)}
    share = [
        tables[n][d] / tables[n].max() for n, d in zip(loads, lengths, strict=True)
    ]
    assert np.mean(share[100:]) > 0.98
    assert engine.drafting.changes < len(loads) // 40


def test_bypass_ends_when_the_drafter_is_good_again() -> None:
    engine = Engine(0.7)
    engine.run([1] * 200)
    engine.rate = 0.02
    bad = engine.run([1] * 6000)
    assert bad[-1] == 0 and engine.reasons[-1] is Reason.ACCEPTANCE
    assert engine.loss(1, bad[300:]) < 0.01  # what the probes cost
    engine.rate = 0.7
    limit = engine.drafting.options.max_probe_interval
    good = engine.run([1] * 2 * limit)
    assert opened(good) <= limit + engine.drafting.options.max_probe_steps
    assert engine.loss(1, good[-200:]) < 0.015  # two steps of it without drafts


def test_probe_intervals_double_up_to_the_limit() -> None:
    options = DraftingOptions(max_probe_interval=256)
    engine = Engine(0.02, options)
    engine.run([4] * 4000)
    starts = [
        i
        for i, (one, two) in enumerate(
            zip(engine.reasons, engine.reasons[1:], strict=False)
        )
        if two is Reason.PROBE
        and one is not Reason.PROBE
        and engine.lengths[i] == 0  # what is tried while drafting is no probe
    ]
    gaps = np.diff(starts)
    assert (np.diff(gaps) >= -1).all()
    assert gaps[-1] >= 256 and gaps.max() <= 256 + options.max_probe_steps
    assert engine.drafting.probes == len(starts) > 10


@pytest.mark.parametrize(
    ("closing", "rounds", "longest"),
    [
        (1.0, 4, 4),  # 16 rounds are enough to see that nothing has changed
        (0.9, 4, 20),  # closing in on break-even it goes on, but not for ever
        (1.0, 0, 20),  # outcomes that never come in are not waited for
    ],
)
def test_every_probe_ends(closing: float, rounds: int, longest: int) -> None:
    drafting = Drafting(WIDTH, DraftingOptions(max_probe_steps=20))
    lengths, gap = [0], 0.3
    for _ in range(2000):
        gap = gap * closing if lengths[-1] else 0.3
        speeds = np.array([1.0] + [np.exp(-gap)] * WIDTH)
        choice = drafting.choose(StepFacts(speeds, 4, rounds, 0.5))
        probing = choice.reason is Reason.PROBE
        lengths.append(lengths[-1] + 1 if probing else 0)
    assert drafting.probes >= 3
    assert max(lengths) == longest


def test_another_load_makes_an_early_probe() -> None:
    """While the load is the same, the next probe would be hundreds of steps away."""
    engine = Engine(0.02)
    engine.run([16] * 2500)
    since = engine.reasons[::-1].index(Reason.PROBE)
    assert since > 32
    probes = engine.drafting.probes
    engine.run([16] * 10)
    assert engine.drafting.probes == probes
    waited = engine.reasons[::-1].index(Reason.PROBE)
    engine.run([16] * max(0, 260 - waited))  # a quarter of the longest interval
    probes = engine.drafting.probes
    assert engine.step(4).reason is Reason.PROBE
    assert engine.drafting.probes == probes + 1


def test_jumping_loads_cannot_make_probes_all_the_time() -> None:
    engine = Engine(0.02)
    lengths = engine.run([n for _ in range(300) for n in [4] * 6 + [40] * 6])
    assert np.mean(np.array(lengths[200:]) > 0) < 0.05


def test_starts_by_drafting_and_says_why() -> None:
    drafting = Drafting(WIDTH)
    choice = drafting.choose(StepFacts(None, 4, 0, 0.7))
    assert (choice.positions, choice.reason) == (WIDTH, Reason.NO_HISTORY)
    # Outcomes that never come must not keep it from deciding.
    speeds = throughput(64, np.full(WIDTH, 0.5))
    reasons = [drafting.choose(StepFacts(speeds, 64, 0, 0.5)).reason for _ in range(90)]
    assert reasons[0] is Reason.NO_HISTORY and reasons[-1] is Reason.COST
    assert sum(drafting.counts.values()) == 91
    assert drafting.counts[Reason.NO_HISTORY] == 64


def test_reasons_of_a_bypass_and_of_holding() -> None:
    engine = Engine(0.7)
    engine.run([64] * 200)
    assert engine.reasons[-1] is Reason.COST
    engine = Engine(0.1)
    engine.run([4] * 400)
    assert engine.reasons[-1] is Reason.ACCEPTANCE
    # Drafting gets better than bypass by less than the margin: it stays.
    drafting = Drafting(WIDTH, DraftingOptions(margin=0.1, warmup_rounds=1))
    worse, better = (np.array([1.0] + [x] * WIDTH) for x in (0.5, 1.05))
    for _ in range(10):
        drafting.choose(StepFacts(worse, 4, 1, 0.5))
    choices = [drafting.choose(StepFacts(better, 4, 1, 0.5)) for _ in range(25)]
    assert choices[-1].reason is Reason.HOLD and choices[-1].positions == 0


@pytest.mark.parametrize(("drafts", "length"), [(0.7, 0), (1.2, WIDTH)])
def test_the_first_choice_by_predictions_comes_at_once(
    drafts: float, length: int
) -> None:
    """What was drafted while nothing was known is nothing to hold on to."""
    options = DraftingOptions(warmup_rounds=6)
    drafting = Drafting(WIDTH, options)
    facts = StepFacts(np.array([1.0, *np.linspace(1, drafts, WIDTH)]), 8, 2, 0.5)
    chosen = [drafting.choose(facts) for _ in range(4 + options.hold)]
    reasons = [choice.reason for choice in chosen]
    assert (
        reasons[:2] == [Reason.NO_HISTORY] * 2 and Reason.NO_HISTORY not in reasons[2:]
    )
    assert {c.positions for c in chosen[:2]} == {WIDTH}
    assert {c.positions for c in chosen[2:6]} == {length}


def test_goal_restricts_lengths() -> None:
    engine = Engine(0.7, DraftingOptions(warmup_rounds=1))
    engine.allowed = np.arange(WIDTH + 1) <= 2
    engine.run([1] * 60)
    assert engine.lengths[-1] == 2 and engine.reasons[-1] is Reason.SLO
    engine.allowed = np.zeros(WIDTH + 1, dtype=bool)  # out of reach: the fastest
    engine.run([1] * 100)
    assert engine.lengths[-1] == engine.best(1) and engine.reasons[-1] is Reason.PAYS


def test_without_bypass_one_position_at_least() -> None:
    engine = Engine(0.05, DraftingOptions(bypass=False))
    lengths = engine.run([64] * 300)
    assert min(lengths) >= 1 and engine.drafting.probes == 0
    assert engine.reasons[-1] is Reason.PAYS


def test_same_facts_same_choices() -> None:
    loads = [n for n in (1, 30, 3, 64, 8) for _ in range(100)]
    runs = [Engine(0.6, noise=0.05, seed=3).run(loads) for _ in range(2)]
    assert runs[0] == runs[1]


def test_wrong_values_are_refused() -> None:
    drafting = Drafting(2, DraftingOptions(warmup_steps=1, warmup_rounds=1))
    for bad in ([1.0, 2.0], [1.0, np.nan, 2.0], [0.0, 1.0, 2.0]):
        with pytest.raises(ValueError, match="give 3 positive numbers"):
            drafting.choose(StepFacts(np.array(bad), 1, 1, 0.5))
    with pytest.raises(ValueError, match="width 0"):
        Drafting(0)
    for name in [f.name for f in dataclasses.fields(DraftingOptions)][1:]:
        with pytest.raises(ValueError, match=name):
            DraftingOptions(**{name: -1})
    with pytest.raises(ValueError, match="max_hold 4"):
        DraftingOptions(max_hold=4)
    with pytest.raises(ValueError, match="max_explore_interval 15: give"):
        DraftingOptions(max_explore_interval=15)
    with pytest.raises(ValueError, match="explore_share 0"):
        DraftingOptions(explore_share=0)
    with pytest.raises(ValueError, match="load_factor 1"):
        DraftingOptions(load_factor=1)
    with pytest.raises(ValueError, match=r"hopeful_rate 1\.1"):
        DraftingOptions(hopeful_rate=1.1)


@pytest.mark.parametrize(
    ("gain", "bypass", "none"),
    [
        (1.04, True, 60),  # every 31 steps
        (1.1, True, 24),  # every 76
        (1.5, True, 6),  # every 324
        (9.0, True, 2),  # every 768
        (1.04, False, 0),
        (1.5, False, 0),
    ],
)
def test_lengths_not_chosen_are_looked_at(gain: float, bypass: bool, none: int) -> None:
    """All positions, two of 96 steps; none the oftener the less drafting gains."""
    options = DraftingOptions(bypass=bypass, average=1)
    drafting = Drafting(WIDTH, options)
    promised = np.array([1.0, 1.0, gain] + [1.0] * (WIDTH - 2))
    facts = StepFacts(promised, 8, 8, 0.7)
    choices = [drafting.choose(facts) for _ in range(1000)]
    settled = choices[len(choices) - 960 :]
    lengths = [c.positions for c in settled]
    assert lengths.count(WIDTH) == 20 and abs(lengths.count(0) - none) <= 2
    lost = lengths.count(0) * np.log(gain) / len(lengths)
    assert lost <= 1.2 * options.explore_share or gain == 9
    assert lengths.count(2) == 960 - lengths.count(WIDTH) - lengths.count(0)
    tried = [c for c in settled if c.positions != 2]
    assert all(c.reason is Reason.PROBE for c in tried)
    assert all(c.most_requests == options.probe_rounds for c in tried)
    assert drafting.changes == 1


def test_another_load_soon_tries_a_step_without_drafts() -> None:
    """However much drafting seems to gain: a wrong table would keep it for ever."""
    drafting = Drafting(WIDTH, DraftingOptions(warmup_rounds=1))
    promised = np.array([1.0] + [1.5] * WIDTH)
    for load in (1, 32, 4):
        choices = [drafting.choose(StepFacts(promised, load, load, 0.7))
                   for _ in range(40)]  # fmt: skip
        bare = [i for i, c in enumerate(choices) if c.positions == 0]
        assert len(bare) == 2 and bare[-1] < 10, load


@pytest.mark.parametrize(("doubt", "drafts"), [(0.0, True), (0.03, True), (0.1, False)])
def test_in_doubt_nothing_is_drafted(doubt: float, drafts: bool) -> None:
    """A gain of 8% is worth it only where predictions are not off by more."""
    drafting = Drafting(WIDTH, DraftingOptions(warmup_rounds=1))
    promised = np.array([1.0] + [1.08] * WIDTH)
    facts = StepFacts(promised, 8, 8, 0.7, doubt=doubt)
    settled = [drafting.choose(facts).positions for _ in range(60)][30:]
    assert (np.median(settled) > 0) == drafts
