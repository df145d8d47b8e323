"""vLLM's DSpark speculator with every sequential head and calibrated confidences.

For any drafter of vLLM's, whose model class stays. With a vanilla head and without a
calibration file everything is vLLM's own.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from vllm.config import VllmConfig
from vllm.v1.worker.gpu.spec_decode.dspark.speculator import DSparkSpeculator

from vllm_dspark.integration.v2 import model as drafter
from vllm_dspark.integration.v2.calibration import DeviceMaps, load_maps


class DSparkV2Speculator(DSparkSpeculator):
    """Drafts as vLLM's does, and with gated and rnn heads."""

    def __init__(self, vllm_config: VllmConfig, device: torch.device) -> None:
        super().__init__(vllm_config, device)
        config = self.draft_model_config
        self._maps: DeviceMaps | None = None
        self._ours = drafter.ARCHITECTURE in config.architectures and (
            drafter.needs_our_class(
                config.hf_config, vllm_config.model_config.get_vocab_size()
            )
        )

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
        # Without a confidence head vLLM's own estimator follows the outcomes.
        if model.model.confidence_head is not None:
            self._maps = load_maps(self.vllm_config, self.device)
        return model

    def propose(self, input_batch: Any, *arguments: Any, **keys: Any) -> torch.Tensor:
        """As vLLM's; what verification is trimmed by is calibrated afterwards.

        In place, where the runner takes it from, and outside the CUDA graph.
        """
        drafts = super().propose(input_batch, *arguments, **keys)
        wanted = self.use_confidence_head and not keys.get("dummy_run")
        if self._maps is not None and wanted:
            rows = input_batch.idx_mapping[: input_batch.num_reqs]
            raw = self.draft_token_confidence_probs[: len(rows)]
            raw.copy_(self._maps.apply(raw, self.temperature[rows]))
        return drafts

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
