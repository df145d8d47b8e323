"""Drafting one block per request: backbone, then the sequential head (3.1).

Nothing here knows the target or keeps state; the context is handed in and extended by
the caller, and so is all randomness.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vllm_dspark.config import resolve_num_speculative_tokens
from vllm_dspark.model.backbone import ContextKV
from vllm_dspark.model.drafter import Drafter
from vllm_dspark.ops.sequential import SequentialHead, draft_sequential
from vllm_dspark.types import DraftBlock

DRAFT_SAMPLE_METHODS = ("greedy", "probabilistic")


@dataclass(frozen=True, slots=True)
class DraftOptions:
    """How to draft; names and defaults are those of vLLM's speculative config.

    Args:
        num_speculative_tokens: drafts per round; None means the block size.
        draft_sample_method: ``greedy`` drafts the likeliest tokens whatever the
            request's temperature is; ``probabilistic`` samples at that temperature.
        dspark_draft_topk: let the sequential head choose among that many of the
            likeliest base logits only; None means all.
        backend: of the sequential loop.
    """

    num_speculative_tokens: int | None = None
    draft_sample_method: str = "greedy"
    dspark_draft_topk: int | None = None
    backend: str = "auto"

    def __post_init__(self) -> None:
        if self.draft_sample_method not in DRAFT_SAMPLE_METHODS:
            raise ValueError(
                f"draft_sample_method is {self.draft_sample_method!r}; choose one of "
                f"{', '.join(DRAFT_SAMPLE_METHODS)}"
            )


class Proposer:
    """A drafter with its options and its head's weights at hand."""

    def __init__(self, drafter: Drafter, options: DraftOptions | None = None) -> None:
        self.drafter = drafter
        self.options = options or DraftOptions()
        self.num_drafts = resolve_num_speculative_tokens(
            self.options.num_speculative_tokens, drafter.config.block_size
        )
        self._head: SequentialHead = drafter.sequential_head_weights()

    @torch.inference_mode()
    def propose(
        self,
        anchor_ids: Tensor,
        anchor_positions: Tensor,
        ctx: ContextKV,
        temperature: Tensor | None = None,
        uniforms: Tensor | None = None,
    ) -> DraftBlock:
        """Draft for a batch: one backbone pass and one sequential loop.

        Args:
            anchor_ids: ``[R]`` target ids.
            anchor_positions: ``[R]`` int64.
            ctx: context before the anchors (later rows are ignored).
            temperature: ``[R]``, 0 for greedy requests; None if all are.
            uniforms: ``[R, K]`` float64 in [0, 1), needed to draw drafts.
        """
        hidden, base_logits = self.drafter.forward_block(
            anchor_ids, anchor_positions, ctx, self.num_drafts
        )
        draws = self.options.draft_sample_method == "probabilistic"
        sampled = draws and temperature is not None
        draft = draft_sequential(
            base_logits,
            hidden,
            anchor_ids,
            self._head,
            temperature=temperature if sampled else None,
            uniforms=uniforms if sampled else None,
            topk=self.options.dspark_draft_topk,
            return_probs=sampled,
            backend=self.options.backend,
        )
        return DraftBlock(
            token_ids=draft.token_ids,
            draft_probs=draft.draft_probs,
            draft_support=draft.draft_support,
            confidence=draft.confidence,
            finite=draft.finite,
            certainty=draft.certainty,
        )


def extend_context(ctx: ContextKV | None, new: ContextKV) -> ContextKV:
    """``ctx`` with the rows of ``new`` after its own."""
    if ctx is None:
        return new
    return ContextKV(
        torch.cat([ctx.keys, new.keys], dim=2),
        torch.cat([ctx.values, new.values], dim=2),
        torch.cat([ctx.positions, new.positions], dim=1),
    )
