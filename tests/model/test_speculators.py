"""The speculators library's DSpark folders: read directly, converted without loss."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.library_folder import make_library_folder, twin_of
from tests.tiny import edit_config, make_tiny_drafter
from vllm_dspark.model import convert as conversion
from vllm_dspark.model.checkpoint import (
    check_checkpoint,
    load_config,
    load_drafter,
    load_state,
    save_checkpoint,
    weights_hash,
)
from vllm_dspark.model.fit import check_fit
from vllm_dspark.model.headers import WEIGHTS
from vllm_dspark.model.speculators import to_deepspec, to_speculators

VARIANTS: dict[str, dict[str, Any]] = {
    "vanilla": {},
    "gated bfloat16": {"head_type": "gated", "dtype": torch.bfloat16},
    "rnn, sliding window": {"head_type": "rnn", "sliding_window": 16},
    "rank 0": {"markov_rank": 0},
    "own everything": {"own_embeddings": True},
    "reduced": {"draft_vocab_size": 40},
    "reduced, own LM head": {"draft_vocab_size": 40, "with_lm_head": True},
    "no confidence": {"confidence": False},
    "confidence without Markov": {"confidence_with_markov": False},
    "biases, old rope key": {
        "overrides": {
            "attention_bias": True,
            "rope_parameters": None,
            "rope_theta": 5000,
        }
    },
}


@pytest.fixture(params=VARIANTS.values(), ids=VARIANTS.keys())
def variant(request: pytest.FixtureRequest) -> dict[str, Any]:
    keys: dict[str, Any] = request.param
    return keys


@pytest.fixture
def library(tmp_path: Path, tiny_target: Path) -> Path:
    """A folder of the library to break."""
    return make_library_folder(tmp_path / "lib", tiny_target, draft_vocab_size=40)


def config_of(folder: Path) -> dict[str, Any]:
    raw: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return raw


def as_target(folder: Path) -> conversion.Target:
    return conversion.Target(str(folder), config_of(folder))


def assert_same_files(one: Path, other: Path) -> None:
    for name in ("config.json", WEIGHTS):
        assert (one / name).read_bytes() == (other / name).read_bytes(), name


def assert_same_tensors(one: Path, other: Path) -> None:
    a, b = load_file(one / WEIGHTS), load_file(other / WEIGHTS)
    assert a.keys() == b.keys()
    for name, tensor in a.items():
        assert tensor.dtype == b[name].dtype
        assert torch.equal(tensor, b[name]), name


def test_deepspec_through_our_drafter(
    variant: dict[str, Any], tmp_path: Path, tiny_target: Path
) -> None:
    """DeepSpec → `Drafter` → DeepSpec; embeddings and LM head may be the target's."""
    folder = make_tiny_drafter(tmp_path / "a", tiny_target, **variant)
    target = load_file(tiny_target / "model.safetensors")
    drafter = load_drafter(
        folder,
        target_embeddings=target["model.embed_tokens.weight"],
        target_lm_head=target["lm_head.weight"],
    )
    state = drafter.state_dict()
    if drafter.draft_to_target is not None:
        ids = drafter.draft_to_target
        state["d2t"] = ids - torch.arange(len(ids))
    source = load_file(folder / WEIGHTS)
    kept = {name: tensor for name, tensor in state.items() if name in source}
    save_checkpoint(tmp_path / "b", config_of(folder), kept)
    assert_same_files(folder, tmp_path / "b")
    assert weights_hash(folder) == weights_hash(tmp_path / "b")


def test_deepspec_there_and_back(
    variant: dict[str, Any], tmp_path: Path, tiny_target: Path
) -> None:
    folder = make_tiny_drafter(tmp_path / "a", tiny_target, **variant)
    done = conversion.convert(folder, tmp_path / "b", "speculators")
    back = conversion.convert(tmp_path / "b", tmp_path / "c", "deepspec")
    assert config_of(tmp_path / "c") == config_of(folder)
    assert_same_tensors(folder, tmp_path / "c")
    assert done.weights_hash == back.weights_hash == weights_hash(folder)
    assert load_config(tmp_path / "b") == load_config(folder)
    there = load_file(tmp_path / "b" / WEIGHTS)
    assert ("t2d" in there) == ("draft_vocab_size" in variant)


