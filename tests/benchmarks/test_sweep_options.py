"""The load sweep's options: defaults, and what does not go together."""

from __future__ import annotations

from pathlib import Path

import _sweep_options as options
import pytest


def arguments(tmp_path: Path, *more: str) -> list[str]:
    file = tmp_path / "prompts.jsonl"
    file.touch()
    found = ["--target", "T", "--drafter", "D", "--prompts", str(file)]
    return [*found, "--out", str(tmp_path / "out"), *more]


def test_quick_changes_only_what_was_not_typed(tmp_path: Path):
    args = options.parse("", arguments(tmp_path, "--quick", "--rounds", "2"))
    assert args.rounds == 2 and args.concurrency == options.QUICK["concurrency"]
    assert options.parse("", arguments(tmp_path)).rounds == options.FULL["rounds"]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--max-num-seqs", "8"], "would wait in the server"),
        (["--max-prompt-tokens", "900"], "do not fit"),
        (["--concurrency", "0"], "a concurrency is 0"),
        (["--rounds", "0"], "--rounds is 0"),
        (["--output-tokens", "1"], "--output-tokens is 1"),
        (["--seconds-per-point", "0"], "above 0"),
        (["--request-rate", "0"], "above 0"),
        (["--goodput", "ttft"], "ttft:MS"),
        (["--mix", "math=0.5"], "--mix is 'math=0.5'"),
    ],
)
def test_options_that_do_not_go_together(tmp_path: Path, more: list[str], message: str):
    with pytest.raises(ValueError, match=message):
        options.parse("", arguments(tmp_path, *more))


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--arms", "dspark-fixed-0"], "no arm is called 'dspark-fixed-0'"),
        (["--arms", "none", "--draft-tokens", "dflash=7"], "there is no such arm"),
        (["--arms", "eagle3"], "--draft-model eagle3=FOLDER"),
        (["--url", "x=localhost:80"], "NAME=http"),
        (["--arm", "none={}"], "two arms are called 'none'"),
        (["--arms", "none", "--split-datasets", "4"], "--split-arms"),
    ],
)
def test_arms_that_cannot_be(tmp_path: Path, more: list[str], message: str):
    with pytest.raises(ValueError, match=message):
        options.chosen_arms(options.parse("", arguments(tmp_path, *more)))


def test_rates_replace_the_closed_loop_and_a_running_server_our_own(tmp_path: Path):
    open_loop = ["--request-rate", "2", "0.5", "--goodput", "ttft:500", "tpot:50"]
    args = options.parse("", arguments(tmp_path, *open_loop, "--url", "x=http://h:1"))
    assert args.concurrency == [] and args.request_rate == [0.5, 2.0]
    assert args.goodput == {"ttft": 500.0, "tpot": 50.0}
    assert args.max_num_seqs == options.OPEN_LOOP_SEQUENCES
    arms = options.chosen_arms(args)
    assert arms["x"].url == "http://h:1" and list(arms) == ["x"]
    assert options.reference_of(args, arms) == "x"
    both = options.parse("", arguments(tmp_path, *open_loop, "--concurrency", "4"))
    assert both.concurrency == [4] and "none" in options.chosen_arms(both)
