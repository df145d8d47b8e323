"""Faults under a running engine: what is said, and that the text stays the target's.

One engine serves all of them, with a trace on a full disk from the start. NaN while
drafting is in ``test_bad_drafts``, bad files at the start in ``test_bad_inputs`` and
``test_adaptive``, killed workers in ``test_matrix_server``.
"""

from __future__ import annotations

import itertools
import json
import logging
import math
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from tests.integration.engine import Engine, engine
from tests.integration.recorder import drive, greedy, prompt
from tests.integration.test_adaptive import cost_table, free
from vllm_dspark.calibration import file as calibration_file
from vllm_dspark.integration import runner, steering, worker
from vllm_dspark.integration.json_lines import JsonLines
from vllm_dspark.model.checkpoint import load_state, weights_hash

ARRIVALS = [
    (0, prompt(90), greedy(30)),
    (0, prompt(3), greedy(60)),
    (2, prompt(40), greedy(27)),
    (9, prompt(33), greedy(40)),
]
Log = list[str]


@pytest.fixture(scope="module")
def expected(tiny_target: Path) -> list[list[int]]:
    with engine(tiny_target) as plain:
        return [t.tokens for t in drive(plain, ARRIVALS)]


@pytest.fixture(scope="module")
def files(
    tiny_drafter: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    """The drafter, and the calibration and cost table that the user names."""
    folder = tmp_path_factory.mktemp("files")
    drafter = Path(shutil.copytree(tiny_drafter, folder / "drafter"))
    row: dict[str, Any] = {"request_temperature": 0.0, "temperature": [1.2] * 5}
    row["bias"] = [0.1] * 5
    mixing = {"weight": [0.8] * 5, "certainty": [0.5] * 5, "bias": [0.1] * 5}
    row["with_certainty"] = mixing
    calibration = folder / "calibration.json"
    calibration_file.write(calibration, weights_hash(drafter), [row], {}, {})
    table = Path(cost_table(folder, free))
    return {"drafter": drafter, "calibration": calibration, "cost_table": table}


@pytest.fixture(scope="module")
def dspark(
    tiny_target: Path, files: dict[str, Path], expected: list[list[int]]
) -> Iterator[Engine]:
    """After the engine of ``expected``, whose end takes others of the process along."""
    ours = {name: str(files[name]) for name in ("calibration", "cost_table")}
    ours |= {"policy": "adaptive", "trace": "/dev/full"}
    config = {"dspark": ours}
    with engine(tiny_target, files["drafter"], additional_config=config) as dspark:
        yield dspark


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> Log:
    """Warnings of ours."""
    found: Log = []
    log = logging.getLogger("vllm_dspark")
    monkeypatch.setattr(log, "warning", lambda text, *args: found.append(text % args))
    return found


def served(dspark: Engine, each_step: Callable[[int], None] | None = None) -> list:
    """Texts, after which drafts were accepted."""
    before = dspark.stats().accepted
    texts = drive(dspark, ARRIVALS, each_step=each_step)
    assert dspark.stats().accepted > before
    return [text.tokens for text in texts]


# ---- files ----


def test_a_full_disk_ends_a_trace_and_nothing_else(
    dspark: Engine, expected: list[list[int]], said: Log
) -> None:
    assert served(dspark) == expected
    assert served(dspark) == expected
    assert said == ["DSpark: the trace ends, /dev/full: [Errno 28] No space left on "
                    "device"]  # fmt: skip


def test_what_a_full_disk_had_room_for_stays(
    tmp_path: Path, said: Log, monkeypatch: pytest.MonkeyPatch
) -> None:
    import os

    path, write = tmp_path / "lines", os.write
    lines = JsonLines(str(path), "step log")
    lines.add(step=0)
    lines.flush()

    def full(*args: Any) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "write", full)
    for step in range(1, 2000):
        lines.add(step=step)
    monkeypatch.setattr(os, "write", write)
    lines.add(step=2000)
    lines.flush()
    assert [json.loads(line) for line in path.open()] == [{"step": 0}]
    assert len(said) == 1 and "step log ends" in said[0]


def truncated(path: Path) -> None:
    with path.open("r+b") as file:
        file.truncate(11)


def swapped(path: Path) -> None:
    path.write_text('{"kind": "something else"}' + " " * 4000)


@pytest.mark.parametrize("damage", [truncated, swapped])
def test_files_that_change_under_the_engine(
    dspark: Engine,
    expected: list[list[int]],
    files: dict[str, Path],
    damage: Callable[[Path], None],
    said: Log,
) -> None:
    """They were read when it started, and are not looked at again."""
    paths = [
        files["calibration"],
        files["cost_table"],
        files["drafter"] / "config.json",
    ]
    before = [path.read_bytes() for path in paths]

    def after_step(number: int) -> None:
        if number == 6:
            for path in paths:
                damage(path)

    try:
        assert served(dspark, after_step) == expected
        assert served(dspark) == expected
    finally:
        for path, content in zip(paths, before, strict=True):
            path.write_bytes(content)
    assert said == []


def mapped_file(tensor: torch.Tensor) -> str:
    """The file that a tensor's memory is a mapping of, if it is."""
    address = tensor.data_ptr()
    for line in Path("/proc/self/maps").read_text().splitlines():
        start, _, end = line.split(maxsplit=1)[0].partition("-")
        if int(start, 16) <= address < int(end, 16):
            return "".join(line.split(maxsplit=5)[5:])
    return ""


