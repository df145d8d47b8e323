"""Anchors of a sequence, and the rows of the blocks that start there (3.3).

Several anchors of one sequence are trained in one pass: they share the sequence's
context K/V, and positions alone decide what each block sees (`Backbone.run_block`), so
packing them is exact.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from vllm_dspark.train.features import Features
from vllm_dspark.train.loss import TargetProbs


@dataclass(frozen=True, slots=True)
class Blocks:
    """Teacher-forced blocks of one sequence.

    Args:
        anchors: ``[R]`` int64 positions p.
        prev_ids: ``[R, K]`` int64 target ids of tokens p..p+K-1.
        valid: ``[R, K]`` bool, False where the text has ended.
        target: rows ``R·K`` of the target's distributions for tokens p+1..p+K, or those
            of ``rows`` alone.
        context: how many positions the last anchor has before it.
        rows: ``[N]`` int64, the rows that count, of ``R·K``; None: all, by ``valid``.
    """

    anchors: Tensor
    prev_ids: Tensor
    valid: Tensor
    target: TargetProbs
    context: int
    rows: Tensor | None = None


def choose_anchors(
    prompt_len: int, length: int, most: int, rng: np.random.Generator
) -> np.ndarray:
    """Sorted anchor positions: response tokens whose next token is known.

    Args:
        prompt_len: tokens of the prompt; the first anchor is the first response token.
        length: tokens of the sequence.
        most: how many to choose at most, without replacement.
    """
    candidates = np.arange(prompt_len, length - 1)
    if len(candidates) <= most:
        return candidates
    chosen = rng.permutation(len(candidates))[:most]
    chosen.sort()
    return candidates[chosen]


def num_rows(anchors: np.ndarray, length: int, block_size: int) -> np.ndarray:
    """``[γ]`` how many blocks have a target for position k."""
    room = np.minimum(length - 1 - anchors, block_size)
    return np.asarray((room[:, None] > np.arange(block_size)).sum(0))


def positions_of(
    anchors: np.ndarray, length: int, block_size: int
) -> tuple[np.ndarray, np.ndarray]:
    """Positions of the rows of the blocks at ``anchors``, ``[R, K]``.

    Returns:
        the positions, none beyond the text, and which of them have a token to predict.
    """
    where = anchors[:, None] + np.arange(block_size)
    # The last token has no successor to predict.
    return np.minimum(where, length - 1), where < length - 1


def target_probs(
    top_ids: Tensor, top_probs: Tensor, rows: Tensor, target_to_draft: Tensor | None
) -> TargetProbs:
    """Chosen rows of `Features`' likeliest tokens, in the draft vocabulary."""
    ids = top_ids[rows].long()
    if target_to_draft is not None:
        ids = target_to_draft[ids]
    return TargetProbs(ids, top_probs[rows].float())


def build_blocks(
    tokens: Tensor,
    features: Features,
    anchors: np.ndarray,
    block_size: int,
    target_to_draft: Tensor | None,
) -> Blocks:
    """Inputs and targets of the blocks at ``anchors``, where the features are.

    Args:
        tokens: ``[T]`` int64.
        features: of the same sequence.
        anchors: positions, each with a next token.
        block_size: K.
        target_to_draft: ``[V]`` int64, draft id of each target id or -1; None if the
            vocabularies are the same.
    """
    device = features.hidden.device
    at, valid = map(torch.from_numpy, positions_of(anchors, len(tokens), block_size))
    row = (at.flatten() - features.first).to(device)
    return Blocks(
        torch.from_numpy(anchors).long().to(device),
        tokens[at].to(device),
        valid.to(device),
        target_probs(features.top_ids, features.top_probs, row, target_to_draft),
        int(anchors.max()),
    )
