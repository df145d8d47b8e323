"""A fresh drafter for a target: its shape, its frozen parts and its first weights.

Embeddings and LM head are the target's and stay frozen (3.3). With ``init = target``
each layer starts as one of the target's, evenly spaced from the first to the last, and
the projection of the features as their mean: the drafter starts as a shallow copy of
the target that reads the target's own states as its past.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vllm_dspark.config import DrafterConfig
from vllm_dspark.model.drafter import Drafter
from vllm_dspark.train.options import TrainOptions

_NUM_TAPS = 5
# With tied embeddings a copy of the target's final norm predicts the anchor itself
# with confidence; smaller logits start at a loss near that of a uniform guess.
_NORM_SCALE = 0.3
# Weights that a target's layer and a drafter's have in common.
_SHARED = (
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "self_attn.q_norm",
    "self_attn.k_norm",
    "mlp.gate_proj",
    "mlp.up_proj",
    "mlp.down_proj",
    "input_layernorm",
    "post_attention_layernorm",
)


@dataclass(frozen=True, slots=True)
class TargetParts:
    """What a drafter takes from a Hugging Face target.

    Args:
        config: its configuration as plain values.
        embeddings, lm_head: ``[V, d]``.
        layers: state dicts of its decoder layers, by index.
        norm: ``[d]``, the final norm.
    """

    config: Mapping[str, Any]
    embeddings: Tensor
    lm_head: Tensor
    layers: Sequence[Mapping[str, Tensor]]
    norm: Tensor


def target_parts(target: Any) -> TargetParts:
    """Look into a target.

    Raises:
        ValueError: its decoder is not built like Llama's or Qwen3's.
    """
    body: Any = getattr(target, "model", None)
    layers = getattr(body, "layers", None)
    if layers is None or not hasattr(body, "norm"):
        raise ValueError(
            f"target is a {type(target).__name__}; drafters can be trained for "
            "decoders built like Llama or Qwen3 (model.layers, model.norm)"
        )
    return TargetParts(
        config=target.config.to_dict(),
        embeddings=target.get_input_embeddings().weight.detach(),
        lm_head=target.get_output_embeddings().weight.detach(),
        layers=[layer.state_dict() for layer in layers],
        norm=body.norm.weight.detach(),
    )


def default_layer_ids(num_layers: int) -> tuple[int, ...]:
    """Five layers from the second to the last but one; fewer for shallow targets.

    Raises:
        ValueError: the target has fewer than two layers.
    """
    if num_layers < 2:
        raise ValueError(
            f"the target has {num_layers} layer; the last one cannot be tapped, so it "
            "takes two at least"
        )
    first, last = min(1, num_layers - 2), num_layers - 2
    spaced = torch.linspace(first, last, _NUM_TAPS).round().int().tolist()
    return tuple(sorted(set(spaced)))


def drafter_config(
    target: Mapping[str, Any], options: TrainOptions, mask_token_id: int
) -> dict[str, Any]:
    """The checkpoint's ``config.json`` for a target and options.

    Raises:
        ValueError: more draft tokens than vocabulary, or a tapped layer that is not
            there or is the last one.
    """
    vocab, depth = int(target["vocab_size"]), int(target["num_hidden_layers"])
    taps = options.target_layer_ids or default_layer_ids(depth)
    for layer in taps:
        if not -1 <= layer < depth - 1:
            raise ValueError(
                f"target layer {layer} cannot be tapped: choose from -1 (the "
                f"embeddings) to {depth - 2} (what vLLM hands out of the last layer is "
                "not what Hugging Face does)"
            )
    draft_vocab = options.draft_tokens(vocab)
    heads = int(target["num_attention_heads"])
    hidden = int(target["hidden_size"])
    kind = "full_attention" if options.sliding_window is None else "sliding_attention"
    config: dict[str, Any] = {
        "architectures": ["Qwen3DSparkModel"],
        "model_type": "qwen3",
        "vocab_size": vocab,
        "hidden_size": hidden,
        "intermediate_size": int(target["intermediate_size"]),
        "num_hidden_layers": options.layers,
        "num_attention_heads": heads,
        "num_key_value_heads": int(target.get("num_key_value_heads") or heads),
        "head_dim": int(target.get("head_dim") or hidden // heads),
        "hidden_act": "silu",
        "rms_norm_eps": float(target["rms_norm_eps"]),
        "max_position_embeddings": int(target["max_position_embeddings"]),
        "rope_parameters": {"rope_type": "default", "rope_theta": _theta(target)},
        "attention_bias": False,
        "attention_dropout": 0.0,
        "tie_word_embeddings": False,
        "layer_types": [kind] * options.layers,
        "max_window_layers": options.layers,
        "dtype": "bfloat16",
        "block_size": options.block_size,
        "mask_token_id": mask_token_id,
        "target_layer_ids": list(taps),
        "num_target_layers": depth,
        "num_anchors": options.anchors,
        "markov_rank": options.rank,
        "markov_head_type": "vanilla" if options.head == "none" else options.head,
        "enable_confidence_head": True,
        "confidence_head_with_markov": options.head != "none",
        "bos_token_id": target.get("bos_token_id"),
        "eos_token_id": target.get("eos_token_id"),
    }
    if draft_vocab < vocab:
        config["draft_vocab_size"] = draft_vocab
    if options.sliding_window is not None:
        config["sliding_window"] = options.sliding_window
        config["use_sliding_window"] = True
    return config


def _theta(target: Mapping[str, Any]) -> float:
    rope = target.get("rope_parameters") or {}
    value = rope.get("rope_theta") or target.get("rope_theta")
    return float(value or 10000.0)


def fresh_drafter(
    config: DrafterConfig,
    parts: TargetParts,
    draft_to_target: Tensor | None,
    init: str,
    seed: int,
) -> Drafter:
    """The drafter before its first step, float32, shared parts frozen in bfloat16.

    Args:
        config: its configuration.
        parts: of its target.
        draft_to_target: ``[Vd]`` int64 or None.
        init: ``target`` or ``random``.
        seed: of the random weights.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        drafter = Drafter(config)
        _random(drafter)
    rows = parts.lm_head if draft_to_target is None else parts.lm_head[draft_to_target]
    drafter.embed_tokens.weight = nn.Parameter(parts.embeddings, requires_grad=False)
    drafter.lm_head.weight = nn.Parameter(rows.clone(), requires_grad=False)
    drafter.draft_to_target = draft_to_target
    if init == "target":
        _copy_layers(drafter, parts)
        _mean_projection(drafter)
    with torch.no_grad():
        drafter.norm.weight.copy_(parts.norm.float() * _NORM_SCALE)
    return drafter


