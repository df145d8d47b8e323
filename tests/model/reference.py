"""The drafter's parallel stage once more, position by position and head by head.

Written from the paper's formulas in float64 with explicit loops over requests, heads,
queries and keys, to share nothing with `vllm_dspark.model.backbone`.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from vllm_dspark.config import DrafterConfig


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Normalise one vector ``[size]``."""
    return x / torch.sqrt((x * x).sum() / len(x) + eps) * weight


def rotate(x: Tensor, position: int, theta: float) -> Tensor:
    """Rotate one head's vector ``[dim]``: pairs are (i, i + dim/2)."""
    half = len(x) // 2
    out = x.clone()
    for i in range(half):
        angle = position / theta ** (2 * i / len(x))
        cos, sin = math.cos(angle), math.sin(angle)
        out[i] = x[i] * cos - x[i + half] * sin
        out[i + half] = x[i + half] * cos + x[i] * sin
    return out


class ReferenceBackbone:
    """Runs one block of one request; ``state`` is a checkpoint's, in any dtype."""

    def __init__(self, config: DrafterConfig, state: dict[str, Tensor]) -> None:
        self.config = config
        self.state = {name: tensor.double() for name, tensor in state.items()}

    def linear(self, name: str, x: Tensor) -> Tensor:
        """Apply one projection to a vector."""
        bias = self.state.get(f"{name}.bias")
        out = self.state[f"{name}.weight"] @ x
        return out if bias is None else out + bias

    def norm(self, name: str, x: Tensor) -> Tensor:
        """Apply one RMSNorm to a vector."""
        return rms_norm(x, self.state[f"{name}.weight"], self.config.rms_norm_eps)

    def key_value(self, layer: str, x: Tensor, position: int) -> tuple[Tensor, Tensor]:
        """Rotated keys and values ``[kv_heads, dim]`` of one vector."""
        shape = (self.config.num_key_value_heads, self.config.head_dim)
        keys = self.linear(f"{layer}.self_attn.k_proj", x).view(shape)
        values = self.linear(f"{layer}.self_attn.v_proj", x).view(shape)
        rotated = [
            rotate(
                self.norm(f"{layer}.self_attn.k_norm", key),
                position,
                self.config.rope_theta,
            )
            for key in keys
        ]
        return torch.stack(rotated), values

    def attend(
        self, layer: str, x: Tensor, position: int, rows: list[tuple[int, Tensor]]
    ) -> Tensor:
        """One query over ``rows`` of (position, normed input of the K/V maps)."""
        dim, heads = self.config.head_dim, self.config.num_attention_heads
        group = heads // self.config.num_key_value_heads
        pairs = [self.key_value(layer, row, at) for at, row in rows]
        queries = self.linear(f"{layer}.self_attn.q_proj", x).view(heads, dim)
        out = []
        for head, raw in enumerate(queries):
            query = self.norm(f"{layer}.self_attn.q_norm", raw)
            query = rotate(query, position, self.config.rope_theta)
            scores = [
                float(query @ key[head // group]) / math.sqrt(dim) for key, _ in pairs
            ]
            peak = max(scores)
            weights = [math.exp(score - peak) for score in scores]
            total = sum(weights)
            out.append(
                sum(
                    weight / total * value[head // group]
                    for weight, (_, value) in zip(weights, pairs, strict=True)
                )
            )
        return self.linear(f"{layer}.self_attn.o_proj", torch.cat(out))

    def run(self, features: Tensor, anchor_id: int, position: int, size: int) -> Tensor:
        """Hidden states ``[K, d]`` of a block after ``position`` context features.

        Args:
            features: ``[T, m*d]`` of the target positions 0..T-1 = position-1.
            anchor_id: the anchor's token.
            position: the anchor's position.
            size: K, inputs of the block.
        """
        config = self.config
        context = [
            self.norm("hidden_norm", self.linear("fc", row))
            for row in features.double()
        ]
        ids = [anchor_id] + [config.mask_token_id] * (size - 1)
        xs = [self.state["embed_tokens.weight"][i] for i in ids]
        for index in range(config.num_hidden_layers):
            layer = f"layers.{index}"
            normed = [self.norm(f"{layer}.input_layernorm", x) for x in xs]
            after = []
            for k, x in enumerate(xs):
                rows = list(enumerate(context))
                rows += [(position + j, row) for j, row in enumerate(normed)]
                rows = [row for row in rows if self.sees(position + k, row[0])]
                attended = self.attend(layer, normed[k], position + k, rows)
                after.append(x + attended)
            xs = [x + self.mlp(layer, x) for x in after]
        return torch.stack([self.norm("norm", x) for x in xs])

    def sees(self, query: int, key: int) -> bool:
        """Everything, but with sliding layers only the window up to itself."""
        window = self.config.sliding_window
        return window is None or query - window < key <= query

    def mlp(self, layer: str, x: Tensor) -> Tensor:
        """SwiGLU behind its norm."""
        x = self.norm(f"{layer}.post_attention_layernorm", x)
        gate = self.linear(f"{layer}.mlp.gate_proj", x)
        gated = gate * torch.sigmoid(gate) * self.linear(f"{layer}.mlp.up_proj", x)
        return self.linear(f"{layer}.mlp.down_proj", gated)
