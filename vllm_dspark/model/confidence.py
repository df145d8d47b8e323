"""The confidence head: will draft k survive, given that those before did? (3.2.1)

``c_k = sigmoid(w . [h_k ; W1[x_{k-1}]] + b)``. It looks at the previous token, never at
x_k itself; scheduling on it stays lossless for that reason.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vllm_dspark.config import DrafterConfig


class ConfidenceHead(nn.Module):
    """One linear unit over the hidden state and, if configured, Markov features."""

    def __init__(self, config: DrafterConfig) -> None:
        super().__init__()
        rank = config.markov_rank if config.confidence_head_with_markov else 0
        self.proj = nn.Linear(config.hidden_size + rank, 1)

    def forward(self, hidden: Tensor, prev: Tensor | None) -> Tensor:
        """Logits of c_k.

        Args:
            hidden: ``[R, K, d]``.
            prev: ``[R, K, r]`` Markov embeddings of the previous tokens; None when
                the head has no Markov features.

        Returns:
            ``[R, K]`` float32.
        """
        features = hidden if prev is None else torch.cat([hidden, prev], dim=-1)
        # float32 whatever the weights are: probabilities near 1 need the bits.
        weight, bias = self.proj.weight.float(), self.proj.bias.float()
        return nn.functional.linear(features.float(), weight, bias).squeeze(-1)
