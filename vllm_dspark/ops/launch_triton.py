"""How every Triton kernel of this package is launched: one place, for tests to replace.

Launching neither reads a value on the host nor makes a shape depend on one.
"""

from typing import Any

import triton
from torch import Tensor


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **constants: Any) -> None:
    """Launches `grid` programs of a kernel."""
    kernel[grid](*args, **constants)


def require_device(kernel: Any, tensor: Tensor) -> None:
    """RuntimeError unless the tensor is on a GPU or the kernel is interpreted."""
    interpreted = not isinstance(kernel, triton.runtime.JITFunction)
    if not tensor.is_cuda and not interpreted:
        raise RuntimeError(
            f"backend 'triton' needs CUDA tensors, got {tensor.device}; use 'auto', or "
            "set TRITON_INTERPRET=1 before triton is imported to interpret it"
        )
