"""What a collection of rounds is asked for, whichever engine runs it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

# Drafts that follow the target's temperature: what the heads are trained for. Without
# effect on greedy requests.
DRAFT_SAMPLE_METHOD = "probabilistic"


@dataclass(frozen=True)
class Drafting:
    """How to draft.

    Args:
        method: vLLM's name; ``dspark`` for drafters with and without sequential head.
        model: the drafter's folder; None for methods without one.
        num_speculative_tokens: drafts a round.
        draft_sample_method: of ``dspark``, see `vllm_dspark.proposer.DraftOptions`.
    """

    method: str
    model: str | None
    num_speculative_tokens: int
    draft_sample_method: str = DRAFT_SAMPLE_METHOD

    def speculative_config(self) -> dict[str, Any]:
        """vLLM's speculative config."""
        config: dict[str, Any] = {
            "method": self.method,
            "num_speculative_tokens": self.num_speculative_tokens,
        }
        if self.model is not None:
            config["model"] = self.model
        if self.method == "dspark":
            config["draft_sample_method"] = self.draft_sample_method
        return config


@dataclass(frozen=True)
class Decoding:
    """What is decoded.

    Args:
        target: model folder or name.
        temperatures: each prompt is decoded once with each.
        max_tokens: new tokens of a prompt at most.
        dtype: of target and drafter; ``auto`` is the checkpoint's.
        concurrency: requests in flight (vLLM only).
    """

    target: str
    temperatures: tuple[float, ...]
    max_tokens: int
    dtype: str = "auto"
    concurrency: int = 8
