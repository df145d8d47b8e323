"""Every option of the trainer and its default, once; and the presets."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

# Covers 97% of the demo target's text; a larger one costs more than it gains.
_DRAFT_TOKENS = 12288
HEADS = ("vanilla", "gated", "rnn", "none")
INITS = ("random", "target")
PRESETS: dict[str, dict[str, Any]] = {
    # Seconds on a laptop: to see the chain work.
    "tiny": {"layers": 1, "rank": 16, "steps": 40},
    # Small targets on CPUs: the demo drafter.
    "small": {},
    # The shape of DeepSeek's released drafters; for GPUs.
    "paper": {"layers": 5, "rank": 256, "draft_vocab_size": 0, "anchors": 512},
}


@dataclass(frozen=True, slots=True)
class TrainOptions:
    """How a drafter is shaped and trained (3.1, 3.3).

    Args:
        layers: backbone layers.
        block_size: γ.
        head: sequential head.
        rank: r of the head; 0 is the head ``none``.
        draft_vocab_size: the most frequent tokens drafts come from; 0: all; None:
            12,288 of them, or all of a smaller vocabulary.
        sliding_window: of every layer; None: full attention.
        target_layer_ids: tapped layers; None: five, evenly spaced.
        init: ``target`` copies the drafter's layers from the target's.
        steps: optimiser steps; None: as many as `epochs` give.
        epochs: passes over the data.
        sequences: sequences of a step.
        anchors: blocks of a sequence at most.
        short_share: share of the steps that train blocks of `short_block` positions
            first: cheaper steps while the first positions are learned.
        short_block: their positions.
        lr: peak learning rate of Adam (norms, tables, the confidence head).
        matrix_lr: peak learning rate of Muon (the backbone's matrices).
        warmup: share of the steps that raise the learning rate.
        weight_decay: of the matrices.
        clip: bound of the gradient's norm.
        ce_weight: of the cross-entropy; 0.1 in the paper.
        ce_start: the same at the first step, falling to `ce_weight` at half the run:
            the total variation alone learns slowly from a drafter that knows nothing.
        tv_weight: of ‖q − p_t‖₁; 0.9 in the paper.
        confidence_weight: of the confidence's BCE; 1 in the paper.
        top: likeliest target tokens kept of each position.
        cache_gb: bound of the feature cache, GiB.
        validation: sequences held out.
        evaluate_every: steps between validations; 0: a twentieth of all steps.
        patience: validations without improvement that end the run; 0: never.
        checkpoint_every: steps between checkpoints that a killed run resumes from.
        seed: of everything random.
    """

    layers: int = 2
    block_size: int = 7
    head: str = "vanilla"
    rank: int = 128
    draft_vocab_size: int | None = None
    sliding_window: int | None = None
    target_layer_ids: tuple[int, ...] | None = None
    init: str = "random"
    steps: int | None = None
    epochs: float = 1.0
    sequences: int = 16
    anchors: int = 256
    short_share: float = 0.5
    short_block: int = 3
    lr: float = 5e-3
    matrix_lr: float = 2e-2
    warmup: float = 0.03
    weight_decay: float = 0.01
    clip: float = 1.0
    ce_weight: float = 0.1
    ce_start: float = 1.0
    tv_weight: float = 0.9
    confidence_weight: float = 1.0
    top: int = 64
    cache_gb: float = 2.0
    validation: int = 64
    evaluate_every: int = 0
    patience: int = 0
    checkpoint_every: int = 50
    seed: int = 0

    def __post_init__(self) -> None:
        low = {
            "layers": 1,
            "block_size": 1,
            "rank": 0,
            "sequences": 1,
            "anchors": 1,
            "short_block": 1,
            "top": 1,
            "validation": 1,
            "evaluate_every": 0,
            "patience": 0,
            "checkpoint_every": 1,
        }
        for name, bound in low.items():
            if getattr(self, name) < bound:
                self._refuse(name, f"at least {bound}")
        if self.draft_vocab_size is not None and self.draft_vocab_size < 0:
            self._refuse("draft_vocab_size", "at least 0")
        if self.sliding_window is not None and self.sliding_window < 1:
            self._refuse("sliding_window", "at least 1")
        if self.steps is not None and self.steps < 1:
            self._refuse("steps", "at least 1")
        for name in ("epochs", "lr", "matrix_lr", "clip"):
            if not 0 < getattr(self, name) < float("inf"):
                self._refuse(name, "more than 0")
        for name in (
            "ce_weight",
            "ce_start",
            "tv_weight",
            "confidence_weight",
            "weight_decay",
        ):
            if not 0 <= getattr(self, name) < float("inf"):
                self._refuse(name, "at least 0")
        for name in ("short_share", "warmup"):
            if not 0 <= getattr(self, name) <= 1:
                self._refuse(name, "between 0 and 1")
        if self.ce_weight + self.tv_weight == 0:
            self._refuse("tv_weight", "more than 0 unless ce_weight is")
        if not self.cache_gb >= 0:
            self._refuse("cache_gb", "at least 0")
        if self.head not in HEADS:
            self._refuse("head", f"one of {', '.join(HEADS)}")
        if self.init not in INITS:
            self._refuse("init", f"one of {', '.join(INITS)}")
        if (self.rank == 0) != (self.head == "none"):
            self._refuse("rank", "0 exactly when head is 'none'")

    def draft_tokens(self, vocab_size: int) -> int:
        """Vd for a target's vocabulary.

        Raises:
            ValueError: more draft tokens were asked for than there are tokens.
        """
        if self.draft_vocab_size is None:
            return min(_DRAFT_TOKENS, vocab_size)
        if self.draft_vocab_size > vocab_size:
            self._refuse(
                "draft_vocab_size",
                f"at most the target's vocabulary, {vocab_size} (0 means all of it)",
            )
        return self.draft_vocab_size or vocab_size

    def _refuse(self, name: str, wanted: str) -> None:
        raise ValueError(f"{name} is {getattr(self, name)!r}; it must be {wanted}")

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for the records of a run."""
        return {spec.name: getattr(self, spec.name) for spec in fields(self)}
