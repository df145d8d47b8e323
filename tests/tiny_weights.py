"""Weights of the tiny pairs: who prefers which token, and why not always.

See `tests.tiny` for the idea; this file knows no folders.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from vllm_dspark.config import DrafterConfig
from vllm_dspark.model.checkpoint import expected_shapes

FIRST_TEXT = 3  # greedy text never leaves the ids from here on


def successors(vocab_size: int) -> Tensor:
    """The next token that the tiny target prefers: one cycle over all text tokens."""
    text = torch.arange(FIRST_TEXT, vocab_size)
    # A stride that is coprime with the cycle's length visits every token.
    stride = next(s for s in range(11, 10**6) if math.gcd(s, len(text)) == 1)
    nxt = torch.full((vocab_size,), FIRST_TEXT)
    nxt[FIRST_TEXT:] = FIRST_TEXT + (text - FIRST_TEXT + stride) % len(text)
    return nxt


def fill_target(
    model: nn.Module, seed: int, disturbance: float, sharpness: float
) -> None:
    """Overwrite a Hugging Face causal LM's weights (see `tests.tiny`)."""
    generator = torch.Generator().manual_seed(seed)
    weights = dict(model.named_parameters())
    with torch.no_grad():
        for name, weight in weights.items():
            if weight.ndim == 2:
                scale = weight.shape[1] ** -0.5
                if "o_proj" in name or "down_proj" in name:
                    scale *= disturbance
                _fill(weight, scale, generator)
        embeddings = weights["model.embed_tokens.weight"]
        _fill(embeddings, 1.0, generator)
        _write_lm_head(weights["lm_head.weight"], embeddings, sharpness)


def _fill(weight: Tensor, scale: float, generator: torch.Generator) -> None:
    weight.copy_(torch.randn(weight.shape, generator=generator) * scale)


def _write_lm_head(head: Tensor, embeddings: Tensor, sharpness: float) -> None:
    """Rows that point from each token to its successor; specials stay silent."""
    unit = embeddings / embeddings.norm(dim=1, keepdim=True)
    head.zero_()
    text = torch.arange(FIRST_TEXT, len(head))
    head[successors(len(head))[text]] = unit[text] * sharpness


def drafter_state(
    config: DrafterConfig, target: dict[str, Tensor], seed: int, noise: float
) -> dict[str, Tensor]:
    """Random weights with the successor codes written over the sequential head.

    Args:
        config: the drafter's.
        target: the target's state dict.
        seed: of the random weights.
        noise: scale of the backbone's say against the sequential head.
    """
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for name, shape in expected_shapes(config).items():
        scale = shape[-1] ** -0.5 if len(shape) == 2 else 0.1
        state[name] = torch.randn(shape, generator=generator) * scale
        if name.endswith("norm.weight"):
            state[name] += 1.0
    # The final norm scales what the backbone says against the sequential head.
    state["norm.weight"] *= noise
    if config.enable_confidence_head:
        state["confidence_head.proj.weight"][:, : config.hidden_size] /= noise
    embeddings = target["model.embed_tokens.weight"].float()
    changed = torch.randn(embeddings.shape, generator=generator) * 0.05
    state["embed_tokens.weight"] = embeddings + changed
    rows = torch.arange(config.vocab_size)
    if config.has_reduced_vocab:
        shuffled = torch.randperm(config.vocab_size - FIRST_TEXT, generator=generator)
        rows = (shuffled[: config.draft_vocab_size] + FIRST_TEXT).sort().values
        state["d2t"] = rows - torch.arange(config.draft_vocab_size)
    state["lm_head.weight"] = target["lm_head.weight"].float()[rows]
    if config.markov_rank:
        _write_codes(state, config, rows, generator)
    return state


def _write_codes(
    state: dict[str, Tensor],
    config: DrafterConfig,
    rows: Tensor,
    generator: torch.Generator,
) -> None:
    """Unit code per token in W1, and its successor's row of W2 along that code."""
    rank, strength = config.markov_rank, 8.0
    codes = torch.randn((config.vocab_size, rank), generator=generator)
    codes /= codes.norm(dim=1, keepdim=True)
    bias = torch.zeros_like(codes)
    text = torch.arange(FIRST_TEXT, config.vocab_size)
    bias[successors(config.vocab_size)[text]] = codes[text] * strength
    state["markov_head.markov_w1.weight"] = codes
    state["markov_head.markov_w2.weight"] = bias[rows]
    if config.markov_head_type == "rnn":
        # Output part of the joint projection: pass the previous token's code on.
        joint = state["markov_head.joint_proj.weight"]
        joint[2 * rank :, rank : 2 * rank] += torch.eye(rank)
