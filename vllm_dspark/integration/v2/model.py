"""vLLM's Qwen3 drafter with the heads and the shared weights that it has no place for.

Used only for a checkpoint that needs it (`needs_our_class`); otherwise vLLM's own class
runs.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextvars import ContextVar
from typing import Any

import torch
from torch import nn
from vllm.config import VllmConfig
from vllm.model_executor.models import ModelRegistry
from vllm.model_executor.models.qwen3_dspark import Qwen3DSparkForCausalLM

from vllm_dspark.integration.model import target_lm_head_rows
from vllm_dspark.model.checkpoint import draft_to_target_ids
from vllm_dspark.model.sequential_head import gated_latent, rnn_step

ARCHITECTURE = "Qwen3DSparkModel"
_JOINT = {"gated": "gate_proj", "rnn": "joint_proj"}
# The target while a drafter is loaded: vLLM's loader has no argument for it.
loading_for: ContextVar[nn.Module | None] = ContextVar("loading_for", default=None)


def register() -> None:
    """Let vLLM build Qwen3 drafters by our class, in this process."""
    ModelRegistry.register_model(
        ARCHITECTURE, "vllm_dspark.integration.v2.model:DSparkV2ForCausalLM"
    )


def head_type(hf_config: Any) -> str:
    """``vanilla``, ``gated`` or ``rnn``."""
    return getattr(hf_config, "markov_head_type", None) or "vanilla"


def needs_our_class(hf_config: Any, target_vocab: int) -> bool:
    """Whether vLLM's class cannot run a Qwen3 drafter as it may be written."""
    draft_vocab = getattr(hf_config, "draft_vocab_size", None)
    reduced = draft_vocab is not None and draft_vocab < target_vocab
    return head_type(hf_config) in _JOINT or reduced


class DSparkV2ForCausalLM(Qwen3DSparkForCausalLM):
    """A DSpark drafter with any head; a reduced vocabulary needs no ``lm_head``."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        self.head_type = head_type(self.config)
        rank, hidden = self.config.markov_rank, self.config.hidden_size
        if self.head_type == "gated":
            self.model.markov_head.gate_proj = nn.Linear(hidden + rank, rank)
        elif self.head_type == "rnn":
            self.model.markov_head.joint_proj = nn.Linear(2 * rank + hidden, 3 * rank)

    def latent(
        self, markov: torch.Tensor, hidden: torch.Tensor, state: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """What W2 multiplies, and the next recurrent state (paper 3.1).

        Shape: markov, state [R, r]; hidden [R, d] → two of [R, r]. ``state`` None: 0.
        """
        head = self.model.markov_head
        if self.head_type == "gated":
            return gated_latent(head.gate_proj, markov, hidden), None
        if self.head_type == "rnn":
            state = torch.zeros_like(markov) if state is None else state
            return rnn_step(head.joint_proj, state, markov, hidden)
        return markov, None

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        """As vLLM's; a missing ``lm_head`` of a reduced vocabulary is the target's."""
        state = dict(weights)
        reduced = self.draft_id_to_target_id is not None
        missing = "lm_head.weight" not in state and "d2t" in state
        if reduced and missing:
            target = loading_for.get()
            assert target is not None
            ids = draft_to_target_ids(state["d2t"]).long()
            state["lm_head.weight"] = target_lm_head_rows(target, ids).cpu()
        # Not by vLLM's loader, which takes any gate_proj for a part of an MLP's.
        joint = getattr(self.model.markov_head, _JOINT.get(self.head_type, ""), None)
        if joint is not None:
            prefix = f"markov_head.{_JOINT[self.head_type]}."
            own = {n: state.pop(prefix + n) for n in ("weight", "bias")}
            joint.load_state_dict(own)
        super().load_weights(state.items())
