"""When lengths have followed a jump of load, on logs whose answer is known."""

from __future__ import annotations

import random
from typing import Any

import pytest
from _burst_analysis import WITHIN, jumps

Row = dict[str, Any]
PHASE = 200


def row(time: int, requests: int, positions: int, verified: float, reason: str) -> Row:
    return {
        "time": float(time),
        "requests": requests,
        "positions": positions,
        "verified": verified * requests,
        "reason": reason,
    }


def log(*phases: tuple[int, list[tuple[int, float]]]) -> list[Row]:
    """Steps one second apart: requests, and (positions, verified each) of each step."""
    steps = [(n, *lengths) for n, phase in phases for lengths in phase]
    return [row(i, *step, "pays") for i, step in enumerate(steps)]


def burst(late: int, high: int = 64) -> list[Row]:
    """5 positions alone, none under load, ``late`` steps after each jump."""
    drafts, none = (5, 3.0), (0, 0.0)
    under_load = [drafts] * late + [none] * (PHASE - late)
    alone = [none] * late + [drafts] * (PHASE - late)
    return log((1, [drafts] * PHASE), (high, under_load), (1, alone))


MARKS = [0.0, float(PHASE), 2.0 * PHASE]
LOADS = [1, 64, 1]


@pytest.mark.parametrize("late", [0, 10, 40, 90])
def test_a_clean_jump(late: int) -> None:
    up, down = jumps(burst(late), LOADS, MARKS)
    for jump in (up, down):
        # The running median of five has followed when three of them have.
        expected = late + 2 if late else 0
        assert jump["settled_after"] == expected
        assert jump["positions"]["settled_after"] == expected
        assert jump["within"] == (expected <= WITHIN)
        assert jump["steps"] == PHASE and jump["load_steps"] == 0
    assert (up["from"], up["to"], down["from"], down["to"]) == (1, 64, 64, 1)
    lengths = {"before": 3.0, "steady": 0.0, "moved": True, "band": 0.5}
    assert lengths.items() <= up["verify_length"].items()
    assert down["verify_length"]["before"] == 0.0


def test_the_slower_of_the_two_counts() -> None:
    rows = burst(10)
    for step in rows[PHASE + 10 : PHASE + 30]:
        step["verified"] = 2.0 * step["requests"]
    up, _ = jumps(rows, LOADS, MARKS)
    assert up["positions"]["settled_after"] == 12
    assert up["verify_length"]["settled_after"] == up["settled_after"] == 32


def test_probes_and_what_they_drafted_do_not_count() -> None:
    """Half of all steps under load probe; what they drafted is verified in the next."""
    rows = burst(10)
    for i in range(PHASE + 1, 2 * PHASE, 4):
        rows[i].update(positions=5, reason="probe")
        rows[i + 1].update(
            positions=5, reason="probe", verified=5.0 * rows[i + 1]["requests"]
        )
        rows[min(i + 2, 2 * PHASE - 1)]["verified"] = 5.0 * 64
    up, _ = jumps(rows, LOADS, MARKS)
    assert up["positions"]["steady"] == up["verify_length"]["steady"] == 0.0
    assert up["positions"]["band"] == up["verify_length"]["band"] == 0.5
    assert 10 <= up["settled_after"] <= 20


def test_touching_the_steady_state_is_not_staying_there() -> None:
    rows = burst(0)
    for i in range(PHASE + 10, PHASE + 70):
        rows[i].update(positions=5, verified=3.0 * 64)
    up, _ = jumps(rows, LOADS, MARKS)
    assert up["settled_after"] == 72 and up["within"] is False


def test_a_steady_state_that_alternates_has_a_wider_band() -> None:
    random.seed(1)
    rows = burst(10)
    for i in range(PHASE + 10, 2 * PHASE):
        positions = random.choice((0, 2))
        rows[i].update(positions=positions, verified=0.5 * positions * 64)
    up, _ = jumps(rows, LOADS, MARKS)
    assert up["positions"]["band"] == 2.0 > 0.5
    assert up["positions"]["moved"] and 10 <= up["settled_after"] <= 20


def test_nothing_is_said_of_what_has_no_steady_state() -> None:
    """One client whose answers differ: 7 verified of one, 1 of the next."""
    rows = burst(10)
    for i in range(2 * PHASE, 3 * PHASE):
        rows[i]["verified"] = 7.0 if i < 2 * PHASE + 140 else 1.0
    _, down = jumps(rows, LOADS, MARKS)
    assert down["positions"]["moved"] and down["positions"]["settled_after"] == 12
    lengths = down["verify_length"]
    assert (lengths["before"], lengths["steady"], lengths["band"]) == (0.0, 1.0, 6.0)
    assert lengths["moved"] is None and lengths["settled_after"] is None
    assert down["within"] is None and down["settled_after"] is None


def test_what_never_settles() -> None:
    """It falls on and on: the last half's median is passed, not kept."""
    falling = [(7 - 7 * i // PHASE, 7 - 7 * i / PHASE) for i in range(PHASE)]
    rows = log((1, [(7, 7.0)] * PHASE), (64, falling))
    (jump,) = jumps(rows, [1, 64], MARKS[:2])
    assert jump["settled_after"] is None or jump["settled_after"] > WITHIN
    assert jump["within"] is False


def test_the_load_takes_steps_to_arrive() -> None:
    """Steps that only read prompts count as steps, and say nothing about lengths."""
    rows = burst(20)
    for i in range(8):
        rows[PHASE + i].update(requests=8 * i, verified=0)
    up, _ = jumps(rows, LOADS, MARKS)
    assert up["load_steps"] == 8 and up["settled_after"] == 22
    rows = [dict(r, requests=1) for r in burst(20)]
    assert not jumps(rows, LOADS, MARKS)[0]["load_steps"]


def test_a_load_that_changes_nothing_says_so() -> None:
    rows = log((1, [(5, 3.0)] * PHASE), (4, [(5, 3.0)] * PHASE))
    (jump,) = jumps(rows, [1, 4], MARKS[:2])
    assert jump["settled_after"] == 0 and not jump["positions"]["moved"]


def test_short_phases_are_not_judged() -> None:
    rows = log((1, [(5, 3.0)] * PHASE), (64, [(0, 0.0)] * (2 * WITHIN - 1)))
    (jump,) = jumps(rows, [1, 64], MARKS[:2])
    assert jump["within"] is None and jump["settled_after"] == 0
    with pytest.raises(ValueError, match=r"no request decoded .* 8 clients"):
        jumps(rows, [1, 64, 8], [0.0, float(PHASE), 1e6])
