"""vLLM's logits processing for every row that verification reads.

A step with drafts in flight has ℓ+1 rows per request: row j is the target's
distribution after the j-th draft. vLLM's sampler processes one row per request; here
each row gets its request's parameters and its own history (outputs plus the first j
drafts), in vLLM's order (``v1/sample/sampler.py``): allowed tokens, bad words,
min_tokens and logit bias, penalties, thinking budget; then temperature, min-p, top-k,
top-p. Rows are independent, so what a trimmed or rejected draft does cannot leak.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from vllm.v1.sample.logits_processor.builtin import (
    LogitBiasLogitsProcessor,
    MinPLogitsProcessor,
    MinTokensLogitsProcessor,
)
from vllm.v1.sample.metadata import SamplingMetadata
from vllm.v1.sample.ops.bad_words import apply_bad_words
from vllm.v1.sample.ops.penalties import apply_all_penalties
from vllm.v1.sample.ops.topk_topp_sampler import apply_top_k_top_p

from vllm_dspark.integration import thinking

# vLLM's threshold below which a temperature means greedy.
GREEDY_EPS = 1e-5


@dataclass(frozen=True)
class Rows:
    """Which row belongs to which request.

    Shape: num_drafts [R]; ``request`` and ``offset`` have one entry per row.
    """

    num_drafts: np.ndarray
    draft_token_ids: torch.Tensor

    @cached_property
    def request(self) -> torch.Tensor:
        """Request of each row, int64."""
        counts = torch.from_numpy(self.num_drafts.astype(np.int64) + 1)
        return torch.repeat_interleave(torch.arange(len(counts)), counts)

    @cached_property
    def starts(self) -> list[int]:
        """First row of each request."""
        return [0, *np.cumsum(self.num_drafts + 1).tolist()[:-1]]

    @cached_property
    def drafts(self) -> list[list[int]]:
        """Draft tokens of each request."""
        tokens = self.draft_token_ids.tolist()
        ends = np.cumsum(self.num_drafts).tolist()
        return [tokens[b:e] for b, e in zip([0, *ends], ends, strict=False)]

    def history(self, outputs: list[list[int]]) -> list[list[int]]:
        """Output tokens each row may look back on: the request's and its drafts'."""
        return [
            out + drafts[:j]
            for out, drafts in zip(outputs, self.drafts, strict=True)
            for j in range(len(drafts) + 1)
        ]


def needs_processing(meta: SamplingMetadata) -> bool:
    """Whether any request of the batch asks for more than a temperature."""
    return (
        not meta.no_penalties
        or bool(meta.bad_words_token_ids)
        or meta.allowed_token_ids_mask is not None
        or meta.top_k is not None
        or meta.top_p is not None
        or thinking.is_tracked(meta.thinking_budget_state_holder)
        or any(_is_active(p) for p in meta.logitsprocs.all)
    )


def _is_active(processor: object) -> bool:
    if isinstance(processor, MinTokensLogitsProcessor):
        return bool(processor.min_toks)
    if isinstance(processor, LogitBiasLogitsProcessor):
        return bool(processor.biases)
    if isinstance(processor, MinPLogitsProcessor):
        return bool(processor.min_p_count)
    return True


def process(logits: torch.Tensor, rows: Rows, meta: SamplingMetadata) -> torch.Tensor:
    """Logits whose softmax is the distribution each row samples from.

    Args:
        logits: [rows, V] float32, changed in place.
        rows: their owners.
        meta: vLLM's sampling parameters, one entry per request.

    Returns:
        [rows, V]: for random requests already divided by the temperature and cut by
        min-p, top-k and top-p; for greedy ones the argmax is what counts.
    """
    logits = _mask_and_bias(logits, rows, meta)
    if meta.all_greedy:
        return logits
    assert meta.temperature is not None
    temperature = meta.temperature[rows.request]
    temperature = torch.where(temperature < GREEDY_EPS, 1.0, temperature)
    logits = logits.div_(temperature.unsqueeze(1))
    logits = _min_p(logits, rows, meta)
    top_k = None if meta.top_k is None else meta.top_k[rows.request]
    top_p = None if meta.top_p is None else meta.top_p[rows.request]
    return apply_top_k_top_p(logits, top_k, top_p)


def _mask_and_bias(
    logits: torch.Tensor, rows: Rows, meta: SamplingMetadata
) -> torch.Tensor:
    if meta.allowed_token_ids_mask is not None:
        mask = meta.allowed_token_ids_mask[rows.request]
        logits.masked_fill_(mask, float("-inf"))
    needs_history = bool(meta.bad_words_token_ids) or not meta.no_penalties
    history = rows.history(meta.output_token_ids) if needs_history else []
    if meta.bad_words_token_ids:
        per_row = {
            row: meta.bad_words_token_ids[request]
            for row, request in enumerate(rows.request.tolist())
            if request in meta.bad_words_token_ids
        }
        apply_bad_words(logits, per_row, history)
    for processor in meta.logitsprocs.non_argmax_invariant:
        if isinstance(processor, MinTokensLogitsProcessor):
            # The bonus row is masked like one more draft row: min_tokens counts the
            # drafts before it, as it would without speculation.
            counts = (rows.num_drafts + 1).tolist()
            logits = processor.apply_with_spec_decode(logits, counts)
        elif isinstance(processor, LogitBiasLogitsProcessor):
            _logit_bias(logits, rows, processor)
    if not meta.no_penalties:
        assert meta.prompt_token_ids is not None
        logits = apply_all_penalties(
            logits,
            meta.prompt_token_ids[rows.request],
            meta.presence_penalties[rows.request],
            meta.frequency_penalties[rows.request],
            meta.repetition_penalties[rows.request],
            history,
        )
    holder = meta.thinking_budget_state_holder
    if thinking.is_tracked(holder):
        thinking.apply(logits, holder, rows.starts, rows.drafts, meta.output_token_ids)
    return logits


def _logit_bias(
    logits: torch.Tensor, rows: Rows, processor: LogitBiasLogitsProcessor
) -> None:
    for request, bias in processor.biases.items():
        start = rows.starts[request]
        stop = start + int(rows.num_drafts[request]) + 1
        ids = torch.tensor(list(bias), dtype=torch.int64, device=logits.device)
        values = torch.tensor(list(bias.values()), device=logits.device)
        logits[start:stop, ids] += values


def _min_p(logits: torch.Tensor, rows: Rows, meta: SamplingMetadata) -> torch.Tensor:
    for processor in meta.logitsprocs.argmax_invariant:
        if isinstance(processor, MinPLogitsProcessor) and processor.min_p_count:
            min_p = processor.min_p_cpu_tensor[rows.request].to(logits.device)
            # p < min_p · max(p) in logits, which needs no softmax.
            floor = logits.amax(dim=-1) + min_p.log()
            logits.masked_fill_(logits < floor.unsqueeze(1), float("-inf"))
    return logits
