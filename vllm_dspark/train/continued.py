"""Going on from a drafter that is there: its shape, vocabulary and weights."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vllm_dspark.model import checkpoint
from vllm_dspark.model.drafter import Drafter
from vllm_dspark.model.vocab_maps import D2T, draft_to_target_ids
from vllm_dspark.train.options import TrainOptions


@dataclass(frozen=True, slots=True)
class Start:
    """A drafter to train further.

    Args:
        config: its ``config.json``.
        state: its tensors.
        weights_hash: its name in the records.
    """

    config: dict[str, Any]
    state: dict[str, Tensor]
    weights_hash: str

    @property
    def draft_to_target(self) -> Tensor | None:
        """``[Vd]`` int64, or None for the whole vocabulary."""
        offsets = self.state.get(D2T)
        return None if offsets is None else draft_to_target_ids(offsets)

    def fill(self, drafter: Drafter, scale: Tensor) -> None:
        """Copy its weights into a drafter that trains on features over ``scale``.

        Raises:
            ValueError: it has embeddings or an LM head of its own, which would be
                trained as if they were the target's.
        """
        own = dict(drafter.named_parameters())
        with torch.no_grad():
            for name, tensor in self.state.items():
                if name not in own:
                    continue
                if own[name].requires_grad:
                    own[name].copy_(tensor)
                elif not torch.equal(own[name], tensor.to(own[name].dtype)):
                    raise ValueError(
                        f"the drafter to start from has its own {name!r}; only "
                        "drafters that use the target's can be trained further"
                    )
            drafter.fc.weight.mul_(scale)


def read_start(folder: Path) -> Start:
    """Read a drafter's folder.

    Raises:
        ValueError: as `checkpoint.load_state`.
    """
    return Start(
        checkpoint.read_config(folder),
        checkpoint.load_state(folder),
        checkpoint.weights_hash(folder),
    )


def fitting_options(options: TrainOptions, start: Start) -> TrainOptions:
    """The options with the drafter's shape in place of their own."""
    config = start.config
    rank = int(config["markov_rank"])
    draft_vocab = config.get("draft_vocab_size") or config["vocab_size"]
    return replace(
        options,
        layers=int(config["num_hidden_layers"]),
        block_size=int(config["block_size"]),
        head=str(config["markov_head_type"]) if rank else "none",
        rank=rank,
        draft_vocab_size=int(draft_vocab),
        target_layer_ids=tuple(config["target_layer_ids"]),
        sliding_window=config.get("sliding_window"),
    )
