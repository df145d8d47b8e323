"""Drafter folders: round trips, what may be left out, every bad folder's message."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.tiny import edit_config, make_tiny_drafter
from vllm_dspark.model.checkpoint import (
    check_checkpoint,
    draft_to_target_ids,
    load_config,
    load_drafter,
    load_state,
    save_checkpoint,
    weights_hash,
)
from vllm_dspark.model.headers import INDEX, WEIGHTS

VARIANTS: list[dict[str, Any]] = [
    {"own_embeddings": True},
    {"head_type": "gated", "dtype": torch.bfloat16},
    {"head_type": "rnn", "draft_vocab_size": 40},
    {"markov_rank": 0, "draft_vocab_size": 40, "with_lm_head": True},
    {"confidence": False},
    {"confidence_with_markov": False},
]


@pytest.fixture
def folder(tmp_path: Path, tiny_target: Path) -> Path:
    return make_tiny_drafter(tmp_path, tiny_target, draft_vocab_size=40)


def rewrite(folder: Path, **changes: Tensor | None) -> None:
    """Replace (or with None remove) tensors; ``__`` in a name stands for a dot."""
    state = load_file(folder / WEIGHTS)
    for key, tensor in changes.items():
        name = key.replace("__", ".")
        state.pop(name, None)
        if tensor is not None:
            state[name] = tensor
    save_file(state, folder / WEIGHTS)


def refused(folder: Path, message: str) -> None:
    """The folder is refused before loading and while loading."""
    for read in (check_checkpoint, load_state):
        with pytest.raises(ValueError, match=message):
            read(folder)


@pytest.mark.parametrize("variant", VARIANTS)
def test_round_trip(variant: dict[str, Any], tmp_path: Path, tiny_target: Path) -> None:
    folder = make_tiny_drafter(tmp_path / "a", tiny_target, **variant)
    state = load_state(folder)
    raw = json.loads((folder / "config.json").read_text())
    save_checkpoint(tmp_path / "b", raw, state)
    again = load_state(tmp_path / "b")
    assert again.keys() == state.keys()
    for name, tensor in state.items():
        assert tensor.dtype == again[name].dtype
        assert torch.equal(tensor, again[name]), name
    assert load_config(tmp_path / "b") == load_config(folder)
    assert weights_hash(tmp_path / "b") == weights_hash(folder)


def test_facts_count_what_is_there(folder: Path) -> None:
    facts = check_checkpoint(folder)
    state = load_state(folder)
    assert facts.num_bytes == sum(t.numel() * t.element_size() for t in state.values())
    assert facts.num_parameters == sum(
        tensor.numel() for name, tensor in state.items() if name != "d2t"
    )
    assert (facts.has_embeddings, facts.has_lm_head) == (False, False)


def test_loaded_weights_are_the_file_s(tmp_path: Path, tiny_target: Path) -> None:
    folder = make_tiny_drafter(tmp_path, tiny_target, own_embeddings=True)
    state = load_state(folder)
    loaded = load_drafter(folder).state_dict()
    assert loaded.keys() == state.keys()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in state.items())
    half = load_drafter(folder, dtype=torch.bfloat16).state_dict()
    assert {tensor.dtype for tensor in half.values()} == {torch.bfloat16}


def test_left_out_parts_come_from_the_target(folder: Path, tiny_target: Path) -> None:
    target = load_file(tiny_target / "model.safetensors")
    embeddings = target["model.embed_tokens.weight"]
    drafter = load_drafter(
        folder, target_embeddings=embeddings, target_lm_head=target["lm_head.weight"]
    )
    ids = draft_to_target_ids(load_state(folder)["d2t"])
    assert torch.equal(drafter.embed_tokens.weight, embeddings)
    assert torch.equal(drafter.lm_head.weight, target["lm_head.weight"][ids])
    assert drafter.draft_to_target is not None
    assert torch.equal(drafter.draft_to_target, ids)


def test_left_out_parts_without_a_target_are_named(folder: Path) -> None:
    with pytest.raises(ValueError, match="not in the checkpoint and no target"):
        load_drafter(folder, target_embeddings=torch.zeros(128, 64))


def test_shipped_drafter(demo_drafter: Path) -> None:
    facts = check_checkpoint(demo_drafter)
    assert not facts.has_embeddings and not facts.has_lm_head
    assert facts.config.block_size == 7
    assert facts.config.draft_vocab_size == 12288
    # The check runs before every engine start; the best of a few runs, since the
    # machine may be busy.
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        check_checkpoint(demo_drafter)
        seconds.append(time.perf_counter() - start)
    assert min(seconds) < 0.05
    drafter = load_drafter(
        demo_drafter,
        target_embeddings=torch.zeros(49152, 576),
        target_lm_head=torch.zeros(49152, 576),
        dtype=torch.float32,
    )
    assert drafter.lm_head.weight.shape == (12288, 576)
    own = {"embed_tokens.weight", "lm_head.weight"}
    loaded = sum(p.numel() for n, p in drafter.named_parameters() if n not in own)
    assert loaded == facts.num_parameters


def split_into_shards(folder: Path) -> dict[str, str]:
    """Turn a single file into two shards with an index; returns its weight map."""
    state = load_file(folder / WEIGHTS)
    (folder / WEIGHTS).unlink()
    files = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
    names = sorted(state)
    half = len(names) // 2
    for file, part in zip(files, (names[:half], names[half:]), strict=True):
        save_file({name: state[name] for name in part}, folder / file)
    where = {name: files[i >= half] for i, name in enumerate(names)}
    (folder / INDEX).write_text(json.dumps({"weight_map": where}))
    return where


def test_sharded_weights_are_the_same_drafter(folder: Path) -> None:
    before, digest = load_state(folder), weights_hash(folder)
    split_into_shards(folder)
    after = load_state(folder)
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert weights_hash(folder) == digest


def test_missing_shard(folder: Path) -> None:
    split_into_shards(folder)
    (folder / "model-00002-of-00002.safetensors").unlink()
    refused(folder, "00002-of-00002.safetensors is missing; download")


def test_hash_tells_weights_apart(folder: Path) -> None:
    before = weights_hash(folder)
    state = load_state(folder)
    state["norm.weight"][0] += 0.01
    rewrite(folder, norm__weight=state["norm.weight"])
    assert weights_hash(folder) != before


def test_missing_folder_and_files(folder: Path, tmp_path: Path) -> None:
    refused(tmp_path / "nowhere", "config.json is missing; a drafter is a local folder")
    (folder / WEIGHTS).unlink()
    refused(folder, "no weights; expected model.safetensors")
    (folder / "config.json").write_text("{")
    refused(folder, "config.json is not valid JSON")
    (folder / "config.json").write_text("[]")
    refused(folder, "holds a list, not a JSON object")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "drafter.pt", "x.ckpt"])
def test_pickles_are_refused_with_the_way_out(folder: Path, name: str) -> None:
    (folder / WEIGHTS).rename(folder / name)
    refused(folder, f"{name} is a pickle.*convert it to model.safetensors")


def test_renamed_pickle_is_not_read(folder: Path) -> None:
    torch.save({"norm.weight": torch.ones(64)}, folder / WEIGHTS)
    refused(folder, "not a safetensors file")


@pytest.mark.parametrize("keep", [0, 5, 200, -1])
def test_truncated_file(folder: Path, keep: int) -> None:
    file = folder / WEIGHTS
    file.write_bytes(file.read_bytes()[:keep])
    refused(folder, "is truncated")


def test_corrupt_header(folder: Path) -> None:
    content = bytearray((folder / WEIGHTS).read_bytes())
    content[8:12] = b"\0\0\0\0"
    (folder / WEIGHTS).write_bytes(content)
    refused(folder, "corrupt safetensors header")


def test_shape_unlike_its_bytes(folder: Path) -> None:
    content = (folder / WEIGHTS).read_bytes()
    # Same length, so that everything after stays where it is.
    changed = content.replace(b'"shape":[40]', b'"shape":[41]')
    assert changed != content
    (folder / WEIGHTS).write_bytes(changed)
    refused(folder, "'d2t' has a shape unlike its byte range")


def test_wrong_shape(folder: Path) -> None:
    rewrite(folder, fc__weight=torch.zeros(64, 128))
    refused(folder, r"'fc.weight' has shape \[64, 128\]; by config.json it is \[64, 19")


def test_wrong_dtype(folder: Path) -> None:
    rewrite(folder, norm__weight=torch.ones(64, dtype=torch.int64))
    refused(folder, "'norm.weight' has dtype I64; expected one of F32")
    rewrite(folder, norm__weight=torch.ones(64, dtype=torch.float64))
    refused(folder, "'norm.weight' has dtype F64; only")


def test_missing_tensor(folder: Path) -> None:
    rewrite(folder, norm__weight=None, d2t=None)
    refused(folder, "'d2t', 'norm.weight' missing from the weights")


def test_unexpected_tensor(folder: Path) -> None:
    edit_config(folder, enable_confidence_head=False)
    refused(folder, "unexpected 'confidence_head.proj.bias', .* of another checkpoint")


def test_config_of_a_deeper_drafter(folder: Path) -> None:
    edit_config(folder, num_hidden_layers=3, layer_types=["full_attention"] * 3)
    refused(folder, "'layers.2.input_layernorm.weight', .* and 8 more missing")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_broken_weights_are_named(folder: Path, value: float) -> None:
    state = load_state(folder)
    weight = state["markov_head.markov_w2.weight"]
    weight[7, 3] = value
    rewrite(folder, markov_head__markov_w2__weight=weight)
    with pytest.raises(ValueError, match=r"'markov_head.markov_w2.weight' holds NaN"):
        load_state(folder)


@pytest.mark.parametrize(("entry", "token"), [(200, 200), (-1, -1)])
def test_mapping_outside_the_vocabulary(folder: Path, entry: int, token: int) -> None:
    offsets = load_state(folder)["d2t"]
    offsets[0] = entry
    rewrite(folder, d2t=offsets)
    with pytest.raises(ValueError, match=f"'d2t' leads to token {token}, outside"):
        load_state(folder)


def test_mapping_of_absolute_ids_is_refused(folder: Path) -> None:
    """The likeliest mistake: target ids instead of offsets."""
    absolute = draft_to_target_ids(load_state(folder)["d2t"])
    rewrite(folder, d2t=absolute)
    with pytest.raises(ValueError, match=r"it holds offsets \(target id minus"):
        load_state(folder)


def test_mapping_twice_to_one_token(folder: Path) -> None:
    offsets = load_state(folder)["d2t"]
    offsets[1] = offsets[0] - 1
    rewrite(folder, d2t=offsets)
    with pytest.raises(ValueError, match="two draft ids to one token"):
        load_state(folder)
