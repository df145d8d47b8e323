"""The name of the device that computes, as cost tables have it."""

from __future__ import annotations

import platform

import torch

from vllm_dspark import provenance


def device_name() -> str:
    """The GPU's name, or the CPU's model, cores and architecture."""
    if torch.cuda.is_available():
        return str(torch.cuda.get_device_name())
    machine = provenance.collect([])["machine"]
    return f"{machine['cpu']} x{machine['cores']} {platform.machine()}"
