"""DSpark decoding of a Hugging Face target: the vLLM-free oracle.

One round: the target runs over the anchor and its drafts, verification accepts a
prefix and adds one token, the accepted positions' hidden states become drafter
context, and the drafter proposes the next block. The prompt's prefill is a round
without drafts. Requests are decoded one after another; it is written to be right and
readable, not fast.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from vllm_dspark.model.backbone import ContextKV
from vllm_dspark.model.drafter import Drafter
from vllm_dspark.proposer import DraftOptions, Proposer, extend_context
from vllm_dspark.types import DraftBlock, StepRecord
from vllm_dspark.verifier import verify


@dataclass(frozen=True, slots=True)
class SamplingOptions:
    """When to stop and how to sample the target.

    Args:
        max_new_tokens: tokens to generate at most.
        temperature: 0 decodes greedily.
        stop_ids: tokens that end a text (and are part of it).
    """

    max_new_tokens: int = 128
    temperature: float = 0.0
    stop_ids: frozenset[int] = frozenset()


@dataclass(frozen=True, slots=True)
class Generation:
    """The new tokens of one prompt and its rounds (the prefill is not one)."""

    token_ids: tuple[int, ...]
    steps: tuple[StepRecord, ...]


def accepted_length(generations: Iterable[Generation]) -> float:
    """τ: tokens per round over all rounds, the bonus token included.

    Raises:
        ValueError: there was no round.
    """
    lengths = [step.num_accepted + 1 for text in generations for step in text.steps]
    if not lengths:
        raise ValueError("no decoding round was run; ask for more than one new token")
    return sum(lengths) / len(lengths)


def generate(
    target: Any,
    drafter: Drafter,
    prompts: Sequence[Sequence[int]],
    sampling: SamplingOptions | None = None,
    drafting: DraftOptions | None = None,
    generator: torch.Generator | None = None,
) -> list[Generation]:
    """Decode prompts with speculation.

    Args:
        target: a Hugging Face causal language model in evaluation mode.
        drafter: its drafter, of the same dtype.
        prompts: token ids, at least one per prompt.
        generator: source of all randomness; needed if the temperature is not 0.

    Raises:
        ValueError: an empty prompt, or sampling without a generator.
    """
    sampling = sampling or SamplingOptions()
    if sampling.temperature > 0 and generator is None:
        raise ValueError(
            f"temperature is {sampling.temperature}: pass a torch.Generator to sample"
        )
    proposer = Proposer(drafter, drafting)
    texts = []
    for index, prompt in enumerate(prompts):
        if not prompt:
            raise ValueError(f"prompt {index} is empty; give it at least one token")
        request = _Request(target, proposer, sampling, generator, list(prompt))
        while not request.finished:
            request.round()
        texts.append(request.result())
    return texts


@dataclass(slots=True)
class _Request:
    """One request while it is decoded; the target has processed what is cached."""

    target: Any
    proposer: Proposer
    sampling: SamplingOptions
    generator: torch.Generator | None
    prompt: list[int]
    new: list[int] = field(default_factory=list)
    steps: list[StepRecord] = field(default_factory=list)
    finished: bool = False
    cache: DynamicCache = field(default_factory=DynamicCache)
    context: ContextKV | None = None
    block: DraftBlock | None = None

    @torch.inference_mode()
    def round(self) -> None:
        """Verify the current drafts, emit, and draft again."""
        start = self.cache.get_seq_length()
        drafts = self._drafts()
        inputs = [*(self.prompt + self.new)[start:], *drafts]
        output = self.target(
            torch.tensor([inputs]),
            past_key_values=self.cache,
            output_hidden_states=True,
            use_cache=True,
            logits_to_keep=len(drafts) + 1,
        )
        emitted = self._verify(output.logits[0], len(drafts))
        if start > 0:
            self._record(start, drafts, len(emitted) - 1)
        rejected = len(drafts) - (len(emitted) - 1)
        kept = len(inputs) - rejected
        if rejected:
            self.cache.crop(-rejected)
        self._observe(output.hidden_states, start, kept)
        self._emit(emitted)
        if not self.finished:
            self.block = self._propose()

    def result(self) -> Generation:
        """What was generated."""
        return Generation(tuple(self.new), tuple(self.steps))

    def _drafts(self) -> list[int]:
        # Drafts from broken logits say nothing; the round then verifies none.
        if self.block is None or not bool(self.block.finite[0]):
            return []
        return [int(token) for token in self.block.token_ids[0]]

    def _temperature(self) -> Tensor | None:
        value = self.sampling.temperature
        return torch.tensor([value]) if value > 0 else None

    def _uniforms(self, *shape: int) -> Tensor | None:
        if self.sampling.temperature == 0:
            return None
        return torch.rand(shape, dtype=torch.float64, generator=self.generator)

    def _verify(self, logits: Tensor, num_drafts: int) -> list[int]:
        result = verify(
            logits,
            self.block,
            torch.tensor([num_drafts]),
            temperature=self._temperature(),
            accept_uniforms=self._uniforms(num_drafts),
            sample_uniforms=self._uniforms(1),
            backend=self.proposer.options.backend,
        )
        return [int(token) for token in result.token_ids[0, : result.num_emitted[0]]]

    def _record(self, position: int, drafts: list[int], num_accepted: int) -> None:
        block, count = self.block, len(drafts)

        def known(values: Tensor | None) -> tuple[float, ...]:
            return () if values is None else tuple(values[0, :count].tolist())

        self.steps.append(
            StepRecord(
                position,
                self.new[-1],
                tuple(drafts),
                num_accepted,
                known(None if block is None else block.confidence),
                known(None if block is None else block.certainty),
            )
        )

    def _observe(self, hidden: Sequence[Tensor], start: int, kept: int) -> None:
        """Add the drafter's context of the accepted positions start..start+kept-1."""
        drafter = self.proposer.drafter
        # hidden[i + 1] is the output of layer i, hidden[0] that of the embeddings.
        layers = [hidden[i + 1][:, :kept] for i in drafter.config.target_layer_ids]
        positions = torch.arange(start, start + kept)[None]
        new = drafter.context_kv(torch.cat(layers, dim=-1), positions)
        self.context = extend_context(self.context, new)

    def _emit(self, tokens: list[int]) -> None:
        for token in tokens:
            self.new.append(token)
            full = len(self.new) >= self.sampling.max_new_tokens
            if full or token in self.sampling.stop_ids:
                self.finished = True
                return

    def _propose(self) -> DraftBlock:
        assert self.context is not None  # set by the round that emitted the anchor
        return self.proposer.propose(
            torch.tensor([self.new[-1]]),
            torch.tensor([len(self.prompt) + len(self.new) - 1]),
            self.context,
            self._temperature(),
            self._uniforms(1, self.proposer.num_drafts),
        )
