"""The drafter as a vLLM model: backbone on vLLM's layers, K/V in vLLM's paged cache.

The backbone is vLLM's DFlash stack (tensor parallel, attention backends, compile);
the sequential and confidence heads are ours, as plain weights for ``ops.sequential``,
replicated on every rank. Paper, sections 2.2, 3.1 and 3.2.1.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn
from vllm import _custom_ops as ops
from vllm.config import VllmConfig
from vllm.distributed.communication_op import tensor_model_parallel_all_reduce
from vllm.model_executor.layers.linear import ReplicatedLinear
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead
from vllm.model_executor.models.qwen3_dflash import (
    DFlashQwen3ForCausalLM,
    DFlashQwen3Model,
)
from vllm.model_executor.models.utils import maybe_prefix

from vllm_dspark.config import DrafterConfig
from vllm_dspark.integration.heads import head_from_state
from vllm_dspark.ops.sequential import SequentialHead

_BACKBONE_PREFIXES = ("layers.", "norm.", "hidden_norm.", "fc.")


class DSparkBackbone(DFlashQwen3Model):
    """vLLM's DFlash stack with its own projection of the context.

    The K/V weights of all layers are one linear layer of vLLM's, so that the CPU
    backend packs them once instead of at every step; keys are normalised layer by
    layer.
    """

    def __init__(
        self, *, vllm_config: VllmConfig, start_layer_id: int = 0, prefix: str = ""
    ) -> None:
        super().__init__(
            vllm_config=vllm_config, start_layer_id=start_layer_id, prefix=prefix
        )
        attention = self.layers[0].self_attn
        self.context_kv = ReplicatedLinear(
            self.config.hidden_size,
            len(self.layers) * 2 * attention.kv_size,
            bias=attention.qkv_proj.bias is not None,
            prefix=maybe_prefix(prefix, "context_kv"),
            return_bias=False,
        )

    def build_context_projection(self) -> None:
        """Collect the K/V weights of all layers; after they are loaded."""
        self._build_fused_kv_buffers()
        assert self._fused_kv_weight is not None
        self.context_kv.weight.data.copy_(self._fused_kv_weight)
        if self._fused_kv_bias is not None:
            self.context_kv.bias.data.copy_(self._fused_kv_bias)
        self._fused_kv_weight = self._fused_kv_bias = None

    def _project_context_kv(
        self,
        context_states: torch.Tensor,
        num_ctx: int,
        num_layers: int,
        num_kv_heads: int,
        head_dim: int,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """K and V of the context for all layers, as vLLM lays them out.

        Shape: context_states [num_ctx, d] → two of [layers, num_ctx, kv_heads, dim].
        """
        normed = torch.empty_like(context_states)
        ops.rms_norm(
            normed, context_states, self._hidden_norm_weight, self._rms_norm_eps
        )
        kv = self.context_kv(normed)
        kv = kv.view(num_ctx, num_layers, 2, num_kv_heads, head_dim)
        keys, values = kv.permute(2, 1, 0, 3, 4).contiguous()
        return keys, values

    def _normalize_context_k(self, all_k: torch.Tensor) -> torch.Tensor:
        """RMSNorm of the context keys, each layer with its own weight.

        vLLM passes all layers to one ``rms_norm`` with a [layers, head_dim] weight;
        the CPU kernel reads only the first row, so that every later layer's keys
        would silently get the first layer's weights. Remove when: vLLM's CPU
        ``rms_norm`` honours a two-dimensional weight.

        Shape: all_k [layers, tokens, kv_heads, head_dim] → the same.
        """
        normed = torch.empty_like(all_k)
        for layer in range(all_k.shape[0]):
            ops.rms_norm(
                normed[layer],
                all_k[layer],
                self._k_norm_weights[layer],
                self._rms_norm_eps,
            )
        return normed


class DSparkDraftModel(DFlashQwen3ForCausalLM):
    """A DSpark drafter (any head type, reduced vocabulary or not) in vLLM."""

    model_cls = DSparkBackbone

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        nn.Module.__init__(self)
        spec = vllm_config.speculative_config
        assert spec is not None
        self.draft_model_config = spec.draft_model_config
        self.config = self.draft_model_config.hf_config
        self.model = self.model_cls(
            vllm_config=vllm_config,
            prefix=maybe_prefix(prefix, "model"),
            # Names of draft layers continue the target's, so that their K/V caches
            # do not collide.
            start_layer_id=vllm_config.model_config.get_total_num_hidden_layers(),
        )
        draft_vocab = (
            getattr(self.config, "draft_vocab_size", None) or self.config.vocab_size
        )
        self.lm_head = ParallelLMHead(
            draft_vocab, self.config.hidden_size, prefix=maybe_prefix(prefix, "lm_head")
        )
        self.logits_processor = LogitsProcessor(draft_vocab)
        self.head: SequentialHead | None = None

    def load_state(
        self,
        state: Mapping[str, torch.Tensor],
        drafter: DrafterConfig,
        target: nn.Module,
    ) -> None:
        """Fill the weights from a validated checkpoint.

        Args:
            state: tensors by their checkpoint names (``checkpoint.load_state``).
            drafter: the checkpoint's configuration.
            target: vLLM's target model; a reduced vocabulary without ``lm_head``
                takes its rows from there.
        """
        backbone = {k: v for k, v in state.items() if k.startswith(_BACKBONE_PREFIXES)}
        if "embed_tokens.weight" in state:
            backbone["embed_tokens.weight"] = state["embed_tokens.weight"]
        self.model.load_weights(backbone.items())
        self.model.build_context_projection()
        dtype = self.draft_model_config.dtype
        self.head = head_from_state(drafter, state, dtype)
        if "lm_head.weight" in state:
            weight = self.lm_head.weight
            weight.weight_loader(weight, state["lm_head.weight"].to(weight.dtype))
        elif drafter.has_reduced_vocab:
            ids = self.head.draft_to_target
            assert ids is not None
            rows = target_lm_head_rows(target, ids.long())
            weight = self.lm_head.weight
            weight.weight_loader(weight, rows.to(weight.dtype))

    def share_with_target(
        self,
        state: Mapping[str, torch.Tensor],
        drafter: DrafterConfig,
        target: nn.Module,
    ) -> None:
        """Alias what the checkpoint leaves out: embeddings, full-vocabulary LM head.

        After weight processing, so that the target's weights are processed once.
        """
        if "embed_tokens.weight" not in state:
            self.model.embed_tokens = without_lora(target.model.embed_tokens)
        if "lm_head.weight" not in state and not drafter.has_reduced_vocab:
            self.lm_head = without_lora(target.lm_head)

    def write_context(
        self, features: torch.Tensor, positions: torch.Tensor, slots: torch.Tensor
    ) -> None:
        """Project target hidden states to K/V and store them for every draft layer.

        Shape: features [tokens, taps·d]; positions, slots [tokens] int64 (slot −1:
        not stored).
        """
        context = self.model.fc(features)
        self.model.precompute_and_store_context_kv(context, positions, slots)

    def base_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """U_k over the draft vocabulary. Shape: [rows, d] → [rows, draft_vocab]."""
        logits = self.logits_processor(self.lm_head, hidden)
        assert logits is not None
        return logits


def without_lora(layer: nn.Module) -> nn.Module:
    """The layer itself, where vLLM has put an adapter's around it.

    Adapters are the target's: their rows are counted for its steps, not for drafting.
    """
    return getattr(layer, "base_layer", layer)


def target_lm_head_rows(target: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    """Rows ``ids`` of the target's LM head, gathered over tensor-parallel ranks.

    Shape: ids [n] int64 → [n, d]. Every rank gets all rows: exact, as exactly one
    rank contributes each row and the others zero.
    """
    head = without_lora(target.lm_head)
    shard = head.shard_indices
    start, end = shard.org_vocab_start_index, shard.org_vocab_end_index
    mine = (ids >= start) & (ids < end)
    local = torch.where(mine, ids - start, torch.zeros_like(ids))
    weight = head.weight.detach()
    rows = weight[local.to(weight.device)] * mine.unsqueeze(1).to(weight)
    if end - start >= head.org_vocab_size:
        return rows
    return tensor_model_parallel_all_reduce(rows)
