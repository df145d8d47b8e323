"""The drafter's parallel stage: Qwen3-style layers with injected context (2.2, 3.1).

In every layer the block's queries attend to two kinds of keys: those of the target's
positions before the anchor, made from the fused target features
``c = RMSNorm(W_c [H^(l1); ...; H^(lm)])``, and those of the block itself::

    K = [W_K c ; W_K h]    V = [W_V c ; W_V h]

The context part depends on the target alone, so it is computed once per position and
kept (`ContextKV`). Which context is seen follows from positions only: those strictly
before the anchor, whose own features the target has not computed yet.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vllm_dspark.config import DrafterConfig
from vllm_dspark.model.shared_context import attend_shared


@dataclass(frozen=True, slots=True)
class ContextKV:
    """Keys (rotated) and values of context positions for every drafter layer.

    Args:
        keys: ``[layers, C, T, kv_heads, head_dim]``; C is the number of requests, or a
            divisor of the number of blocks R if R/C of them share each context, side by
            side (many anchors of one sequence).
        values: like ``keys``.
        positions: ``[C, T]`` int64; rows at a block's anchor position or after it
            are not seen, nor are padding rows, marked -1.
    """

    keys: Tensor
    values: Tensor
    positions: Tensor


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last dimension, in float32 inside."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """Normalise ``x [..., size]``, keeping its dtype."""
        wide = x.float()
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return self.weight * wide.to(x.dtype)


def apply_rope(x: Tensor, positions: Tensor, theta: float) -> Tensor:
    """Rotate the halves of every head by its position.

    Args:
        x: ``[..., T, heads, head_dim]``.
        positions: ``[..., T]``.
        theta: base of the frequencies.
    """
    dim = x.shape[-1]
    index = torch.arange(0, dim, 2, dtype=torch.float32, device=x.device)
    angle = positions[..., None].float() * theta ** (-index / dim)
    cos = angle.cos()[..., None, :].to(x.dtype)
    sin = angle.sin()[..., None, :].to(x.dtype)
    low, high = x.chunk(2, dim=-1)
    return torch.cat([low * cos - high * sin, high * cos + low * sin], dim=-1)


class Attention(nn.Module):
    """Grouped-query attention of a block over its context and itself."""

    def __init__(self, config: DrafterConfig) -> None:
        super().__init__()
        self.config = config
        hidden, dim = config.hidden_size, config.head_dim
        q_size, kv_size = (
            config.num_attention_heads * dim,
            config.num_key_value_heads * dim,
        )
        bias = config.attention_bias
        self.q_proj = nn.Linear(hidden, q_size, bias=bias)
        self.k_proj = nn.Linear(hidden, kv_size, bias=bias)
        self.v_proj = nn.Linear(hidden, kv_size, bias=bias)
        self.o_proj = nn.Linear(q_size, hidden, bias=bias)
        self.q_norm = RMSNorm(dim, config.rms_norm_eps)
        self.k_norm = RMSNorm(dim, config.rms_norm_eps)

    def key_value(self, x: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Rotated keys and values of ``x [..., T, d]``: ``[..., T, kv_heads, dim]``."""
        shape = (*x.shape[:-1], -1, self.config.head_dim)
        key = self.k_norm(self.k_proj(x).view(shape))
        return (
            apply_rope(key, positions, self.config.rope_theta),
            self.v_proj(x).view(shape),
        )

    def forward(
        self, x: Tensor, positions: Tensor, key: Tensor, value: Tensor, mask: Tensor
    ) -> Tensor:
        """Attend from the block.

        Args:
            x: ``[R, K, d]`` block inputs; ``positions``: ``[R, K]``.
            key: ``[C, T, kv_heads, dim]`` context keys; ``value`` likewise.
            mask: ``[R, K, T+K]`` bool, True where a query sees a key; or ``[R, T]`` as
                `attend_shared` takes it.

        Returns:
            ``[R, K, d]``.
        """
        num_reqs, size, _ = x.shape
        kv_heads, dim = self.config.num_key_value_heads, self.config.head_dim
        query = self.q_norm(self.q_proj(x).view(num_reqs, size, -1, dim))
        query = apply_rope(query, positions, self.config.rope_theta)
        query = query.view(num_reqs, size, kv_heads, -1, dim)
        own = self.key_value(x, positions)
        if mask.ndim == 2:
            out = attend_shared(query, (key[0], value[0]), own, mask)
        else:
            out = self._attend(query, (key, value), own, mask)
        result: Tensor = self.o_proj(out.reshape(num_reqs, size, -1))
        return result

    def _attend(
        self,
        query: Tensor,
        context: tuple[Tensor, Tensor],
        own: tuple[Tensor, Tensor],
        mask: Tensor,
    ) -> Tensor:
        """``[R, K, kv_heads, group, dim]`` from queries of that shape."""
        (key, value), (own_key, own_value) = context, own
        size, dim = query.shape[1], query.shape[-1]
        # Two products instead of one over concatenated keys: a context shared by many
        # blocks is then read in place rather than copied per block.
        each = len(query) // len(key)
        grouped = query.view(len(key), each, *query.shape[1:])
        scores = torch.cat(
            [
                torch.einsum("cnkhgd,cthd->cnhgkt", grouped, key).flatten(0, 1),
                torch.einsum("rkhgd,rthd->rhgkt", query, own_key),
            ],
            dim=-1,
        ).float()
        scores = scores * dim**-0.5
        scores = scores.masked_fill(~mask[:, None, None], float("-inf"))
        weights = scores.softmax(-1).to(query.dtype)
        from_context, from_block = weights.split([key.shape[1], size], dim=-1)
        grouped = from_context.view(len(key), each, *from_context.shape[1:])
        out = torch.einsum("cnhgkt,cthd->cnkhgd", grouped, value).flatten(0, 1)
        return out + torch.einsum("rhgkt,rthd->rkhgd", from_block, own_value)


