"""`vllm-dspark convert`: what it prints and writes, and its exit status."""

import json
from pathlib import Path

from vllm_dspark.cli import main
from vllm_dspark.model.checkpoint import weights_hash


def test_there_and_back(tiny_target: Path, tiny_drafter: Path, tmp_path: Path, capsys):
    there, back, report = tmp_path / "s", tmp_path / "d", tmp_path / "r.json"
    command = ["convert", str(tiny_drafter), str(there), "--to", "speculators"]
    assert main([*command, "--target", str(tiny_target), "--json", str(report)]) == 0
    digest = weights_hash(tiny_drafter)
    assert f"weights sha256  {digest} (unchanged)" in capsys.readouterr().out
    facts = json.loads(report.read_text())
    assert facts["weights_hash"] == digest
    assert (facts["source_layout"], facts["layout"]) == ("deepspec", "speculators")
    assert facts["provenance"]["versions"] and facts["notes"] == []
    assert main(["convert", str(there), str(back), "--to", "deepspec"]) == 0
    assert weights_hash(back) == digest


def test_notes_name_what_others_miss(demo_drafter: Path, tmp_path: Path, capsys):
    command = ["convert", str(demo_drafter), str(tmp_path / "s"), "--to"]
    assert main([*command, "speculators"]) == 0
    shown = capsys.readouterr().out
    assert "note: 'lm_head.weight' is left out" in shown
    assert "note: the target is not named (--target)" in shown


def test_a_mistake_is_one_line(tiny_drafter: Path, tmp_path: Path, capsys):
    status = main(["convert", str(tiny_drafter), str(tmp_path), "--to", "deepspec"])
    assert status == 2
    error = capsys.readouterr().err
    assert error.startswith("vllm-dspark convert: ") and "already" in error
    assert error.count("\n") == 1
