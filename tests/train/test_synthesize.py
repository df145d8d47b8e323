"""Runs against a fake target: what is kept, and that no kill loses or doubles any.

The fake answers from hashes of what it is asked, so a run's result is known; answers
come back in another order each time, and the result must not depend on it.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import random
import signal
from pathlib import Path

import pytest

from vllm_dspark.model.target import TargetIdentity
from vllm_dspark.train import manifest as manifests
from vllm_dspark.train.ledger import HOPELESS
from vllm_dspark.train.plan import Settings, uniform
from vllm_dspark.train.prompts import Prompt, Stop
from vllm_dspark.train.synthesize import Answer, Goal, Synthesis
from vllm_dspark.train.tokens import TokenWriter, read_tokens

TARGET = TargetIdentity("fake", "f" * 64, 1000)
HEADER = (7, 7)
PROMPTS = [Prompt((100 + i,), "prompts") for i in range(6)]
MIX = ((0.0, 0.5), (1.0, 0.5))
SETTINGS = Settings(MIX, 8, 10, 3, self_share=0.5)


class Killed(BaseException):
    """As KeyboardInterrupt: no `except Exception` may stop it."""


@pytest.fixture(autouse=True)
def no_fsync(monkeypatch):
    """These tests kill processes, not machines."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


class FakeRenderer:
    """A user turn is a prompt as it is, unless it holds a 'special' token."""

    def user_header(self) -> tuple[tuple[int, ...], Stop]:
        return HEADER, Stop(ids=(1,))

    def own_prompt(self, turn, stop):
        return "malformed prompt" if turn[0] % 9 == 0 else tuple(turn)


class FakeTarget:
    """Answers of 1 to 10 tokens; may be killed at the n-th question."""

    def __init__(self, die_at: int | None = None, shuffle: int = 0) -> None:
        self.asked: list[tuple[int, ...]] = []
        self.most_at_once = self.at_once = 0
        self._die_at = die_at
        self._random = random.Random(shuffle)

    def _may_die(self) -> None:
        if len(self.asked) == self._die_at:
            raise Killed

    async def __call__(self, prompt, *, temperature, seed, max_tokens, stop=None):
        self.asked.append(prompt)
        self._may_die()
        self.at_once += 1
        self.most_at_once = max(self.at_once, self.most_at_once)
        for _ in range(self._random.randrange(5)):
            await asyncio.sleep(0)
        self.at_once -= 1
        key = (prompt, seed if temperature else None)
        length = 1 + int(uniform(*key, "length") * max_tokens)
        # A target that repeats itself: few first tokens, so user turns are repeated.
        few = 20 if prompt == HEADER else 900
        ids = tuple(int(uniform(*key, i) * few) for i in range(length))
        if prompt == HEADER:
            ids = ids[:1]
        return Answer(ids, length < max_tokens)


def run(folder: Path, goal=None, target=None, *, concurrency=4, settings=SETTINGS,
        prompts=PROMPTS, per_shard=8) -> Synthesis:  # fmt: skip
    """Go on with a folder until the goal; raises what stopped it."""
    with TokenWriter(
        folder,
        target=TARGET,
        sampling={"seed": settings.seed},
        sources=["prompts", "self"],
    ) as writer:
        synthesis = Synthesis(
            settings, prompts, FakeRenderer(), writer, target or FakeTarget(), per_shard
        )
        synthesis.reached = asyncio.run(
            synthesis.run(goal or Goal(samples=40), concurrency, lambda: None)
        )
    return synthesis


def content(folder: Path) -> list:
    data = read_tokens(folder)
    return [
        (*data.sample(i), float(data.temperature[i]), int(data.source[i]))
        for i in range(len(data))
    ]


def same(one: list, other: list) -> bool:
    return len(one) == len(other) and all(
        a[0].tolist() == b[0].tolist() and a[1:] == b[1:]
        for a, b in zip(one, other, strict=True)
    )


