"""Ratios of turns that engines took at the same moment."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import _in_process
import paired_load
import pytest
from _paired_turns import Turn, paired, prompt_weight, summary


def turns(speeds: list[float], drafts: int = 0) -> list[Turn]:
    return [Turn(100, 0, 100 / speed, 10, drafts, drafts // 2) for speed in speeds]


def test_the_machine_cancels() -> None:
    """It wavers by a factor of three, and an arm is 10% faster at every moment."""
    machine = [10.0, 30.0, 15.0, 20.0, 12.0]
    found = paired(turns([1.1 * s for s in machine]), turns(machine), 0.0)
    assert found == pytest.approx({"median": 1.1, "low": 1.1, "high": 1.1})
    with pytest.raises(ValueError, match="zip"):
        paired(turns(machine), turns(machine[1:]), 0.0)


def with_prompts(prompts: list[int], emitted: float) -> list[Turn]:
    """A token takes so many seconds, one of a prompt a quarter of 0.1 s."""
    return [Turn(100, p, 100 * emitted + 0.025 * p, 10, 0, 0) for p in prompts]


def test_prompts_that_began_cancel() -> None:
    """An arm emits a token in 0.08 s that takes the reference 0.1 s."""
    reference = with_prompts([0, 90, 40, 200, 10, 120, 60], 0.1)
    assert prompt_weight(reference) == pytest.approx(0.25)
    disturbed = [*reference[:3], Turn(100, 90, 99.0, 10, 0, 0), *reference[3:]]
    assert prompt_weight(disturbed) == pytest.approx(0.25, rel=0.1)
    arm = with_prompts([100, 0, 150, 30, 80, 0, 70], 0.08)
    found = paired(arm, reference, prompt_weight(reference))
    assert 1.15 < found["low"] <= found["median"] <= found["high"] <= 1.25
    without = paired(arm, reference, 0.0)
    assert without["high"] - without["low"] > 2 * (found["high"] - found["low"])
    assert prompt_weight(turns([10.0, 20.0])) == 0


def test_the_interval_holds_the_median_of_what_was_seen() -> None:
    found = paired(turns([9.0, 10.0, 11.0, 12.0, 13.0]), turns([10.0] * 5), 0.0)
    assert 0.9 <= found["low"] < found["median"] == pytest.approx(1.1)
    assert found["median"] < found["high"] <= 1.3 + 1e-9


def test_a_load_is_summed_up() -> None:
    found = summary(
        {
            "none": turns([10.0, 20.0]),
            "dspark-fixed-1": turns([12.0, 24.0], 40),
            "dspark-adaptive": turns([15.0, 30.0], 80),
        },
        load=4,
    )
    arms = found["arms"]
    assert arms["dspark-fixed-1"]["ratio"]["median"] == pytest.approx(1.2)
    assert arms["dspark-adaptive"]["draft_length"] == pytest.approx(2.0)
    assert arms["dspark-adaptive"]["verify_length"] == pytest.approx(1.0)
    assert found["best_other"]["arm"] == "dspark-fixed-1"
    assert found["best_other"]["median"] == pytest.approx(1.25)


def test_figures_are_drawn(tmp_path: Path) -> None:
    found = summary({"none": turns([1.0, 2.0]), "a": turns([2.0, 3.0])}, load=1)
    paired_load.plot({1: found, 8: found}, "none", tmp_path / "paired.png")
    assert (tmp_path / "paired.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("typed", "says"),
    [(["--turns", "0"], "--turns is 0"), (["--arms", "none"], r"--arms \['none'\]")],
)
def test_wrong_values_are_refused(typed: list[str], says: str) -> None:
    needed = "--target T --drafter D --prompts P --out O".split()  # noqa: SIM905
    with pytest.raises(ValueError, match=says):
        paired_load.parse([*needed, *typed])


@pytest.mark.parametrize("loaded", ["", "/lib/other.so"])
def test_engines_run_on_the_servers_openmp(
    loaded: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The script begins again with it, once."""
    begun: list[tuple[str, list[str], str]] = []
    monkeypatch.setenv("LD_PRELOAD", loaded)
    monkeypatch.setattr(
        "os.execv",
        lambda file, argv: begun.append((file, argv, os.environ["LD_PRELOAD"])),
    )
    monkeypatch.setattr(_in_process, "intel_openmp", lambda: Path("/x/libiomp5.so"))
    monkeypatch.setattr("sys.argv", ["paired_load.py", "--out", "x"])
    _in_process.preload()
    (file, argv, preloaded) = begun.pop()
    assert file == sys.executable and argv == [sys.executable, *sys.argv]
    assert preloaded.split(":") == ["/x/libiomp5.so", *filter(None, [loaded])]
    _in_process.preload()  # it is there now
    assert not begun
    monkeypatch.setenv("LD_PRELOAD", loaded)
    monkeypatch.setattr(_in_process, "intel_openmp", lambda: None)
    _in_process.preload()  # not installed: as it was
    assert not begun and os.environ["LD_PRELOAD"] == loaded
