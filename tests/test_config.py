"""Configuration: what is accepted, and that each bad value is named with its fix."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from vllm_dspark.config import (
    DrafterConfig,
    DSparkOptions,
    resolve_num_speculative_tokens,
)

# The keys of a released checkpoint (deepseek-ai's dspark for Qwen3-4B, block 7).
RELEASED: dict[str, Any] = {
    "architectures": ["Qwen3DSparkModel"],
    "model_type": "qwen3",
    "vocab_size": 151936,
    "hidden_size": 2560,
    "intermediate_size": 9728,
    "num_hidden_layers": 5,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000,
    "rope_scaling": None,
    "sliding_window": None,
    "use_sliding_window": False,
    "attention_bias": False,
    "tie_word_embeddings": False,
    "layer_types": ["full_attention"] * 5,
    "torch_dtype": "bfloat16",
    "block_size": 7,
    "mask_token_id": 151669,
    "target_layer_ids": [1, 9, 17, 25, 33],
    "num_target_layers": 36,
    "num_anchors": 512,
    "markov_rank": 256,
    "markov_head_type": "vanilla",
    "enable_confidence_head": True,
    "confidence_head_with_markov": True,
    "transformers_version": "4.57.1",
}


def read(**changes: Any) -> DrafterConfig:
    """The released configuration with some keys changed; None removes a key."""
    raw = {k: v for k, v in {**RELEASED, **changes}.items() if v is not None}
    return DrafterConfig.from_dict(raw, source="X/config.json")


def test_released_layout_is_read() -> None:
    config = read()
    assert config.target_layer_ids == (1, 9, 17, 25, 33)
    assert config.feature_size == 5 * 2560
    assert (config.block_size, config.markov_rank) == (7, 256)
    assert (config.rope_theta, config.dtype) == (1e6, "bfloat16")
    assert config.draft_vocab_size == 151936
    assert not config.has_reduced_vocab
    assert config.sliding_window is None


def test_shipped_drafter_is_read(demo_drafter: Path) -> None:
    config = DrafterConfig.from_dict(
        json.loads((demo_drafter / "config.json").read_text())
    )
    assert config.has_reduced_vocab
    assert config.rope_theta == 100000.0  # from rope_parameters


def test_defaults_of_absent_keys() -> None:
    absent = ["head_dim", "num_key_value_heads", "layer_types", "rms_norm_eps"]
    absent += ["torch_dtype", "enable_confidence_head", "draft_vocab_size"]
    config = read(**dict.fromkeys(absent))
    assert (config.head_dim, config.num_key_value_heads) == (80, 32)
    assert config.layer_types == ("full_attention",) * 5
    assert (config.rms_norm_eps, config.dtype) == (1e-6, "float32")
    assert not config.enable_confidence_head
    assert not config.confidence_head_with_markov


def test_rank_zero_has_no_head() -> None:
    config = read(markov_rank=0, markov_head_type=None, enable_confidence_head=False)
    assert config.markov_head_type == "none"


def test_uniform_sliding_layers_are_read() -> None:
    config = read(
        layer_types=["sliding_attention"] * 5,
        sliding_window=2048,
        use_sliding_window=True,
    )
    assert config.sliding_window == 2048


BAD: list[tuple[dict[str, Any], str]] = [
    ({"block_size": 0}, "'block_size' is 0; it must be an integer >= 1"),
    ({"block_size": 7.5}, "'block_size' is 7.5"),
    ({"block_size": None}, "'block_size' is missing"),
    ({"markov_rank": -1}, "'markov_rank' is -1; it must be an integer >= 0"),
    ({"markov_head_type": "lstm"}, "'lstm'; choose one of vanilla, gated, rnn"),
    ({"markov_head_type": None}, "'markov_head_type' is None"),
    ({"mask_token_id": 151936}, "'mask_token_id' is 151936, outside the vocabulary"),
    ({"target_layer_ids": [9, 1]}, r"'target_layer_ids' is \[9, 1\].*increasing"),
    ({"target_layer_ids": [1, 1]}, "increasing"),
    ({"target_layer_ids": [1, 36]}, "'num_target_layers' 36 .* to 35"),
    ({"target_layer_ids": [-2, 3]}, "from -1"),
    ({"target_layer_ids": []}, "must be a list of layer numbers"),
    ({"target_layer_ids": ["1"]}, "must be a list of layer numbers"),
    ({"head_dim": 127}, "'head_dim' is 127"),
    ({"num_key_value_heads": 5}, "not a multiple of 'num_key_value_heads', 5"),
    ({"draft_vocab_size": 151937}, "'draft_vocab_size' is 151937, more than"),
    ({"layer_types": ["full_attention"] * 4}, "4 entries for 5 layers"),
    ({"layer_types": ["linear"] * 5}, "'linear'; choose"),
    (
        {"layer_types": ["full_attention"] * 4 + ["sliding_attention"]},
        "mixes full and sliding attention, which vLLM's V1",
    ),
    (
        {"layer_types": ["sliding_attention"] * 5, "use_sliding_window": True},
        "'sliding_window' is missing",
    ),
    (
        {"layer_types": ["sliding_attention"] * 5, "sliding_window": 2048},
        "'use_sliding_window' is not true",
    ),
    ({"is_causal": True}, "'is_causal' is True with 'full_attention'"),
    ({"rope_theta": None}, "'rope_theta' is missing"),
    ({"rope_scaling": {"rope_type": "yarn"}}, "'rope_type' is 'yarn'"),
    ({"rms_norm_eps": 0}, "'rms_norm_eps' is 0; it must be a number > 0"),
    ({"torch_dtype": "int8"}, "'dtype' is 'int8'; choose one of"),
    ({"attention_bias": "yes"}, "'attention_bias' is 'yes'; it must be true or false"),
    ({"hidden_act": "gelu"}, "'hidden_act' is 'gelu'; only 'silu' works"),
    ({"tie_word_embeddings": True}, "'tie_word_embeddings' is True; only False"),
    ({"target_hidden_size": 4096}, "'target_hidden_size' is 4096"),
    ({"architectures": ["LlamaForCausalLM"]}, "not a DSpark drafter"),
    (
        {"speculators_model_type": "dspark"},
        "speculators library; read it with checkpoint.load_config",
    ),
    (
        {"markov_rank": 0},
        "'confidence_head_with_markov' is true, but 'markov_rank' 0",
    ),
]


@pytest.mark.parametrize(("changes", "message"), BAD)
def test_bad_value_is_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=rf"X/config\.json: .*{message}"):
        read(**changes)


def test_number_of_drafts_defaults_to_the_block() -> None:
    assert resolve_num_speculative_tokens(None, 7) == 7
    assert resolve_num_speculative_tokens(3, 7) == 3
    assert resolve_num_speculative_tokens(7, 7) == 7


def test_more_drafts_than_the_block_names_both_numbers() -> None:
    with pytest.raises(ValueError, match="is 8, but the drafter's block_size is 7"):
        resolve_num_speculative_tokens(8, 7)


@pytest.mark.parametrize("requested", [0, -1, True])
def test_fewer_than_one_draft_is_refused(requested: int) -> None:
    with pytest.raises(ValueError, match=f"is {requested!r}; it must be an integer"):
        resolve_num_speculative_tokens(requested, 7)


def test_options_default_and_read() -> None:
    assert DSparkOptions.from_dict(None) == DSparkOptions()
    assert DSparkOptions().backend == "auto"
    assert DSparkOptions.from_dict({"backend": "native"}).backend == "native"


def test_unknown_option_is_refused_with_the_nearest() -> None:
    with pytest.raises(ValueError, match=r"'bakend'; did you mean 'backend'\?.*known"):
        DSparkOptions.from_dict({"bakend": "native"})
    with pytest.raises(ValueError, match=r"unknown dspark option 'zzz' \(known: back"):
        DSparkOptions.from_dict({"zzz": 1})


def test_bad_option_values_are_refused() -> None:
    with pytest.raises(ValueError, match="'backend' is 'cuda'; choose one of auto, n"):
        DSparkOptions.from_dict({"backend": "cuda"})
    with pytest.raises(ValueError, match="must be an object"):
        DSparkOptions.from_dict("native")  # type: ignore[arg-type]
