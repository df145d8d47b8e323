"""Which tokens a drafter drafts from, and which one stands for "not known yet"."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class DraftVocabulary:
    """The most frequent tokens of the training text.

    Args:
        draft_to_target: ``[Vd]`` int64, ascending target ids; None: all tokens.
        target_to_draft: ``[V]`` int64, draft id or -1; None likewise.
        coverage: share of the text's tokens that can be drafted.
    """

    draft_to_target: Tensor | None
    target_to_draft: Tensor | None
    coverage: float

    @property
    def offsets(self) -> Tensor | None:
        """``d2t`` as checkpoints hold it: target id minus draft id."""
        if self.draft_to_target is None:
            return None
        return self.draft_to_target - torch.arange(len(self.draft_to_target))


def draft_vocabulary(counts: np.ndarray, size: int) -> DraftVocabulary:
    """The ``size`` most frequent tokens, the lowest ids among equals.

    Args:
        counts: ``[V]``, how often each token occurs in the training responses.
        size: Vd, at most V.
    """
    vocab = len(counts)
    if size == vocab:
        return DraftVocabulary(None, None, 1.0)
    chosen = np.sort(np.argsort(-counts, kind="stable")[:size])
    back = torch.full((vocab,), -1, dtype=torch.int64)
    back[torch.from_numpy(chosen)] = torch.arange(size)
    covered = float(counts[chosen].sum() / max(counts.sum(), 1))
    return DraftVocabulary(torch.from_numpy(chosen), back, covered)


def known_vocabulary(
    draft_to_target: Tensor | None, counts: np.ndarray
) -> DraftVocabulary:
    """The vocabulary of a drafter that is there already; ``counts`` as above."""
    if draft_to_target is None:
        return DraftVocabulary(None, None, 1.0)
    back = torch.full((len(counts),), -1, dtype=torch.int64)
    back[draft_to_target] = torch.arange(len(draft_to_target))
    covered = float(counts[draft_to_target.numpy()].sum() / max(counts.sum(), 1))
    return DraftVocabulary(draft_to_target, back, covered)


def choose_mask_token(counts: np.ndarray, special_ids: Sequence[int]) -> int:
    """A token that the text never uses: a special one if there is any, else the rarest.

    Args:
        counts: ``[V]`` over prompts and responses.
        special_ids: the tokenizer's special tokens.
    """
    for token in sorted(special_ids):
        if token < len(counts) and counts[token] == 0:
            return int(token)
    # The last among equals: vocabularies are padded with unused ids at their end.
    return int(len(counts) - 1 - np.argmin(counts[::-1]))
