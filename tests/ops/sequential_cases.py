"""Random heads and blocks for the tests of `draft_sequential`, and a naive loop."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from vllm_dspark.ops import SequentialDraft, SequentialHead, draft_sequential

HEADS = ("none", "vanilla", "gated", "rnn")


@dataclass
class Block:
    """Arguments of one call of `draft_sequential`."""

    base: Tensor
    hidden: Tensor
    anchors: Tensor
    head: SequentialHead
    options: dict[str, Any] = field(default_factory=dict)

    def run(self, backend: str) -> SequentialDraft:
        args = (self.base, self.hidden, self.anchors, self.head)
        result = draft_sequential(*args, backend=backend, **self.options)
        assert result.backend == backend
        return result


def make_head(
    seed: int,
    head_type: str,
    *,
    vocab: int = 200,
    draft_vocab: int | None = None,
    rank: int = 16,
    hidden: int = 24,
    dtype: torch.dtype = torch.float32,
    confidence: str = "markov",
) -> SequentialHead:
    """Weights from a seed; `draft_vocab` makes a reduced vocabulary.

    `confidence` is none, plain ([d]) or markov ([d+r]).
    """
    g = torch.Generator().manual_seed(seed)

    def weight(*shape: int) -> Tensor:
        return (0.5 * torch.randn(*shape, generator=g)).to(dtype)

    joint = {"gated": (rank, hidden + rank), "rnn": (3 * rank, hidden + 2 * rank)}
    shape = joint.get(head_type)
    size = {"none": 0, "plain": hidden, "markov": hidden + rank}[confidence]
    ids = torch.randperm(vocab, generator=g)[: draft_vocab or vocab].sort().values
    return SequentialHead(
        head_type,
        markov_w1=weight(vocab, rank),
        markov_w2=None if head_type == "none" else weight(len(ids), rank),
        joint_weight=weight(*shape) if shape else None,
        joint_bias=weight(shape[0]) if shape else None,
        confidence_weight=torch.randn(size, generator=g) if size else None,
        confidence_bias=torch.randn(1, generator=g) if size else None,
        draft_to_target=ids.to(torch.int32) if draft_vocab else None,
    )


def make_block(
    seed: int,
    head: SequentialHead,
    *,
    requests: int = 6,
    positions: int = 5,
    sampling: str = "mixed",
    topk: int | None = None,
    dtype: torch.dtype = torch.float32,
    masked: float = 0.0,
    return_probs: bool = True,
) -> Block:
    """A block for `head`; `masked` is the share of base logits set to -inf."""
    g = torch.Generator().manual_seed(seed)
    assert head.markov_w1 is not None
    vocab, rank = head.markov_w1.shape
    w2, joint, weight = head.markov_w2, head.joint_weight, head.confidence_weight
    columns = vocab if w2 is None else w2.shape[0]
    if head.draft_to_target is not None:
        columns = head.draft_to_target.shape[0]
    width = 24
    if joint is not None:
        width = joint.shape[1] - (1 if head.head_type == "gated" else 2) * rank
    elif weight is not None and weight.shape[0] > rank:
        width = weight.shape[0] - rank
    base = 3.0 * torch.randn(requests, positions, columns, generator=g)
    base[torch.rand(base.shape, generator=g) < masked] = -math.inf
    base[:, :, columns // 2] = 0.0
    temperature = 0.1 + 1.9 * torch.rand(requests, generator=g)
    if sampling == "mixed":
        temperature[torch.rand(requests, generator=g) < 0.4] = 0.0
    options = {
        "temperature": None if sampling == "greedy" else temperature,
        "uniforms": torch.rand(requests, positions, generator=g, dtype=torch.float64),
        "topk": topk,
        "return_probs": return_probs,
    }
    return Block(
        base.to(dtype),
        torch.randn(requests, positions, width, generator=g).to(dtype),
        torch.randint(0, vocab, (requests,), generator=g),
        head,
        options,
    )


def naive_bias(head: SequentialHead, h: Tensor, e: Tensor, s: Tensor) -> Any:
    """B_k and the next state for one request, written from the paper (3.1)."""
    if head.head_type == "none":
        return 0.0, s
    assert head.markov_w2 is not None
    z = e
    if head.head_type == "gated":
        gate = torch.sigmoid(head.joint_weight @ torch.cat([h, e]) + head.joint_bias)
        z = gate * e
    elif head.head_type == "rnn":
        out = head.joint_weight @ torch.cat([s, e, h]) + head.joint_bias
        gate, candidate, output = out.view(3, -1)
        keep = torch.sigmoid(gate)
        s = keep * s + (1 - keep) * torch.tanh(candidate)
        z = torch.tanh(output)
    return head.markov_w2 @ z, s


def naive_draft(block: Block, r: int) -> tuple[list[int], list[Tensor], list[float]]:
    """One request, one token at a time: tokens, dense draft probabilities, c_k."""
    head, o = block.head, block.options
    assert head.markov_w1 is not None
    x, tokens, probs, confidences = int(block.anchors[r]), [], [], []
    s = torch.zeros(head.markov_w1.shape[1])
    t = 0.0 if o["temperature"] is None else float(o["temperature"][r])
    for k in range(block.base.shape[1]):
        h, e, base = block.hidden[r, k], head.markov_w1[x], block.base[r, k]
        if head.confidence_weight is not None:
            f = torch.cat([h, e]) if len(head.confidence_weight) > len(h) else h
            c = torch.sigmoid(head.confidence_weight @ f + head.confidence_bias)
            confidences.append(float(c))
        bias, s = naive_bias(head, h, e, s)
        logits = base + bias
        if o["topk"] is not None and o["topk"] < len(base):
            # Among equals the lowest ids stay.
            order = sorted(range(len(base)), key=lambda v: (-float(base[v]), v))
            logits[order[o["topk"] :]] = -math.inf
        if t < 1e-5:
            v = int(logits.argmax())
            p = torch.zeros_like(logits)
            p[v] = 1.0
        else:
            p = torch.softmax(logits.double() / t, -1)
            above = p.cumsum(0) > float(o["uniforms"][r, k]) * float(p.sum())
            v = int((above & (p > 0)).nonzero()[0])
        x = v if head.draft_to_target is None else int(head.draft_to_target[v])
        tokens.append(x)
        probs.append(p.float())
    return tokens, probs, confidences
