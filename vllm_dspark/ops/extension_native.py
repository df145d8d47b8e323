"""Loads the C++ extension once, and says why when there is none.

A missing extension is normal (no compiler); one built from other sources is an error.
Environment: ``VLLM_DSPARK_ISA`` = scalar, avx2, avx512, avx512_bf16 or amx forces
the instruction set of the kernels.
"""

import functools
import importlib
import logging
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.utils.dlpack import to_dlpack  # type: ignore[attr-defined]

from vllm_dspark._build_info import REBUILD_COMMAND, source_hash

logger = logging.getLogger("vllm_dspark")

_CSRC = Path(__file__).resolve().parents[2] / "csrc"


@dataclass(frozen=True)
class NativeStatus:
    """Whether the native backend can be used.

    Attributes:
        available: whether the extension is loaded.
        isa: instruction set in use, e.g. ``avx512_bf16``; empty if unavailable.
        threads: threads a kernel would use when called from this thread.
        reason: one line for people: the OpenMP runtime in use, or what is missing.
    """

    available: bool
    isa: str
    threads: int
    reason: str


@functools.cache
def _load() -> tuple[Any, str]:
    """The module and "", or None and the reason."""
    try:
        module = importlib.import_module("vllm_dspark._C")
    except ModuleNotFoundError:
        return None, f"the extension is not built; build it with `{REBUILD_COMMAND}`"
    except ImportError as error:
        return None, f"the extension does not load ({error}); `{REBUILD_COMMAND}`"
    if _CSRC.is_dir() and module.source_hash() != source_hash(_CSRC):
        raise RuntimeError(
            "vllm_dspark._C was built from other sources than those in csrc/. "
            f"Rebuild it: `{REBUILD_COMMAND}`"
        )
    # torch is loaded by now; its own OpenMP runtime is the one to share.
    library = Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"
    module.init_omp(str(library) if library.exists() else "")
    module.set_isa(os.environ.get("VLLM_DSPARK_ISA") or "auto")
    return module, ""


def load() -> Any:
    """The extension module, or None if there is none.

    Raises:
        RuntimeError: the extension is stale, or VLLM_DSPARK_ISA cannot run here.
    """
    return _load()[0]


def require() -> Any:
    """The extension module; RuntimeError with cause and fix if there is none."""
    module, reason = _load()
    if module is None:
        raise RuntimeError(f"backend 'native' is unavailable: {reason}")
    return module


def require_for(tensor: torch.Tensor) -> None:
    """RuntimeError if the extension, or the tensor's device, does not allow native."""
    require()
    if tensor.device.type != "cpu":
        raise RuntimeError(
            f"backend 'native' needs CPU tensors, got {tensor.device}; use 'auto'"
        )


def native_status() -> NativeStatus:
    """Facts for `vllm-dspark check`; never raises."""
    try:
        module, reason = _load()
    except RuntimeError as error:
        return NativeStatus(False, "", 1, str(error))
    if module is None:
        return NativeStatus(False, "", 1, reason)
    path, origin = module.omp_runtime()
    threads = f"threads of {path} ({origin})"
    return NativeStatus(True, module.isa(), module.max_threads(), threads)


@functools.cache
def log_backend_once() -> None:
    """Says, the first time an op runs on the CPU, what it runs with."""
    status = native_status()
    if status.available:
        logger.info("native kernels: %s, %s", status.isa, status.reason)
    else:
        logger.warning("kernels run on the torch reference: %s", status.reason)


def capsule(tensor: torch.Tensor | None) -> object:
    """DLPack capsule of a tensor (None stays None); cheap, and keeps it alive."""
    return None if tensor is None else to_dlpack(tensor)