def test_speculators_there_and_back(
    variant: dict[str, Any], tmp_path: Path, tiny_target: Path
) -> None:
    """Byte for byte, as the library's files are written like ours."""
    folder = make_library_folder(tmp_path / "a", tiny_target, **variant)
    to = conversion.convert
    to(folder, tmp_path / "b", "deepspec", as_target(tiny_target))
    to(tmp_path / "b", tmp_path / "c", "speculators")
    assert_same_files(folder, tmp_path / "c")
    assert weights_hash(folder) == weights_hash(tmp_path / "b")
    assert load_config(tmp_path / "b").num_target_layers == 4


def test_read_as_its_deepspec_twin(
    variant: dict[str, Any], tmp_path: Path, tiny_target: Path
) -> None:
    folder = make_library_folder(tmp_path / "a", tiny_target, **variant)
    twin = twin_of(folder)
    config = load_config(twin)
    assert load_config(folder) == replace(config, num_target_layers=None)
    state, expected = load_state(folder), load_state(twin)
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[name], expected[name]) for name in state)
    assert weights_hash(folder) == weights_hash(twin)
    ours, theirs = check_checkpoint(folder), check_checkpoint(twin)
    assert replace(ours, config=config) == theirs


def test_what_the_library_reads(tmp_path: Path, tiny_target: Path) -> None:
    """The keys that carry the meaning, written down once more."""
    raw = config_of(make_tiny_drafter(tmp_path, tiny_target, head_type="gated"))
    found = to_speculators(raw, verifier={"name_or_path": "T", "architectures": ["A"]})
    assert found["speculators_model_type"] == found["speculators_config"]["algorithm"]
    assert found["aux_hidden_state_layer_ids"] == [0, 2, 3]
    assert found["sample_from_anchor"] is True
    assert found["draft_vocab_size"] == 128  # never null there
    assert found["markov_head_type"] == "gated"
    proposal = found["speculators_config"]["proposal_methods"][0]
    assert proposal["speculative_tokens"] == found["block_size"] == 5
    assert found["speculators_config"]["verifier"]["name_or_path"] == "T"
    layer = found["transformer_layer_config"]
    assert layer["head_dim"] == 32 and layer["model_type"] == "qwen3"
    assert "block_size" not in layer and "architectures" not in layer
    assert to_deepspec(found)["target_layer_ids"] == [-1, 1, 2]


def test_exotic_deepspec_keys_survive(tmp_path: Path, tiny_target: Path) -> None:
    raw = config_of(make_tiny_drafter(tmp_path, tiny_target, markov_rank=0))
    raw |= {
        "architectures": ["Qwen3DSparkModel", "Other"],
        "auto_map": {"AutoModel": "modeling.X"},
        "markov_head_type": "none",
        "target_hidden_size": 64,
        "sample_from_anchor": True,
        "num_anchors": 4.0,
        "made_by": {"someone": [1, None, 1.0]},
    }
    del raw["tie_word_embeddings"], raw["draft_vocab_size"]
    there = to_speculators(raw)
    assert there["markov_head_type"] == "vanilla"  # the library knows no "none"
    assert json.dumps(to_deepspec(there), sort_keys=True) == json.dumps(
        raw, sort_keys=True
    )


def test_numbers_keep_their_type(library: Path) -> None:
    raw = config_of(library)
    proposal = raw["speculators_config"]["proposal_methods"][0]
    proposal["accept_tolerance"] = 0  # the library writes 0.0, equal in Python
    raw["speculators_config"]["verifier"] = {"architectures": [], "name_or_path": None}
    back = to_speculators(to_deepspec(raw))
    assert json.dumps(back, sort_keys=True) == json.dumps(raw, sort_keys=True)


