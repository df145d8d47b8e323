"""The table of drafters; the runs themselves are the trainer's tests."""

from __future__ import annotations

import argparse
import json
import shlex
from pathlib import Path
from typing import Any

import pytest
import train_table

from vllm_dspark.cli import train


def pretend(command: list[str], log: Path) -> int:
    """What `vllm-dspark train` leaves behind."""
    log.touch()
    options = dict(zip(command[4::2], command[5::2], strict=False))
    if options.get("--layers") == "0":
        return 1
    out = Path(options["--out"])
    (out / "training").mkdir(parents=True)
    weak = "--head" in options
    lines: list[dict[str, Any]] = [{"step": 1, "acceptance": [0.5]}]
    for step, tau in ((2, 1.9), (4, 1.5 if weak else 2.0)):
        lines.append(
            {
                "step": step,
                "tau": tau / (1 + weak),
                "acceptance_cumulative": [0.6, 0.3],
                "ece": [0.1, 0.1],
                "auroc": [0.7, None],
                "rounds": 9,
                "seconds": step * 1.0,
                "blocks": step * 100,
            }
        )
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (out / "training" / "train.jsonl").write_text(text)
    (out / "model.safetensors").write_bytes(bytes(500 if weak else 900))
    outcome = {"coverage": 0.9, "steps": 4, "blocks": 400, "seconds": 4.0}
    Path(options["--json"]).write_text(json.dumps(outcome))
    return 0


def test_rows_are_trained_once_and_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ran = []

    def run(command: list[str], log: Path) -> int:
        ran.append(command)
        return pretend(command, log)

    monkeypatch.setattr(train_table, "run", run)
    line = ["--target", "T", "--data", "D", "--steps", "4", "--parallel", "2"]
    line += ["--out", str(tmp_path / "runs"), "--json", str(tmp_path / "table.json")]
    line += ["--png", str(tmp_path / "curves.png"), "--rows", "base", "head-none"]
    line += ["--row", "wrong=--layers 0", "--", "--seed", "3"]
    assert train_table.main(line) == 1
    rows = json.loads((tmp_path / "table.json").read_text())["rows"]
    assert list(rows) == ["base", "head-none", "wrong"]
    assert rows["wrong"]["error"] == "status 1"
    base, plain = rows["base"], rows["head-none"]
    assert (base["tau"], plain["tau"]) == (2.0, 0.95)  # the best validation's
    assert [x["step"] for x in base["validations"]] == [2, 4]
    assert base["bytes"] == 900 and base["options"] == "--seed 3"
    assert (tmp_path / "curves.png").stat().st_size > 1000
    assert "0.475" in capsys.readouterr().out  # of base
    assert len(ran) == 3 and all("--seed" in command for command in ran)
    # What is done is read again, not trained again.
    assert train_table.main(line) == 1 and len(ran) == 4


def test_every_row_is_one_that_can_be_trained() -> None:
    parser = argparse.ArgumentParser()
    train.add_parser(parser.add_subparsers())
    needed = ["train", "--target", "T", "--data", "D", "--out", "O"]
    for options in train_table.ROWS.values():
        train.chosen_options(parser.parse_args([*needed, *shlex.split(options)]))


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--rows", "layers-99"], "'layers-99'; there are base, layers-1"),
        (["--row", "base=--layers 2"], "a new name"),
        (["--row", "nothing"], "NAME='OPTIONS'"),
    ],
)
def test_rows_that_are_none_are_refused(more: list[str], message: str) -> None:
    line = ["--target", "T", "--data", "D", "--out", "O", "--steps", "1"]
    with pytest.raises(ValueError, match=message):
        train_table.parse([*line, "--json", "J", *more])
