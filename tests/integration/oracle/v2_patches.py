"""What vLLM's V2 model runner needs to run on a CPU wheel, in Triton's interpreter.

For tests only: the interpreter executes vLLM's kernels in numpy, block by block, so
that vLLM's own DSpark can be asked what it would have drafted. Each patch says why it
is there. `install` must run before vllm is imported.
"""

from __future__ import annotations

import functools
import os
from types import SimpleNamespace
from typing import Any

import numpy as np


def install() -> None:
    """Interpret Triton kernels and let vLLM choose its V2 runner."""
    os.environ["TRITON_INTERPRET"] = "1"
    os.environ["VLLM_USE_V2_MODEL_RUNNER"] = "1"
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"
    _patch()


@functools.cache  # a fork has its own environment, and these already
def _patch() -> None:
    _pretend_backend()
    _replace_functions_once()
    _boolean_masks()
    _math_functions()
    _random_bits()


def _pretend_backend() -> None:
    """vLLM turns Triton off unless some backend has an active driver, and the wheel of
    Triton has none for CPUs. The interpreter needs no backend."""
    import triton.backends

    class Driver:
        @staticmethod
        def is_active() -> bool:
            return True

    triton.backends.backends["cpu"] = triton.backends.Backend(
        compiler=None, driver=Driver
    )


def _replace_functions_once() -> None:
    """At each launch, and again at each call of a device function, the interpreter puts
    its own functions into triton.language, and takes them out after the launch: most of
    the time of a small kernel. Nothing is compiled in this process: they stay there."""
    import triton.language as tl
    from triton.runtime import interpreter

    patch, stays = interpreter._patch_lang, interpreter._LangPatchScope()
    everything = SimpleNamespace(__globals__={"tl": tl, "core": tl.core})
    done: list[Any] = []

    def patch_once(fn: Any) -> Any:
        if not done:
            done.append(patch(everything))
        return stays

    interpreter._patch_lang = patch_once


def _boolean_masks() -> None:
    """``&`` of two int1 values gives an int8 array in the interpreter, which its masked
    loads and stores refuse as an index mask."""
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    def as_bool(mask: Any) -> Any:
        if mask.data.dtype == np.bool_:
            return mask
        return TensorHandle(mask.data.astype(np.bool_), mask.dtype)

    load = InterpreterBuilder.create_masked_load
    store = InterpreterBuilder.create_masked_store

    def masked_load(self: Any, pointer: Any, mask: Any, *rest: Any) -> Any:
        return load(self, pointer, as_bool(mask), *rest)

    def masked_store(self: Any, pointer: Any, value: Any, mask: Any, *rest: Any) -> Any:
        return store(self, pointer, value, as_bool(mask), *rest)

    InterpreterBuilder.create_masked_load = masked_load
    InterpreterBuilder.create_masked_store = masked_store


def _math_functions() -> None:
    """CUDA's libdevice has no implementation in the interpreter: its functions return
    None there."""
    import triton.language as tl
    from triton.language.extra import libdevice
    from triton.runtime.interpreter import TensorHandle

    def elementwise(function: Any) -> Any:
        def call(x: Any, *_args: Any, **_kwargs: Any) -> Any:
            data = x.handle.data
            with np.errstate(all="ignore"):
                result = function(data).astype(data.dtype)
            return tl.tensor(TensorHandle(result, x.handle.dtype), x.type)

        return call

    for name in ("exp", "log", "log1p", "tanh"):
        setattr(libdevice, name, elementwise(getattr(np, name)))


def _random_bits() -> None:
    """Philox in numpy, to the bit: its ten rounds, operation by operation, are half of
    what a step with sampled tokens takes in the interpreter."""
    import triton.language as tl
    import triton.language.random as random
    from triton.runtime.interpreter import TensorHandle

    philox = random.philox_impl
    low, half = np.uint64(0xFFFFFFFF), np.uint64(32)
    key_a, key_b = np.uint64(0x9E3779B9), np.uint64(0xBB67AE85)
    round_a, round_b = np.uint64(0xD2511F53), np.uint64(0xCD9E8D57)

    def in_numpy(*counter_and_key: Any, n_rounds: Any = 10) -> Any:
        *state, n_rounds = (*counter_and_key, n_rounds)[:7]
        if state[0].dtype != tl.uint32:
            return philox(*state, n_rounds)
        block = max(state, key=lambda x: len(x.shape))
        c0, c1, c2, c3, k0, k1 = (x.handle.data.astype(np.uint64) for x in state)
        for _ in range(getattr(n_rounds, "value", n_rounds)):
            a, b = round_a * c0, round_b * c2
            c0, c2 = (b >> half) ^ c1 ^ k0, (a >> half) ^ c3 ^ k1
            c1, c3 = b & low, a & low
            k0, k1 = (k0 + key_a) & low, (k1 + key_b) & low
        kind = tl.uint32
        if len(block.shape):
            kind = tl.block_type(tl.uint32, block.shape)
        rows = np.broadcast_arrays(c0, c1, c2, c3)
        return tuple(
            tl.tensor(TensorHandle(row.astype(np.uint32), tl.uint32), kind)
            for row in rows
        )

    random.philox_impl = in_numpy


def top_k_top_p_in_torch() -> None:
    """vLLM's kernel for top-k and top-p fails in the interpreter (a plain int has no
    ``to``): its torch version. Call it once vllm can be imported."""
    import vllm.v1.sample.ops.topk_topp_sampler as module

    module.HAS_TRITON = False


def trim_on_device() -> None:
    """vLLM trims on the device only with full CUDA graphs and attention backends that
    say so. CPU attention reads the device's query lengths like any other, it has only
    never been said; graphs change times, not results. Call it once vllm can be
    imported."""
    import vllm.v1.worker.gpu.model_runner as runner
    import vllm.v1.worker.gpu.spec_decode.adaptive_verification as module
    from vllm.config import VllmConfig

    from vllm_dspark.integration.v2 import config

    VllmConfig._validate_adaptive_verification = lambda self: None
    runner.resolve_adaptive_cudagraph_mode = lambda mode, **keys: mode
    module.get_query_lens_mismatch_unsupported_backend = lambda *args, **keys: None
    module.get_varlen_cudagraph_unsupported_backend = lambda *args, **keys: None
    config._no_device = lambda vllm_config: None


def overlap_steps() -> None:
    """CPUs have asynchronous scheduling off; the machinery works there, too."""
    from vllm.platforms.cpu import CpuPlatform

    check = CpuPlatform.check_and_update_config.__func__

    def keep(cls: Any, vllm_config: Any) -> None:
        wanted = vllm_config.scheduler_config.async_scheduling
        check(cls, vllm_config)
        vllm_config.scheduler_config.async_scheduling = wanted

    CpuPlatform.check_and_update_config = classmethod(keep)
