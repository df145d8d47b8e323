"""Builds the drafter beside the target and fills it from its checkpoint."""

from __future__ import annotations

import torch
from torch import nn
from vllm.compilation.backends import set_model_tag
from vllm.config import VllmConfig
from vllm.model_executor.model_loader.utils import (
    initialize_model,
    process_weights_after_loading,
)
from vllm.utils.torch_utils import set_default_torch_dtype

from vllm_dspark.integration.model import DSparkDraftModel
from vllm_dspark.model import checkpoint


def load_draft_model(
    vllm_config: VllmConfig, folder: str, target: nn.Module, device: torch.device
) -> DSparkDraftModel:
    """The drafter of a folder, ready to run.

    vLLM's own loader is not used: it would take pickled weights, and insists on
    tensors that a DSpark checkpoint may leave out.

    Args:
        vllm_config: the drafter's (``_create_draft_vllm_config``).
        folder: its checkpoint.
        target: vLLM's target model; what the checkpoint leaves out is taken from it.
        device: where it runs.

    Raises:
        ValueError: NaN or otherwise unusable weights (names the tensor).
    """
    spec = vllm_config.speculative_config
    assert spec is not None
    draft = spec.draft_model_config
    config, state = checkpoint.load_config(folder), checkpoint.load_state(folder)
    with set_model_tag("dspark_head"), set_default_torch_dtype(draft.dtype), device:
        model = initialize_model(
            vllm_config, model_class=DSparkDraftModel, model_config=draft
        )
    assert isinstance(model, DSparkDraftModel)
    model.load_state(state, config, target)
    process_weights_after_loading(model, draft, device)
    model.share_with_target(state, config, target)
    return model.eval()
