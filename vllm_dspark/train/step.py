"""Loss and gradient of one optimiser step: sequences one by one, gradients added up."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from vllm_dspark.model.drafter import Drafter
from vllm_dspark.train.blocks import Blocks
from vllm_dspark.train.loss import (
    block_loss,
    confidence_loss,
    position_weights,
)
from vllm_dspark.train.options import TrainOptions


@dataclass(frozen=True, slots=True)
class StepSums:
    """Sums over rows that ranks can add; divide by `rows` for means.

    Shape: each ``[γ]`` float64, by position.
    """

    rows: np.ndarray
    cross_entropy: np.ndarray
    distance: np.ndarray
    confidence_loss: np.ndarray

    def __add__(self, other: StepSums) -> StepSums:
        return StepSums(
            self.rows + other.rows,
            self.cross_entropy + other.cross_entropy,
            self.distance + other.distance,
            self.confidence_loss + other.confidence_loss,
        )


class SequenceLoss:
    """Forward and backward of one sequence's blocks.

    Args:
        drafter: float32 weights.
        options: loss weights.
        scale: ``[m·d]`` channel scale of the features.
        dtype: what products run in, bfloat16 or float32.
    """

    def __init__(
        self,
        drafter: Drafter,
        options: TrainOptions,
        scale: Tensor,
        dtype: torch.dtype,
    ) -> None:
        self.drafter, self.options, self.dtype = drafter, options, dtype
        self.inverse_scale = (1.0 / scale).to(dtype)
        # Frozen, so cast once.
        self.lm_head = drafter.lm_head.weight.detach().to(dtype)
        self.embeddings = drafter.embed_tokens.weight.detach()
        size = drafter.config.block_size
        self.position_weights = position_weights(size, scale.device)

    def precision(self) -> torch.autocast:
        """Context that a step runs in; weights are cast once as long as it is open."""
        kind = self.inverse_scale.device.type
        mixed = self.dtype is torch.bfloat16
        return torch.autocast(kind, torch.bfloat16, enabled=mixed)

    def hidden(self, features: Tensor, blocks: Blocks) -> Tensor:
        """h of all blocks, ``[R, K, d]``.

        Args:
            features: ``[T, m·d]`` of the one text they are of, or ``[C, T, m·d]`` of C
                texts with R/C blocks each, side by side.
            blocks: their inputs.
        """
        drafter, last = self.drafter, blocks.context
        # Blocks see positions before their anchor only.
        context = features[..., :last, :].to(self.dtype) * self.inverse_scale
        if context.ndim == 2:
            context = context[None]
        positions = torch.arange(last, device=context.device)
        ctx = drafter.context_kv(context, positions.expand(len(context), -1))
        mask_id = drafter.config.mask_token_id
        ids = torch.full_like(blocks.prev_ids, mask_id)
        ids[:, 0] = blocks.prev_ids[:, 0]
        x = self.embeddings[ids].to(self.dtype)
        packed = (
            x.device.type == "cpu"
            and len(context) == 1
            and int(blocks.anchors.min()) > 0
        )
        return drafter.run_block(x, blocks.anchors, ctx, packed)

    def backward(
        self,
        features: Tensor,
        blocks: Blocks,
        ce_weight: float,
        total_weight: float,
    ) -> StepSums:
        """Add these blocks' gradient to the parameters'; within `precision`.

        Args:
            features, blocks: as `hidden` takes them.
            ce_weight: α of this step.
            total_weight: sum of the row weights of the whole step.
        """
        loss, sums = self._loss(features, blocks, ce_weight)
        (loss / total_weight).backward()  # type: ignore[no-untyped-call]
        return sums

    def _loss(
        self, features: Tensor, blocks: Blocks, ce_weight: float
    ) -> tuple[Tensor, StepSums]:
        drafter, options = self.drafter, self.options
        hidden = self.hidden(features, blocks)
        size = hidden.shape[1]
        head = drafter.markov_head
        latent = w2 = prev = None
        if head is not None:
            latent = _counted(head.latent(blocks.prev_ids, hidden), blocks)
            latent = latent.to(self.dtype)
            w2 = head.markov_w2.weight.to(self.dtype)
        weights = _counted(self.position_weights[:size] * blocks.valid, blocks)
        hidden = _counted(hidden, blocks)
        loss, terms = block_loss(
            hidden.to(self.dtype),
            latent,
            self.lm_head,
            w2,
            blocks.target,
            weights,
            ce_weight,
            options.tv_weight,
        )
        bce = torch.zeros_like(weights)
        if drafter.confidence_head is not None and options.confidence_weight:
            if head is not None and drafter.config.confidence_head_with_markov:
                prev = head.embed(_counted(blocks.prev_ids, blocks))
            logits = drafter.confidence_head(hidden, prev)
            bce = confidence_loss(logits, terms.distance)
            loss = loss + options.confidence_weight * (weights * bce).sum()
        return loss, self._sums(blocks, terms.cross_entropy, terms.distance, bce)

    def _sums(self, blocks: Blocks, *terms: Tensor) -> StepSums:
        size, width = blocks.valid.shape[1], self.drafter.config.block_size
        valid = _counted(blocks.valid, blocks).double()
        rows = torch.stack([torch.ones_like(valid), *(t.detach() for t in terms)])
        rows = rows.double() * valid
        position = torch.arange(blocks.valid.numel(), device=valid.device) % size
        total = rows.new_zeros(len(rows), width)
        total.index_add_(1, _counted(position.view(-1, size), blocks), rows)
        return StepSums(*total.cpu().numpy())


def _counted(values: Tensor, blocks: Blocks) -> Tensor:
    """The rows that count, of ``[R, K, ...]``: ``[N, ...]``."""
    flat = values.flatten(0, 1)
    return flat if blocks.rows is None else flat[blocks.rows]


def total_weight(rows: Sequence[np.ndarray], block_size: int) -> float:
    """Sum of the row weights of a step, from `blocks.num_rows` of its sequences."""
    counts = np.sum(rows, axis=0)
    weights = position_weights(block_size).double().numpy()
    return float((counts * weights[: len(counts)]).sum())
