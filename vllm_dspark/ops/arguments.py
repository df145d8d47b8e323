"""What the two operations ask of their arguments, and how they choose a backend."""

from collections.abc import Mapping

import torch
from torch import Tensor

from vllm_dspark.ops import extension_native

GREEDY_TEMPERATURE = 1e-5  # below: greedy
INTEGERS = (torch.int32, torch.int64)
FLOATS = (torch.float32, torch.bfloat16)
F32 = (torch.float32,)


def resolve_backend(backend: str, known: tuple[str, ...], like: Tensor) -> str:
    """``auto`` made into the fastest backend there is for tensors such as `like`.

    Raises:
        ValueError: `backend` is none of `known`.
        RuntimeError: the extension is stale.
    """
    if backend not in known:
        raise ValueError(f"backend: unknown {backend!r}, one of {known}")
    if backend != "auto":
        return backend
    if like.is_cuda and "triton" in known:
        return "triton"
    if like.device.type == "cpu":
        extension_native.log_backend_once()
        if extension_native.load() is not None:
            return "native"
    return "reference"


def require_vocabulary(name: str, logits: Tensor) -> None:
    """ValueError if the last dimension is empty."""
    if logits.shape[-1] == 0:
        raise ValueError(f"{name}: no vocabulary in {tuple(logits.shape)}")


def require_randomness(
    temperature: Tensor | None,
    requests: int,
    uniforms: Mapping[str, tuple[Tensor | None, tuple[int, ...]]],
    like: Tensor,
) -> None:
    """ValueError unless every request that is not greedy has its uniform numbers.

    Args:
        temperature: Shape ``[requests]`` float32. None: all greedy, nothing to check.
        requests: how many there are.
        uniforms: name to the argument and the shape it must have, float64.
        like: a tensor on the device they must be on.
    """
    if temperature is None:
        return
    require("temperature", temperature, F32, (requests,), like)
    for name, (tensor, shape) in uniforms.items():
        if tensor is not None:
            require(name, tensor, (torch.float64,), shape, like)
    missing = any(tensor is None for tensor, _ in uniforms.values())
    if missing and bool((temperature >= GREEDY_TEMPERATURE).any()):
        needed = [f"{name} of shape {list(s)}" for name, (_, s) in uniforms.items()]
        raise ValueError(
            f"{' and '.join(needed)} are needed: some requests are not greedy"
        )


def require(
    name: str,
    tensor: Tensor,
    dtypes: tuple[torch.dtype, ...],
    shape: tuple[int | None, ...],
    like: Tensor,
    inner_only: bool = False,
) -> None:
    """ValueError naming the shape unless `tensor` is as described.

    Args:
        name: the argument's name, for the message.
        tensor: the argument.
        dtypes: what it may be.
        shape: what it must be, None for any size.
        like: a tensor on the device it must be on.
        inner_only: only the last dimension must be contiguous.
    """
    actual = tuple(tensor.shape)
    fits = len(actual) == len(shape) and all(
        want is None or want == got for want, got in zip(shape, actual, strict=True)
    )
    if fits and tensor.dtype in dtypes and tensor.device == like.device:
        if tensor.is_contiguous() or (
            inner_only and (tensor.stride(-1) == 1 or tensor.shape[-1] == 1)
        ):
            return
        raise ValueError(
            f"{name}: shape {list(actual)} with strides {list(tensor.stride())} is "
            f"not contiguous{' in its last dimension' if inner_only else ''}"
        )
    kinds = " or ".join(str(d).removeprefix("torch.") for d in dtypes)
    wanted = ", ".join("any" if s is None else str(s) for s in shape)
    raise ValueError(
        f"{name}: expected {kinds} of shape [{wanted}] on {like.device}, got "
        f"{str(tensor.dtype).removeprefix('torch.')} of shape {list(actual)} on "
        f"{tensor.device}"
    )
