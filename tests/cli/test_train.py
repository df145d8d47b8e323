"""`vllm-dspark train` as a command: one process and two, mistakes, Ctrl-C."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.tiny import make_tiny_drafter, make_tiny_target
from tests.train.data import greedy_samples, write_tokens
from vllm_dspark.cli import main
from vllm_dspark.model.checkpoint import check_checkpoint, load_config
from vllm_dspark.train import state

FEW = ("--steps", "6", "--sequences", "4", "--validation", "4", "--draft-vocab-size",
       "100", "--dtype", "float32", "--threads", "1", "--evaluate-every", "6",
       "--preset", "tiny", "--block-size", "4")  # fmt: skip


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_target(tmp_path_factory.mktemp("target"))


@pytest.fixture(scope="module")
def data(target: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokens") / "data"
    return write_tokens(folder, target, greedy_samples(target, 24))


def arguments(target: Path, data: Path, out: Path, *more: str) -> list[str]:
    where = ["--target", str(target), "--data", str(data), "--out", str(out)]
    return ["train", *where, *FEW, *more]


@pytest.fixture(scope="module")
def trained(target, data, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("out") / "drafter"
    assert main(arguments(target, data, out)) == 0
    return out


def test_it_writes_a_drafter_and_its_outcome(
    target, data, trained, tmp_path, capsys
) -> None:
    file = tmp_path / "outcome.json"
    assert main(arguments(target, data, trained, "--json", str(file))) == 0
    outcome = json.loads(file.read_text())
    assert outcome["reason"] == "finished" and outcome["steps"] == 6
    assert outcome["blocks"] > 0 and outcome["tau"] >= 1.0
    assert check_checkpoint(trained).config.block_size == 4
    assert "going on from step 6" in capsys.readouterr().out


@pytest.mark.slow  # imports torch three times
def test_two_processes_do_what_one_does(target, data, trained, tmp_path) -> None:
    out = tmp_path / "drafter"
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2",
               "--master-port", str(port), "-m", "vllm_dspark.cli"]  # fmt: skip
    done = subprocess.run(
        [*command, *arguments(target, data, out)],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    one = load_file(next((trained / "training").glob("state-*.safetensors")))
    two = load_file(next((out / "training").glob("state-*.safetensors")))
    weights = [name for name in one if name.startswith("weights.")]
    assert len(weights) > 10
    for name in weights:
        # Sums in another order; Adam turns the rounding of tiny gradients into steps.
        torch.testing.assert_close(two[name], one[name], rtol=0, atol=2e-3)


def test_going_on_from_a_drafter_keeps_its_shape(target, data, tmp_path) -> None:
    start = make_tiny_drafter(
        tmp_path / "start",
        target,
        head_type="gated",
        draft_vocab_size=64,
        with_lm_head=False,
    )
    out = tmp_path / "drafter"
    assert main(arguments(target, data, out, "--start-from", str(start))) == 0
    one, other = load_config(start), load_config(out)
    for name in ("block_size", "markov_head_type", "markov_rank", "target_layer_ids",
                 "mask_token_id", "draft_vocab_size", "num_hidden_layers"):  # fmt: skip
        assert getattr(one, name) == getattr(other, name), name
    before, after = (
        load_file(start / "model.safetensors"),
        load_file(out / "model.safetensors"),
    )
    assert torch.equal(before["d2t"], after["d2t"])
    moved = (before["layers.0.mlp.up_proj.weight"].float()
             - after["layers.0.mlp.up_proj.weight"].float()).abs().max()  # fmt: skip
    assert 0 < float(moved) < 0.3


def test_data_of_another_target_is_refused(data, tmp_path, capsys) -> None:
    other = make_tiny_target(tmp_path / "other", seed=9)
    assert main(arguments(other, data, tmp_path / "out")) == 2
    error = capsys.readouterr().err
    assert "was written by" in error and "not by other" in error


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--rank", "0"), "rank is 0; it must be 0 exactly when head is 'none'"),
        (("--draft-vocab-size", "999"), "draft_vocab_size is 999"),
        (("--target-layer-ids", "0", "3"), "target layer 3 cannot be tapped"),
    ],
)
def test_mistakes_are_one_line(target, data, tmp_path, capsys, more, message) -> None:
    assert main(arguments(target, data, tmp_path / "out", *more)) == 2
    assert message in capsys.readouterr().err


def test_a_full_disk_says_how_to_go_on(
    target, data, tmp_path, capsys, monkeypatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(state, "save_file", full)
    assert main(arguments(target, data, tmp_path / "out")) == 2
    error = capsys.readouterr().err
    assert "No space left on device" in error and "the same command goes on" in error


def test_ctrl_c_leaves_a_state_to_go_on_from(target, data, tmp_path) -> None:
    out = tmp_path / "drafter"
    command = [sys.executable, "-m", "vllm_dspark.cli"]
    more = ("--steps", "100000")
    run = subprocess.Popen(
        [*command, *arguments(target, data, out, *more)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    lines, deadline = out / "training" / "train.jsonl", time.monotonic() + 300
    try:
        while not (lines.is_file() and lines.read_text().count("\n") > 2):
            assert run.poll() is None and time.monotonic() < deadline
            time.sleep(0.2)
        run.send_signal(signal.SIGINT)
        text, _ = run.communicate(timeout=60)
    finally:
        run.kill()
    assert run.returncode == 130, text[-2000:]
    assert "the same command goes on" in text
    done = json.loads((out / "training" / "state.json").read_text())
    assert done["progress"]["step"] > 2
