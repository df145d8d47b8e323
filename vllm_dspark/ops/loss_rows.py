"""The training loss of rows of logits, and its gradient in their place (3.3).

A row's target distribution is known by its n likeliest tokens and one event "something
else" that holds all others; see `train.loss` for the terms.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vllm_dspark.ops.arguments import (
    F32,
    FLOATS,
    require,
    require_vocabulary,
    resolve_backend,
)
from vllm_dspark.ops.extension_native import capsule
from vllm_dspark.ops.extension_native import require as require_extension

BACKENDS = ("auto", "reference", "native")


def loss_rows_(
    logits: Tensor,
    ids: Tensor,
    probs: Tensor,
    weights: Tensor,
    ce_weight: float,
    tv_weight: float,
    backend: str = "auto",
) -> tuple[Tensor, Tensor, str]:
    """Replaces logits by the gradient of ``w (α·CE + β·‖q − p‖₁)`` in them.

    Args:
        logits: ``[N, Vd]`` float32 or bfloat16, overwritten.
        ids: ``[N, n]`` int32 draft ids of the target's likeliest tokens, no two alike
            in a row; -1 for a token that is not in the draft vocabulary.
        probs: ``[N, n]`` float32, their probabilities.
        weights: ``[N]`` float32: w.
        ce_weight, tv_weight: α and β.
        backend: auto, reference or native; auto is native for CPU tensors where the
            extension is built.

    Returns:
        CE and ‖q − p‖₁ of each row, ``[N]`` float32 and unweighted, and the backend
        that ran.

    Raises:
        ValueError: a shape, dtype or device is not as above, or an id is out of range.
        RuntimeError: the backend asked for is not available here.
    """
    backend = resolve_backend(backend, BACKENDS, logits)
    require("logits", logits, FLOATS, (None, None), logits)
    require_vocabulary("logits", logits)
    n, vocab = logits.shape
    require("ids", ids, (torch.int32,), (n, None), logits)
    require("probs", probs, F32, (n, ids.shape[1]), logits)
    require("weights", weights, F32, (n,), logits)
    if backend == "reference":
        # Not on a GPU: the host would wait for it.
        looked_at = n and ids.numel() and not ids.is_cuda
        if looked_at and not -1 <= int(ids.min()) <= int(ids.max()) < vocab:
            raise ValueError(f"ids: some are outside [-1, {vocab}) given by logits")
        terms = reference(logits, ids, probs, weights, ce_weight, tv_weight)
        return (*terms, backend)
    ce, distance = torch.empty_like(weights), torch.empty_like(weights)
    tensors = [capsule(t) for t in (logits, ids, probs, weights)]
    outputs = [capsule(t) for t in (ce, distance)]
    require_extension().loss_rows(*tensors, ce_weight, tv_weight, *outputs)
    return ce, distance, backend


def reference(
    logits: Tensor, ids: Tensor, probs: Tensor, w: Tensor, alpha: float, beta: float
) -> tuple[Tensor, Tensor]:
    """The same in plain torch, for any device.

    With s the signs of q − p, s_o that of "something else" and ḡ = Σ q s, the
    gradient is ``(α Σp + β (s_o − ḡ)) q``, plus ``β q (s − s_o) − α p`` at the ids.
    """
    z, p, inside = logits.float(), probs, ids >= 0
    at = ids.clamp_min(0).long()
    p_in = p * inside
    z = z - z.amax(dim=-1, keepdim=True)
    z_at = z.gather(1, at)
    total = z.exp_().sum(dim=-1, keepdim=True)
    q = z.gather(1, at) / total * inside
    q_out, p_out = 1.0 - q.sum(-1, keepdim=True), 1.0 - p.sum(-1, keepdim=True)
    diff, diff_out = q - p_in, q_out - p_out
    unreachable = (p * ~inside).sum(-1)
    distance = diff.abs().sum(-1) + diff_out.abs().squeeze(-1) + unreachable
    ce = -(p_in * (z_at - total.log())).sum(-1)
    sign, sign_out = diff.sign(), diff_out.sign()
    mean = (q * sign).sum(-1, keepdim=True) + q_out * sign_out
    row = w.unsqueeze(-1)
    dense = alpha * p_in.sum(-1, keepdim=True) + beta * (sign_out - mean)
    z *= row * dense / total
    sparse = row * (beta * q * (sign - sign_out) - alpha * p_in) * inside
    z.scatter_add_(1, at, sparse)
    logits.copy_(z)
    return ce, distance
