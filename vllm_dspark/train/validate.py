"""How good a drafter is on held-out text, without running the target again.

Text that the target wrote greedily tells what it would accept: a draft is accepted as
long as it equals the text. All anchors of a text are drafted at once, and the rounds
that decoding would run are then walked through. On text sampled at a temperature the
same walk gives a lower bound.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from vllm_dspark.calibration.reliability import auroc, ece
from vllm_dspark.ops.sequential import draft_sequential
from vllm_dspark.train.blocks import Blocks, build_blocks
from vllm_dspark.train.features import Features
from vllm_dspark.train.step import SequenceLoss


@dataclass(frozen=True, slots=True)
class Validation:
    """Greedy figures over rounds.

    Args:
        accepted_length: τ.
        acceptance: ``[γ]``, share of rounds whose drafts 1..k were all accepted.
        ece: ``[γ]`` calibration error of the survival, nan without confidences.
        auroc: ``[γ]`` likewise.
        rounds: how many rounds they are over.
    """

    accepted_length: float
    acceptance: tuple[float, ...]
    ece: tuple[float, ...]
    auroc: tuple[float, ...]
    rounds: int


@torch.no_grad()
def draft_everywhere(
    model: SequenceLoss, features: Features, blocks: Blocks
) -> tuple[Tensor, Tensor | None]:
    """Greedy drafts ``[R, K]`` and their confidences after every anchor of a text."""
    with model.precision():
        hidden = model.hidden(features.hidden, blocks).to(model.dtype)
    draft = draft_sequential(
        F.linear(hidden, model.lm_head),
        hidden,
        blocks.prev_ids[:, 0].contiguous(),
        model.drafter.sequential_head_weights(),
    )
    return draft.token_ids, draft.confidence


def walk(
    tokens: Tensor, anchors: np.ndarray, drafts: Tensor
) -> tuple[list[int], list[int]]:
    """The rounds that decoding runs through a text.

    Args:
        tokens: ``[T]``.
        anchors: consecutive positions from the first response token on.
        drafts: ``[R, K]`` of the same anchors.

    Returns:
        Index into anchors, and accepted drafts, of every round.
    """
    size = drafts.shape[1]
    first, length = int(anchors[0]), len(tokens)
    padded = F.pad(tokens, (0, size), value=-1)
    text = padded[torch.from_numpy(anchors)[:, None] + 1 + torch.arange(size)]
    accepted = (drafts == text).int().cumprod(dim=-1).sum(-1).tolist()
    rounds, counts, at = [], [], first
    while at < length - 1:
        n = accepted[at - first]
        # A round that would run past the end of the text says too little.
        if at + size >= length:
            break
        rounds.append(at - first)
        counts.append(n)
        at += n + 1
    return rounds, counts


class Validator:
    """Held-out texts, drafted with the current weights when asked.

    Args:
        model: gives hidden states with the weights being trained.
        texts: (tokens, prompt length, features) of each text.
        target_to_draft: as `build_blocks`.
    """

    def __init__(
        self,
        model: SequenceLoss,
        texts: list[tuple[Tensor, int, Features]],
        target_to_draft: Tensor | None,
    ) -> None:
        self.model, self.texts = model, texts
        self.target_to_draft = target_to_draft

    def run(self) -> Validation:
        """Draft everywhere and walk."""
        size = self.model.drafter.config.block_size
        counts: list[int] = []
        scores = []
        for tokens, prompt_len, features in self.texts:
            anchors = np.arange(prompt_len, len(tokens) - 1)
            blocks = build_blocks(tokens, features, anchors, size, self.target_to_draft)
            drafts, confidence = draft_everywhere(self.model, features, blocks)
            rounds, accepted = walk(tokens, anchors, drafts.cpu())
            counts += accepted
            if confidence is not None:
                scores.append(confidence.cpu().numpy()[rounds])
        return _summary(
            np.asarray(counts), np.concatenate(scores) if scores else None, size
        )


def _summary(
    counts: np.ndarray, confidence: np.ndarray | None, size: int
) -> Validation:
    survived: np.ndarray = counts[:, None] > np.arange(size)
    nothing = (float("nan"),) * size
    errors, ranks = nothing, nothing
    if confidence is not None and len(counts):
        survival: np.ndarray = np.cumprod(confidence, axis=1, dtype=np.float64)
        errors = tuple(ece(survival[:, k], survived[:, k]) for k in range(size))
        ranks = tuple(auroc(survival[:, k], survived[:, k]) for k in range(size))
    return Validation(
        accepted_length=float(counts.mean()) + 1.0 if len(counts) else float("nan"),
        acceptance=tuple(survived.mean(0).tolist()) if len(counts) else nothing,
        ece=errors,
        auroc=ranks,
        rounds=len(counts),
    )
