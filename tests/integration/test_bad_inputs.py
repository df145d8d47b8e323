"""Bad input is refused while the configuration is made, before any engine starts.

Every message names the offending value and what would do. Groups: the checkpoint's
files and weights, its configuration, a drafter of another target, options and limits,
and what the user chose beside the drafter. NaN weights are the exception: only their
headers are read before the start, so they are found when the drafter is loaded.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.integration.engine import engine
from tests.tiny import edit_config, make_tiny_target

WEIGHTS = "model.safetensors"
BLOCK = 5  # block size of the tiny drafter


@pytest.fixture
def drafter(tmp_path: Path, tiny_drafter: Path) -> Path:
    """A drafter's folder to break."""
    return Path(shutil.copytree(tiny_drafter, tmp_path / "drafter"))


def create(target: Path, drafter: Path, spec: dict | None = None, **kwargs: Any) -> Any:
    """The engine's configuration; no engine is started."""
    from vllm.engine.arg_utils import EngineArgs

    return EngineArgs(
        model=str(target),
        skip_tokenizer_init=True,
        dtype="float32",
        max_model_len=256,
        speculative_config={"method": "dspark", "model": str(drafter), **(spec or {})},
        **kwargs,
    ).create_engine_config()


def edit(**changes: Any) -> Callable[[Path], None]:
    return lambda folder: edit_config(folder, **changes)


def tensors(change: Callable[[dict[str, torch.Tensor]], Any]) -> Callable:
    """A breakage that changes the weights' file."""

    def apply(folder: Path) -> None:
        state = load_file(folder / WEIGHTS)
        change(state)
        save_file(state, folder / WEIGHTS)

    return apply


