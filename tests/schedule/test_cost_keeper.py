"""What is kept of a corrected cost table, when, and what becomes of trouble."""

from __future__ import annotations

import errno
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.schedule.test_cost_file import CONTENT, KEY
from vllm_dspark.schedule import cost_file
from vllm_dspark.schedule.correction import LiveCost
from vllm_dspark.schedule.cost_file import CostFile, path_of
from vllm_dspark.schedule.cost_keeper import (
    INTERVAL,
    MAX_ERROR,
    MIN_OBSERVATIONS,
    CostKeeper,
)


class Engine:
    """A keeper, what corrects its table, and a clock."""

    def __init__(self, root: Path, content: CostFile = CONTENT) -> None:
        self.now, self.live = 1000.0, LiveCost(content.table)
        self.keeper = CostKeeper(root, content, self.live, lambda: self.now)

    def serve(self, steps: int = MIN_OBSERVATIONS, factor: float = 2.0) -> None:
        """Steps that take so many times what the first table says."""
        for i in range(steps):
            tokens = 1 + i % 8
            seconds = factor * float(CONTENT.table.step_seconds(tokens))
            self.live.observe(tokens, 0, seconds)


def kept(root: Path) -> CostFile:
    found, why = cost_file.load(root, KEY)
    assert found is not None, why
    return found


def test_the_next_start_has_the_corrected_table(tmp_path: Path) -> None:
    cost_file.save(tmp_path, CONTENT)
    engine = Engine(tmp_path)
    engine.serve()
    engine.keeper.keep()
    found = kept(tmp_path)
    assert found.table == engine.live.snapshot() != CONTENT.table
    assert found.table.step_seconds(4) == pytest.approx(
        2 * CONTENT.table.step_seconds(4), rel=0.05
    )
    assert (found.key, found.provenance) == (KEY, CONTENT.provenance)
    # What else is said of it stays: how far the profiling meant to go counts.
    seen = {"live_observations": MIN_OBSERVATIONS}
    assert found.measured == {**CONTENT.measured, **seen}
    again = Engine(tmp_path, found)
    again.serve()
    again.keeper.keep()
    assert kept(tmp_path).measured["live_observations"] == 2 * MIN_OBSERVATIONS


def test_a_few_observations_are_not_enough(tmp_path: Path) -> None:
    cost_file.save(tmp_path, CONTENT)
    engine = Engine(tmp_path)
    engine.serve(MIN_OBSERVATIONS - 1)
    engine.keeper.idle()
    engine.keeper.keep()
    assert kept(tmp_path) == CONTENT
    engine.serve(1)
    engine.keeper.idle()
    assert kept(tmp_path) != CONTENT


def test_a_table_that_still_predicts_poorly_is_not_kept(tmp_path: Path) -> None:
    cost_file.save(tmp_path, CONTENT)
    engine = Engine(tmp_path)
    for i in range(2 * MIN_OBSERVATIONS):  # as on a machine that others hold up
        engine.live.observe(4, 0, (0.01, 0.1, 2.0)[i % 3])
    assert engine.live.error() > MAX_ERROR
    engine.keeper.keep()
    assert kept(tmp_path) == CONTENT
    engine.live.observe(4, 0, 0.2)
    engine.serve()
    engine.serve()
    engine.keeper.keep()
    assert kept(tmp_path) != CONTENT


def test_an_engine_that_is_often_idle_saves_now_and_then(tmp_path: Path) -> None:
    engine = Engine(tmp_path)
    engine.serve()
    engine.keeper.idle()
    first = kept(tmp_path)
    engine.serve()
    engine.now += INTERVAL - 1
    engine.keeper.idle()
    assert kept(tmp_path) == first
    engine.now += 1
    engine.keeper.idle()
    assert kept(tmp_path).measured["live_observations"] == 2 * MIN_OBSERVATIONS
    path = path_of(tmp_path, KEY)
    path.unlink()
    engine.now += INTERVAL
    engine.keeper.idle()  # nothing was learned since
    engine.keeper.keep()
    assert not path.exists()
    engine.serve()
    engine.keeper.keep()  # at the end there is no waiting
    assert kept(tmp_path).measured["live_observations"] == 3 * MIN_OBSERVATIONS


@pytest.mark.parametrize("reason", ["no folder", "full"])
def test_trouble_is_said_once(
    tmp_path: Path,
    reason: str,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cost_file.save(tmp_path, CONTENT)
    if reason == "full":

        def full(*args: Any) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(Path, "replace", full)
        root = tmp_path
    else:
        root = tmp_path / "other"
        root.mkdir()
        (root / cost_file.FOLDER).write_text("a file where the folder belongs")
    engine = Engine(root)
    for _ in range(3):
        engine.serve()
        engine.now += 2 * INTERVAL
        engine.keeper.idle()
        engine.keeper.keep()
    (record,) = caplog.records
    assert record.levelname == "WARNING" and "not kept" in record.getMessage()
    monkeypatch.undo()
    assert kept(tmp_path) == CONTENT
    assert len(list((tmp_path / cost_file.FOLDER).iterdir())) == 1


def test_what_is_no_valid_table_is_not_kept(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    cost_file.save(tmp_path, CONTENT)
    engine = Engine(tmp_path)
    engine.serve()
    broken = replace(CONTENT.table)
    object.__setattr__(broken, "step", tuple(reversed(broken.step)))
    monkeypatch.setattr(engine.live, "snapshot", lambda: broken)
    engine.keeper.keep()
    assert kept(tmp_path) == CONTENT
    (record,) = caplog.records
    assert "seconds fall" in record.getMessage()


def test_a_table_that_reaches_further_stays(tmp_path: Path) -> None:
    """One of an engine for more requests, measured while this one was running."""
    ends = {name: cost_file.reach(CONTENT, name) for name in cost_file.AXES}
    for name, end in ends.items():
        further = replace(CONTENT, measured={name: [end + 1, 1]})
        cost_file.save(tmp_path, further)
        engine = Engine(tmp_path)
        engine.serve()
        engine.keeper.keep()
        assert kept(tmp_path) == further
    path_of(tmp_path, KEY).write_text("{")
    engine.serve()
    engine.keeper.keep()
    assert kept(tmp_path).table == engine.live.snapshot()
