"""Verification of a batch of draft blocks, possibly of different lengths (2.1)."""

from __future__ import annotations

import torch
from torch import Tensor

from vllm_dspark.ops.rejection import rejection_sample
from vllm_dspark.types import DraftBlock, VerifyResult


def verify(
    target_logits: Tensor,
    block: DraftBlock | None,
    num_drafts: Tensor,
    *,
    temperature: Tensor | None = None,
    accept_uniforms: Tensor | None = None,
    sample_uniforms: Tensor | None = None,
    backend: str = "auto",
) -> VerifyResult:
    """Accept a prefix of each request's drafts and add one token of the target's.

    Args:
        target_logits: ``[N+R, V]``; of each request in turn the rows that judge its
            drafts (N over all requests) and then its bonus row.
        block: the drafts; None if nobody has any.
        num_drafts: ``[R]`` int64, how many leading drafts of each block are verified.
        temperature: ``[R]``, 0 for greedy requests; None if all are.
        accept_uniforms: ``[N]`` float64 in [0, 1), needed unless all are greedy.
        sample_uniforms: ``[R]`` float64 in [0, 1), likewise.
        backend: of the rejection sampler.
    """
    ids, probs, support = _flatten(block, num_drafts)
    result = rejection_sample(
        target_logits,
        ids,
        num_drafts.int(),
        draft_probs=probs,
        draft_support=support,
        temperature=temperature,
        accept_uniforms=accept_uniforms,
        sample_uniforms=sample_uniforms,
        backend=backend,
    )
    return VerifyResult(result.token_ids.long(), result.num_emitted.long())


def _flatten(
    block: DraftBlock | None, num_drafts: Tensor
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The verified drafts of all requests one after another: ``[N]``, ``[N, S]``."""
    if block is None:
        return torch.empty(0, dtype=torch.int64), None, None
    offsets = torch.arange(block.token_ids.shape[1])
    chosen = offsets < num_drafts[:, None]
    ids, probs, support = block.token_ids, block.draft_probs, block.draft_support
    if probs is None:
        return ids[chosen], None, None
    if support is not None:
        shared = support.shape[:2] == (1, 1)
        support = support[0] if shared else support[chosen]
    return ids[chosen], probs[chosen], support
