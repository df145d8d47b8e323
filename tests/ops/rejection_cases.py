"""Random but reproducible inputs for the rejection tests, with realistic acceptance."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from vllm_dspark.ops import RejectionResult, rejection_sample

INF = float("inf")
KINDS = ("dense", "onehot", "topk", "reduced")


@dataclass
class Case:
    """Arguments of one call of `rejection_sample`."""

    logits: Tensor
    draft_ids: Tensor
    lengths: Tensor
    options: dict[str, Tensor | None] = field(default_factory=dict)
    method: str = "standard"

    def run(self, backend: str) -> RejectionResult:
        args: Any = (self.logits, self.draft_ids, self.lengths)
        result = rejection_sample(
            *args, method=self.method, backend=backend, **self.options
        )
        assert result.backend == backend
        return result


def draft_rows(lengths: Tensor) -> Tensor:
    """Rows of target_logits that belong to drafts, ``[N]``."""
    rows, start = [], 0
    for length in lengths.tolist():
        rows += range(start, start + length)
        start += length + 1
    return torch.tensor(rows, dtype=torch.int64)


def make_temperature(mode: str, num: int, g: torch.Generator) -> Tensor | None:
    """all greedy, all random in [0.1, 3], or both in one batch."""
    if mode == "greedy":
        return None
    temperature = 0.1 + 2.9 * torch.rand(num, generator=g)
    if mode == "mixed":
        temperature[torch.rand(num, generator=g) < 0.4] = 0.0
    return temperature


def make_drafts(
    kind: str, near: Tensor, g: torch.Generator
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Draft ids, probabilities and support, from logits close to the target's."""
    n, vocab = near.shape
    if kind == "onehot":
        return near.argmax(-1) if n else torch.zeros(0).long(), None, None
    support = None
    if kind == "topk":  # a set of its own for each row, in no order
        order = torch.rand(n, min(16, vocab), generator=g).argsort(-1)
        support = near.topk(min(16, vocab), -1).indices.gather(1, order)
        near = near.gather(1, support)
    elif kind == "reduced":  # one set for all rows, and padding
        some = torch.randperm(vocab, generator=g)[: vocab // 2]
        some[0] = vocab // 2 if vocab // 2 not in some else some[0]
        support = some[None]  # has the one id that is never masked
        near = near[:, support[0]]
        support = torch.cat([support, torch.full((1, 3), -1)], 1)
        near = torch.cat([near, torch.full((n, 3), -INF)], 1)
    probs = near.softmax(-1)
    picks = torch.zeros(n, 1, dtype=torch.int64)
    if n:
        picks = torch.multinomial(probs, 1, generator=g)
    ids = picks
    if support is not None:
        ids = support.expand(n, -1).gather(1, picks)
        support = support.to(torch.int32)
    return ids[:, 0], probs, support


def make_case(
    seed: int,
    *,
    vocab: int = 1000,
    lengths: tuple[int, ...] = (3, 0, 5, 1, 7),
    drafts: str = "dense",
    sampling: str = "mixed",
    dtype: torch.dtype = torch.float32,
    masked: float = 0.0,
    row_padding: int = 0,
    method: str = "standard",
) -> Case:
    """One batch.

    Args:
        seed: of everything random in it.
        vocab: V.
        lengths: drafts of each request.
        drafts: dense, onehot, topk ([N, 16] support) or reduced ([1, V/2 + padding]).
        sampling: greedy, random or mixed.
        dtype: of the target's logits.
        masked: share of logits set to -inf.
        row_padding: how much further apart rows are than V.
        method: standard or block.
    """
    g = torch.Generator().manual_seed(seed)
    counts = torch.tensor(lengths, dtype=torch.int64)
    n, r = sum(lengths), len(lengths)
    padded = 3.0 * torch.randn(n + r, vocab + row_padding, generator=g)
    padded[torch.rand(padded.shape, generator=g) < masked] = -INF
    # At least one finite logit, the same one in a draft and its target.
    padded[:, vocab // 2] = 0.0
    logits = padded.to(dtype)[:, :vocab]
    temperature = make_temperature(sampling, r, g)
    scale = torch.ones(r) if temperature is None else temperature.clamp(min=0.3)
    near = logits[draft_rows(counts)].float() / scale.repeat_interleave(counts)[:, None]
    near = near + 0.3 * torch.randn(near.shape, generator=g)
    ids, probs, support = make_drafts(drafts, near, g)
    options = {
        "draft_probs": probs,
        "draft_support": support,
        "temperature": temperature,
        "accept_uniforms": torch.rand(n, generator=g, dtype=torch.float64),
        "sample_uniforms": torch.rand(r, generator=g, dtype=torch.float64),
    }
    return Case(logits, ids, counts, options, method)


def assert_same(a: RejectionResult, b: RejectionResult) -> None:
    """Token for token."""
    assert torch.equal(a.num_emitted, b.num_emitted), (a.num_emitted, b.num_emitted)
    assert torch.equal(a.token_ids, b.token_ids), (a.token_ids, b.token_ids)
