"""Showing a cost table: what people, figures and machines get of a file."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path

import pytest
from rich.console import Console

from tests.schedule.test_cost_file import CONTENT
from vllm_dspark.cli.profile_show import as_json, show
from vllm_dspark.schedule import cost_file


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "cost.json"
    cost_file.write(path, CONTENT)
    return path


def shown(path: Path, plot: Path | None = None, out: Path | None = None) -> str:
    console = Console(file=io.StringIO(), width=100)
    show(path, console, plot, out)
    text: str = console.file.getvalue()  # type: ignore[attr-defined]
    return text


def test_people_see_the_points(file: Path) -> None:
    text = shown(file)
    assert "tttttttttttt…" in text and "eager" in text and "how by hand" in text
    assert "1000 context tokens add 2 ms" in text
    # 1 token takes 25.4 ms, 128 take 308: from step_time of the made-up machine.
    for part in ("25.40", "39.4", "308.00", "12.13"):
        assert part in text
    rows = [[cell.strip() for cell in line.split("│")] for line in text.splitlines()]
    assert ["", "1", "2.30", "2.90", "4.70", "6.50", ""] in rows


def test_the_figure_is_a_png(file: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    plot = tmp_path / "cost.png"
    assert str(plot) in shown(file, plot=plot)
    content = plot.read_bytes()
    assert content.startswith(b"\x89PNG") and len(content) > 10_000


def test_machines_get_json(file: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    shown(file, out=out)
    found = json.loads(out.read_text())
    assert found == as_json(cost_file.read(file))
    assert found["step"][0]["ms"] == pytest.approx(25.4)
    assert found["ms_per_1000_context_tokens"] == pytest.approx(2)
    assert {"requests": 1, "positions": 0, "ms": pytest.approx(2.3)} in found["draft"]


def test_a_file_that_cannot_be_used(file: Path) -> None:
    file.write_text("{}")
    with pytest.raises(ValueError, match="'kind' is None"):
        shown(file)


def test_without_matplotlib(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ValueError, match="figures need matplotlib"):
        shown(file, plot=tmp_path / "cost.png")
