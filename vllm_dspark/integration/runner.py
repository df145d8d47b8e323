"""vLLM's V1 model runner with DSpark drafting and verification.

What differs from vLLM's: the drafter, the hidden states it taps, the sampler of steps
with drafts or seeds, and what is handed to the scheduler's process.
"""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from vllm.config import VllmConfig
from vllm.distributed.parallel_state import get_tensor_model_parallel_rank
from vllm.utils.torch_utils import PIN_MEMORY
from vllm.v1.outputs import DraftTokenIds, SamplerOutput
from vllm.v1.sample.logits_processor import (
    LogitBiasLogitsProcessor,
    LogitsProcessors,
    MinPLogitsProcessor,
    MinTokensLogitsProcessor,
)
from vllm.v1.sample.metadata import SamplingMetadata
from vllm.v1.sample.rejection_sampler import PLACEHOLDER_TOKEN_ID
from vllm.v1.spec_decode.metadata import SpecDecodeMetadata
from vllm.v1.worker.gpu_model_runner import GPUModelRunner

from vllm_dspark.integration import thinking, uniforms
from vllm_dspark.integration.config import options
from vllm_dspark.integration.pending import Drafted, PendingDrafts
from vllm_dspark.integration.proposer import DSparkProposer, StepTokens
from vllm_dspark.integration.report import DSparkDraftTokenIds, take_plan
from vllm_dspark.integration.sampler import DSparkRejectionSampler, RequestKeys
from vllm_dspark.integration.trace import Trace

_PROCESSORS = (MinTokensLogitsProcessor, LogitBiasLogitsProcessor, MinPLogitsProcessor)


