"""Drafting in vLLM's worker: context K/V, one backbone pass, one sequential loop.

Per step: the features of every token that survived verification become context K/V
of the draft layers; then each request that will go on drafts K tokens from its anchor.
Requests in mid-prefill or at the end of the context only have their context written.
No Python runs per request. Paper, sections 2.2 and 3.1.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn
from vllm.config import VllmConfig, get_layers_from_vllm_config
from vllm.forward_context import set_forward_context
from vllm.logger import init_logger
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.spec_decode.dflash import DFlashProposer

from vllm_dspark.integration.config import drafter_folder, options
from vllm_dspark.integration.context import ContextWriter
from vllm_dspark.integration.kept_rows import Rows
from vllm_dspark.integration.loader import load_draft_model
from vllm_dspark.integration.pending import Drafted
from vllm_dspark.integration.upkeep import blocks_read, context_writer
from vllm_dspark.model import checkpoint
from vllm_dspark.ops.sequential import SequentialDraft, draft_sequential
from vllm_dspark.types import DraftBlock

logger = init_logger(__name__)

NO_SLOT = -1


@dataclass(frozen=True)
class StepTokens:
    """What a target step leaves for drafting (host arrays, one entry per request).

    Shape: query_start [R+1] (first row of each request in the step, then the end);
    num_valid [R] rows whose tokens are final (scheduled minus rejected); anchors [R]
    token ids; drafting [R] bool, False while a prompt is not finished.
    """

    query_start: np.ndarray
    num_valid: np.ndarray
    anchors: np.ndarray
    drafting: np.ndarray


class DSparkProposer(DFlashProposer):
    """DSpark on vLLM's V1 runner.

    A DFlashProposer only because the runner asks ``isinstance``: buffers, K/V groups
    and attention metadata are its; inputs, sampling and loading are ours.
    """

    def __init__(
        self, vllm_config: VllmConfig, device: torch.device, runner: Any = None
    ) -> None:
        spec = vllm_config.speculative_config
        assert spec is not None
        # DFlashProposer asserts its own method name.
        spec.method = "dflash"
        try:
            super().__init__(vllm_config, device, runner=runner)
        finally:
            spec.method = "dspark"
        self.backend = options(vllm_config).backend
        self.draft_topk: int | None = spec.dspark_draft_topk
        self.probabilistic = spec.draft_sample_method == "probabilistic"
        self.folder = drafter_folder(spec)
        self.drafter = checkpoint.load_config(self.folder)
        self.last_backend = "none"
        self.nonfinite_drafts = 0
        self.muted = False  # while steps are timed
        self.runner = runner
        self.context: ContextWriter  # once the K/V cache is laid out
        # Positions the drafter's rotary table covers.
        self.max_position = min(
            self.max_model_len,
            self.draft_model_config.hf_config.max_position_embeddings,
        )

    def load_model(self, target_model: nn.Module) -> None:
        """Build and fill the drafter; what its checkpoint leaves out is the target's.

        Raises:
            ValueError: NaN or otherwise unusable weights (names the tensor).
        """
        before = self._attention_layers()
        self.model = load_draft_model(
            self._create_draft_vllm_config(), self.folder, target_model, self.device
        )
        self._draft_attn_layer_names = self._attention_layers() - before

    def initialize_attn_backend(
        self, kv_cache_config: Any, kernel_block_sizes: list[int] | None = None
    ) -> None:
        super().initialize_attn_backend(kv_cache_config, kernel_block_sizes)
        self.context = context_writer(self, self.runner, kv_cache_config.num_blocks)

    def dummy_run(self, *args: Any, **kwargs: Any) -> None:
        if not self.muted:
            super().dummy_run(*args, **kwargs)

    def _attention_layers(self) -> set[str]:
        layers = get_layers_from_vllm_config(self.vllm_config, AttentionLayerBase)
        return set(layers)

    def step(
        self,
        tokens: StepTokens,
        features: list[torch.Tensor],
        positions: torch.Tensor,
        attention: CommonAttentionMetadata,
        temperature: torch.Tensor | None,
        uniforms: Any,
        num_drafts: int,
    ) -> Drafted | None:
        """Write the context of one target step and draft from it.

        Args:
            tokens: what the step produced.
            features: per tapped layer, [rows, d] hidden states of the step.
            positions: [rows] int64.
            attention: the step's metadata in the drafter's K/V group.
            temperature: [R] or None when every request is greedy.
            uniforms: called with (rows, positions [n, K]) → [n, K] float64; used for
                probabilistic drafts only.
            num_drafts: K; 0 takes the context and drafts nothing.

        Returns:
            Drafts of the requests that got any, or None.
        """
        last = tokens.query_start[:-1] + tokens.num_valid - 1
        anchor_positions = positions.cpu().numpy()[np.maximum(last, 0)] + 1
        room = anchor_positions + num_drafts <= self.max_position
        rows = np.nonzero(tokens.drafting & room)[0]
        drafts = num_drafts > 0 and len(rows) > 0
        context = self._context_rows(
            _valid_rows(tokens), features, positions, attention
        )
        read = None
        if drafts or self.muted:
            # While steps are timed, what was put off would be missing from the times.
            read = np.empty(0, dtype=np.int64)
        if drafts and self.context.rows:
            table = attention.block_table_tensor
            read = blocks_read(table, rows, anchor_positions[rows], self.block_size)
        self.context.add(context, read)
        if not drafts:
            return None
        hidden = self._backbone(
            tokens.anchors[rows], anchor_positions[rows], rows, attention, num_drafts
        )
        block = self._sample(
            hidden.view(len(rows), num_drafts, -1),
            tokens.anchors[rows],
            None if temperature is None else temperature[torch.from_numpy(rows)],
            uniforms,
            (rows, anchor_positions[rows]),
        )
        return Drafted(rows, block)

    def _context_rows(
        self,
        keep: np.ndarray | None,
        features: list[torch.Tensor],
        positions: torch.Tensor,
        attention: CommonAttentionMetadata,
    ) -> Rows:
        """Features (a copy), positions and slots of a step's final tokens."""
        n = positions.shape[0]
        slots = attention.slot_mapping[:n]
        taps = torch.cat(features, dim=-1)
        if keep is not None:
            index = torch.from_numpy(keep).to(positions.device)
            positions, slots = positions[index], slots[index]
            taps = taps[index]
        if self.max_position < self.max_model_len:
            # Beyond the drafter's own context there is nothing to attend from.
            inside = positions < self.max_position
            slots = torch.where(inside, slots, NO_SLOT)
            positions = positions.clamp(max=self.max_position - 1)
        return taps, positions, slots

    def _backbone(
        self,
        anchors: np.ndarray,
        anchor_positions: np.ndarray,
        rows: np.ndarray,
        attention: CommonAttentionMetadata,
        k: int,
    ) -> torch.Tensor:
        """One pass over the block: anchor and k−1 masks per request → [n·k, d]."""
        n = len(rows)
        total = n * k
        ids = np.full((n, k), self.parallel_drafting_token_id, dtype=np.int32)
        ids[:, 0] = anchors
        where = anchor_positions[:, None] + np.arange(k)
        table = attention.block_table_tensor
        if n != table.shape[0]:
            table = table[torch.from_numpy(rows).to(self.device)]
        # Small arithmetic on the host: a tensor operation costs more than all of it.
        block, offset = np.divmod(where, self.block_size)
        slots = self._slot_mapping_buffer[:total].view(n, k)
        torch.add(
            torch.from_numpy(offset).to(self.device),
            table.gather(1, torch.from_numpy(block).to(self.device)),
            alpha=self.block_size,
            out=slots,
        )
        self.input_ids[:total] = torch.from_numpy(ids.ravel())
        self.positions[:total] = torch.from_numpy(where.ravel())
        metadata = self._block_metadata(where, k, table)
        _, per_layer = self.build_per_group_and_layer_attn_metadata(metadata)
        mode, padded, across_dp = self._determine_batch_execution_and_padding(total)
        if padded > total:
            self._slot_mapping_buffer[total:padded] = NO_SLOT
        with set_forward_context(
            per_layer,
            self.vllm_config,
            num_tokens=padded,
            num_tokens_across_dp=across_dp,
            cudagraph_runtime_mode=mode,
            slot_mapping=self._get_slot_mapping(padded),
        ):
            hidden = self.model(
                input_ids=self.input_ids[:padded], positions=self.positions[:padded]
            )
        return hidden[:total]

    def _block_metadata(
        self, where: np.ndarray, k: int, table: torch.Tensor
    ) -> CommonAttentionMetadata:
        n = where.shape[0]
        lengths = torch.from_numpy((where[:, -1] + 1).astype(np.int32))
        starts = torch.arange(0, n * k + 1, k, dtype=torch.int32)
        return CommonAttentionMetadata(
            query_start_loc=starts.to(self.device),
            query_start_loc_cpu=starts,
            seq_lens=lengths.to(self.device),
            seq_lens_cpu_upper_bound=lengths,
            num_reqs=n,
            num_actual_tokens=n * k,
            max_query_len=k,
            max_seq_len=int(where.max()) + 1,
            block_table_tensor=table,
            slot_mapping=self._slot_mapping_buffer[: n * k],
            causal=self.dflash_causal,
        )

    def _sample(
        self,
        hidden: torch.Tensor,
        anchors: np.ndarray,
        temperature: torch.Tensor | None,
        uniforms: Any,
        keys: tuple[np.ndarray, np.ndarray],
    ) -> DraftBlock:
        n, k, width = hidden.shape
        base = self.model.base_logits(hidden.reshape(n * k, width)).view(n, k, -1)
        probabilistic = self.probabilistic and temperature is not None
        draft = draft_sequential(
            base,
            hidden,
            torch.from_numpy(anchors.astype(np.int64)).to(hidden.device),
            self.model.head,
            temperature=temperature if probabilistic else None,
            uniforms=uniforms(*keys, k) if probabilistic else None,
            topk=self.draft_topk,
            return_probs=probabilistic,
            backend=self.backend,
        )
        self.last_backend = draft.backend
        return self._checked(draft)

    def _checked(self, draft: SequentialDraft) -> DraftBlock:
        """Count and report drafts whose logits or confidences were not finite."""
        if not bool(draft.finite.all()):
            bad = int((~draft.finite).sum())
            self.nonfinite_drafts += bad
            logger.warning(
                "DSpark: NaN in draft logits or confidences of %d request(s); they "
                "are not drafted for in this step (%d so far)",
                bad,
                self.nonfinite_drafts,
            )
        return DraftBlock(
            token_ids=draft.token_ids,
            draft_probs=draft.draft_probs,
            draft_support=draft.draft_support,
            confidence=draft.confidence,
            finite=draft.finite,
            certainty=draft.certainty,
        )


def _valid_rows(tokens: StepTokens) -> np.ndarray | None:
    """Rows of the step whose tokens are final; None when all are."""
    lengths = np.diff(tokens.query_start)
    if (lengths == tokens.num_valid).all():
        return None
    offset = np.arange(tokens.query_start[-1]) - np.repeat(
        tokens.query_start[:-1], lengths
    )
    return np.nonzero(offset < np.repeat(tokens.num_valid, lengths))[0]
