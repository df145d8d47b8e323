"""What the trainer reads from the target: hidden states and likeliest tokens (3.3).

On a CPU a sequence is run through the target alone, never padded or batched, so its
features do not depend on its neighbours and a resumed or cached run sees the same bits.
On a GPU the sequences of a step are run together, padded behind their ends. The cache
holds the features of as many sequences as its budget allows; the others are computed
again each time they come up.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence


@dataclass(frozen=True, slots=True)
class Features:
    """One sequence as the target sees it.

    Args:
        hidden: ``[T, m·d]``, outputs of the tapped layers side by side.
        first: position of the first row of ``top_*``; prompts are not predicted.
        top_ids: ``[T-first, n]`` int32 target ids, likeliest first: the row of
            position t predicts token t+1.
        top_probs: ``[T-first, n]`` float32, their probabilities at temperature 1.
    """

    hidden: Tensor
    first: int
    top_ids: Tensor
    top_probs: Tensor

    @property
    def num_bytes(self) -> int:
        """Memory it takes."""
        tensors = (self.hidden, self.top_ids, self.top_probs)
        return sum(t.numel() * t.element_size() for t in tensors)


class FeatureSource:
    """Features of sequences, from the cache or from the target.

    Args:
        target: a Hugging Face causal language model in evaluation mode.
        layer_ids: tapped layers; the last one is not among them (its Hugging Face
            output is after the final norm, vLLM's before it).
        top: n, likeliest tokens kept of each position.
        cache_bytes: bound of the cache.
    """

    def __init__(
        self, target: Any, layer_ids: Sequence[int], top: int, cache_bytes: int
    ) -> None:
        self.target, self.layer_ids, self.top = target, tuple(layer_ids), top
        self.cache_bytes = cache_bytes
        self.cached_bytes = 0
        self.computed = 0
        self._cache: dict[int, Features] = {}

    def get(self, texts: Sequence[tuple[int, Tensor, int]]) -> list[Features]:
        """Features of sequences; those not cached are computed at once.

        Args:
            texts: the key by which each is known, ``tokens [T]`` int64, prompt length.
        """
        missing = [text for text in texts if text[0] not in self._cache]
        fresh: dict[int, Features] = {}
        if missing:
            computed = self.compute_together([text[1:] for text in missing])
            fresh = {text[0]: f for text, f in zip(missing, computed, strict=True)}
        found = [fresh.get(key) or self._cache[key] for key, _, _ in texts]
        for key, features in fresh.items():
            if self.cached_bytes + features.num_bytes <= self.cache_bytes:
                self._cache[key] = features
                self.cached_bytes += features.num_bytes
        return found

    def compute(self, tokens: Tensor, prompt_len: int) -> Features:
        """Run the target over a text whose response starts at ``prompt_len``."""
        return self.compute_together([(tokens, prompt_len)])[0]

    @torch.no_grad()
    def compute_together(self, texts: Sequence[tuple[Tensor, int]]) -> list[Features]:
        """Run the target over several texts at once.

        Causal attention never looks at the padding behind a text's end.

        Args:
            texts: tokens ``[T]`` int64 and prompt length of each.
        """
        self.computed += len(texts)
        padded = pad_sequence([tokens for tokens, _ in texts], batch_first=True)
        first = min(prompt_len for _, prompt_len in texts)
        output = self.target(
            padded.to(self.target.device),
            output_hidden_states=True,
            use_cache=False,
            logits_to_keep=padded.shape[1] - first,
        )
        # hidden_states[i + 1] is the output of layer i.
        taps = [output.hidden_states[i + 1] for i in self.layer_ids]
        found = []
        for row, (tokens, prompt_len) in enumerate(texts):
            length = len(tokens)
            hidden = torch.cat([tap[row, :length] for tap in taps], dim=-1)
            logits = output.logits[row, prompt_len - first : length - first].float()
            top = logits.topk(min(self.top, logits.shape[-1]), dim=-1)
            probs = (top.values - logits.logsumexp(-1, keepdim=True)).exp()
            found.append(Features(hidden, prompt_len, top.indices.int(), probs))
        return found


def channel_scale(features: Sequence[Features]) -> Tensor:
    """Root mean square of every feature channel, ``[m·d]`` float32.

    Hidden states have channels hundreds of times larger than the rest; the trainer
    divides by these scales and folds them into the projection when it exports.
    """
    total = features[0].hidden.new_zeros(
        features[0].hidden.shape[-1], dtype=torch.float64
    )
    count = 0
    for item in features:
        total += item.hidden.double().square().sum(0)
        count += len(item.hidden)
    return (total / count).sqrt().clamp_min(1e-6).float()
