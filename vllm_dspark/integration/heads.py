"""From checkpoint tensors to the weights of the sequential loop."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from vllm_dspark.config import DrafterConfig
from vllm_dspark.model.checkpoint import draft_to_target_ids
from vllm_dspark.ops.sequential import SequentialHead

_JOINT = {"gated": "gate_proj", "rnn": "joint_proj"}


def head_from_state(
    drafter: DrafterConfig, state: Mapping[str, torch.Tensor], dtype: torch.dtype
) -> SequentialHead:
    """The sequential and confidence heads of a checkpoint (paper, 3.1 and 3.2.1).

    Copies: what safetensors reads is the file itself, mapped into memory, and a file
    that is overwritten under a running server would kill it (SIGBUS).

    Args:
        drafter: the checkpoint's configuration.
        state: its tensors.
        dtype: what the Markov weights run in (bfloat16 or float32); the confidence
            head always runs in float32, because probabilities near 1 need the bits.
    """

    def weight(name: str) -> torch.Tensor | None:
        tensor = state.get(name)
        return None if tensor is None else tensor.to(dtype, copy=True).contiguous()

    def scalar(name: str) -> torch.Tensor | None:
        tensor = state.get(name)
        if tensor is None:
            return None
        return tensor.to(torch.float32, copy=True).flatten().contiguous()

    offsets = state.get("d2t")
    joint = _JOINT.get(drafter.markov_head_type)
    prefix = f"markov_head.{joint}"
    return SequentialHead(
        head_type=drafter.markov_head_type,
        markov_w1=weight("markov_head.markov_w1.weight"),
        markov_w2=weight("markov_head.markov_w2.weight"),
        joint_weight=weight(f"{prefix}.weight") if joint else None,
        joint_bias=weight(f"{prefix}.bias") if joint else None,
        confidence_weight=scalar("confidence_head.proj.weight"),
        confidence_bias=scalar("confidence_head.proj.bias"),
        draft_to_target=None if offsets is None else draft_to_target_ids(offsets).int(),
    )