def test_edits_between_conversions_count(library: Path, tmp_path: Path) -> None:
    """The record restores what is missing; it does not undo what was changed."""
    raw = to_deepspec(config_of(library), num_target_layers=4)
    again = to_speculators(raw | {"rms_norm_eps": 0.5, "mask_token_id": 3})
    assert again["transformer_layer_config"]["rms_norm_eps"] == 0.5
    assert again["mask_token_id"] == 3
    with pytest.raises(ValueError, match=r"'speculative_tokens' .* is 5, more than"):
        to_speculators(raw | {"block_size": 4})


def test_a_folder_without_t2d(library: Path, tmp_path: Path, tiny_target: Path) -> None:
    """vLLM does not need it, so some leave it out; it stays out."""
    state = load_file(library / WEIGHTS)
    del state["t2d"]
    save_file(state, library / WEIGHTS, metadata={"format": "pt"})
    conversion.convert(library, tmp_path / "b", "deepspec", as_target(tiny_target))
    conversion.convert(tmp_path / "b", tmp_path / "c", "speculators")
    assert_same_files(library, tmp_path / "c")


def test_the_target_is_named_and_kept(tmp_path: Path, tiny_target: Path) -> None:
    folder = make_tiny_drafter(tmp_path / "a", tiny_target)
    target = as_target(tiny_target)
    conversion.convert(folder, tmp_path / "b", "speculators", target)
    conversion.convert(tmp_path / "b", tmp_path / "c", "deepspec")
    conversion.convert(tmp_path / "c", tmp_path / "d", "speculators")
    assert_same_files(tmp_path / "b", tmp_path / "d")
    settings = config_of(tmp_path / "b")["speculators_config"]
    assert settings["verifier"] == {
        "name_or_path": str(tiny_target),
        "architectures": ["LlamaForCausalLM"],
    }


def test_fit_without_a_known_depth(library: Path, tiny_target: Path) -> None:
    config, target = load_config(library), config_of(tiny_target)
    check_fit(config, target)
    check_fit(config, target | {"num_hidden_layers": 5})  # it cannot know
    with pytest.raises(ValueError, match="reads layer 2, but the target given ends"):
        check_fit(config, target | {"num_hidden_layers": 2})


LAYER = "transformer_layer_config"
BAD: dict[str, tuple[dict[str, Any], str]] = {
    "another speculator": (
        {"speculators_model_type": "eagle3"},
        "'eagle3'; only 'dspark' folders",
    ),
    "anchor drafts nothing": (
        {"sample_from_anchor": False},
        "'sample_from_anchor' is False",
    ),
    "anchor not said": ({"sample_from_anchor": None}, "'sample_from_anchor' is None"),
    "no layer config": ({LAYER: None}, f"'{LAYER}' is missing"),
    "no settings": ({"speculators_config": None}, "'speculators_config' is missing"),
    "no proposals": (
        {"speculators_config": {"proposal_methods": []}},
        "'speculative_tokens' of 'speculators_config' None",
    ),
    "no mask": ({"mask_token_id": None}, "'mask_token_id' is missing"),
    "no head type": ({"markov_head_type": None}, "'markov_head_type' is missing"),
    "no taps": ({"aux_hidden_state_layer_ids": None}, "layer_ids' is None"),
    "negative tap": ({"aux_hidden_state_layer_ids": [-1, 2]}, r"is \[-1, 2\]"),
    "block size": ({"block_size": 4}, "is 5, more than 'block_size', 4"),
    "Omni": ({"architectures": ["Qwen3OmniDSparkModel"]}, "Qwen3OmniDSparkModel"),
    "no features": ({"use_aux_hidden_state": False}, "'use_aux_hidden_state' is false"),
    "unknown head": ({"markov_head_type": "lstm"}, "'markov_head_type' is 'lstm'"),
    "record": ({"from_deepspec": 3}, "record of an earlier conversion is 3"),
}


@pytest.mark.parametrize(("change", "message"), BAD.values(), ids=BAD.keys())
def test_what_cannot_be_expressed_is_named(
    library: Path, change: dict[str, Any], message: str
) -> None:
    edit_config(library, **change)
    for read in (load_config, check_checkpoint):
        with pytest.raises(ValueError, match=message) as error:
            read(library)
        assert str(library) in str(error.value)


