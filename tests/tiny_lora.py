"""Tiny LoRA adapters for the tiny targets, in PEFT's layout."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

RANK = 4


def make_tiny_lora(
    path: Path,
    target: Path,
    *,
    seed: int = 0,
    strength: float = 0.5,
    lm_head: bool = False,
) -> Path:
    """Save an adapter that changes what a target of `tests.tiny` says.

    Args:
        path: folder to write.
        target: the target's folder.
        strength: of the change, against weights of about one.
        lm_head: change the LM head as well.
    """
    generator = torch.Generator().manual_seed(seed)
    modules = ["q_proj", "v_proj", "o_proj", "down_proj"]
    if lm_head:
        modules.append("lm_head")
    state = {}
    for name, weight in load_file(target / "model.safetensors").items():
        module = name.removesuffix(".weight")
        if module.rsplit(".", 1)[-1] not in modules:
            continue
        rows, columns = weight.shape
        left = torch.randn((RANK, columns), generator=generator) * columns**-0.5
        right = torch.randn((rows, RANK), generator=generator) * strength
        state[f"base_model.model.{module}.lora_A.weight"] = left
        state[f"base_model.model.{module}.lora_B.weight"] = right
    path.mkdir(parents=True)
    save_file(state, path / "adapter_model.safetensors")
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(target),
        "r": RANK,
        "lora_alpha": RANK,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": modules,
    }
    (path / "adapter_config.json").write_text(json.dumps(config))
    return path
