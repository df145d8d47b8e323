"""Files that are read, with bits flipped, parts missing, and values that cannot be.

Each reader takes a file or raises ValueError, which callers know what to do with; and
what it takes can be served with.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.fuzz.damage import FUZZ, JSON, damaged, dumped, edited
from tests.schedule.test_cost_file import CONTENT
from vllm_dspark.calibration import file as calibration_file
from vllm_dspark.calibration.online import OnlineSurvival
from vllm_dspark.config import DrafterConfig
from vllm_dspark.model import checkpoint
from vllm_dspark.model.headers import INDEX, WEIGHTS, read_headers
from vllm_dspark.model.speculators import to_deepspec, to_speculators
from vllm_dspark.schedule import cost_file
from vllm_dspark.schedule.correction import LiveCost

ROW = {"request_temperature": 0.0, "temperature": [1.0, 2.0], "bias": [0.0, 0.1]}
MIXED = {"weight": [0.5, 1.0], "certainty": [0.7, 0.6], "bias": [-0.1, 0.0]}
CALIBRATION = {
    "schema": 1,
    "kind": "dspark-calibration",
    "weights_hash": "abc",
    "settings": [{**ROW, "with_certainty": MIXED}, {**ROW, "request_temperature": 1.0}],
    "data": {"label": "some text"},
}


# ---- calibrations ----


def calibrated(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    try:
        found = calibration_file.read(path)
        survival = OnlineSurvival(2, found)
    except ValueError:
        return
    confidence = np.array([[0.5, 0.9], [0.0, 1.0]])
    for certainty in (None, np.array([[1.0, -9.0], [np.nan, np.inf]])):
        made = survival.apply("ab", (0.0, 0.7), confidence, certainty)
        assert ((made.survival >= 0) & (made.survival <= 1)).all()


@FUZZ
@given(content=damaged(dumped(CALIBRATION)))
def test_damaged_calibrations(tmp_path: Path, content: bytes) -> None:
    calibrated(tmp_path / "file.json", content)


@FUZZ
@given(raw=edited(CALIBRATION))
def test_calibrations_with_other_values(tmp_path: Path, raw: Any) -> None:
    calibrated(tmp_path / "file.json", dumped(raw))


# ---- cost tables ----


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("cost") / "table.json"
    cost_file.write(path, CONTENT)
    return path.read_bytes()


def priced(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    try:
        found = cost_file.read(path).table
    except ValueError:
        return
    live = LiveCost(found)
    live.observe(3, 100, 0.02)
    seconds = live.snapshot().step_seconds(np.array([1, 5, 10**6]), 1000)
    assert np.isfinite(seconds).all() and (seconds > 0).all()


@FUZZ
@given(data=st.data())
def test_damaged_cost_tables(tmp_path: Path, table: bytes, data: st.DataObject) -> None:
    priced(tmp_path / "file.json", data.draw(damaged(table)))


@FUZZ
@given(data=st.data())
def test_cost_tables_with_other_values(
    tmp_path: Path, table: bytes, data: st.DataObject
) -> None:
    priced(tmp_path / "file.json", dumped(data.draw(edited(json.loads(table)))))


TIMES = st.one_of(
    st.floats(), st.floats(1e-4, 1.0), st.sampled_from([-1e9, 0.0, 3600.0, 1e9])
)
OBSERVED = st.tuples(st.integers(0, 10**6), st.integers(0, 10**6), TIMES)


@FUZZ
@given(st.lists(st.tuples(st.booleans(), OBSERVED), max_size=60))
def test_times_of_a_clock_that_jumps(
    seen: list[tuple[bool, tuple[int, int, float]]],
) -> None:
    live = LiveCost(CONTENT.table)
    for drafting, observation in seen:
        learn = live.observe_draft if drafting else live.observe
        learn(*observation)
    seconds = live.snapshot().step_seconds(np.array([1, 5, 10**6]), 1000)
    assert np.isfinite(seconds).all() and (seconds > 0).all()
    assert math.isnan(live.error()) or live.error() >= 0


@pytest.mark.parametrize("seconds", [1.7e308, 1e9, 3601.0, 0.0, -1e9, math.nan])
def test_times_that_no_step_takes(seconds: float) -> None:
    """However often they come: a machine may get slower, but not that slow."""
    live = LiveCost(CONTENT.table)
    for _ in range(40):
        live.observe(4, 0, seconds)
        live.observe_draft(2, 3, seconds)
    assert live.snapshot() == CONTENT.table and live.observed == 0


# ---- drafters ----


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, tiny_drafter: Path) -> Path:
    path = tmp_path_factory.mktemp("fuzz") / "drafter"
    return Path(shutil.copytree(tiny_drafter, path))


def restoring(
    folder: Path, name: str, content: bytes, read: Callable[[Path], object]
) -> object | None:
    """What reading the folder gives with another content of one file."""
    file = folder / name
    before = file.read_bytes() if file.exists() else None
    # A new file: the old one may still be mapped into memory.
    file.unlink(missing_ok=True)
    file.write_bytes(content)
    try:
        return read(folder)
    except ValueError:
        return None
    finally:
        file.unlink()
        if before is not None:
            file.write_bytes(before)


def header_size(content: bytes) -> int:
    return 8 + int.from_bytes(content[:8], "little")


def with_header(content: bytes, header: Any) -> bytes:
    raw = dumped(header)
    return len(raw).to_bytes(8, "little") + raw + content[header_size(content) :]


@FUZZ
@given(data=st.data())
def test_damaged_headers(folder: Path, data: st.DataObject) -> None:
    sound = (folder / WEIGHTS).read_bytes()
    content = data.draw(damaged(sound, within=header_size(sound)))
    restoring(folder, WEIGHTS, content, checkpoint.check_checkpoint)
    restoring(folder, WEIGHTS, content, checkpoint.load_state)


@FUZZ
@given(data=st.data())
def test_headers_with_other_values(folder: Path, data: st.DataObject) -> None:
    sound = (folder / WEIGHTS).read_bytes()
    header = json.loads(sound[8 : header_size(sound)])
    content = with_header(sound, data.draw(edited(header)))
    restoring(folder, WEIGHTS, content, checkpoint.check_checkpoint)
    restoring(folder, WEIGHTS, content, checkpoint.load_state)


@FUZZ
@given(raw=edited({"weight_map": {"a": "x.safetensors", "b": "y.safetensors"}}))
def test_indexes_with_other_values(tmp_path: Path, raw: Any) -> None:
    found = restoring(tmp_path, INDEX, dumped(raw), read_headers)
    assert found is None, "there are no such files"


@FUZZ
@given(data=st.data())
def test_damaged_configurations(folder: Path, data: st.DataObject) -> None:
    content = data.draw(damaged((folder / "config.json").read_bytes()))
    restoring(folder, "config.json", content, checkpoint.check_checkpoint)


@FUZZ
@given(data=st.data())
def test_configurations_with_other_values(folder: Path, data: st.DataObject) -> None:
    """A configuration that is taken describes tensors, which can be compared."""
    raw = data.draw(edited(json.loads((folder / "config.json").read_bytes())))
    restoring(folder, "config.json", dumped(raw), checkpoint.check_checkpoint)


@FUZZ
@given(data=st.data())
def test_speculators_configurations_with_other_values(
    folder: Path, data: st.DataObject
) -> None:
    sound = to_speculators(json.loads((folder / "config.json").read_bytes()))
    try:
        DrafterConfig.from_dict(to_deepspec(data.draw(edited(sound))))
    except ValueError:
        return


@FUZZ
@given(st.dictionaries(st.text(max_size=8), JSON))
def test_configurations_of_anything_else(raw: dict[str, Any]) -> None:
    with pytest.raises(ValueError):
        DrafterConfig.from_dict(raw)
    for kind in ("dspark", 5):
        with pytest.raises(ValueError):
            to_deepspec({**raw, "speculators_model_type": kind})


@pytest.mark.parametrize("name", [WEIGHTS, "config.json", INDEX])
def test_depth_without_end(folder: Path, name: str) -> None:
    """Where Python's parser gives up before its stack does."""
    deep = b"[" * 100_000
    content = len(deep).to_bytes(8, "little") + deep if name == WEIGHTS else deep
    if name == INDEX:
        assert restoring(folder.parent, name, content, read_headers) is None
    else:
        assert restoring(folder, name, content, checkpoint.check_checkpoint) is None
