"""Attention of many blocks over one context, with a gradient that keeps no scores.

What `model.backbone.Attention` computes when all blocks share one context, as training
wants it: blocks in chunks, so that scores stay in the processor's cache, each chunk
against the keys before its last anchor only, and scores computed again for the
gradient (as flash attention does). Blocks must come by ascending anchor.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

_CHUNK = 16  # blocks


def block_attention(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    own_keys: Tensor,
    own_values: Tensor,
    visible: Tensor,
    anchors: Tensor,
) -> Tensor:
    """Softmax attention over context and own block.

    Args:
        query: ``[R, K, H, dim]``, rotated.
        keys, values: ``[T, kv_heads, dim]``, the shared context.
        own_keys, own_values: ``[R, K, kv_heads, dim]``.
        visible: ``[R, K, T+K]`` bool.
        anchors: ``[R]`` int64, ascending; no block sees keys from its anchor on.

    Returns:
        ``[R, K, H·dim]``.
    """
    r, k, heads, dim = query.shape
    groups = keys.shape[1]
    # Query heads that share a key head lie beside each other: [groups, R, K·share, dim].
    folded = query.view(r, k, groups, heads // groups, dim).permute(2, 0, 1, 3, 4)
    out = _Attention.apply(  # type: ignore[no-untyped-call]
        folded.reshape(groups, r, -1, dim),
        keys.transpose(0, 1),
        values.transpose(0, 1),
        own_keys.permute(2, 0, 1, 3),
        own_values.permute(2, 0, 1, 3),
        visible,
        anchors.tolist(),
    )
    out = out.view(groups, r, k, heads // groups, dim).permute(1, 2, 0, 3, 4)
    result: Tensor = out.reshape(r, k, heads * dim)
    return result


def _chunks(anchors: list[int]) -> list[tuple[slice, int]]:
    """Blocks of each chunk and how many context keys it may see."""
    starts = range(0, len(anchors), _CHUNK)
    return [
        (slice(i, min(i + _CHUNK, len(anchors))), max(anchors[i : i + _CHUNK]))
        for i in starts
    ]


def _probabilities(
    q: Tensor, keys: Tensor, own: Tensor, visible: Tensor, share: int
) -> tuple[Tensor, Tensor]:
    """Softmax over both kinds of keys: ``[G, B, S, t]`` and ``[G, B, S, K]``."""
    g, b, s, dim = q.shape
    t = keys.shape[1]
    scores = torch.empty(g, b, s, t + own.shape[2], dtype=torch.float32)
    scores[..., :t] = (q.reshape(g, b * s, dim) @ keys.mT).view(g, b, s, t)
    scores[..., t:] = q @ own.mT
    hidden = ~visible.repeat_interleave(share, dim=1)
    scores.mul_(dim**-0.5).masked_fill_(hidden, float("-inf"))
    probs = scores.softmax(-1).to(q.dtype)
    return probs[..., :t], probs[..., t:]


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        keys: Tensor,
        values: Tensor,
        own_keys: Tensor,
        own_values: Tensor,
        visible: Tensor,
        anchors: list[int],
    ) -> Tensor:
        out = torch.empty_like(query)
        size, total = own_keys.shape[2], keys.shape[1]
        share = query.shape[2] // size
        g, _, s, dim = query.shape
        for blocks, t in _chunks(anchors):
            seen = torch.cat(
                [visible[blocks, :, :t], visible[blocks, :, total:]], dim=-1
            )
            q = query[:, blocks]
            p, own = _probabilities(q, keys[:, :t], own_keys[:, blocks], seen, share)
            n = q.shape[1]
            from_context = p.reshape(g, n * s, t) @ values[:, :t]
            out[:, blocks] = from_context.view(g, n, s, dim) + own @ own_values[
                :, blocks
            ]
        ctx.save_for_backward(query, keys, values, own_keys, own_values, visible, out)
        ctx.anchors = anchors
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        query, keys, values, own_keys, own_values, visible, out = ctx.saved_tensors
        d_out = grads[0]
        d_query = torch.empty_like(query)
        d_keys = torch.zeros_like(keys, dtype=torch.float32)
        d_values = torch.zeros_like(values, dtype=torch.float32)
        d_own_keys, d_own_values = (
            torch.empty_like(own_keys),
            torch.empty_like(own_values),
        )
        total, size = keys.shape[1], own_keys.shape[2]
        share = query.shape[2] // size
        g, _, s, dim = query.shape
        scale = dim**-0.5
        for blocks, t in _chunks(ctx.anchors):
            seen = torch.cat(
                [visible[blocks, :, :t], visible[blocks, :, total:]], dim=-1
            )
            q, do = query[:, blocks], d_out[:, blocks]
            k, v = keys[:, :t], values[:, :t]
            ok, ov = own_keys[:, blocks], own_values[:, blocks]
            p, own = _probabilities(q, k, ok, seen, share)
            n = q.shape[1]
            flat_p, flat_do = p.reshape(g, n * s, t), do.reshape(g, n * s, dim)
            d_values[:, :t] += flat_p.mT @ flat_do
            d_own_values[:, blocks] = own.mT @ do
            mean = (do.float() * out[:, blocks].float()).sum(-1, keepdim=True)
            d_p = (flat_do @ v.mT).view(g, n, s, t).float()
            d_s = d_p.sub_(mean).mul_(p).mul_(scale).to(q.dtype)
            d_own = ((do @ ov.mT).float() - mean) * own * scale
            d_own = d_own.to(q.dtype)
            flat_s = d_s.view(g, n * s, t)
            d_query[:, blocks] = (flat_s @ k).view(g, n, s, dim) + d_own @ ok
            d_keys[:, :t] += flat_s.mT @ q.reshape(g, n * s, dim)
            d_own_keys[:, blocks] = d_own.mT @ q
        return (
            d_query,
            d_keys.to(keys.dtype),
            d_values.to(values.dtype),
            d_own_keys,
            d_own_values,
            None,
            None,
        )
