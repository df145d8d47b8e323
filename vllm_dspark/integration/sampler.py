"""Verification in vLLM: our rejection sampling behind vLLM's sampler interface.

vLLM's V1 CPU path expands temperature, top-k and top-p of speculated rows into
uninitialised memory (vllm#55005), needs softmaxes of every row, and draws a noise
matrix per step. Here rows go to ``ops.rejection`` as logits; only what a request asks
for beyond a temperature is applied to a float32 copy first (``rows``).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from vllm.v1.outputs import LogprobsTensors, SamplerOutput
from vllm.v1.sample.metadata import SamplingMetadata
from vllm.v1.sample.rejection_sampler import PLACEHOLDER_TOKEN_ID, RejectionSampler
from vllm.v1.sample.sampler import Sampler
from vllm.v1.spec_decode.metadata import SpecDecodeMetadata

from vllm_dspark.integration import uniforms
from vllm_dspark.integration.pending import DraftProbs
from vllm_dspark.integration.rows import (
    GREEDY_EPS,
    Rows,
    needs_processing,
    process,
)
from vllm_dspark.ops.rejection import METHODS, RejectionResult, rejection_sample


@dataclass(frozen=True)
class RequestKeys:
    """What keys a request's random numbers: its seed and the next token's position."""

    seeds: list[int | None]
    positions: np.ndarray


class DSparkRejectionSampler(RejectionSampler):
    """Drop-in for vLLM's rejection sampler, right whatever the batch holds.

    Args:
        sampler: vLLM's sampler (its logprobs mode and helpers are used).
        backend: ``auto`` or a backend of ``ops.rejection``; ``last_backend`` is the
            one that ran.
        method: ``standard`` or ``block`` verification of sampled requests.
    """

    def __init__(
        self, sampler: Sampler, backend: str = "auto", method: str = METHODS[0]
    ) -> None:
        super().__init__(sampler)
        self.backend, self.method = backend, method
        self.last_backend = "none"

    def forward(
        self,
        metadata: SpecDecodeMetadata,
        draft_probs: DraftProbs | torch.Tensor | None,
        logits: torch.Tensor,
        sampling_metadata: SamplingMetadata,
        keys: RequestKeys | None = None,
    ) -> SamplerOutput:
        """Accept drafts and sample the token that ends the round.

        Args:
            metadata: drafts per request; rows of ``logits`` are each request's ℓ
                draft rows and then its bonus row.
            draft_probs: None for greedy (one-hot) drafts.
            logits: [rows, V], any float dtype; not changed.
            sampling_metadata: vLLM's, per request.
            keys: for seeded requests; None means no request has a seed.
        """
        if isinstance(draft_probs, torch.Tensor):  # vLLM's own profiling run
            draft_probs = DraftProbs(draft_probs, None)
        num_drafts = np.asarray(metadata.num_draft_tokens, dtype=np.int32)
        rows = Rows(num_drafts, metadata.draft_token_ids)
        meta = sampling_metadata
        wants_logprobs = meta.max_num_logprobs is not None or meta.logprob_token_ids
        shows_processed = bool(wants_logprobs) and self.is_processed_logprobs_mode
        final, temperature = logits, meta.temperature
        if shows_processed or needs_processing(meta):
            final = process(logits.to(torch.float32, copy=True), rows, meta)
            temperature = _after_processing(meta)
        result = self._verify(final, rows, draft_probs, temperature, meta, keys)
        self.last_backend = result.backend
        logprobs = None
        if wants_logprobs:
            source = final if shows_processed else logits
            logprobs = self._logprobs(source, rows, result.token_ids, meta)
        return SamplerOutput(
            sampled_token_ids=result.token_ids, logprobs_tensors=logprobs
        )

    def _verify(
        self,
        logits: torch.Tensor,
        rows: Rows,
        draft: DraftProbs | None,
        temperature: torch.Tensor | None,
        meta: SamplingMetadata,
        keys: RequestKeys | None,
    ) -> RejectionResult:
        accept = sample = None
        if not meta.all_greedy:
            accept, sample = _random_numbers(rows.num_drafts, keys)
        else:
            temperature = draft = None
        return rejection_sample(
            logits,
            rows.draft_token_ids,
            torch.from_numpy(rows.num_drafts),
            draft_probs=None if draft is None else draft.probs,
            draft_support=None if draft is None else draft.support,
            temperature=temperature,
            accept_uniforms=accept,
            sample_uniforms=sample,
            method=self.method,
            backend=self.backend,
        )

    def _logprobs(
        self,
        logits: torch.Tensor,
        rows: Rows,
        token_ids: torch.Tensor,
        meta: SamplingMetadata,
    ) -> LogprobsTensors:
        """Logprobs of every emitted token, laid out as [R, max ℓ + 1] rows.

        Cells past a request's last token hold a neighbour's row: vLLM filters them.
        """
        width = token_ids.shape[1]
        cells = torch.tensor(rows.starts).unsqueeze(1) + torch.arange(width)
        cells = cells.clamp_(max=logits.shape[0] - 1).flatten().to(logits.device)
        tokens = token_ids.flatten().to(torch.int64)
        tokens = torch.where(tokens == PLACEHOLDER_TOKEN_ID, 0, tokens)
        picked = logits[cells].to(torch.float32)
        if not self.is_logits_logprobs_mode:
            picked = self.sampler.compute_logprobs(picked)
        if meta.logprob_token_ids:
            # Like vLLM's sampler: asked for by one, they are what all get.
            wanted = {
                request * width + j: ids
                for request, ids in meta.logprob_token_ids.items()
                for j in range(width)
            }
            return self.sampler.gather_specific_token_logprobs(picked, wanted, tokens)
        assert meta.max_num_logprobs is not None
        return self.sampler.gather_logprobs(picked, meta.max_num_logprobs, tokens)


def _after_processing(meta: SamplingMetadata) -> torch.Tensor | None:
    """Temperatures once ``process`` has divided by them: 1, or 0 for greedy."""
    if meta.all_greedy or meta.temperature is None:
        return None
    return (meta.temperature >= GREEDY_EPS).to(torch.float32)


def _random_numbers(
    num_drafts: np.ndarray, keys: RequestKeys | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """One acceptance uniform per draft and one sampling uniform per request."""
    accept = uniforms.unseeded(int(num_drafts.sum()))
    sample = uniforms.unseeded(len(num_drafts))
    if keys is not None:
        requests = np.arange(len(num_drafts))
        owner = np.repeat(requests, num_drafts)
        first = np.cumsum(num_drafts) - num_drafts
        offset = np.arange(len(owner)) - np.repeat(first, num_drafts)
        at = keys.positions[owner] + offset
        uniforms.fill(accept, keys.seeds, owner, at, uniforms.ACCEPT)
        uniforms.fill(sample, keys.seeds, requests, keys.positions, uniforms.SAMPLE)
    return torch.from_numpy(accept), torch.from_numpy(sample)