def ranges(folder: Path) -> list:
    return [s.items for s in manifests.read_manifest(folder).shards]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What an uninterrupted run makes, one question at a time."""
    folder = tmp_path_factory.mktemp("whole") / "data"
    run(folder, concurrency=1)
    return folder


def test_what_is_kept(whole: Path) -> None:
    samples = content(whole)
    assert len(samples) == 40
    keys = [tuple(tokens) for tokens, *_ in samples]
    assert len(set(keys)) == 40
    own = [tuple(tokens[:n]) for tokens, n, _, source in samples if source == 1]
    assert len(set(own)) == len(own) > 5  # prompts it wrote: each once
    assert all(len(tokens) - n >= 3 for tokens, n, *_ in samples)
    counts = manifests.read_manifest(whole).counts
    assert counts["samples"] == 40 == sum(counts["source"].values())
    assert counts["items"] == 40 + sum(counts["dropped"].values())
    assert {"short response", "duplicate prompt", "malformed prompt"} <= set(
        counts["dropped"]
    )
    assert counts["response_tokens"] == sum(len(t) - n for t, n, *_ in samples)
    assert 0 < counts["truncated"] < 40


@pytest.mark.parametrize("concurrency", [2, 5, 64])
def test_the_order_of_answers_does_not_matter(
    whole: Path, tmp_path: Path, concurrency
) -> None:
    target = FakeTarget(shuffle=concurrency)
    run(tmp_path / "data", target=target, concurrency=concurrency)
    assert same(content(tmp_path / "data"), content(whole))
    counts = [manifests.read_manifest(f).counts for f in (whole, tmp_path / "data")]
    assert counts[0] == counts[1]
    # Of 40 wanted samples, some are dropped before they are asked a second time.
    assert target.most_at_once >= min(concurrency, 30)


@pytest.mark.parametrize("concurrency", [1, 4])
def test_killed_at_any_question(whole: Path, tmp_path: Path, concurrency) -> None:
    """Every n-th question kills; the same command goes on, often enough, to the end."""
    for die_at in range(1, 30, 3):
        folder, target, kills = tmp_path / str(die_at), None, 0
        for attempt in range(200):
            target = FakeTarget(die_at + attempt, shuffle=attempt)
            try:
                run(folder, target=target, concurrency=concurrency)
                break
            except Killed:
                kills += 1
        assert kills and same(content(folder), content(whole))
        ends = [0, *(end for _, end in ranges(folder))]
        assert ranges(folder) == list(itertools.pairwise(ends))  # no gap
        assert manifests.read_manifest(folder).counts == (
            manifests.read_manifest(whole).counts
        )


@pytest.mark.parametrize("step", ["open", "fsync", "before", "after"])
def test_killed_at_any_write(whole: Path, tmp_path: Path, monkeypatch, step) -> None:
    """Every file (shards and manifests), killed at four places of writing it."""
    real = manifests.write_atomically
    writes = 0

    def dying(path, write) -> None:
        nonlocal writes
        writes += 1
        if writes != die_at:
            return real(path, write)
        if step == "after":
            real(path, write)
        elif step != "before":
            temporary = path.with_name(f".{path.name}.tmp")
            temporary.write_bytes(b"" if step == "open" else b"half a fi")
        raise Killed

    for module in ("vllm_dspark.train.manifest", "vllm_dspark.train.tokens"):
        monkeypatch.setattr(f"{module}.write_atomically", dying)
    die_at, completed = 1, False
    while not completed:
        folder, writes = tmp_path / str(die_at), 0
        try:
            run(folder)
            completed = True
        except Killed:
            run(folder)
        assert same(content(folder), content(whole)), die_at
        die_at += 1
    assert die_at > 10  # manifest, then two files for each of several shards


def test_a_real_kill_during_the_run(whole: Path, tmp_path: Path) -> None:
    """SIGKILL leaves no time to write: what was not in a shard is asked again."""

    class KillingTarget(FakeTarget):
        def _may_die(self) -> None:
            if len(self.asked) == self._die_at:
                os.kill(os.getpid(), signal.SIGKILL)

    folder = tmp_path / "data"
    for questions in (25, 50, 10):
        child = os.fork()
        if child == 0:
            run(folder, target=KillingTarget(questions))
            os._exit(0)
        status = os.waitpid(child, 0)[1]
        assert os.WTERMSIG(status) == signal.SIGKILL
    run(folder)
    assert same(content(folder), content(whole))


def test_more_is_added_to_what_is_there(whole: Path, tmp_path: Path) -> None:
    for samples in (5, 17, 40, 40):
        synthesis = run(tmp_path / "data", Goal(samples=samples))
        assert synthesis.reached
    assert synthesis.generated == 0  # the last run had nothing to do
    assert same(content(tmp_path / "data"), content(whole))


def test_tokens_as_goal_stop_at_the_sample_that_reaches_it(tmp_path: Path) -> None:
    run(tmp_path / "data", Goal(tokens=150), concurrency=16)
    lengths = read_tokens(tmp_path / "data").response_len
    assert lengths.sum() >= 150 > lengths[:-1].sum()


def test_no_question_beyond_the_goal(tmp_path: Path) -> None:
    target = FakeTarget()
    settings = Settings(((1.0, 1.0),), 8, 10, 1)
    run(tmp_path / "d", Goal(samples=5), target, settings=settings, concurrency=64)
    assert len(target.asked) == 5


def test_prompts_that_are_used_up(tmp_path: Path) -> None:
    settings = Settings(((0.0, 1.0),), 8, 10, 1)
    synthesis = run(tmp_path / "data", settings=settings)
    assert not synthesis.reached and synthesis.ledger.samples == len(PROMPTS)


def test_long_and_unfinished_prompts_of_its_own_are_dropped(tmp_path: Path) -> None:
    async def answer(prompt, **options) -> Answer:
        if prompt == HEADER:
            seed = options["seed"]
            return Answer((1 + seed % 97,) * (1 + seed % 12), seed % 5 > 0)
        return Answer((*prompt, 1, 2, options["seed"] % 1000), True)

    settings = Settings(((1.0, 1.0),), 8, 10, 3, self_share=1.0)
    dropped = run(tmp_path / "data", target=answer, settings=settings).ledger.dropped
    assert dropped["long prompt"] and dropped["unfinished prompt"]
    assert read_tokens(tmp_path / "data").prompt_len.max() <= 8


def test_when_nothing_can_be_kept_it_says_so(tmp_path: Path) -> None:
    async def answer(prompt, **options) -> Answer:
        return Answer((5,), True)

    with pytest.raises(ValueError, match=f"none of the last {HOPELESS} .*short resp"):
        run(tmp_path / "data", target=answer, prompts=PROMPTS, per_shard=256)


def test_an_error_of_the_target_keeps_what_was_taken(tmp_path: Path) -> None:
    class Gone(FakeTarget):
        async def __call__(self, prompt, **options):
            if len(self.asked) >= 30:
                raise ValueError("vllm serve ended")
            return await super().__call__(prompt, **options)

    with pytest.raises(ValueError, match="vllm serve ended"):
        run(tmp_path / "data", target=Gone(), per_shard=1000)
    assert len(read_tokens(tmp_path / "data")) > 5  # none of them filled a shard


def test_goals_that_cannot_be() -> None:
    with pytest.raises(ValueError, match="say when to stop"):
        Goal()
    with pytest.raises(ValueError, match="--tokens is 0"):
        Goal(tokens=0)
