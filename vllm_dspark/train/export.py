"""From training weights to a drafter folder (DeepSpec's layout)."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vllm_dspark.model.checkpoint import OPTIONAL, save_checkpoint
from vllm_dspark.model.drafter import Drafter
from vllm_dspark.model.vocab_maps import D2T

PROVENANCE = "dspark_training.json"


def checkpoint_state(
    drafter: Drafter, scale: Tensor, offsets: Tensor | None
) -> dict[str, Tensor]:
    """Tensors under the checkpoint's names, bfloat16.

    Args:
        drafter: trained on features divided by ``scale``.
        scale: ``[m·d]``, folded into ``fc`` here.
        offsets: ``d2t``, or None for the whole vocabulary.
    """
    state = {
        name: tensor.detach()
        for name, tensor in drafter.state_dict().items()
        if name not in OPTIONAL  # embeddings and LM head are the target's
    }
    state["fc.weight"] = state["fc.weight"] / scale
    state = {name: tensor.to("cpu", torch.bfloat16) for name, tensor in state.items()}
    if offsets is not None:
        state[D2T] = offsets
    return state


def export(
    out: Path,
    config: dict[str, Any],
    state: dict[str, Tensor],
    provenance: dict[str, Any],
) -> None:
    """Write the folder; a kill in between leaves the old files or the new ones.

    Raises:
        OSError: no space, for example; the drafter before is still whole.
    """
    temporary = out / ".writing"
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        save_checkpoint(temporary, config, state)
        text = json.dumps(provenance, indent=1) + "\n"
        (temporary / PROVENANCE).write_text(text)
        for file in sorted(temporary.iterdir()):
            os.replace(file, out / file.name)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
