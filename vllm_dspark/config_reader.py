"""Checked reading of a drafter's ``config.json``, key by key.

Only `DrafterConfig.from_dict` uses this module. It knows which values cannot be and
says so with the value and what would do; it does not know the weights or the target.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

ARCHITECTURE = "Qwen3DSparkModel"
HEAD_TYPES = ("vanilla", "gated", "rnn")
NO_HEAD = "none"
FULL_ATTENTION = "full_attention"
SLIDING_ATTENTION = "sliding_attention"
# Left by a conversion (model/speculators.py); that layout knows no target depth.
FROM_SPECULATORS = "from_speculators"
DTYPES = ("float32", "bfloat16", "float16")
# No drafter has more; what a damaged file says must not be built to be refused.
_MOST = 1 << 24
_MOST_LAYERS = 1 << 10

# Keys that change what a drafter computes and that we do not implement: a checkpoint
# that sets one to another value would draft badly without any error.
_ONLY_SUPPORTED: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu",),
    "logit_scale": (1.0,),
    "is_neox_style": (True,),
    "dspark_bonus_anchor": (False,),
    "sample_from_anchor": (True,),
    "dflash_config": ({},),
    "tie_word_embeddings": (False,),
}


def is_int(value: Any) -> bool:
    """True for integers, but not for booleans, which Python counts as such."""
    return isinstance(value, int) and not isinstance(value, bool)


class ConfigReader:
    """Typed, checked access to one config.json.

    `shape`, `attention`, `block` and `heads` return the fields of `DrafterConfig`.
    """

    def __init__(self, raw: Mapping[str, Any], source: str) -> None:
        self.raw = raw
        self.source = source

    def fail(self, problem: str) -> ValueError:
        return ValueError(f"{self.source}: {problem}")

    def integer(
        self, key: str, low: int, default: int | None = None, high: int = _MOST
    ) -> int:
        value = self.raw.get(key)
        if value is None:
            value = default
        if value is None:
            raise self.fail(f"{key!r} is missing")
        if not is_int(value) or value < low:
            raise self.fail(f"{key!r} is {value!r}; it must be an integer >= {low}")
        if value > high:
            raise self.fail(f"{key!r} is {value!r}; it must be at most {high}")
        return int(value)

    def boolean(self, key: str) -> bool:
        value = self.raw.get(key, False)
        if not isinstance(value, bool):
            raise self.fail(f"{key!r} is {value!r}; it must be true or false")
        return value

    def positive(self, key: str, value: Any) -> float:
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not number or not 0 < value < 1e30:
            raise self.fail(
                f"{key!r} is {value!r}; it must be a number > 0 and below 1e30"
            )
        return float(value)

    def check_layout(self) -> None:
        """Refuse folders of another kind before complaining about their keys."""
        if "speculators_model_type" in self.raw:
            raise self.fail(
                "this is a configuration of the speculators library; read it with "
                "checkpoint.load_config, or convert it: `vllm-dspark convert`"
            )
        architectures = self.raw.get("architectures") or []
        if not isinstance(architectures, list) or ARCHITECTURE not in architectures:
            raise self.fail(
                f"'architectures' is {architectures!r}, so this is not a DSpark "
                f"drafter; expected [{ARCHITECTURE!r}]"
            )
        for key, allowed in _ONLY_SUPPORTED.items():
            value = self.raw.get(key)
            if value is not None and value not in allowed:
                raise self.fail(f"{key!r} is {value!r}; only {allowed[0]!r} works")

    def shape(self) -> dict[str, Any]:
        heads = self.integer("num_attention_heads", 1)
        kv_heads = self.integer("num_key_value_heads", 1, heads)
        hidden = self.integer("hidden_size", 1)
        vocab = self.integer("vocab_size", 2)
        draft_vocab = self.integer("draft_vocab_size", 2, vocab)
        target_hidden = self.integer("target_hidden_size", 1, hidden)
        head_dim = self.integer("head_dim", 2, max(hidden // heads, 2))
        if heads % kv_heads:
            raise self.fail(
                f"'num_attention_heads' is {heads}, which is not a multiple of "
                f"'num_key_value_heads', {kv_heads}"
            )
        if head_dim % 2:
            raise self.fail(f"'head_dim' is {head_dim}; rotary positions need it even")
        if draft_vocab > vocab:
            raise self.fail(
                f"'draft_vocab_size' is {draft_vocab}, more than 'vocab_size', {vocab}"
            )
        if target_hidden != hidden:
            raise self.fail(
                f"'target_hidden_size' is {target_hidden} and 'hidden_size' {hidden}; "
                "only drafters as wide as their target work"
            )
        dtype = self.raw.get("dtype") or self.raw.get("torch_dtype") or "float32"
        if dtype not in DTYPES:
            raise self.fail(f"'dtype' is {dtype!r}; choose one of {', '.join(DTYPES)}")
        return {
            "vocab_size": vocab,
            "draft_vocab_size": draft_vocab,
            "hidden_size": hidden,
            "intermediate_size": self.integer("intermediate_size", 1),
            "num_hidden_layers": self.layers(),
            "num_attention_heads": heads,
            "num_key_value_heads": kv_heads,
            "head_dim": head_dim,
            "dtype": dtype,
        }

    def layers(self) -> int:
        return self.integer("num_hidden_layers", 1, high=_MOST_LAYERS)

    def attention(self) -> dict[str, Any]:
        num_layers = self.layers()
        types = self.raw.get("layer_types") or [FULL_ATTENTION] * num_layers
        if not isinstance(types, list) or not all(isinstance(t, str) for t in types):
            raise self.fail(f"'layer_types' is {types!r}; it must be a list of names")
        if len(types) != num_layers:
            raise self.fail(
                f"'layer_types' has {len(types)} entries for {num_layers} layers"
            )
        unknown = sorted(set(types) - {FULL_ATTENTION, SLIDING_ATTENTION})
        if unknown:
            raise self.fail(
                f"'layer_types' contains {unknown[0]!r}; choose {FULL_ATTENTION!r} or "
                f"{SLIDING_ATTENTION!r}"
            )
        if len(set(types)) > 1:
            raise self.fail(
                "'layer_types' mixes full and sliding attention, which vLLM's V1 "
                "runner cannot serve (one KV cache group per drafter); use one type"
            )
        sliding = types[0] == SLIDING_ATTENTION
        causal = self.raw.get("is_causal")
        if causal is not None and causal is not sliding:
            raise self.fail(
                f"'is_causal' is {causal!r} with {types[0]!r} layers; full attention "
                "is bidirectional in the block and sliding attention causal"
            )
        if sliding and self.raw.get("use_sliding_window") is not True:
            raise self.fail(
                "'layer_types' are sliding, but 'use_sliding_window' is not true: "
                "Hugging Face's Qwen3Config drops 'sliding_window' then; set it"
            )
        eps = self.raw.get("rms_norm_eps", 1e-6)
        return {
            "rms_norm_eps": self.positive("rms_norm_eps", eps),
            "rope_theta": self.rope_theta(),
            "attention_bias": self.boolean("attention_bias"),
            "layer_types": tuple(types),
            "sliding_window": self.integer("sliding_window", 1) if sliding else None,
        }

    def rope_theta(self) -> float:
        """The base of the rotary positions, from either place it is written."""
        rope = self.raw.get("rope_parameters") or self.raw.get("rope_scaling") or {}
        if not isinstance(rope, Mapping):
            raise self.fail(f"'rope_parameters' is {rope!r}; it must be an object")
        kind = rope.get("rope_type", rope.get("type", "default"))
        if kind != "default":
            raise self.fail(
                f"'rope_type' is {kind!r}; only unscaled rotary positions "
                "('default') work"
            )
        theta = rope.get("rope_theta", self.raw.get("rope_theta"))
        if theta is None:
            raise self.fail("'rope_theta' is missing (also from 'rope_parameters')")
        return self.positive("rope_theta", theta)

    def block(self) -> dict[str, Any]:
        vocab = self.integer("vocab_size", 2)
        mask = self.integer("mask_token_id", 0)
        known = "num_target_layers" in self.raw or FROM_SPECULATORS not in self.raw
        num_target = self.integer("num_target_layers", 1) if known else None
        if mask >= vocab:
            raise self.fail(
                f"'mask_token_id' is {mask}, outside the vocabulary of {vocab} tokens"
            )
        return {
            "block_size": self.integer("block_size", 1),
            "mask_token_id": mask,
            "num_target_layers": num_target,
            "target_layer_ids": self.target_layer_ids(num_target),
        }

    def target_layer_ids(self, num_target_layers: int | None) -> tuple[int, ...]:
        ids = self.raw.get("target_layer_ids")
        if not isinstance(ids, (list, tuple)) or not ids or not all(map(is_int, ids)):
            raise self.fail(
                f"'target_layer_ids' is {ids!r}; it must be a list of layer numbers"
            )
        if list(ids) != sorted(set(ids)):
            raise self.fail(f"'target_layer_ids' is {ids!r}; it must be increasing")
        end = ids[-1] + 1 if num_target_layers is None else num_target_layers
        if ids[0] < -1 or ids[-1] >= end:
            raise self.fail(
                f"'target_layer_ids' is {ids!r}; with 'num_target_layers' "
                f"{num_target_layers} they go from -1 (the embeddings) to {end - 1}"
            )
        return tuple(ids)

    def heads(self) -> dict[str, Any]:
        rank = self.integer("markov_rank", 0)
        kind = str(self.raw.get("markov_head_type")).lower() if rank else NO_HEAD
        if rank and kind not in HEAD_TYPES:
            raise self.fail(
                f"'markov_head_type' is {self.raw.get('markov_head_type')!r}; choose "
                f"one of {', '.join(HEAD_TYPES)} (or 'markov_rank': 0 for none)"
            )
        confidence = self.boolean("enable_confidence_head")
        with_markov = confidence and self.boolean("confidence_head_with_markov")
        if with_markov and not rank:
            raise self.fail(
                "'confidence_head_with_markov' is true, but 'markov_rank' 0 means "
                "there are no Markov features; set it to false"
            )
        return {
            "markov_rank": rank,
            "markov_head_type": kind,
            "enable_confidence_head": confidence,
            "confidence_head_with_markov": with_markov,
        }
