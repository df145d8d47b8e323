"""Sequential heads: what the previous draft token adds to the next logits (3.1).

``p_k(v | x_0, x_<k) = softmax(U_k + B_k)``, with W1 ``[V, r]`` and W2 ``[Vd, r]``::

    vanilla   B_k = W1[x_{k-1}] W2^T
    gated     B_k = (g * W1[x_{k-1}]) W2^T,  g = sigmoid(gate_proj [h_k; W1[x_{k-1}]])
    rnn       [gate; cand; out] = joint_proj [s_{k-1}; W1[x_{k-1}]; h_k],  s_0 = 0
              s_k = sigmoid(gate) * s_{k-1} + (1 - sigmoid(gate)) * tanh(cand)
              B_k = tanh(out) W2^T

The modules here are teacher-forced: all previous tokens are given, as in training.
Sampling left to right is `vllm_dspark.ops.sequential`.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vllm_dspark.config import DrafterConfig


def zero_embedding(num: int, size: int) -> nn.Embedding:
    """A trainable table of zeros: a fresh head adds nothing to the base logits.

    Drawing random numbers for it would also cost a second on the meta device, where
    `check_checkpoint` builds a drafter to learn its shapes.
    """
    return nn.Embedding(num, size, _weight=torch.zeros(num, size))


def gated_latent(gate_proj: nn.Module, prev: Tensor, hidden: Tensor) -> Tensor:
    """g * W1[x]; prev = W1[x] ``[..., r]``, hidden ``[..., d]``."""
    gate = torch.sigmoid(gate_proj(torch.cat([hidden, prev], -1)))
    return gate * prev


def rnn_step(
    joint_proj: nn.Module, state: Tensor, prev: Tensor, hidden: Tensor
) -> tuple[Tensor, Tensor]:
    """tanh(out) and s_k, ``[R, r]``.

    Shape: state s_{k-1} and prev = W1[x] ``[R, r]``, hidden ``[R, d]``.
    """
    joint = joint_proj(torch.cat([state, prev, hidden], -1))
    gate, candidate, output = joint.chunk(3, dim=-1)
    keep = torch.sigmoid(gate)
    state = keep * state + (1 - keep) * torch.tanh(candidate)
    return torch.tanh(output), state


class VanillaHead(nn.Module):
    """Low-rank transition bias, memoryless."""

    def __init__(self, config: DrafterConfig) -> None:
        super().__init__()
        rank = config.markov_rank
        self.markov_w1 = zero_embedding(config.vocab_size, rank)
        self.markov_w2 = nn.Linear(rank, config.draft_vocab_size, bias=False)

    def embed(self, prev_ids: Tensor) -> Tensor:
        """W1 rows of target ids ``[...]``: ``[..., r]``."""
        rows: Tensor = self.markov_w1(prev_ids)
        return rows

    def project(self, latent: Tensor) -> Tensor:
        """W2 of latents ``[..., r]``: ``[..., Vd]``."""
        bias: Tensor = self.markov_w2(latent)
        return bias

    def latent(self, prev_ids: Tensor, hidden: Tensor) -> Tensor:
        """What W2 multiplies: ``[R, K, r]``; arguments as `forward`."""
        return self.embed(prev_ids)

    def forward(self, prev_ids: Tensor, hidden: Tensor) -> Tensor:
        """Biases B_1..B_K of a block.

        Args:
            prev_ids: ``[R, K]`` target ids x_0..x_{K-1}.
            hidden: ``[R, K, d]``.

        Returns:
            ``[R, K, Vd]``.
        """
        return self.project(self.latent(prev_ids, hidden))


class GatedHead(VanillaHead):
    """Transition bias whose latent is gated by the hidden state."""

    def __init__(self, config: DrafterConfig) -> None:
        super().__init__(config)
        rank = config.markov_rank
        self.gate_proj = nn.Linear(config.hidden_size + rank, rank)

    def latent(self, prev_ids: Tensor, hidden: Tensor) -> Tensor:
        """See `VanillaHead.latent`."""
        return gated_latent(self.gate_proj, self.embed(prev_ids), hidden)


class RnnHead(VanillaHead):
    """Transition bias with a state carried along the block."""

    def __init__(self, config: DrafterConfig) -> None:
        super().__init__(config)
        rank = config.markov_rank
        self.joint_proj = nn.Linear(2 * rank + config.hidden_size, 3 * rank)

    def latent(self, prev_ids: Tensor, hidden: Tensor) -> Tensor:
        """See `VanillaHead.latent`."""
        prev = self.embed(prev_ids)
        state = torch.zeros_like(prev[:, 0])
        latents = []
        for k in range(prev.shape[1]):
            latent, state = rnn_step(self.joint_proj, state, prev[:, k], hidden[:, k])
            latents.append(latent)
        return torch.stack(latents, dim=1)


_HEADS = {"vanilla": VanillaHead, "gated": GatedHead, "rnn": RnnHead}


def build_sequential_head(config: DrafterConfig) -> VanillaHead | None:
    """The head a config asks for; None for ``markov_rank`` 0."""
    if config.markov_rank == 0:
        return None
    return _HEADS[config.markov_head_type](config)
