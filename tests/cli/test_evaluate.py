"""`vllm-dspark evaluate` and `calibrate` on a tiny pair, from either engine."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.integration.forks import serve_in_forks
from tests.tiny import make_tiny_drafter
from vllm_dspark.calibration import file
from vllm_dspark.cli import main
from vllm_dspark.cli.arms import Speculation
from vllm_dspark.cli.rounds import engine_vllm
from vllm_dspark.cli.rounds.methods import counted
from vllm_dspark.model.checkpoint import weights_hash

KEYS = {
    *("tau", "acceptance_conditional", "acceptance_cumulative"),
    *("ece_raw", "ece_calibrated", "auc", "auc_calibrated", "rounds"),
}


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("prompts") / "prompts.jsonl"
    rows = [
        {"dataset": name, "messages": [{"role": "user", "content": text * n}]}
        for name, text in (("words", "hello there "), ("sums", "12+3=15, "))
        for n in range(1, 6)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def run(
    pair: tuple[Path, Path], prompts: Path, *more: Any, command: str = "evaluate"
) -> dict[str, Any]:
    out = prompts.parent / "result.json"
    asked = [command, "--target", pair[0], "--drafter", pair[1], "--prompts", prompts]
    asked += ["--dtype", "float32", "--max-tokens", 24, "--json", out, *more]
    assert main([str(word) for word in asked]) == 0
    return dict(json.loads(out.read_text()))


def test_the_result(
    text_pair: tuple[Path, Path], prompts: Path, tmp_path: Path
) -> None:
    picture = tmp_path / "out.png"
    found = run(text_pair, prompts, "--engine", "torch", "--png", picture)
    assert list(found["datasets"]) == ["words", "sums"]
    for entry in (*found["datasets"].values(), found["macro"], found["pooled"]):
        assert set(entry) == KEYS
        for name in KEYS - {"tau", "rounds"}:
            assert len(entry[name]) == 5
        assert entry["ece_calibrated"] == [None] * 5
        assert 1 < entry["tau"] < 6 and entry["rounds"] > 0
        # Positions' cumulative acceptance sums up to what a round brings.
        assert entry["tau"] == pytest.approx(1 + sum(entry["acceptance_cumulative"]))
    taus = [entry["tau"] for entry in found["datasets"].values()]
    assert found["macro"]["tau"] == pytest.approx(sum(taus) / 2)
    assert [run["temperature"] for run in found["runs"]] == [0.0, 1.0]
    sweep = found["runs"][0]["sweep"]["macro"]["raw"]
    assert sweep[0]["tau"] == pytest.approx(found["macro"]["tau"])
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert found["provenance"] and found["engine"] == "torch"


def test_a_dflash_drafter_side_by_side(
    text_pair: tuple[Path, Path], prompts: Path, tmp_path: Path
) -> None:
    plain = make_tiny_drafter(
        tmp_path / "dflash", text_pair[0], markov_rank=0, confidence=False
    )
    found = run(
        text_pair,
        prompts,
        *("--engine", "torch", "--temperature", 0, "--limit", 2),
        *("--drafter", text_pair[1], plain),
    )
    names = [run["name"] for run in found["runs"]]
    assert names == ["drafter", "dflash"]
    assert found["runs"][1]["macro"]["auc"] == [None] * 5
    assert found["runs"][0]["macro"]["tau"] > found["runs"][1]["macro"]["tau"]


def test_calibrate_then_evaluate(
    text_pair: tuple[Path, Path], prompts: Path, tmp_path: Path
) -> None:
    pair = text_pair[0], make_tiny_drafter(tmp_path / "drafter", text_pair[0])
    report = tmp_path / "report"
    found = run(
        pair, prompts, "--engine", "torch", "--report", report, command="calibrate"
    )
    assert [row["request_temperature"] for row in found["settings"]] == [0.0, 1.0]
    calibration = file.read(pair[1] / file.NAME, weights_hash(pair[1]))
    assert calibration.scaling(0.0).width == 5
    # This head knows nothing: raw it is off by 30%, and a map can mend that.
    greedy = found["settings"][0]
    assert sum(greedy["ece_after"]) < sum(greedy["ece_before"]) / 2
    text = (report / "report.md").read_text()
    for title in ("Temperature 1", "Bias by domain", "Drift", "Throughput"):
        assert title in text
    assert (report / "reliability-0.png").read_bytes().startswith(b"\x89PNG")
    again = run(pair, prompts, "--engine", "torch", "--temperature", 0)
    raw, after = again["macro"]["ece_raw"], again["macro"]["ece_calibrated"]
    assert sum(after) < sum(raw) / 2
    (pair[1] / file.NAME).write_text("{}")
    assert main(["evaluate", "--target", str(pair[0]), "--drafter", str(pair[1]),
                 "--prompts", str(prompts), "--engine", "torch", "--limit", "1",
                 "--max-tokens", "4"]) == 2  # fmt: skip


def test_what_cannot_be_calibrated_is_said_at_once(
    text_pair: tuple[Path, Path],
    prompts: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    silent = make_tiny_drafter(tmp_path, text_pair[0], confidence=False)
    asked = ["calibrate", "--target", text_pair[0], "--drafter", silent]
    assert main([str(w) for w in (*asked, "--prompts", prompts)]) == 2
    assert "no confidence head" in capsys.readouterr().err
    assert main(["evaluate", "--target", "x", "--prompts", str(prompts)]) == 2
    assert "nothing to evaluate" in capsys.readouterr().err


def test_counters_of_other_methods() -> None:
    # 10 tokens: 2 counted rounds with 3 accepted drafts bring 5, so 5 steps had none.
    found = counted(Speculation(2, 10, 3, (2, 1, 0)), decoded=10, width=3)
    assert found.rounds == 7 and found.tau == pytest.approx(10 / 7)
    assert found.acceptance_cumulative == (1.0, 0.5, 0.0)
    assert found.acceptance_conditional[:2] == (1.0, 0.5)
    assert counted(None, decoded=4, width=2).tau == 1.0


@pytest.mark.slow
def test_both_engines_run_the_same_rounds(
    text_pair: tuple[Path, Path], prompts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    serve_in_forks(monkeypatch, engine_vllm)
    by_engine = {}
    for engine in ("torch", "vllm"):
        found = run(text_pair, prompts, "--engine", engine, "--temperature", 0)
        by_engine[engine] = found
    for name in ("words", "sums"):
        one, other = (by_engine[e]["datasets"][name] for e in ("torch", "vllm"))
        assert one["rounds"] == other["rounds"] and one["tau"] == other["tau"]
        assert one["acceptance_cumulative"] == other["acceptance_cumulative"]
        assert one["ece_raw"] == pytest.approx(other["ece_raw"], abs=1e-4)
