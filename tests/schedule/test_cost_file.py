"""The cost table's file: what is written is read, what is damaged is never used."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest

from tests.schedule.machine import true_table
from vllm_dspark.schedule import cost_file
from vllm_dspark.schedule.cost_file import CostFile, CostKey, load, path_of, save
from vllm_dspark.schedule.profile_points import Limits

KEY = CostKey(
    target="t" * 64,
    drafter="d" * 64,
    dtype="bfloat16",
    device="a CPU",
    threads=2,
    vllm_version="0.32.0",
    compiled=False,
    tensor_parallel=1,
)
CONTENT = CostFile(KEY, true_table(), {"how": "by hand"}, {"python": "3"})


@pytest.fixture
def path(tmp_path: Path) -> Path:
    found = save(tmp_path, CONTENT)
    assert found is not None
    return found


def test_round_trip(path: Path, tmp_path: Path) -> None:
    assert load(tmp_path, KEY) == (CONTENT, "")
    assert cost_file.read(path) == CONTENT
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]
    raw = json.loads(path.read_text())
    assert (raw["schema"], raw["kind"]) == (1, "dspark-cost")
    assert raw["key"]["threads"] == 2 and raw["measured"] == {"how": "by hand"}


def test_what_prompts_count_as_is_kept_and_older_files_do_not_have_it(
    tmp_path: Path,
) -> None:
    less = replace(CONTENT, table=replace(CONTENT.table, prompt_share=0.75))
    path = save(tmp_path, less)
    assert path is not None and load(tmp_path, KEY) == (less, "")
    raw = json.loads(path.read_text())
    del raw["step"]["prompt_share"]
    path.write_text(json.dumps(raw))
    assert load(tmp_path, KEY) == (CONTENT, "")


@pytest.mark.parametrize("part", ["batch_tokens", "requests", "positions"])
def test_a_table_of_a_smaller_engine_is_none(
    tmp_path: Path, part: str, caplog: pytest.LogCaptureFixture
) -> None:
    table = CONTENT.table
    ends = Limits(table.tokens[-1], table.requests[-1], table.positions[-1])
    save(tmp_path, CONTENT)
    assert load(tmp_path, KEY, ends) == (CONTENT, "")
    further = replace(ends, **{part: getattr(ends, part) + 1})
    found, reason = load(tmp_path, KEY, further)
    assert found is None and f"ends at {part}" in reason
    assert caplog.records == []
    # Profiling that meant to go there and had no time for it is not repeated.
    meant = replace(CONTENT, measured={part: [getattr(further, part), 1]})
    save(tmp_path, meant)
    assert load(tmp_path, KEY, further) == (meant, "")


def test_none_yet_is_no_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    table, reason = load(tmp_path, KEY)
    assert table is None and "no cost table yet" in reason
    assert caplog.records == []


def test_every_part_of_the_key_counts(path: Path, tmp_path: Path) -> None:
    for part in fields(CostKey):
        value = getattr(KEY, part.name)
        other: Any = (value + "x") if isinstance(value, str) else value + 1
        if isinstance(value, bool):
            other = not value
        foreign = replace(KEY, **{part.name: other})
        assert path_of(tmp_path, foreign) != path
        assert load(tmp_path, foreign)[0] is None
        with pytest.raises(ValueError, match=f"measured for {part.name} "):
            cost_file.read(path, foreign)


def edited(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], object]:
    def write(path: Path) -> None:
        raw = json.loads(path.read_text())
        change(raw)
        path.write_text(json.dumps(raw))

    return write


def step(raw: dict[str, Any], index: int, value: Any) -> None:
    raw["step"]["seconds"][index] = value


def cut(path: Path) -> None:
    path.write_text(path.read_text()[:300])


def folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def dangling(path: Path) -> None:
    path.unlink()
    path.symlink_to(path.parent / "nowhere")


DAMAGE: list[tuple[Callable[[Path], object], str]] = [
    (cut, "damaged, not JSON"),
    (lambda path: path.write_bytes(b""), "damaged, not JSON"),
    (lambda path: path.write_bytes(b"\xff\xfe\x00"), "damaged, not text"),
    (lambda path: path.write_text("[" * 100_000), "damaged, not JSON"),
    (lambda path: path.write_text("1" * 10_000), "damaged, not JSON"),
    (lambda path: path.write_text("[]"), "holds list"),
    (lambda path: path.write_text("null"), "holds NoneType"),
    (lambda path: path.write_text(" " * (1 << 21)), "bytes are no cost table"),
    (folder, "is no file"),
    (pipe, "is no file"),
    (dangling, "is no file"),
    (edited(lambda raw: raw.update(kind="dspark-calibration")), "'kind' is"),
    (edited(lambda raw: raw.update(schema=2)), "'schema' is 2"),
    (edited(lambda raw: raw.pop("schema")), "'schema' is None"),
    (edited(lambda raw: raw.pop("key")), "'key' must have"),
    (edited(lambda raw: raw["key"].update(more=1)), "'key' must have"),
    (edited(lambda raw: raw["key"].update(threads="2")), "key threads is '2'"),
    (edited(lambda raw: raw["key"].update(compiled=0)), "key compiled is 0"),
    (edited(lambda raw: raw["key"].update(threads=64)), "for threads 64"),
    (edited(lambda raw: raw.pop("step")), "'step' is None"),
    (edited(lambda raw: raw.pop("provenance")), "'provenance' is None"),
    (edited(lambda raw: raw["step"].pop("tokens")), "where a list belongs"),
    (edited(lambda raw: raw["draft"].update(seconds=[1, 2])), "where a list belongs"),
    (edited(lambda raw: raw["draft"].update(seconds=[])), "expected 7 by 4"),
    (edited(lambda raw: step(raw, 3, -0.01)), "-0.01 is no number of seconds"),
    (edited(lambda raw: step(raw, 3, float("nan"))), "nan is no number"),
    (edited(lambda raw: step(raw, 3, float("inf"))), "inf is no number"),
    (edited(lambda raw: step(raw, 3, 10**400)), "is no number of seconds"),
    (edited(lambda raw: step(raw, 3, None)), "None is no number of seconds"),
    (edited(lambda raw: step(raw, 3, [1])), "is no number of seconds"),
    (edited(lambda raw: step(raw, 3, 3.0)), "seconds fall"),
    (edited(lambda raw: raw["step"]["tokens"].reverse()), "must increase"),
    (
        edited(lambda raw: raw["step"].update(seconds_per_context_token="0")),
        "per_context_token '0'",
    ),
    (edited(lambda raw: raw["step"].update(prompt_share=[1])), "prompt_share [1]"),
    (edited(lambda raw: raw["draft"]["seconds"].pop()), "expected 7 by 4"),
]


@pytest.mark.parametrize(("damage", "match"), DAMAGE)
def test_damage_is_ignored_with_one_warning(
    path: Path,
    tmp_path: Path,
    damage: Callable[[Path], object],
    match: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    damage(path)
    table, reason = load(tmp_path, KEY)
    assert table is None and match in reason
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    message = record.getMessage()
    assert reason in message and "profiling anew" in message and "\n" not in message
    assert len(message) < 600


def test_any_cut_is_ignored(path: Path, tmp_path: Path) -> None:
    content = path.read_bytes()
    for length in range(0, len(content) - 2, 37):
        path.write_bytes(content[:length])
        assert load(tmp_path, KEY)[0] is None


def test_a_damaged_file_is_replaced_by_the_next_profile(
    path: Path, tmp_path: Path
) -> None:
    cut(path)
    assert save(tmp_path, CONTENT) == path
    assert load(tmp_path, KEY)[0] == CONTENT


def test_where_nothing_can_be_kept_the_engine_goes_on(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / cost_file.FOLDER).write_text("a file where the folder belongs")
    assert save(tmp_path, CONTENT) is None
    (record,) = caplog.records
    assert "not kept" in record.getMessage()


@pytest.mark.parametrize("what", [float("nan"), "x" * (1 << 21)])
def test_a_write_that_fails_leaves_the_old_file(
    path: Path, tmp_path: Path, what: object, caplog: pytest.LogCaptureFixture
) -> None:
    before = path.read_bytes()
    assert save(tmp_path, replace(CONTENT, measured={"x": what})) is None
    assert len(caplog.records) == 1 and path.read_bytes() == before
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]
