"""Conversations that grow: who is asked what, and what is made of the answers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import long_context
import pytest
from _conversations import Exchange, bucket, by_context
from _paired_turns import Turn

NEEDED = "--target T --drafter D --prompts P --out O".split()  # noqa: SIM905


def exchange(context: int, speeds: dict[str, float], same: list[str]) -> Exchange:
    answers = {
        name: Turn(100, 0, 100 / speed, 100 if name == "none" else 40, 120, 75)
        for name, speed in speeds.items()
    }
    return Exchange(0, 0, context, answers, same)


def test_buckets_double() -> None:
    assert [bucket(n) for n in (0, 511, 512, 1023, 1024, 8000)] == [
        *(512, 512, 1024, 1024, 2048, 8192)
    ]


def test_figures_by_context() -> None:
    found = by_context(
        [
            exchange(600, {"none": 10.0, "a": 12.0}, ["none", "a"]),
            exchange(700, {"none": 20.0, "a": 26.0}, ["none"]),
            exchange(100, {"none": 10.0, "a": 20.0}, ["none", "a"]),
        ]
    )
    assert list(found) == [512, 1024]
    assert found[512]["a"]["ratio"]["median"] == pytest.approx(2.0)
    later = found[1024]["a"]
    assert later["ratio"]["median"] == pytest.approx(1.25)
    assert (later["answers"], later["same_text"]) == (2, 1)
    # 100 tokens in 40 steps, which verified 75 drafts: 60 of them were accepted.
    assert later["tau"] == pytest.approx(2.5)
    assert later["acceptance"] == pytest.approx(0.8)
    assert later["draft_length"] == pytest.approx(3.0)
    assert later["verify_length"] == pytest.approx(1.875)


def test_nothing_verified_has_no_acceptance() -> None:
    turn = Turn(100, 0, 10.0, 100, 0, 0)
    found = by_context([Exchange(0, 0, 5, {"none": turn}, ["none"])])
    assert found[512]["none"]["acceptance"] is None


class FakeEngine:
    """Answers by the length of what it is asked."""

    def __init__(self, name: str, asked: list[tuple[str, int]], odd: bool) -> None:
        self.name, self._asked, self._odd = name, asked, odd

    def answer(self, ids: list[int], most: int) -> tuple[list[int], Turn]:
        self._asked.append((self.name, len(ids)))
        tokens = 2 if len(ids) == 20 else most
        text = [len(ids)] * tokens
        if self._odd and len(ids) == 30:
            text[-1] = 0
        return text, Turn(tokens - 1, 0, 1.0, tokens, 0, 0)


class FakeTalk:
    def __init__(self) -> None:
        self.heard: list[list[int]] = []
        self._lengths: Any = iter((10, 20, 30, None))

    def begin(self) -> None:
        assert not self.heard

    def ask(self) -> list[int] | None:
        length = next(self._lengths)
        return None if length is None else [1] * length

    def hear(self, answer: list[int]) -> None:
        self.heard.append(answer)


def test_all_arms_answer_the_reference_s_conversation() -> None:
    asked: list[tuple[str, int]] = []
    engines = [FakeEngine("none", asked, False), FakeEngine("a", asked, True)]
    args = long_context.parse([*NEEDED, "--answer-tokens", "9"])
    talk = FakeTalk()
    found = list(long_context.hold(engines, args, 3, talk))  # type: ignore[arg-type]
    # In turn, another one first each time.
    assert asked == [
        *(("none", 10), ("a", 10), ("a", 20), ("none", 20), ("none", 30), ("a", 30))
    ]
    # A short answer is heard, but not timed; the reference's is the one that stays.
    assert [e.context for e in found] == [10, 30] and [e.turn for e in found] == [0, 2]
    assert talk.heard == [[10] * 9, [20] * 2, [30] * 9]
    assert [e.same for e in found] == [["none", "a"], ["none"]]
    assert {e.conversation for e in found} == {3}


def test_every_other_question_is_the_reference_s_alone() -> None:
    asked: list[tuple[str, int]] = []
    engines = [FakeEngine("none", asked, False), FakeEngine("a", asked, False)]
    args = long_context.parse([*NEEDED, "--answer-tokens", "9", "--every", "2"])
    talk = FakeTalk()
    found = list(long_context.hold(engines, args, 0, talk))  # type: ignore[arg-type]
    assert asked == [*(("none", 10), ("a", 10), ("none", 20), ("a", 30), ("none", 30))]
    assert [e.context for e in found] == [10, 30]
    assert talk.heard == [[10] * 9, [20] * 2, [30] * 9]


def test_figures_are_drawn(tmp_path: Path) -> None:
    speeds = {"none": 10.0, "a": 12.0}
    found = by_context([exchange(c, speeds, ["none"]) for c in (100, 600)])
    long_context.plot(found, tmp_path / "long.png")
    assert (tmp_path / "long.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("typed", "says"),
    [
        (["--conversations", "0"], "--conversations is 0"),
        (["--every", "0"], "--every is 0"),
        (["--answer-tokens", "8"], "--answer-tokens is 8"),
        (["--max-model-len", "500"], "--max-model-len 500 has no room"),
    ],
)
def test_wrong_values_are_refused(typed: list[str], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        long_context.parse([*NEEDED, *typed])
