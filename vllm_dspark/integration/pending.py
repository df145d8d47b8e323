"""Drafts that wait for their verification, and what they were drawn from.

Usually all drafts of a step come from the step before. A request that was not
scheduled in between keeps its drafts, so their distributions are kept as well:
verifying sampled drafts without theirs would not be lossless.
"""

from __future__ import annotations

from collections.abc import Container, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from vllm_dspark.types import DraftBlock


@dataclass(frozen=True)
class Drafted:
    """Drafts of the requests at ``rows`` of the batch."""

    rows: np.ndarray
    block: DraftBlock


@dataclass(frozen=True)
class DraftProbs:
    """What the drafts of a batch were drawn from, rows as the drafts.

    Shape: probs [N, S] float32; support [N, S] or [1, S] int32 target ids, or None
    when column i is token i.
    """

    probs: torch.Tensor
    support: torch.Tensor | None


class PendingDrafts:
    """Where the drafts of each request are: request id → (block, row in it)."""

    def __init__(self) -> None:
        self._at: dict[str, tuple[DraftBlock, int]] = {}

    def __len__(self) -> int:
        return len(self._at)

    def update(
        self, req_ids: Sequence[str], drafted: Drafted | None, alive: Container[str]
    ) -> None:
        """Note the drafts of one step.

        Args:
            req_ids: the step's requests; earlier drafts of theirs are verified or void.
            drafted: the new drafts, or None.
            alive: ids of all unfinished requests; the others are forgotten.
        """
        gone = [r for r in self._at if r not in alive]
        for req_id in (*req_ids, *gone):
            self._at.pop(req_id, None)
        if drafted is not None:
            for i, row in enumerate(drafted.rows.tolist()):
                self._at[req_ids[row]] = (drafted.block, i)

    def signals(self, req_id: str, count: int) -> tuple[list[float], list[float]]:
        """c_1..c_count and z_1..z_count of a request's drafts; empty if not known."""
        if not count:
            return [], []
        block, row = self._at[req_id]
        confidence, certainty = (
            [] if values is None else values[row, :count].tolist()
            for values in (block.confidence, block.certainty)
        )
        return confidence, certainty

    def distributions(
        self, req_ids: Sequence[str], counts: Sequence[int]
    ) -> DraftProbs | None:
        """Distributions of the drafts being verified, in the order of the batch.

        Args:
            req_ids: the batch.
            counts: [R] drafts of each request that are verified, a prefix of its own.

        Returns:
            None when all drafts are one-hot. A block without distributions among
            blocks with them belongs to greedy requests, whose rows nobody reads:
            they are zero.
        """
        pieces: dict[int, tuple[DraftBlock, list[int], list[int]]] = {}
        for i, (req_id, n) in enumerate(zip(req_ids, counts, strict=True)):
            if n:
                block, row = self._at[req_id]
                piece = pieces.setdefault(id(block), (block, [], []))
                piece[1].append(i)
                piece[2].append(row)
        sampled = [b for b, _, _ in pieces.values() if b.draft_probs is not None]
        if not sampled:
            return None
        return _gather(list(pieces.values()), np.asarray(counts), sampled[0])


def _gather(
    pieces: list[tuple[DraftBlock, list[int], list[int]]],
    counts: np.ndarray,
    sampled: DraftBlock,
) -> DraftProbs:
    """Cut the verified prefixes out of the blocks and put them in batch order."""
    support = sampled.draft_support
    shared = support is not None and support.shape[:2] == (1, 1)
    probs, supports, order = [], [], []
    for block, requests, rows in pieces:
        n = counts[requests]
        k = block.token_ids.shape[1]
        offset = np.arange(n.sum()) - np.repeat(np.cumsum(n) - n, n)
        index = torch.from_numpy(np.repeat(np.asarray(rows), n) * k + offset)
        probs.append(_cut(block.draft_probs, sampled.draft_probs, index))
        if support is not None and not shared:
            supports.append(_cut(block.draft_support, support, index))
        order.append(np.repeat(np.asarray(requests), n))
    back = torch.from_numpy(np.argsort(np.concatenate(order), kind="stable"))
    if supports:
        support = torch.cat(supports)[back.to(supports[0].device)]
    elif shared and support is not None:
        support = support.flatten(0, 1)
    return DraftProbs(torch.cat(probs)[back.to(probs[0].device)], support)


def _cut(
    values: torch.Tensor | None, like: torch.Tensor | None, index: torch.Tensor
) -> torch.Tensor:
    """Rows ``index`` of [R, K, S] values as [n, S]; zeros like ``like`` for None."""
    if values is not None:
        return values.flatten(0, 1)[index.to(values.device)]
    assert like is not None
    return like.new_zeros((len(index), like.shape[-1]))