class DSparkRunnerMixin:
    """Overrides shared by the CPU and the GPU V1 runner."""

    def __init__(self, vllm_config: VllmConfig, device: torch.device) -> None:
        # vLLM builds an EagleProposer for "dspark" here; it is replaced below.
        super().__init__(vllm_config, device)  # type: ignore[call-arg]
        self.drafter = DSparkProposer(vllm_config, device, self)
        self.use_aux_hidden_state_outputs = True
        chosen = options(vllm_config)
        self.rejection_sampler = DSparkRejectionSampler(
            self.sampler,
            chosen.backend,
            vllm_config.speculative_config.rejection_sample_method,
        )
        # With speculation vLLM leaves out min-p and logit bias; our sampler applies
        # them to every row, so they are put back.
        self.input_batch.logitsprocs = LogitsProcessors(
            cls(vllm_config, device, PIN_MEMORY) for cls in _PROCESSORS
        )
        self._drafted: Drafted | None = None
        self._drafted_req_ids: list[str] = []
        self._pending = PendingDrafts()
        self._draft_times = (0.0, 0, 0)
        self._trace: Trace | None = None
        if chosen.trace is not None and get_tensor_model_parallel_rank() == 0:
            self._trace = Trace(chosen.trace)

    def _get_eagle3_aux_layers_from_config(self) -> tuple[int, ...]:
        """vLLM numbers a layer's input, DeepSpec its output: one more."""
        return tuple(i + 1 for i in self.drafter.drafter.target_layer_ids)

    def _input_fits_in_drafter(self, common_attn_metadata: Any) -> bool:
        """Always: one long request must not stop drafting, and writing context K/V,
        for the whole batch. The proposer leaves out the requests without room."""
        return common_attn_metadata is not None

    # ---- verification ----

    def _update_states(self, scheduler_output: Any) -> Any:
        if self._trace is not None and scheduler_output.finished_req_ids:
            self._trace.flush()  # whoever waited for a request finds all its rounds
        return super()._update_states(scheduler_output)  # type: ignore[misc]

    def shutdown(self) -> None:
        # An offline engine takes no further step after its last request.
        if self._trace is not None:
            self._trace.flush()
        super().shutdown()  # type: ignore[misc]

    def _sample(
        self,
        logits: torch.Tensor | None,
        spec_decode_metadata: SpecDecodeMetadata | None,
    ) -> SamplerOutput:
        output = self._verify(logits, spec_decode_metadata)
        if self._trace is not None:
            self._trace_step(self._trace, spec_decode_metadata, output)
        return output

    def _trace_step(
        self, trace: Trace, verified: SpecDecodeMetadata | None, output: SamplerOutput
    ) -> None:
        batch, n = self.input_batch, self.input_batch.num_reqs
        generated = batch.num_tokens_no_spec[:n] > batch.num_prompt_tokens[:n]
        trace.step(
            batch,
            self.requests,
            generated & ~self.discard_request_mask.np[:n],
            [0] * n if verified is None else verified.num_draft_tokens,
            None if verified is None else verified.draft_token_ids,
            output.sampled_token_ids,
            self._pending,
        )

    def _verify(
        self,
        logits: torch.Tensor | None,
        spec_decode_metadata: SpecDecodeMetadata | None,
    ) -> SamplerOutput:
        seeds = self._seeds()
        if spec_decode_metadata is None:
            seeded = any(seed is not None for seed in seeds)
            # vLLM's sampler would count a budget in its own way (see `thinking`).
            holder = self.input_batch.thinking_budget_state_holder
            if not (seeded or thinking.is_tracked(holder)):
                return super()._sample(logits, None)  # type: ignore[misc]
            spec_decode_metadata = _no_drafts(len(seeds), self.device)
        # Our random numbers are keyed by seed and position. vLLM would rewind these
        # generators after a discarded sample, which kills the engine on CPU.
        self.input_batch.generators.clear()
        n = self.input_batch.num_reqs
        keys = RequestKeys(seeds, self.input_batch.num_tokens_no_spec[:n].copy())
        return self.rejection_sampler(
            spec_decode_metadata,
            self._pending.distributions(
                self.input_batch.req_ids, spec_decode_metadata.num_draft_tokens
            ),
            logits,
            self.input_batch.sampling_metadata,
            keys,
        )

    def _seeds(self) -> list[int | None]:
        params = (self.requests[r].sampling_params for r in self.input_batch.req_ids)
        return [p.seed if p is not None else None for p in params]

    # ---- drafting ----

    def propose_draft_token_ids(
        self,
        scheduler_output: Any,
        sampled_token_ids: torch.Tensor,
        sampling_metadata: SamplingMetadata,
        hidden_states: torch.Tensor,
        sample_hidden_states: torch.Tensor,
        aux_hidden_states: list[torch.Tensor] | None,
        spec_decode_metadata: SpecDecodeMetadata | None,
        common_attn_metadata: Any,
        slot_mappings: Any,
    ) -> torch.Tensor:
        assert aux_hidden_states is not None
        n = scheduler_output.total_num_scheduled_tokens
        num_drafts = scheduler_output.num_spec_tokens_to_schedule
        start = time.perf_counter()
        tokens = self._step_tokens(
            sampled_token_ids, common_attn_metadata, spec_decode_metadata
        )
        if skip := take_plan(scheduler_output).skip:
            wanted = [r not in skip for r in self.input_batch.req_ids]
            tokens = replace(tokens, drafting=tokens.drafting & np.array(wanted))
        self._drafted = self.drafter.step(
            tokens,
            [h[:n] for h in aux_hidden_states],
            self._get_positions(n),
            common_attn_metadata,
            None if sampling_metadata.all_greedy else sampling_metadata.temperature,
            self._draft_uniforms,
            num_drafts,
        )
        self._drafted_req_ids = self.input_batch.req_ids.copy()
        seconds = time.perf_counter() - start
        requests, made = len(self._drafted_req_ids), 0
        if self._drafted is not None:
            requests = len(self._drafted.rows)
            made = self._drafted.block.token_ids.numel()
        self._draft_times = (seconds, requests, made)
        # ``requests``, not the step's finished ids: the last ones come in a step
        # without tokens, which never gets here.
        self._pending.update(self._drafted_req_ids, self._drafted, self.requests)
        # Only its type and width are looked at; the drafts travel in ``_drafted``.
        return sampled_token_ids.new_empty((len(self._drafted_req_ids), num_drafts))

    def _step_tokens(
        self,
        sampled_token_ids: torch.Tensor,
        attention: Any,
        verified: SpecDecodeMetadata | None,
    ) -> StepTokens:
        """Anchors and final rows of the step that has just been sampled."""
        n = self.input_batch.num_reqs
        query_start = attention.query_start_loc_cpu[: n + 1].numpy()
        sampled = sampled_token_ids.cpu().numpy()
        emitted = (sampled != PLACEHOLDER_TOKEN_ID).sum(axis=1)
        drafting = ~self.discard_request_mask.np[:n]
        anchors = sampled[np.arange(n), np.maximum(emitted - 1, 0)]
        # Scheduled rows: context, then ℓ drafts. Of ℓ drafts emitted−1 were accepted.
        drafts = np.zeros(n, dtype=np.int64)
        if verified is not None:
            drafts = np.asarray(verified.num_draft_tokens, dtype=np.int64)
        rejected = np.where(drafting, drafts + 1 - emitted, 0)
        return StepTokens(
            query_start=query_start,
            num_valid=np.diff(query_start) - rejected,
            anchors=anchors,
            drafting=drafting,
        )

    def _draft_uniforms(
        self, rows: np.ndarray, anchor_positions: np.ndarray, k: int
    ) -> torch.Tensor:
        """[n, k] uniforms for drafts k = 1.. after the anchors of ``rows``."""
        numbers = uniforms.unseeded(len(rows) * k)
        at = (anchor_positions[:, None] + 1 + np.arange(k)).ravel()
        owner = np.repeat(rows, k)
        uniforms.fill(numbers, self._seeds(), owner, at, uniforms.DRAFT)
        return torch.from_numpy(numbers.reshape(len(rows), k))

    # ---- to the scheduler's process ----

    def _copy_draft_token_ids_to_cpu(
        self, scheduler_output: Any, zeros_only: bool = False
    ) -> None:
        """Nothing: ``take_draft_token_ids`` reads the drafts themselves."""

    def take_draft_times(self) -> tuple[float, int, int]:
        """Seconds, requests and drafts of the drafting just done; zeros if none was."""
        times, self._draft_times = self._draft_times, (0.0, 0, 0)
        return times

    def take_draft_token_ids(self) -> DraftTokenIds | None:
        drafted, req_ids = self._drafted, self._drafted_req_ids
        if not req_ids:
            return None
        tokens: list[list[int]] = [[] for _ in req_ids]
        confidences = certainties = None
        if drafted is not None:
            block = drafted.block
            drafts, finite = block.token_ids.tolist(), block.finite.tolist()
            for i, row in enumerate(drafted.rows.tolist()):
                if finite[i]:
                    tokens[row] = drafts[i]
            confidences = _spread(block.confidence, drafted.rows, len(req_ids))
            certainties = _spread(block.certainty, drafted.rows, len(req_ids))
        return DSparkDraftTokenIds(req_ids, tokens, confidences, certainties)


def _spread(
    values: torch.Tensor | None, rows: np.ndarray, num_reqs: int
) -> np.ndarray | None:
    """Values ``[n, K]`` of some rows of a batch as ``[num_reqs, K]`` float32."""
    if values is None:
        return None
    spread = np.zeros((num_reqs, values.shape[1]), "f4")
    spread[rows] = values.cpu().numpy()
    return spread


def _no_drafts(num_reqs: int, device: torch.device) -> SpecDecodeMetadata:
    """Metadata of a step in which every request has ℓ = 0."""
    return SpecDecodeMetadata.make_dummy([[] for _ in range(num_reqs)], device)


class DSparkGPUModelRunner(DSparkRunnerMixin, GPUModelRunner):
    """The V1 runner on GPUs with DSpark (VLLM_USE_V2_MODEL_RUNNER=0)."""
