"""A tiny Gemma4 target and a DSpark drafter of that family, for vLLM's classes.

DeepSpec's layout has no such drafters; names and shapes are those that vLLM reads.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

VOCAB, HIDDEN, INNER, HEADS, KV_HEADS, HEAD, RANK = 128, 64, 96, 4, 2, 32, 32
_COMMON: dict[str, Any] = {
    "model_type": "gemma4_text",
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "intermediate_size": INNER,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "head_dim": HEAD,
    "global_head_dim": HEAD,
    "num_global_key_value_heads": KV_HEADS,
    "vocab_size_per_layer_input": VOCAB,
    "hidden_size_per_layer_input": 0,
    "sliding_window": 64,
    "max_position_embeddings": 256,
    "attention_k_eq_v": True,
    "dtype": "float32",
}


def make_tiny_gemma(path: Path) -> Path:
    """Save a random text-only target of four layers, sliding and full in turn."""
    from transformers.models.gemma4 import Gemma4ForCausalLM, Gemma4TextConfig

    layers = ["sliding_attention", "full_attention"] * 2
    config = Gemma4TextConfig(
        **_COMMON, num_hidden_layers=4, layer_types=layers, tie_word_embeddings=True
    )
    model = Gemma4ForCausalLM(config).float()
    generator = torch.Generator().manual_seed(0)
    for weight in model.parameters():
        if weight.dim() > 1:
            weight.data = 0.3 * torch.randn(weight.shape, generator=generator)
    model.save_pretrained(path)
    return path


def make_tiny_gemma_drafter(
    path: Path, texts: Sequence[Sequence[int]], block_size: int = 5
) -> Path:
    """Save a random drafter whose Markov head knows which token follows which in texts.

    It needs to: drafts of a random pair are never accepted.
    """
    path.mkdir()
    config = {
        **_COMMON,
        "architectures": ["Gemma4DSparkModel"],
        "num_hidden_layers": 2,
        "layer_types": ["full_attention"] * 2,
        "tie_word_embeddings": False,
        "block_size": block_size,
        "mask_token_id": 1,
        "target_layer_ids": [0, 2],
        "num_target_layers": 4,
        "markov_rank": RANK,
        "enable_confidence_head": True,
        "confidence_head_with_markov": True,
    }
    (path / "config.json").write_text(json.dumps(config))
    state = _drafter_state(torch.Generator().manual_seed(1), texts)
    save_file(state, path / "model.safetensors", metadata={"format": "pt"})
    return path


def _drafter_state(
    generator: torch.Generator, texts: Sequence[Sequence[int]]
) -> dict[str, torch.Tensor]:
    def random(*shape: int) -> torch.Tensor:
        return 0.2 * torch.randn(shape, generator=generator)

    codes = torch.nn.functional.normalize(random(VOCAB, RANK), dim=1)
    follows = torch.zeros(VOCAB, RANK)
    for text in texts:
        for token, successor in pairwise(text):
            follows[successor] = 30 * codes[token]
    state = {
        "embed_tokens.weight": random(VOCAB, HIDDEN),
        "lm_head.weight": random(VOCAB, HIDDEN),
        "fc.weight": random(HIDDEN, 2 * HIDDEN),
        "hidden_norm.weight": torch.ones(HIDDEN),
        "norm.weight": torch.ones(HIDDEN),
        "markov_head.markov_w1.weight": codes,
        "markov_head.markov_w2.weight": follows,
        "confidence_head.proj.weight": random(1, HIDDEN + RANK),
        "confidence_head.proj.bias": torch.zeros(1),
    }
    for i in range(2):
        for norm in ("input", "post_attention", "pre_feedforward", "post_feedforward"):
            state[f"layers.{i}.{norm}_layernorm.weight"] = torch.ones(HIDDEN)
        layer = {
            "self_attn.q_proj": random(HEADS * HEAD, HIDDEN),
            "self_attn.k_proj": random(KV_HEADS * HEAD, HIDDEN),
            "self_attn.o_proj": random(HIDDEN, HEADS * HEAD),
            "self_attn.q_norm": torch.ones(HEAD),
            "self_attn.k_norm": torch.ones(HEAD),
            "mlp.gate_proj": random(INNER, HIDDEN),
            "mlp.up_proj": random(INNER, HIDDEN),
            "mlp.down_proj": random(HIDDEN, INNER),
        }
        state |= {f"layers.{i}.{name}.weight": w for name, w in layer.items()}
    return state
