"""Runs of the trainer on a tiny target: they learn, resume to the bit, stop in order,
and what they export is the drafter that was validated."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from tests.tiny import load_target, make_tiny_target
from tests.train.data import greedy_samples, write_tokens
from vllm_dspark.decode import SamplingOptions, accepted_length, generate
from vllm_dspark.model.checkpoint import load_drafter, load_state, save_checkpoint
from vllm_dspark.train import state
from vllm_dspark.train.data import TrainingData
from vllm_dspark.train.export import PROVENANCE
from vllm_dspark.train.options import TrainOptions
from vllm_dspark.train.record import CURVES, LINES
from vllm_dspark.train.tokens import read_tokens
from vllm_dspark.train.trainer import Trainer
from vllm_dspark.train.validate import walk

OPTIONS = TrainOptions(
    layers=1,
    block_size=4,
    rank=8,
    draft_vocab_size=100,
    steps=12,
    sequences=4,
    anchors=16,
    top=32,
    validation=6,
    evaluate_every=4,
    checkpoint_every=3,
)


@pytest.fixture(scope="module")
def target_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_target(tmp_path_factory.mktemp("target"))


@pytest.fixture(scope="module")
def tokens(target_path: Path, tmp_path_factory: pytest.TempPathFactory):
    folder = tmp_path_factory.mktemp("tokens") / "data"
    return read_tokens(
        write_tokens(folder, target_path, greedy_samples(target_path, 40))
    )


def make(target_path: Path, tokens: Any, out: Path, options: TrainOptions = OPTIONS):
    data = TrainingData(tokens, options)
    return Trainer(load_target(target_path), [0, 1, 2], data, options, out, {"t": 1})


class Killed(Exception):
    pass


def run_until(trainer: Trainer, steps: int) -> None:
    """Run and die right after a step, without a chance to save."""

    def watch(report) -> None:
        if report.sums is not None and report.progress.step == steps:
            raise Killed

    with pytest.raises(Killed):
        trainer.run(watch)


@pytest.fixture(scope="module")
def whole(target_path: Path, tokens, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("whole") / "drafter"
    outcome = make(target_path, tokens, out).run(lambda _: None)
    assert outcome.reason == "finished" and outcome.progress.step == 12
    return out


def lines(out: Path) -> list[dict[str, Any]]:
    text = (out / state.FOLDER / LINES).read_text().splitlines()
    dropped = ("seconds",)
    return [
        {k: v for k, v in json.loads(line).items() if k not in dropped} for line in text
    ]


@pytest.mark.parametrize("at", [2, 3, 7, 11])
def test_a_killed_run_ends_with_the_same_bits(
    target_path, tokens, whole, tmp_path, at
) -> None:
    out = tmp_path / "drafter"
    run_until(make(target_path, tokens, out), at)
    again = make(target_path, tokens, out)
    assert again.progress.step == (at - 1) // 3 * 3
    again.run(lambda _: None)
    one, other = (
        load_file(whole / "model.safetensors"),
        load_file(out / "model.safetensors"),
    )
    assert one.keys() == other.keys()
    for name in one:
        assert torch.equal(one[name], other[name]), name
    (final,) = (out / state.FOLDER).glob("state-*.safetensors")
    (expected,) = (whole / state.FOLDER).glob("state-*.safetensors")
    mine, theirs = load_file(final), load_file(expected)
    assert all(torch.equal(mine[n], theirs[n]) for n in theirs)
    assert lines(out) == lines(whole)


def test_a_torn_checkpoint_is_the_one_before(target_path, tokens, tmp_path) -> None:
    out = tmp_path / "drafter"
    run_until(make(target_path, tokens, out), 4)
    # Killed between the tensors of step 6 and the note that names them.
    (out / state.FOLDER / "state-0000006.safetensors").write_bytes(b"half")
    assert make(target_path, tokens, out).progress.step == 3


def test_other_settings_or_a_broken_checkpoint_are_refused(
    target_path, tokens, tmp_path
) -> None:
    out = tmp_path / "drafter"
    run_until(make(target_path, tokens, out), 4)
    with pytest.raises(ValueError, match=r"holds a run with lr 0.005, and 0.1"):
        make(target_path, tokens, out, replace(OPTIONS, lr=0.1))
    (tensors,) = (out / state.FOLDER).glob("state-*.safetensors")
    tensors.write_bytes(tensors.read_bytes()[:100])
    with pytest.raises(ValueError, match="no checkpoint this version can go on from"):
        make(target_path, tokens, out)


def test_it_learns(target_path, tokens, tmp_path) -> None:
    options = replace(
        OPTIONS, steps=150, evaluate_every=50, checkpoint_every=200, lr=0.03
    )
    trainer = make(target_path, tokens, tmp_path / "drafter", options)
    before = trainer.validator.run().accepted_length
    outcome = trainer.run(lambda _: None)
    # The tiny target mostly follows a successor table, which the head can learn.
    assert outcome.progress.best > before + 0.2
    about = json.loads((tmp_path / "drafter" / PROVENANCE).read_text())
    assert about["validation"]["tau"] == outcome.progress.best
    assert about["options"]["steps"] == 150 and "machine" in about["provenance"]
    assert (tmp_path / "drafter" / state.FOLDER / CURVES).stat().st_size > 1000


def test_validation_is_what_decoding_gives(target_path, tokens, tmp_path) -> None:
    """τ of the walk through greedy texts = τ of real rounds with the export."""
    options = replace(OPTIONS, steps=40, evaluate_every=40, block_size=3)
    out = tmp_path / "drafter"
    trainer = make(target_path, tokens, out, options)
    trainer.run(lambda _: None)
    target = load_target(target_path)
    # float32 weights, so that rounding the export does not change a draft.
    trained = dict(trainer.drafter.state_dict())
    trained["fc.weight"] = trained["fc.weight"] / trainer.scale
    exported = load_state(out)
    wide = {n: trained.get(n, exported[n]).clone() for n in exported}
    save_checkpoint(tmp_path / "wide", {**trainer.config, "dtype": "float32"}, wide)
    drafter = load_drafter(
        tmp_path / "wide",
        target_embeddings=target.get_input_embeddings().weight,
        target_lm_head=target.get_output_embeddings().weight,
    )
    lengths, walked = [], []
    for text, prompt_len, features in trainer.validator.texts:
        size = len(text) - prompt_len
        done = generate(
            target,
            drafter,
            [text[:prompt_len].tolist()],
            SamplingOptions(max_new_tokens=size),
        )[0]
        assert list(done.token_ids) == text[prompt_len:].tolist()
        one = type(trainer.validator)(
            trainer.model,
            [(text, prompt_len, features)],
            trainer.validator.target_to_draft,
        ).run()
        # The walk leaves out rounds that reach past the text's end; so do we.
        kept = [s for s in done.steps if s.anchor_position + 3 < len(text)]
        lengths += [s.num_accepted + 1 for s in kept]
        walked.append((one.accepted_length, one.rounds))
        assert one.rounds == len(kept)
    total = sum(tau * rounds for tau, rounds in walked)
    assert total == pytest.approx(sum(lengths))
    assert accepted_length([done]) >= 1.0


def test_export_holds_the_trained_weights(target_path, tokens, tmp_path) -> None:
    """Exports are bfloat16 with the channel scale folded in; the map is offsets."""
    trainer = make(target_path, tokens, tmp_path, replace(OPTIONS, steps=4))
    trainer.run(lambda _: None)
    exported = load_state(tmp_path)
    folded = trainer.drafter.fc.weight / trainer.scale
    torch.testing.assert_close(
        exported["fc.weight"], folded.detach().to(torch.bfloat16)
    )
    ids = torch.arange(100) + exported["d2t"]
    assert torch.equal(ids, trainer.vocabulary.draft_to_target)
    assert "embed_tokens.weight" not in exported and "lm_head.weight" not in exported


def test_a_loss_that_is_not_a_number_stops_with_the_last_good(
    target_path, tokens, tmp_path
) -> None:
    out = tmp_path / "drafter"
    trainer = make(target_path, tokens, out)

    def poison(report) -> None:
        if report.progress.step == 7 and report.sums is not None:
            with torch.no_grad():
                trainer.drafter.fc.weight[0, 0] = math.nan

    outcome = trainer.run(poison)
    assert outcome.reason == "diverged" and outcome.progress.step == 7
    kept = make(target_path, tokens, out)
    assert kept.progress.step == 6
    assert all(bool(p.isfinite().all()) for p in kept.drafter.parameters())
    load_state(out)  # the drafter of step 4 is whole


def test_early_stop(target_path, tokens, tmp_path) -> None:
    options = replace(
        OPTIONS, steps=200, evaluate_every=1, patience=3, lr=1e-9, matrix_lr=1e-9
    )
    outcome = make(target_path, tokens, tmp_path / "d", options).run(lambda _: None)
    assert outcome.reason == "early stop" and outcome.progress.step == 4


def test_disk_full_leaves_the_checkpoint_before(
    target_path, tokens, tmp_path, monkeypatch
) -> None:
    out = tmp_path / "drafter"
    trainer = make(target_path, tokens, out)
    run_until(trainer, 4)

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(state, "save_file", full)
    with pytest.raises(OSError, match="No space left"):
        trainer.run(lambda _: None)
    monkeypatch.undo()
    assert make(target_path, tokens, out).progress.step == 3
    assert not list((out / state.FOLDER).glob("*.tmp"))


def test_walk_follows_rounds_by_hand() -> None:
    text = torch.tensor([9, 1, 2, 3, 4, 5, 6, 7])
    anchors = np.arange(1, 7)
    drafts = torch.tensor([[2, 3], [0, 0], [0, 0], [5, 0], [0, 0], [7, 7]])
    # At 1: both right, on to 4; at 4: one right, on to 6; there the text ends.
    assert walk(text, anchors, drafts) == ([0, 3], [2, 1])


def test_data_of_a_step_depends_on_step_and_seed_alone(tokens) -> None:
    data = TrainingData(tokens, OPTIONS)
    keys = [s.key for step in range(9) for s in data.step(step)]
    assert len(data.training) == 34 and len(data.validation) == 6
    assert sorted(keys[:34]) == sorted(data.training.tolist())
    again = TrainingData(tokens, OPTIONS).step(7)
    assert [s.anchors.tolist() for s in again] == [
        s.anchors.tolist() for s in data.step(7)
    ]
    other = TrainingData(tokens, replace(OPTIONS, seed=1))
    assert [s.key for s in other.step(0)] != keys[:4]
