"""A tiny target with eight-bit weights, in the layout of compressed-tensors."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from tests.tiny import edit_config


def quantize_target(source: Path, path: Path) -> Path:
    """Round a target's projections to int8, one scale a row; the rest is copied.

    Args:
        source: folder of a target of `tests.tiny.make_tiny_target`.
        path: folder to write.
    """
    shutil.copytree(source, path)
    state: dict[str, torch.Tensor] = {}
    for name, weight in load_file(path / "model.safetensors").items():
        if not name.endswith("_proj.weight"):
            state[name] = weight
            continue
        scale = weight.abs().amax(dim=1, keepdim=True) / 127
        state[name] = (weight / scale).round().to(torch.int8)
        state[name.replace("weight", "weight_scale")] = scale.float()
    save_file(state, path / "model.safetensors", metadata={"format": "pt"})
    eight: dict[str, Any] = {"num_bits": 8, "type": "int", "symmetric": True}
    group = {
        "targets": ["Linear"],
        "weights": {**eight, "strategy": "channel", "dynamic": False},
        "input_activations": {**eight, "strategy": "token", "dynamic": True},
    }
    edit_config(
        path,
        quantization_config={
            "quant_method": "compressed-tensors",
            "format": "int-quantized",
            "quantization_status": "compressed",
            "ignore": ["lm_head"],
            "config_groups": {"group_0": group},
        },
    )
    return path
