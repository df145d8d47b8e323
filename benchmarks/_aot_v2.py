"""The V2 runner's rejection kernel for the report: it calls device functions of vLLM's.

vLLM hides Triton where no backend is active, as on a machine without a GPU. Compiling
ahead of time needs none, so one is pretended while vLLM looks.
"""

from __future__ import annotations

from typing import Any
from unittest import mock

import torch
import triton.backends
from _aot import Launch, Recorder
from torch._subclasses.fake_tensor import FakeTensorMode

SLOTS = 64  # of requests in the runner's buffers


class _ActiveDriver:
    @staticmethod
    def is_active() -> bool:
        return True


def kernel_module() -> Any:
    """``integration.v2.rejection_triton`` with real kernels in it."""
    pretended = triton.backends.Backend(compiler=None, driver=_ActiveDriver)
    with mock.patch.dict(triton.backends.backends, {"cpu": pretended}):
        from vllm.triton_utils import HAS_TRITON
    assert HAS_TRITON, "vllm was imported before, without Triton"
    from vllm_dspark.integration.v2 import rejection_triton

    return rejection_triton


def v2_launches(
    shape: tuple[int, int, int], dense: bool, method: str, processed: bool
) -> list[Launch]:
    """The one kernel of a verification of R requests with K drafts over V tokens.

    Args:
        shape: R, K, V.
        dense: with draft logits (bfloat16), else one-hot drafts.
        method: standard or block.
        processed: target logits are float32, else the model's bfloat16.
    """
    requests, k, vocab = shape
    module, recorder = kernel_module(), Recorder()
    rows, ints, bf16 = requests * (k + 1), torch.int32, torch.bfloat16
    with FakeTensorMode():
        inputs = module.V2Inputs(
            torch.empty(rows, vocab, dtype=torch.float32 if processed else bf16),
            torch.empty(SLOTS, k, vocab, dtype=bf16) if dense else None,
            torch.empty(rows, dtype=ints),
            torch.empty(requests + 1, dtype=ints),
            torch.empty(rows, dtype=torch.int64),
            torch.empty(requests, dtype=ints),
            torch.empty(SLOTS),
            torch.empty(SLOTS, dtype=torch.int64),
            k,
            method,
            False,
        )
        with mock.patch.object(module, "launch", recorder):
            module.rejection_sample(inputs)
    return recorder.launches