def truncate(folder: Path) -> None:
    data = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(data[: len(data) // 2])


def pickled(folder: Path) -> None:
    state = load_file(folder / WEIGHTS)
    (folder / WEIGHTS).unlink()
    torch.save(state, folder / "pytorch_model.bin")


def widen(state: dict[str, torch.Tensor]) -> None:
    state["fc.weight"] = torch.zeros(64, 65)


# What is wrong → how to break the folder, and what the message must name.
FILES: dict[str, tuple[Callable[[Path], Any], list[str]]] = {
    "no weights": (lambda f: (f / WEIGHTS).unlink(), ["no weights", WEIGHTS]),
    "truncated": (truncate, ["truncated", WEIGHTS, "download"]),
    "not safetensors": (
        lambda f: (f / WEIGHTS).write_bytes(b"<html>not found</html>"),
        [WEIGHTS, "not a safetensors file"],
    ),
    "pickle": (pickled, ["pytorch_model.bin", "pickle", "convert it to"]),
    "missing tensor": (
        tensors(lambda s: s.pop("markov_head.markov_w2.weight")),
        ["markov_head.markov_w2.weight", "missing"],
    ),
    "unexpected tensor": (
        tensors(lambda s: s.update(extra=torch.zeros(2))),
        ["extra", "unexpected"],
    ),
    "wrong shape": (tensors(widen), ["fc.weight", "[64, 65]", "[64, 192]"]),
    "wrong dtype": (
        tensors(lambda s: s.update({"norm.weight": torch.ones(64, dtype=torch.int8)})),
        ["norm.weight", "I8"],
    ),
    "head type": (edit(markov_head_type="magic"), ["magic", "vanilla", "gated", "rnn"]),
    "block size 0": (edit(block_size=0), ["block_size", "0", ">= 1"]),
    "block size text": (edit(block_size="7"), ["block_size", "'7'"]),
    "mask token": (edit(mask_token_id=999), ["mask_token_id", "999", "128"]),
    "layer ids": (edit(target_layer_ids=[1, 9]), ["target_layer_ids", "9"]),
    "last layer": (edit(target_layer_ids=[-1, 1, 3]), ["last layer", "3"]),
    "rope": (
        edit(rope_parameters={"rope_type": "yarn", "rope_theta": 1e4}),
        ["rope_type", "yarn"],
    ),
    "no config": (lambda f: (f / "config.json").unlink(), ["config.json"]),
    "other shapes": (edit(hidden_size=32), ["[1, 72]", "by config.json", "[1, 40]"]),
}


@pytest.mark.parametrize("name", FILES)
def test_checkpoint(name: str, tiny_target: Path, drafter: Path) -> None:
    breakage, words = FILES[name]
    breakage(drafter)
    with pytest.raises(ValueError) as error:
        create(tiny_target, drafter)
    message = str(error.value)
    assert [w for w in words if w not in message] == [], message


def test_a_sound_checkpoint_is_taken(tiny_target: Path, drafter: Path) -> None:
    config = create(tiny_target, drafter)
    assert config.speculative_config.num_speculative_tokens == BLOCK
    assert config.parallel_config.worker_cls.startswith("vllm_dspark.")
    assert config.scheduler_config.scheduler_cls.startswith("vllm_dspark.")


@pytest.mark.parametrize("path", ["nowhere", "config.json"])
def test_no_such_folder(tiny_target: Path, drafter: Path, path: str) -> None:
    with pytest.raises(ValueError, match=path):
        create(tiny_target, drafter / path)


@pytest.mark.parametrize(
    ("shape", "words"),
    [
        ({"hidden": 128}, ["another target", "hidden_size", "64", "128"]),
        ({"vocab_size": 160}, ["another target", "vocab_size", "128", "160"]),
        ({"layers": 6}, ["another target", "layers", "4", "6"]),
    ],
)
def test_a_drafter_of_another_target(
    tmp_path: Path, tiny_drafter: Path, shape: dict[str, int], words: list[str]
) -> None:
    other = make_tiny_target(tmp_path / "other", **shape)
    with pytest.raises(ValueError) as error:
        create(other, tiny_drafter)
    assert [w for w in words if w not in str(error.value)] == []


def test_a_target_without_auxiliary_hidden_states(
    tmp_path: Path, tiny_drafter: Path
) -> None:
    from transformers import OPTConfig

    OPTConfig(
        vocab_size=128,
        hidden_size=64,
        word_embed_proj_dim=64,
        ffn_dim=64,
        num_hidden_layers=4,
        num_attention_heads=2,
        architectures=["OPTForCausalLM"],
    ).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"OPTForCausalLM.*auxiliary hidden states"):
        create(tmp_path, tiny_drafter)


OPTIONS: dict[str, tuple[dict[str, Any], list[str]]] = {
    "unknown": ({"dspark": {"backnd": "auto"}}, ["backnd", "did you mean 'backend'"]),
    "unknown value": (
        {"dspark": {"backend": "cuda"}},
        ["backend", "cuda", "auto", "native", "reference"],
    ),
    "no object": ({"dspark": "native"}, ["'native'", "object"]),
    "unknown policy": ({"dspark": {"policy": "fast"}}, ["fast", "adaptive", "fixed"]),
    "no probability": ({"dspark": {"threshold": 2}}, ["threshold", "2", "from 0 to 1"]),
    "no flag": ({"dspark": {"bypass": 1}}, ["bypass", "1", "true or false"]),
    "no goal": ({"dspark": {"slo_tps": -3}}, ["slo_tps", "-3"]),
    "no table": ({"dspark": {"cost_table": "/nowhere"}}, ["cost_table", "/nowhere"]),
    "no file": ({"dspark": {"calibration": "/nowhere"}}, ["calibration", "/nowhere"]),
    "no such kernel": (
        {"dspark": {"rejection_kernel": "triton"}},
        ["rejection_kernel", "triton", "auto", "vllm", "dspark"],
    ),
    "kernel of the other runner": (
        {"dspark": {"rejection_kernel": "vllm"}},
        ["rejection_kernel", "vllm", "only the V2 runner", "leave the option out"],
    ),
}


@pytest.mark.parametrize("name", OPTIONS)
def test_additional_config(name: str, tiny_target: Path, tiny_drafter: Path) -> None:
    extra, words = OPTIONS[name]
    with pytest.raises(ValueError) as error:
        create(tiny_target, tiny_drafter, additional_config=extra)
    assert [w for w in words if w not in str(error.value)] == [], str(error.value)


def test_adaptive_verification_needs_no_cuda_graphs_here(
    tiny_target: Path, tiny_drafter: Path
) -> None:
    spec = {"enable_adaptive_verification": True}
    create(tiny_target, tiny_drafter, spec)
    extra = {"dspark": {"policy": "fixed"}}
    with pytest.raises(ValueError, match=r"enable_adaptive_verification.*'fixed'"):
        create(tiny_target, tiny_drafter, spec, additional_config=extra)


SPEC: dict[str, tuple[dict[str, Any], list[str]]] = {
    "unknown key": ({"draft_sample_metod": "greedy"}, ["draft_sample_metod"]),
    "too many": ({"num_speculative_tokens": 6}, ["6", "block_size is 5"]),
    "none": ({"num_speculative_tokens": 0}, ["num_speculative_tokens", "0"]),
    "sample method": ({"draft_sample_method": "magic"}, ["draft_sample_method"]),
    "draft top-k": ({"dspark_draft_topk": 0}, ["dspark_draft_topk"]),
    "rejection": (
        {
            "rejection_sample_method": "synthetic",
            "synthetic_acceptance_rates": [0.5] * BLOCK,
        },
        ["rejection_sample_method", "synthetic", "standard"],
    ),
}


@pytest.mark.parametrize("name", SPEC)
def test_speculative_config(name: str, tiny_target: Path, tiny_drafter: Path) -> None:
    spec, words = SPEC[name]
    with pytest.raises(ValueError) as error:
        create(tiny_target, tiny_drafter, spec)
    assert [w for w in words if w not in str(error.value)] == [], str(error.value)


def test_fewer_tokens_than_the_block(tiny_target: Path, tiny_drafter: Path) -> None:
    config = create(tiny_target, tiny_drafter, {"num_speculative_tokens": 2})
    assert config.speculative_config.num_speculative_tokens == 2


@pytest.mark.parametrize("key", ["worker_cls", "scheduler_cls"])
def test_a_class_of_the_users(key: str, tiny_target: Path, tiny_drafter: Path) -> None:
    mine = f"somewhere.My{key}"
    with pytest.raises(ValueError, match=mine) as error:
        create(tiny_target, tiny_drafter, **{key: mine})
    assert "leave it out" in str(error.value)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_numbers(
    tiny_target: Path, drafter: Path, value: float
) -> None:
    name = "layers.1.self_attn.k_proj.weight"

    def spoil(state: dict[str, torch.Tensor]) -> None:
        state[name][3, 3] = value

    tensors(spoil)(drafter)
    with (
        pytest.raises(ValueError, match=name) as error,
        engine(tiny_target, drafter),
    ):
        pass
    assert "NaN or infinite" in str(error.value)


@pytest.mark.parametrize("backend", ["auto", "native"])
def test_a_stale_build(
    backend: str,
    tiny_target: Path,
    tiny_drafter: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It is found while the engine starts, not by the first request."""
    from vllm_dspark.ops import extension_native

    def stale() -> None:
        raise RuntimeError("built from other sources")

    monkeypatch.setattr(extension_native, "_load", stale)
    extra = {"additional_config": {"dspark": {"backend": backend}}}
    with (
        pytest.raises(RuntimeError, match="built from other sources"),
        engine(tiny_target, tiny_drafter, **extra),
    ):
        pytest.fail("the engine started")