class MLP(nn.Module):
    """SwiGLU."""

    def __init__(self, config: DrafterConfig) -> None:
        super().__init__()
        hidden, inner = config.hidden_size, config.intermediate_size
        self.gate_proj = nn.Linear(hidden, inner, bias=False)
        self.up_proj = nn.Linear(hidden, inner, bias=False)
        self.down_proj = nn.Linear(inner, hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``x [..., d]`` to the same shape."""
        result: Tensor = self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
        return result


class Layer(nn.Module):
    """Attention and MLP, each behind a norm and a residual."""

    def __init__(self, config: DrafterConfig) -> None:
        super().__init__()
        self.self_attn = Attention(config)
        self.mlp = MLP(config)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(
        self, x: Tensor, positions: Tensor, key: Tensor, value: Tensor, mask: Tensor
    ) -> Tensor:
        """See `Attention.forward` for the arguments."""
        normed = self.input_layernorm(x)
        x = x + self.self_attn(normed, positions, key, value, mask)
        result: Tensor = x + self.mlp(self.post_attention_layernorm(x))
        return result


class Backbone(nn.Module):
    """Layers and norms of the drafter, with the names of its checkpoint."""

    def __init__(self, config: DrafterConfig) -> None:
        super().__init__()
        self.config = config
        self.fc = nn.Linear(config.feature_size, config.hidden_size, bias=False)
        self.hidden_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.layers = nn.ModuleList(
            Layer(config) for _ in range(config.num_hidden_layers)
        )
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def context_kv(self, features: Tensor, positions: Tensor) -> ContextKV:
        """Keys and values of target positions; each row stands for itself.

        Args:
            features: ``[C, T, m*d]``, concatenated hidden states of the tapped layers.
            positions: ``[C, T]`` int64.
        """
        context = self.hidden_norm(self.fc(features))
        layers = cast(list[Layer], list(self.layers))
        pairs = [layer.self_attn.key_value(context, positions) for layer in layers]
        keys, values = zip(*pairs, strict=True)
        return ContextKV(torch.stack(keys), torch.stack(values), positions)

    def run_block(
        self,
        x: Tensor,
        anchor_positions: Tensor,
        ctx: ContextKV,
        packed: bool = False,
    ) -> Tensor:
        """Hidden states of blocks that start at their anchors (3.1).

        Args:
            x: ``[R, K, d]`` embeddings of the anchor and K-1 masks.
            anchor_positions: ``[R]`` int64.
            ctx: context of the same requests, or fewer that they share (`ContextKV`).
            packed: fused attention for many blocks of one text, as training has them
                (CPU; the context is shared and each anchor has a row before it).

        Returns:
            ``[R, K, d]``, after the final norm.
        """
        offsets = torch.arange(x.shape[1], device=x.device)
        positions = anchor_positions[:, None] + offsets
        if packed and self.config.sliding_window is None:
            mask = ctx.positions < anchor_positions[:, None]
        else:
            mask = self._visible(positions, ctx.positions)
        for layer, key, value in zip(self.layers, ctx.keys, ctx.values, strict=True):
            x = layer(x, positions, key, value, mask)
        hidden: Tensor = self.norm(x)
        return hidden

    def _visible(self, positions: Tensor, ctx_positions: Tensor) -> Tensor:
        """Which keys each block position sees: ``[R, K, T+K]`` bool."""
        num_reqs, size = positions.shape
        ctx = ctx_positions.repeat_interleave(num_reqs // len(ctx_positions), dim=0)
        before_anchor = (ctx >= 0) & (ctx < positions[:, :1])
        block = torch.ones_like(positions, dtype=torch.bool)
        seen = torch.cat([before_anchor, block], dim=-1)[:, None].expand(-1, size, -1)
        if self.config.sliding_window is None:
            return seen
        keys = torch.cat([ctx, positions], dim=-1)
        distance = positions[:, :, None] - keys[:, None]
        return seen & (distance >= 0) & (distance < self.config.sliding_window)
