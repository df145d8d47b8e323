"""Attention of many blocks over one shared context, without a matrix of scores kept.

Training packs hundreds of blocks of one text: every query sees a part of the shared
context and its own block. Both parts are computed apart and merged by their
log-normalisers. The context part runs in torch's fused CPU kernel, whose backward pass
is exact for a part too when it is given the merged output and normaliser, since the
weights it rebuilds, exp(score - normaliser), are then those of the whole softmax.

`Attention._attend` in `model.backbone` is the specification.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def attend_shared(
    query: Tensor,
    context: tuple[Tensor, Tensor],
    own: tuple[Tensor, Tensor],
    see: Tensor,
) -> Tensor:
    """Output of all blocks, before the output projection; CPU only.

    Args:
        query: ``[R, K, kv_heads, group, dim]``.
        context: keys and values ``[T, kv_heads, dim]``, T at least 1.
        own: keys and values of the blocks, ``[R, K, kv_heads, dim]``.
        see: ``[R, T]`` bool, which context rows a block sees; all positions of a
            block see the same, at least one, and all of their own block.

    Returns:
        ``[R, K, kv_heads, group, dim]``.
    """
    # Norms with float32 weights make float32 of what products gave in bfloat16.
    dtype = context[1].dtype
    tensors = [x.to(dtype) for x in (query, *context, *own)]
    out: Tensor = _SharedContext.apply(*tensors, see)  # type: ignore[no-untyped-call]
    return out


class _SharedContext(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        own_key: Tensor,
        own_value: Tensor,
        see: Tensor,
    ) -> Tensor:
        scale = query.shape[-1] ** -0.5
        q, k, v = _rows(query), _heads(key), _heads(value)
        mask = _mask(see, query)
        seen, norm = _forward(q, k, v, 0.0, False, attn_mask=mask, scale=scale)
        scores = torch.einsum("rkhgd,rthd->hrgkt", query, own_key).float() * scale
        norm = norm.view(scores.shape[:-1])
        whole = torch.logaddexp(norm, scores.logsumexp(-1))
        weights = (scores - whole[..., None]).exp().to(query.dtype)
        out = seen.view(*whole.shape, -1) * (norm - whole).exp()[..., None]
        out = out.to(query.dtype) + torch.einsum(
            "hrgkt,rthd->hrgkd", weights, own_value
        )
        inputs = (query, key, value, own_key, own_value, see)
        ctx.save_for_backward(*inputs, out, whole, weights)
        whole_out: Tensor = out.permute(1, 3, 0, 2, 4).contiguous()
        return whole_out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, own_key, own_value, see, *rest = ctx.saved_tensors
        out, whole, weights = rest
        scale = query.shape[-1] ** -0.5
        d_out = grads[0].permute(2, 0, 3, 1, 4).contiguous()
        flat = (1, out.shape[0], -1, out.shape[-1])
        d_query, d_key, d_value = _backward(
            d_out.view(flat),
            _rows(query),
            _heads(key),
            _heads(value),
            out.view(flat),
            whole.view(1, out.shape[0], -1),
            0.0,
            False,
            attn_mask=_mask(see, query),
            scale=scale,
        )
        inner = (d_out.float() * out.float()).sum(-1, keepdim=True)
        d_weights = torch.einsum("hrgkd,rthd->hrgkt", d_out, own_value).float()
        d_scores = (weights * (d_weights - inner) * scale).to(query.dtype)
        d_query = d_query.view(out.shape) + torch.einsum(
            "hrgkt,rthd->hrgkd", d_scores, own_key
        )
        return (
            d_query.permute(1, 3, 0, 2, 4),
            d_key[0].transpose(0, 1),
            d_value[0].transpose(0, 1),
            torch.einsum("hrgkt,rkhgd->rthd", d_scores, query),
            torch.einsum("hrgkt,hrgkd->rthd", weights, d_out),
            None,
        )


def _rows(query: Tensor) -> Tensor:
    """``[1, kv_heads, R * group * K, dim]``: the heads of a group share their keys."""
    return query.permute(2, 0, 3, 1, 4).reshape(1, query.shape[2], -1, query.shape[-1])


def _heads(x: Tensor) -> Tensor:
    return x.transpose(0, 1)[None]


def _mask(see: Tensor, query: Tensor) -> Tensor:
    """``[1, 1, R * group * K, T]``, 0 where a query sees a row, else -inf."""
    blocks, size, _, group, _ = query.shape
    bias = torch.zeros(see.shape, dtype=query.dtype).masked_fill_(~see, -torch.inf)
    whole = bias[:, None].expand(-1, group * size, -1)
    return whole.reshape(1, 1, blocks * group * size, -1)