def test_bidirectional_window_is_refused(tmp_path: Path, tiny_target: Path) -> None:
    folder = make_library_folder(tmp_path / "a", tiny_target, sliding_window=16)
    edit_config(folder, sliding_window_non_causal=True)
    with pytest.raises(ValueError, match="'sliding_window_non_causal' is true"):
        load_config(folder)
    full = make_library_folder(tmp_path / "b", tiny_target)
    edit_config(full, sliding_window_non_causal=True)  # nothing slides
    back = to_speculators(to_deepspec(config_of(full)))
    assert back == config_of(full)


def test_deepspec_names_that_are_taken(tiny_drafter: Path) -> None:
    raw = config_of(tiny_drafter) | {"speculators_config": {}, "from_deepspec": {}}
    with pytest.raises(ValueError, match="'speculators_config', 'from_deepspec' can"):
        to_speculators(raw)


def test_anchor_drafts_nothing_in_deepspec_too(
    tmp_path: Path, tiny_drafter: Path
) -> None:
    folder = Path(shutil.copytree(tiny_drafter, tmp_path / "a"))
    edit_config(folder, sample_from_anchor=False)
    with pytest.raises(ValueError, match="'sample_from_anchor' is False; only True"):
        load_config(folder)


def test_maps_that_disagree(library: Path) -> None:
    state = load_file(library / WEIGHTS)
    first = int(state["t2d"].nonzero()[0])
    state["t2d"][first] = False
    save_file(state, library / WEIGHTS)
    with pytest.raises(ValueError, match="'t2d' and 'd2t' name different tokens"):
        load_state(library)
    state["t2d"] = state["t2d"].int()
    save_file(state, library / WEIGHTS)
    with pytest.raises(ValueError, match=r"'t2d' is I32 of shape \[128\]"):
        check_checkpoint(library)


def test_draft_ids_out_of_order(library: Path, tmp_path: Path) -> None:
    """DeepSpec's layout has them in any order, the library along the vocabulary."""
    for folder in (library, twin_of(library)):
        state = load_file(folder / WEIGHTS)
        ids = (state["d2t"] + torch.arange(40)).flip(0)
        state["d2t"] = ids - torch.arange(40)
        save_file(state, folder / WEIGHTS)
    load_state(twin_of(library))
    for broken in (
        lambda: load_state(library),
        lambda: conversion.convert(twin_of(library), tmp_path / "b", "speculators"),
    ):
        with pytest.raises(ValueError, match="'d2t' is not in the order of"):
            broken()
    assert not (tmp_path / "b").exists()


def test_t2d_where_it_has_no_place(library: Path, tiny_target: Path) -> None:
    twin = twin_of(library)
    shutil.copyfile(library / WEIGHTS, twin / WEIGHTS)
    with pytest.raises(ValueError, match="unexpected 't2d' in the weights"):
        check_checkpoint(twin)


def test_depth_must_come_from_somewhere(library: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"does not say 'num_target_layers'.*--target"):
        conversion.convert(library, tmp_path / "b", "deepspec")


def test_folders_in_the_way(library: Path, tmp_path: Path, tiny_target: Path) -> None:
    to = conversion.convert
    with pytest.raises(ValueError, match="in the speculators layout already"):
        to(library, tmp_path / "b", "speculators")
    with pytest.raises(ValueError, match="not an empty folder"):
        to(library, tiny_target, "deepspec")
    other = config_of(tiny_target) | {"vocab_size": 256}
    with pytest.raises(ValueError, match="vocab_size is 128, but the target given has"):
        to(library, tmp_path / "b", "deepspec", conversion.Target("T", other))
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="could not be written"):
        to(library, tmp_path / "file" / "b", "deepspec", as_target(tiny_target))


def test_calibration_goes_along(tiny_drafter: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_drafter, tmp_path / "a"))
    (folder / "dspark_calibration.json").write_text("{}")
    (folder / "modeling.py").write_text("")
    done = conversion.convert(folder, tmp_path / "b", "speculators")
    assert done.beside == ("dspark_calibration.json",)
    names = {"config.json", WEIGHTS, "dspark_calibration.json"}
    assert {file.name for file in (tmp_path / "b").iterdir()} == names
