"""Sequential and confidence heads against their formulas, one step at a time."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.tiny import make_tiny_drafter
from vllm_dspark.model.checkpoint import load_drafter
from vllm_dspark.model.drafter import Drafter

HEAD_TYPES = ["vanilla", "gated", "rnn"]


def draft_inputs(drafter: Drafter) -> tuple[Tensor, Tensor, Tensor]:
    """hidden ``[3, 5, d]``, base logits ``[3, 5, Vd]``, previous ids ``[3, 5]``."""
    generator = torch.Generator().manual_seed(3)
    config = drafter.config
    hidden = torch.randn((3, 5, config.hidden_size), generator=generator)
    base = torch.randn((3, 5, config.draft_vocab_size), generator=generator)
    prev = torch.randint(0, config.vocab_size, (3, 5), generator=generator)
    return hidden, base, prev


def bias_by_hand(drafter: Drafter, hidden: Tensor, prev: Tensor) -> Tensor:
    """B_1..B_K of one request: hidden ``[K, d]``, prev ``[K]`` -> ``[K, Vd]``."""
    state = drafter.state_dict()
    w1, w2 = (state[f"markov_head.markov_w{i}.weight"] for i in (1, 2))
    rank = w1.shape[1]
    memory = torch.zeros(rank)
    rows = []
    for h, token in zip(hidden, prev, strict=True):
        e = w1[token]
        if drafter.config.markov_head_type == "gated":
            weight, bias = (
                state[f"markov_head.gate_proj.{n}"] for n in ("weight", "bias")
            )
            e = torch.sigmoid(weight @ torch.cat([h, e]) + bias) * e
        elif drafter.config.markov_head_type == "rnn":
            weight, bias = (
                state[f"markov_head.joint_proj.{n}"] for n in ("weight", "bias")
            )
            joint = weight @ torch.cat([memory, e, h]) + bias
            gate = torch.sigmoid(joint[:rank])
            memory = gate * memory + (1 - gate) * torch.tanh(joint[rank : 2 * rank])
            e = torch.tanh(joint[2 * rank :])
        rows.append(w2 @ e)
    return torch.stack(rows)


@pytest.mark.parametrize("draft_vocab_size", [None, 40])
@pytest.mark.parametrize("head_type", HEAD_TYPES)
def test_teacher_forced_logits(
    head_type: str, draft_vocab_size: int | None, tmp_path: Path, tiny_target: Path
) -> None:
    folder = make_tiny_drafter(
        tmp_path,
        tiny_target,
        head_type=head_type,
        draft_vocab_size=draft_vocab_size,
        own_embeddings=True,
    )
    drafter = load_drafter(folder)
    hidden, base, prev = draft_inputs(drafter)
    logits, _ = drafter.teacher_forced(hidden, base, prev)
    expected = torch.stack(
        [
            b + bias_by_hand(drafter, h, p)
            for b, h, p in zip(base, hidden, prev, strict=True)
        ]
    )
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("with_markov", [True, False])
def test_confidence_logits(
    with_markov: bool, tmp_path: Path, tiny_target: Path
) -> None:
    folder = make_tiny_drafter(
        tmp_path, tiny_target, own_embeddings=True, confidence_with_markov=with_markov
    )
    drafter = load_drafter(folder)
    hidden, base, prev = draft_inputs(drafter)
    _, confidence = drafter.teacher_forced(hidden, base, prev)
    state = drafter.state_dict()
    weight = state["confidence_head.proj.weight"][0]
    features = hidden
    if with_markov:
        embedded = state["markov_head.markov_w1.weight"][prev]
        features = torch.cat([hidden, embedded], dim=-1)
    assert features.shape[-1] == len(weight)
    expected = features @ weight + state["confidence_head.proj.bias"]
    torch.testing.assert_close(confidence, expected, rtol=1e-4, atol=1e-5)


def test_without_heads_the_base_logits_remain(
    tmp_path: Path, tiny_target: Path
) -> None:
    folder = make_tiny_drafter(
        tmp_path, tiny_target, markov_rank=0, confidence=False, own_embeddings=True
    )
    drafter = load_drafter(folder)
    hidden, base, prev = draft_inputs(drafter)
    logits, confidence = drafter.teacher_forced(hidden, base, prev)
    assert logits is base
    assert confidence is None
