"""The training loss of a block and its gradient, without a matrix of logits kept (3.3).

Per draft position k, weighted by ``w_k = exp(-(k-1)/γ)``::

    L_k = α·CE(p_t, q) + β·‖q − p_t‖₁ + λ·BCE(c_k, 1 − ½‖q − p_t‖₁)

with q the drafter's and p_t the target's distribution. The target is known by its n
likeliest tokens. Of those, a token outside the draft vocabulary has q = 0 exactly; all
tokens beyond the n are one event "something else", with mass 1 − Σp for the target and
1 − Σq for the drafter. The ℓ1 distance of these coarser distributions is what is
minimised: no mass is dropped, and it is below the full distance by at most twice the
smaller of the two masses of "something else". CE is that of the n tokens' masses.

`block_loss` computes the gradient along with the loss, a slice of rows at a time, so
memory does not grow with rows times vocabulary. `reference_loss` is the specification.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from vllm_dspark.ops.loss_rows import loss_rows_

# Rows of logits alive at a time: large enough for efficient products, small enough
# for a shared cache (512 rows of 16k tokens are 16 MB in bfloat16). GPUs want few and
# large ones.
_ROWS, _ROWS_GPU = 512, 8192


@dataclass(frozen=True, slots=True)
class TargetProbs:
    """The target's distribution for rows of a block.

    Args:
        ids: ``[N, n]`` int64 draft ids of its likeliest tokens; -1 for a token that is
            not in the draft vocabulary.
        probs: ``[N, n]`` float32, their probabilities.
    """

    ids: Tensor
    probs: Tensor


@dataclass(frozen=True, slots=True)
class LossTerms:
    """Per-row terms, ``[N]`` float32 without gradient.

    ``distance`` is ‖q − p_t‖₁, so 1 − distance/2 is the chance of acceptance (2.1).
    """

    cross_entropy: Tensor
    distance: Tensor


def position_weights(block_size: int, device: Any = None) -> Tensor:
    """``[γ]`` weights exp(−(k−1)/γ), k = 1..γ (3.3)."""
    steps = torch.arange(block_size, dtype=torch.float32, device=device)
    return torch.exp(-steps / block_size)


def block_loss(
    hidden: Tensor,
    latent: Tensor | None,
    lm_head: Tensor,
    markov_w2: Tensor | None,
    target: TargetProbs,
    row_weights: Tensor,
    ce_weight: float,
    tv_weight: float,
) -> tuple[Tensor, LossTerms]:
    """Weighted sum of CE and ℓ1 over rows of logits ``h W^T + latent W2^T``.

    Args:
        hidden: ``[N, d]``, float32 or bfloat16.
        latent: ``[N, r]``, what the head's W2 multiplies; None without a head.
        lm_head: ``[Vd, d]``, frozen (3.3); all four of one dtype.
        markov_w2: ``[Vd, r]``.
        target: of the same N rows.
        row_weights: ``[N]`` float32.
        ce_weight, tv_weight: α and β.

    Returns:
        The scalar to minimise, differentiable in hidden, latent and markov_w2, and
        its terms.
    """
    loss, ce, distance = _BlockLoss.apply(  # type: ignore[no-untyped-call]
        hidden,
        latent,
        lm_head,
        markov_w2,
        target,
        row_weights,
        (ce_weight, tv_weight),
    )
    return loss, LossTerms(ce, distance)


class _BlockLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        latent: Tensor | None,
        lm_head: Tensor,
        w2: Tensor | None,
        target: TargetProbs,
        row_weights: Tensor,
        factors: tuple[float, float],
    ) -> tuple[Tensor, Tensor, Tensor]:
        # One product with both tables side by side, there and back.
        inputs, table = hidden, lm_head
        if latent is not None and w2 is not None:
            inputs, table = torch.cat([hidden, latent], -1), torch.cat([lm_head, w2], 1)
        n, d = len(hidden), hidden.shape[1]
        ce, distance = row_weights.new_empty(n), row_weights.new_empty(n)
        d_inputs = torch.empty_like(inputs)
        d_w2 = None if w2 is None else torch.zeros_like(w2, dtype=torch.float32)
        ids = target.ids.int()
        most = _ROWS_GPU if hidden.is_cuda else _ROWS
        buffer = inputs.new_empty(min(n, most), len(table))
        for start in range(0, n, most):
            rows = slice(start, min(start + most, n))
            part = inputs[rows]
            logits = torch.mm(part, table.T, out=buffer[: len(part)])
            ce[rows], distance[rows], _ = loss_rows_(
                logits, ids[rows], target.probs[rows], row_weights[rows], *factors
            )
            torch.mm(logits, table, out=d_inputs[rows])
            if d_w2 is not None and latent is not None:
                d_w2 += logits.T @ latent[rows]
        d_hidden, d_latent = d_inputs[:, :d], d_inputs[:, d:]
        ctx.save_for_backward(d_hidden, None if latent is None else d_latent, d_w2)
        loss = (row_weights * (factors[0] * ce + factors[1] * distance)).sum()
        ctx.mark_non_differentiable(ce, distance)
        return loss, ce, distance

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        scale = grads[0]
        d_hidden, d_latent, d_w2 = (
            None if d is None else d * scale.to(d.dtype) for d in ctx.saved_tensors
        )
        return d_hidden, d_latent, None, d_w2, None, None, None


def reference_loss(
    logits: Tensor,
    target: TargetProbs,
    row_weights: Tensor,
    ce_weight: float,
    tv_weight: float,
) -> tuple[Tensor, LossTerms]:
    """What `block_loss` computes, row by row from complete logits ``[N, Vd]``."""
    log_q = logits.float().log_softmax(-1)
    ce, distance = [], []
    for row, ids, probs in zip(log_q, target.ids, target.probs, strict=True):
        known = ids >= 0
        q, p = row[ids[known]].exp(), probs[known]
        gap = (q - p).abs().sum() + probs[~known].sum()
        distance.append(gap + ((1 - q.sum()) - (1 - probs.sum())).abs())
        ce.append(-(p * row[ids[known]]).sum())
    terms = LossTerms(torch.stack(ce), torch.stack(distance))
    per_row = ce_weight * terms.cross_entropy + tv_weight * terms.distance
    return (row_weights * per_row).sum(), terms


def confidence_loss(logits: Tensor, distance: Tensor) -> Tensor:
    """BCE of each row's confidence against its chance of acceptance (3.2.1).

    Shape: logits, distance ``[N]`` → ``[N]``; the target 1 − distance/2 is held fixed.
    """
    wanted = (1.0 - 0.5 * distance.detach()).clamp(0.0, 1.0)
    return F.binary_cross_entropy_with_logits(logits, wanted, reduction="none")
