"""The burst benchmark, whole, on a tiny model; how jumps are judged is tested apart."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import _sweep_fleet
import burst
import pytest

from tests.integration.forks import serve_in_forks

LOADS = [1, 6, 1]


def prompts(file: Path) -> Path:
    rows = [
        {"dataset": "d", "messages": [{"role": "user", "content": f"tell me of {i}"}]}
        for i in range(20)
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


@pytest.mark.slow
def test_a_burst(
    text_pair: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target, drafter = text_pair
    monkeypatch.setenv("VLLM_DSPARK_CACHE", str(tmp_path / "cache"))
    serve_in_forks(monkeypatch, _sweep_fleet, "OwnServer")
    out = tmp_path / "out"
    argv = ["burst.py", "--target", str(target), "--drafter", str(drafter)]
    argv += ["--prompts", str(prompts(tmp_path / "p.jsonl")), "--out", str(out)]
    argv += ["--loads", *map(str, LOADS), "--phase-seconds", "5"]
    argv += ["--output-tokens", "60", "--max-model-len", "512"]
    monkeypatch.setattr("sys.argv", argv)
    assert burst.main() in (0, 1)  # how fast it was is the machine's affair
    result = json.loads((out / "burst.json").read_text())
    rows = burst.read_log(out / "steps.jsonl")
    assert result["steps"] == len(rows) and result["provenance"]["command"]
    for load, phase in zip(LOADS, burst.split(rows, result["marks"]), strict=True):
        late = [row["requests"] for row in phase[len(phase) // 2 :]]
        # A client that asks its next question is not decoding for a moment.
        assert max(late) == load
    assert [(j["from"], j["to"]) for j in result["jumps"]] == [(1, 6), (6, 1)]
    assert all(j["load_steps"] is not None for j in result["jumps"])
    assert (out / "burst.png").stat().st_size > 10_000
    monkeypatch.setattr("sys.argv", ["burst.py", "--out", str(out), "--analyse"])
    burst.main()
    assert json.loads((out / "burst.json").read_text())["jumps"] == result["jumps"]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--loads", "1"], "two or more"),
        (["--loads", "1", "0"], "at least 1"),
        (["--phase-seconds", "0"], "more than 0"),
        (["--max-prompt-tokens", "900"], "do not fit"),
        (["--prompts", "nowhere.jsonl"], "is no file"),
    ],
)
def test_options_that_cannot_be(more: list[str], message: str, tmp_path: Path) -> None:
    argv = ["--target", "T", "--drafter", "D", "--out", str(tmp_path)]
    argv += ["--prompts", str(prompts(tmp_path / "p.jsonl"))]
    with pytest.raises(ValueError, match=message):
        burst.parse([*argv, *more])
    with pytest.raises(ValueError, match="--drafter is missing"):
        burst.parse(["--target", "T", "--out", "O"])


def test_a_log_that_was_cut_off(tmp_path: Path) -> None:
    file = tmp_path / "steps.jsonl"
    row: dict[str, Any] = {"step": 0}
    file.write_text(json.dumps(row) + '\n{"ste')
    assert burst.read_log(file) == [row]
    file.write_text('{"ste\n' + json.dumps(row) + "\n")
    with pytest.raises(ValueError, match="damaged"):
        burst.read_log(file)
    with pytest.raises(ValueError, match="no step log"):
        burst.read_log(tmp_path / "none.jsonl")
