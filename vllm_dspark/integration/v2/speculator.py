"""vLLM's DSpark speculator with every sequential head, draft lengths and a meter.

For any drafter of vLLM's, whose model class stays. With a vanilla head, full blocks and
without a calibration file everything is vLLM's own.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from vllm.config import VllmConfig
from vllm.v1.worker.gpu.spec_decode.dspark.speculator import DSparkSpeculator

from vllm_dspark.integration.v2 import model as drafter
from vllm_dspark.integration.v2.calibration import DeviceMaps, load_maps
from vllm_dspark.integration.v2.meter import Mark, Meter
from vllm_dspark.integration.v2.trims import Trims, trims_of


class DSparkV2Speculator(DSparkSpeculator):
    """Drafts as vLLM's does, and with gated and rnn heads, and fewer positions."""

    def __init__(self, vllm_config: VllmConfig, device: torch.device) -> None:
        super().__init__(vllm_config, device)
        config = self.draft_model_config
        self._maps: DeviceMaps | None = None
        self._ours = drafter.ARCHITECTURE in config.architectures and (
            drafter.needs_our_class(
                config.hf_config, vllm_config.model_config.get_vocab_size()
            )
        )
        self.trims = trims_of(vllm_config)
        self.meter = Meter(device)
        self.muted = False  # vLLM's dummy steps without the drafter
        self.dummy_positions: int | None = None  # what they draft, None for all
        self.dummy_marks: tuple[Mark, Mark] | None = None  # around what they drafted
        self._writing_only = False

    def load_draft_model(
        self, target_model: nn.Module, target_attn_layer_names: set[str]
    ) -> nn.Module:
        if self._ours:
            drafter.register()
        token = drafter.loading_for.set(target_model)
        try:
            model = super().load_draft_model(target_model, target_attn_layer_names)
        finally:
            drafter.loading_for.reset(token)
        has_head = model.model.confidence_head is not None
        if self.trims is Trims.HOST:
            # vLLM computes them only where its device trims.
            self.use_confidence_head = has_head
            self.use_acceptance_estimator = not has_head
        # Without a confidence head vLLM's own estimator follows the outcomes.
        if has_head and self.trims is Trims.NOT_OURS:
            self._maps = load_maps(self.vllm_config, self.device)
        return model

    @property
    def reports_confidences(self) -> bool:
        """Whether the scheduler decides by this drafter's confidences."""
        return self.trims in (Trims.HOST, Trims.DEVICE)

    def propose(self, input_batch: Any, *arguments: Any, **keys: Any) -> torch.Tensor:
        """As vLLM's, for as many positions as the step asks; 0 is a bypass."""
        n, dummy = input_batch.num_reqs, bool(keys.get("dummy_run"))
        if dummy and self.muted:
            return self.draft_tokens[:n]
        asked = self.dummy_positions if dummy else keys.get("num_speculative_tokens")
        positions = self.num_speculative_steps if asked is None else asked
        start = Mark(self.device) if dummy else self.meter.begin()
        with self._drafting(positions):
            if self._writing_only:
                keys["is_profile"] = True  # its only meaning here: no CUDA graph
            super().propose(input_batch, *arguments, **keys)
        if dummy:
            self.dummy_marks = start, Mark(self.device)
            return self.draft_tokens[:n]
        confidence = self.draft_token_confidence_probs[:n, :positions]
        wanted = self.reports_confidences
        self.meter.end(input_batch.req_ids, positions, confidence if wanted else None)
        if self._maps is not None and self.use_confidence_head:
            # In place, where vLLM's runner takes it from, outside the CUDA graph.
            rows = input_batch.idx_mapping[:n]
            raw = self.draft_token_confidence_probs[:n]
            raw.copy_(self._maps.apply(raw, self.temperature[rows]))
        return self.draft_tokens[:n]

    @contextmanager
    def _drafting(self, positions: int) -> Iterator[None]:
        """Blocks of so many positions, inside.

        0: context K/V is written, the query pass is left out. A drafter whose CUDA
        graphs are of whole blocks drafts whole ones, and the runner cuts them.
        """
        whole = self.num_speculative_steps
        if positions == 0:
            self._writing_only = True
            try:
                yield
            finally:
                self._writing_only = False
            return
        graphs = self.query_cudagraph_manager
        if positions == whole or (graphs is not None and graphs.needs_capture()):
            yield
            return
        kept = (self.num_query_per_req, self._anchor_idx)
        confidences = self.draft_token_confidence_probs
        self.num_speculative_steps = positions
        self.num_query_per_req -= whole - positions
        requests = torch.arange(len(self._anchor_idx), device=self.device)
        self._anchor_idx = requests * self.num_query_per_req
        self.draft_token_confidence_probs = confidences[:, :positions]
        try:
            yield
        finally:
            self.num_speculative_steps = whole
            self.num_query_per_req, self._anchor_idx = kept
            self.draft_token_confidence_probs = confidences

    def _build_uniform_attn_metadata(self, *arguments: Any, **keys: Any) -> Any:
        if self._writing_only:
            return None
        return super()._build_uniform_attn_metadata(*arguments, **keys)

    def _generate_draft(self, *arguments: Any, **keys: Any) -> None:
        if not self._writing_only:
            super()._generate_draft(*arguments, **keys)

    def _sample_sequential(self, num_reqs: int, head_hidden: torch.Tensor) -> None:
        """vLLM's loop; for other heads ours, with the latent of the head in it."""
        if not self._ours or self.model.head_type == "vanilla":
            super()._sample_sequential(num_reqs, head_hidden)
            return
        k = self.num_speculative_steps
        n = num_reqs * k
        rows = head_hidden[self.sample_indices[:n]]
        base = self.model.compute_draft_logits(rows).view(num_reqs, k, -1)
        hidden = rows.view(num_reqs, k, -1)
        values = ids = None
        if self._draft_topk is not None:
            values, ids = base.topk(self._draft_topk, dim=-1)
            base.fill_(float("-inf"))
        requests = self.sample_idx_mapping[:n].view(num_reqs, k)
        positions = self.sample_pos[:n].view(num_reqs, k)
        previous = self.input_buffers.input_ids[self._anchor_idx[:num_reqs]]
        state, embedded = None, []
        for i in range(k):
            markov = self.model.markov_embed(previous)
            embedded.append(markov)
            latent, state = self.model.latent(markov, hidden[:, i], state)
            if ids is None:
                logits = base[:, i] + self.model.markov_bias(latent)
            else:
                logits = self.model.apply_markov_bias_gathered(
                    latent, base[:, i], values[:, i], ids[:, i]
                )
            previous = self._sample_logits(logits, requests[:, i], positions[:, i], i)
            self.draft_tokens[:num_reqs, i] = previous
        if self.use_confidence_head:
            markov = torch.stack(embedded, dim=1).flatten(0, 1)
            confidence = self.model.compute_confidence(rows, markov)
            self.draft_token_confidence_probs[:num_reqs] = confidence.view(num_reqs, k)