def test_weights_that_change_under_the_engine(
    dspark: Engine, files: dict[str, Path]
) -> None:
    """They are copies: safetensors maps a file into memory, and a mapped file that is
    overwritten in place, as by ``cp``, kills the process (SIGBUS)."""
    folder = files["drafter"]
    assert str(folder) in mapped_file(load_state(folder)["fc.weight"])
    model = dspark.runner.drafter.model
    head = [v for v in vars(model.head).values() if isinstance(v, torch.Tensor)]
    assert len(head) >= 4
    for tensor in [*model.parameters(), *model.buffers(), *head]:
        assert str(folder) not in mapped_file(tensor)


# ---- between the processes ----


def without_one(drafts: Any, number: int) -> None:
    """A request of the step is missing from the message."""
    if len(drafts.req_ids) > 1:
        drop = number % len(drafts.req_ids)
        if drafts.confidences is not None:  # nothing may have been drafted
            drafts.confidences = np.delete(drafts.confidences, drop, axis=0)
            drafts.certainties = np.delete(drafts.certainties, drop, axis=0)
        del drafts.req_ids[drop], drafts.draft_token_ids[drop]


def without_confidences(drafts: Any, number: int) -> None:
    if number % 2:
        drafts.confidences = None


def without_certainties(drafts: Any, number: int) -> None:
    if number % 2:
        drafts.certainties = None


def garbled(drafts: Any, number: int) -> None:
    """No probabilities in a row of the confidences, no numbers among certainties."""
    values = (math.nan, -3.0, 2.0, math.inf)
    if drafts.confidences is not None and len(drafts.confidences):
        for signal in (drafts.confidences, drafts.certainties):
            signal[number % len(signal)][number % 5 :] = values[number % 4]


FAULTS = [without_one, without_confidences, without_certainties, garbled]


@pytest.mark.parametrize("fault", FAULTS)
def test_confidences_that_do_not_arrive(
    dspark: Engine,
    expected: list[list[int]],
    fault: Callable[[Any, int], None],
    said: Log,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """History takes their place; drafts that are missing are no drafts."""
    update, count = dspark.scheduler.update_draft_token_ids, itertools.count()
    # Lists of its own: the runner's would lose the request as well.
    seen = []

    def faulty(drafts: Any) -> None:
        drafts.req_ids = list(drafts.req_ids)
        fault(drafts, next(count))
        seen.append(drafts)
        update(drafts)

    monkeypatch.setattr(dspark.scheduler, "update_draft_token_ids", faulty)
    assert served(dspark) == expected
    assert len(seen) > 20 and said == []
    survival = dspark.scheduler.controller.survival
    assert len(survival) == 0


# ---- clocks ----


class Jumping:
    """A clock that leaps forwards and back, an hour at a time."""

    def __init__(self) -> None:
        self.readings = 0

    def read(self) -> float:
        self.readings += 1
        leap = (0.0, 3600.0, -3600.0, 0.0, 1e9, 0.0)[self.readings % 6]
        return 1000.0 + 0.001 * self.readings + leap


def test_clocks_that_jump(
    dspark: Engine, expected: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Times that cannot be are passed over: no length is chosen by them for long."""
    clock = Jumping()
    fake = SimpleNamespace(perf_counter=clock.read, monotonic=clock.read)
    for module in (steering, worker, runner):
        monkeypatch.setattr(module, "time", fake)
    controller = dspark.scheduler.controller
    for _ in range(3):
        assert served(dspark) == expected
    assert clock.readings > 500
    assert 0 <= controller.overhead < math.inf
    seconds = controller.live.snapshot().step_seconds(np.arange(1, 200))
    assert np.isfinite(seconds).all() and (np.diff(seconds) >= 0).all()
    monkeypatch.undo()
    for _ in range(6):
        assert served(dspark) == expected
    assert controller.live.error() < 10


# ---- with an engine of their own, which ends the one above ----


def test_a_cache_that_cannot_be_written(
    tiny_target: Path,
    tiny_drafter: Path,
    expected: list[list[int]],
    tmp_path: Path,
    said: Log,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Costs are measured, used, and not kept; that is said once."""
    from vllm_dspark.integration import costs

    profile = costs.profile
    monkeypatch.setattr(costs, "profile", lambda *a, **k: profile(*a, budget=1.0, **k))
    (tmp_path / "a file").write_text("")
    monkeypatch.setenv("VLLM_DSPARK_CACHE", str(tmp_path / "a file" / "cache"))
    ours = {"dspark": {"policy": "adaptive"}}
    with engine(tiny_target, tiny_drafter, additional_config=ours) as eng:
        assert [t.tokens for t in drive(eng, ARRIVALS)] == expected
        assert eng.scheduler.controller.adapts
    (warning,) = said
    assert "not kept" in warning and "a file/cache" in warning


def test_a_drafter_that_raises_ends_the_engine(
    tiny_target: Path, tiny_drafter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At once and with its own words; no request gets a text."""
    from vllm import SamplingParams

    params = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True)
    with engine(tiny_target, tiny_drafter) as eng:
        backbone, calls = eng.runner.drafter._backbone, itertools.count()

        def broken(*args: Any) -> Any:
            if next(calls) == 2:
                raise RuntimeError("the drafter is broken")
            return backbone(*args)

        monkeypatch.setattr(eng.runner.drafter, "_backbone", broken)
        with pytest.raises(RuntimeError, match="the drafter is broken"):
            eng.tokens([[5, 9, 17], [7, 7]], params)