def _random(drafter: Drafter) -> None:
    for weight in drafter.parameters():
        if weight.ndim == 2:
            nn.init.normal_(weight, std=0.02)
    # Thousands of inputs: the usual scale would drown their mean in noise.
    nn.init.normal_(drafter.fc.weight, std=0.002)
    if drafter.markov_head is not None:
        # W2 starts at zero, so the bias does; W1 must not, or neither ever moves.
        nn.init.zeros_(drafter.markov_head.markov_w2.weight)
    if drafter.confidence_head is not None:
        nn.init.zeros_(drafter.confidence_head.proj.weight)


def _copy_layers(drafter: Drafter, parts: TargetParts) -> None:
    """Weights of evenly spaced target layers, where the shapes agree."""
    depth, count = len(parts.layers), len(drafter.layers)
    spaced = torch.linspace(0, depth - 1, max(count, 2)).round().int().tolist()
    for layer, index in zip(drafter.layers, spaced, strict=False):
        own, theirs = layer.state_dict(), parts.layers[index]
        for module in _SHARED:
            for kind in ("weight", "bias"):
                name = f"{module}.{kind}"
                there = name in own and name in theirs
                if there and own[name].shape == theirs[name].shape:
                    own[name].copy_(theirs[name].float())


def _mean_projection(drafter: Drafter) -> None:
    """The features' mean plus a little noise."""
    weight = drafter.fc.weight.data
    width = weight.shape[0]
    taps = weight.shape[1] // width
    weight += torch.eye(width).repeat(1, taps) / taps
