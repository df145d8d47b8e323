"""The hash that names a target: stable where it is the same, changed where not."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.tiny import edit_config
from vllm_dspark.model.target import (
    find_target,
    identify_target,
    read_target_facts,
    target_hash,
)


@pytest.fixture
def target(tiny_target: Path, tmp_path: Path) -> Path:
    """A copy of the tiny target that a test may change."""
    return Path(shutil.copytree(tiny_target, tmp_path / "target"))


def test_what_does_not_change_the_model_does_not_change_the_hash(
    target: Path,
) -> None:
    before = target_hash(target)
    edit_config(target, transformers_version="9.9", use_cache=False, _name_or_path="x")
    assert target_hash(target) == before
    (target / "README.md").write_text("x")
    tensors = load_file(target / "model.safetensors")
    names = sorted(tensors)
    files = {n: f"part-{i % 2}.safetensors" for i, n in enumerate(names)}
    for file in set(files.values()):
        part = {n: t for n, t in tensors.items() if files[n] == file}
        save_file(part, target / file)
    (target / "model.safetensors").unlink()
    index = {"weight_map": files}
    (target / "model.safetensors.index.json").write_text(json.dumps(index))
    assert target_hash(target) == before  # split into files is the same model


def test_other_weights_or_another_shape_change_it(target: Path) -> None:
    seen = {target_hash(target)}
    file = target / "model.safetensors"
    tensors = load_file(file)
    tensors["model.layers.2.self_attn.q_proj.weight"][0, 3] += 0.01
    save_file(tensors, file)
    seen.add(target_hash(target))
    save_file({n: t.to(torch.bfloat16) for n, t in tensors.items()}, file)
    seen.add(target_hash(target))
    edit_config(target, num_attention_heads=2)
    seen.add(target_hash(target))
    assert len(seen) == 4


def test_quantised_weights_have_a_hash(target: Path) -> None:
    file = target / "model.safetensors"
    eight = {"x": torch.zeros(8, dtype=torch.float8_e4m3fn)}
    save_file(load_file(file) | eight, file)
    assert len(target_hash(target)) == 64


def test_identity_and_facts(target: Path) -> None:
    identity = identify_target(target)
    assert identity.name == "target" and identity.hash == target_hash(target)
    assert identity.vocab_size == read_target_facts(target).vocab_size == 128


def test_what_is_no_target_is_refused(target: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no model folder"):
        find_target(tmp_path)
    with pytest.raises(ValueError, match=r"neither.*hf download nobody/nothing"):
        find_target("nobody/nothing")
    (target / "model.safetensors").write_bytes(b"short")
    with pytest.raises(ValueError, match="truncated"):
        target_hash(target)
