"""Which sequences a step trains on: a function of the step and the seed alone."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from vllm_dspark.train.blocks import choose_anchors
from vllm_dspark.train.options import TrainOptions
from vllm_dspark.train.tokens import TokenSet


@dataclass(frozen=True, slots=True)
class Sequence:
    """One training text with the anchors of a step; ``key`` names it in the cache."""

    key: int
    tokens: Tensor
    prompt_len: int
    anchors: np.ndarray


class TrainingData:
    """Training and validation texts.

    Args:
        tokens: all samples.
        options: seed, sequences, anchors, validation, steps, epochs.

    Raises:
        ValueError: too few samples with a response to train on.
    """

    def __init__(self, tokens: TokenSet, options: TrainOptions) -> None:
        self.tokens, self.options = tokens, options
        usable = np.nonzero(tokens.response_len >= 2)[0]
        if len(usable) < 2:
            raise ValueError(
                f"the data has {len(usable)} samples with two response tokens or more; "
                "training takes at least 2, one of them for validation"
            )
        # Greedy text is what validation can judge exactly.
        rng = np.random.default_rng([options.seed, 0])
        shuffled = rng.permutation(usable)
        greedy_first = np.argsort(tokens.temperature[shuffled] > 0, kind="stable")
        count = min(options.validation, len(usable) // 2)
        self.validation = np.sort(shuffled[greedy_first[:count]])
        self.training = np.setdiff1d(usable, self.validation)

    @property
    def steps_per_epoch(self) -> int:
        """Steps of one pass, the last one possibly reaching into the next."""
        return -(-len(self.training) // self.options.sequences)

    @property
    def total_steps(self) -> int:
        """Steps of the whole run."""
        if self.options.steps is not None:
            return self.options.steps
        return max(1, round(self.options.epochs * self.steps_per_epoch))

    def text(self, index: int) -> tuple[Tensor, int]:
        """Tokens ``[T]`` int64 of a sample and the length of its prompt."""
        tokens, prompt_len = self.tokens.sample(index)
        return torch.from_numpy(tokens.astype(np.int64)), prompt_len

    def step(self, step: int) -> list[Sequence]:
        """The sequences of a step, each with its anchors."""
        size, n = self.options.sequences, len(self.training)
        chosen: list[Sequence] = []
        for at in range(step * size, (step + 1) * size):
            epoch, place = divmod(at, n)
            if place == 0 or not chosen:
                order = np.random.default_rng([self.options.seed, 1, epoch])
                permutation = order.permutation(n)
            index = int(self.training[permutation[place]])
            tokens, prompt_len = self.text(index)
            rng = np.random.default_rng([self.options.seed, 2, at])
            anchors = choose_anchors(prompt_len, len(tokens), self.options.anchors, rng)
            chosen.append(Sequence(index, tokens, prompt_len, anchors))
        return chosen

    def counts(self, responses_only: bool) -> np.ndarray:
        """How often each token of the target's vocabulary occurs in training texts."""
        parts = []
        for index in self.training.tolist():
            tokens, prompt_len = self.tokens.sample(index)
            parts.append(tokens[prompt_len:] if responses_only else tokens)
        size = self.tokens.target.vocab_size
        return np.bincount(np.concatenate(parts), minlength=size)

    @property
    def num_response_tokens(self) -> int:
        """Of the training texts."""
        return int(self.tokens.response_len[self.training].sum())
