"""``rejection_kernel: dspark``: our kernel in vLLM's rejection sampler.

Logits are processed by vLLM; only what accepts drafts and draws a token is ours. It
emits what vLLM's kernels emit, structured output included (a draft that vLLM calls
invalid is none, and the token in its place comes from the target alone; which drafts
are, `grammar` has a say in).
"""

from __future__ import annotations

import logging
from typing import Any

import numpy as np
import torch
from vllm.v1.worker.gpu.spec_decode.rejection_sampler import RejectionSampler

from vllm_dspark.integration.v2.rejection_triton import V2Inputs, rejection_sample

logger = logging.getLogger("vllm_dspark")


class DSparkV2RejectionSampler(RejectionSampler):
    """vLLM's with our kernel; `verifications` counts its calls."""

    def __init__(self, *args: Any, **keys: Any) -> None:
        super().__init__(*args, **keys)
        self.verifications = 0

    def _verify(
        self,
        logits: torch.Tensor,
        draft_logits: torch.Tensor | None,
        draft_sampled: torch.Tensor,
        pos: torch.Tensor,
        cu_num_logits: torch.Tensor,
        idx_mapping: torch.Tensor,
        idx_mapping_np: np.ndarray,
        expanded_idx_mapping: torch.Tensor,
        expanded_local_pos: torch.Tensor,
        seq_lens_upper_bound_np: np.ndarray,
        verify_draft_sampled: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """As vLLM's: processed logits, tokens and how many.

        Shape: logits [L, V], draft_logits [M, K, V] → [L, V], [R, K + 1], [R].
        """
        processed = self.sampler.apply_sampling_params(
            logits,
            expanded_idx_mapping,
            idx_mapping,
            idx_mapping_np,
            pos,
            draft_sampled,
            expanded_local_pos,
            seq_lens_upper_bound_np,
        )
        states = self.sampler.sampling_states
        inputs = V2Inputs(
            processed,
            draft_logits,
            verify_draft_sampled,
            cu_num_logits,
            pos,
            idx_mapping,
            states.temperature.gpu,
            states.seeds.gpu,
            self.num_speculative_steps,
            "block" if self.use_block_verification else "standard",
            self.sampler.use_fp64_gumbel,
        )
        self.verifications += 1
        return processed, *rejection_sample(inputs)


def put_in_place(runner: Any, vllm_config: Any) -> None:
    """Replaces a V2 runner's rejection sampler, where the runner has one.

    Raises:
        ValueError: the target brings a rejection sampler of its own.
    """
    theirs = runner.rejection_sampler
    if theirs is None:  # not the last pipeline stage
        return
    if type(theirs) is not RejectionSampler:
        raise ValueError(
            "dspark option 'rejection_kernel' is 'dspark', but the target verifies "
            f"with {type(theirs).__name__}: leave the option out"
        )
    runner.rejection_sampler = DSparkV2RejectionSampler(
        theirs.sampler, vllm_config.speculative_config, runner.device
    )
    logger.info("DSpark: drafts are verified by rejection_kernel 'dspark' (Triton)")
