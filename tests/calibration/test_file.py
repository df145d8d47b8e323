"""dspark_calibration.json: what is written is read, what is damaged is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.calibration.synthetic import make_rounds
from vllm_dspark.calibration.file import NAME, Calibration, read, setting, write
from vllm_dspark.calibration.fitting import fit
from vllm_dspark.calibration.scaling import Scaling, identity


@pytest.fixture(scope="module")
def settings() -> list[dict[str, Any]]:
    return [
        setting(0.0, fit(make_rounds(900, [2.0, 1.0])), rounds=900),
        setting(1.0, fit(make_rounds(900, [1.0, 1.0])), rounds=900),
    ]


@pytest.fixture
def file(tmp_path: Path, settings: list[dict[str, Any]]) -> Path:
    path = tmp_path / NAME
    write(path, "abc", settings, {"label": "synthetic"}, {"drafter": "d"})
    return path


def test_round_trip(file: Path) -> None:
    found = read(file, "abc")
    assert found.label == "synthetic" and set(found.settings) == {0.0, 1.0}
    assert found.settings[0.0].temperature[0] == pytest.approx(2, rel=0.3)
    assert found.settings[1.0] == identity(2)
    raw = json.loads(file.read_text())
    assert raw["schema"] == 1 and raw["settings"][0]["fit_size"] == [900, 900]
    assert "temperature 1" in raw["settings"][1]["note"]
    assert [path.name for path in file.parent.iterdir()] == [NAME]


def test_a_file_without_biases(file: Path) -> None:
    raw = json.loads(file.read_text())
    for row in raw["settings"]:
        del row["bias"]
    file.write_text(json.dumps(raw))
    assert read(file).settings[1.0].bias == (0, 0)


def test_a_request_takes_the_nearest_of_its_kind() -> None:
    one, two, three = (Scaling((t,), (0.0,)) for t in (1.5, 2.0, 3.0))
    found = Calibration("abc", {0.0: one, 0.6: two, 1.0: three}, "")
    asked = (0.0, 0.01, 0.7, 0.9, 2.0)
    expected = [one, two, two, three, three]
    assert [found.scaling(t) for t in asked] == expected
    assert Calibration("abc", {1.0: three}, "").scaling(0.0) == three


def test_another_drafters(file: Path) -> None:
    with pytest.raises(ValueError, match=r"weights abc…, but these are xyz…"):
        read(file, "xyz")


def test_no_file(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="cannot be read: No such file"):
        read(tmp_path / NAME)
    with pytest.raises(ValueError, match="cannot be read: Is a directory"):
        read(tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not JSON"),
        (b'{"schema": 1', "not JSON"),
        (b"\xff\xfe\x00", "not JSON"),
        (b"[" * 100_000, "not JSON"),
        (b"[]", "holds list"),
        (b"{}", "'kind' is None"),
        (b" " * 2_000_000, "no calibration"),
    ],
)
def test_damaged(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / NAME).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read(tmp_path / NAME)


def _row(**changes: Any) -> dict[str, Any]:
    row = {"request_temperature": 0.0, "temperature": [1.0, 2.0], "bias": [0.0, 0.1]}
    return {**row, **changes}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"schema": 2}, "'schema' is 2; this version reads 1"),
        ({"weights_hash": 5}, "'weights_hash' is 5"),
        ({"settings": {}}, "'settings' is {}"),
        ({"settings": [7]}, r"settings\[0\] is 7"),
        ({"settings": [_row(temperature=[])]}, r"\[\] is no list of numbers"),
        ({"settings": [_row(temperature=[1.0, 0.0])]}, "0.0 is no number from 0.01"),
        ({"settings": [_row(temperature=[1.0, -2])]}, "-2 is no number"),
        ({"settings": [_row(temperature=[1.0, float("nan")])]}, "nan is no number"),
        ({"settings": [_row(temperature=[1.0, True])]}, "True is no number"),
        ({"settings": [_row(bias=["x", 0])]}, "'x' is no number"),
        ({"settings": [_row(bias=[0.0])]}, "2 temperatures but 1 biases"),
        ({"settings": [_row(request_temperature=None)]}, "None is no number"),
        ({"settings": [_row(), _row()]}, "request_temperature 0 appears twice"),
        (
            {"settings": [_row(), _row(request_temperature=1, temperature=[1.0],
                                       bias=[0])]},
            "different numbers of positions",
        ),
    ],
)  # fmt: skip
def test_wrong_values(file: Path, changes: dict[str, Any], message: str) -> None:
    raw = {**json.loads(file.read_text()), **changes}
    file.write_text(json.dumps(raw))
    with pytest.raises(ValueError, match=message):
        read(file)


def test_nothing_unreadable_is_written(file: Path) -> None:
    before = file.read_text()
    with pytest.raises(ValueError, match="no number"):
        write(file, "abc", [_row(bias=[0.0, 99.0])], {}, {})
    assert file.read_text() == before
    assert [path.name for path in file.parent.iterdir()] == [NAME]
