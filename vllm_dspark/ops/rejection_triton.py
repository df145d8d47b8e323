"""`rejection_sample` on the GPU: one Triton program per request.

A program walks over its request's rows and stops at the first rejection. A row is read
in blocks: once for a greedy choice, twice for the maximum and the normaliser of a
random one, and once more where a token is drawn. With TRITON_INTERPRET=1, set before
triton is imported, the same kernel runs on CPU tensors.

Run in the interpreter and compiled ahead of time; no result from a GPU is on record.
"""

# Kernels are no Python functions: their arguments have no Python types.
# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from vllm_dspark.ops.launch_triton import launch, require_device
from vllm_dspark.ops.rejection import RejectionInputs, RejectionResult
from vllm_dspark.ops.rejection_parts_triton import (
    DENSE,
    ONE_HOT,
    SPARSE,
    block_walk,
    draft_probability,
    residual_draw,
    target_probability,
)
from vllm_dspark.ops.row_scan_triton import argmax, normaliser

BLOCK = 4096
NUM_WARPS = 8


@triton.jit
def rejection_kernel(
    logits,
    logits_stride,
    vocab,
    draft_ids,
    ends,
    lengths,
    draft_probs,
    probs_stride,
    support,
    support_stride,
    support_size,
    dense,
    temperature,
    accept_uniforms,
    sample_uniforms,
    token_ids,
    width,
    num_emitted,
    MODE: tl.constexpr,
    RANDOM: tl.constexpr,
    METHOD: tl.constexpr,
    BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Verifies one request; `ends` is the inclusive sum of `lengths`."""
    r = tl.program_id(0).to(tl.int64)
    length = tl.load(lengths + r).to(tl.int64)
    first = tl.load(ends + r).to(tl.int64) - length
    t = 0.0
    if RANDOM:
        t = tl.load(temperature + r)
    greedy = t < 1e-5
    k = tl.zeros([], tl.int64)
    more = length >= 0
    if RANDOM and METHOD == "block":  # noqa: SIM102 - the next line is decided when run
        if not greedy:
            k = block_walk(
                logits + (first + r) * logits_stride,
                logits_stride,
                vocab,
                draft_ids + first,
                length,
                draft_probs + first * probs_stride,
                probs_stride,
                support + first * support_stride,
                support_stride,
                support_size,
                dense + r * vocab,
                tl.div_rn(1.0, t),
                accept_uniforms + first,
                tl.load(sample_uniforms + r),
                token_ids + r * width,
                MODE,
                BLOCK,
                CHUNK,
            )
            more = length < 0
    while more:
        row = logits + (first + r + k) * logits_stride
        drafted = k < length
        i = tl.where(drafted, first + k, 0)
        x = tl.load(draft_ids + i, mask=drafted, other=-1).to(tl.int64)
        token = tl.zeros([], tl.int64)
        proper = False
        if RANDOM and METHOD == "standard":  # noqa: SIM102
            if not greedy:
                inv_t = tl.div_rn(1.0, t)
                top, total = normaliser(row, vocab, inv_t, BLOCK)
                proper = (top > float("-inf")) & (top < float("inf"))
                if proper:
                    scale = (1.0 / total).to(tl.float32)
                    q = draft_probs + i * probs_stride
                    ids = support + i * support_stride
                    u = tl.load(accept_uniforms + i, mask=drafted, other=0.0)
                    qx = draft_probability(q, ids, support_size, x, vocab, MODE, CHUNK)
                    px = target_probability(row, x, vocab, inv_t, top, scale)
                    more = drafted & (qx > 0)
                    more = more & (u * qx.to(tl.float64) < px.to(tl.float64))
                    token = x
                    if not more:
                        u = tl.load(sample_uniforms + r)
                        token = residual_draw(
                            row,
                            q,
                            ids,
                            support_size,
                            dense + r * vocab,
                            vocab,
                            inv_t,
                            top,
                            total,
                            scale,
                            x,
                            drafted,
                            u,
                            MODE,
                            BLOCK,
                            CHUNK,
                        )
        if not proper:
            token = argmax(row, vocab, BLOCK).to(tl.int64)
            more = drafted & (token == x)
        tl.store(token_ids + r * width + k, token.to(tl.int32))
        k += 1
    tl.store(num_emitted + r, k.to(tl.int32))


def checked_run(logits: Tensor) -> Callable[[RejectionInputs], RejectionResult]:
    """`run`, or RuntimeError unless the tensors are on a GPU or interpreted."""
    require_device(rejection_kernel, logits)
    return run


def launch_options(inputs: RejectionInputs) -> dict[str, Any]:
    """Compile-time constants for these inputs: the largest blocks that do not spill."""
    block, chunk = BLOCK, 512  # 1024 spills on sm_80
    if inputs.method == "block" and inputs.draft_support is not None:
        block, chunk = 2048, 128
    mode = ONE_HOT
    if inputs.draft_probs is not None:
        mode = DENSE if inputs.draft_support is None else SPARSE
    return {
        "MODE": mode.value,
        "RANDOM": inputs.temperature is not None and inputs.sample_uniforms is not None,
        "METHOD": inputs.method,
        "BLOCK": block,
        "CHUNK": chunk,
    }


@dataclass(frozen=True)
class Buffers:
    """Everything that a call writes, for R requests of at most `most` drafts.

    Made once, they keep their addresses over the replays of a CUDA graph.

    Attributes:
        token_ids, num_emitted: as in `RejectionResult`.
        ends: ``[R]`` int64, the inclusive sum of the lengths.
        dense: ``[R, V]`` float32 with draft_support, otherwise empty.
        nothing: stands for arguments that a kernel never reads.
    """

    token_ids: Tensor
    num_emitted: Tensor
    ends: Tensor
    dense: Tensor
    nothing: Tensor


def make_buffers(inputs: RejectionInputs) -> Buffers:
    """Buffers for inputs of these shapes."""
    token_ids, num_emitted = inputs.outputs()
    num, device = num_emitted.shape[0], num_emitted.device
    rows = 0 if inputs.draft_support is None else num
    return Buffers(
        token_ids,
        num_emitted,
        torch.empty(num, dtype=torch.int64, device=device),
        torch.empty((rows, inputs.target_logits.shape[1]), device=device),
        torch.empty(1, device=device),
    )


def run(inputs: RejectionInputs) -> RejectionResult:
    """One call with buffers of its own."""
    return verify(inputs, make_buffers(inputs))


def verify(inputs: RejectionInputs, b: Buffers) -> RejectionResult:
    """Launches one program per request; the result's tensors are those of `b`.

    Reads no value on the host, and no shape depends on one.
    """
    b.token_ids.fill_(-1)
    num, vocab = inputs.num_draft_tokens.shape[0], inputs.target_logits.shape[1]
    result = RejectionResult(b.token_ids, b.num_emitted, "triton")
    if num == 0:
        return result
    q, support = inputs.draft_probs, inputs.draft_support
    torch.cumsum(inputs.num_draft_tokens, 0, out=b.ends)
    b.dense.zero_()
    shared = support is None or support.shape[0] == 1
    launch(
        rejection_kernel,
        (num,),
        inputs.target_logits,
        inputs.target_logits.stride(0),
        vocab,
        inputs.draft_token_ids,
        b.ends,
        inputs.num_draft_tokens,
        _or(q, b),
        0 if q is None else q.stride(0),
        _or(support, b),
        0 if support is None or shared else support.stride(0),
        0 if support is None else support.shape[1],
        b.dense,
        _or(inputs.temperature, b),
        _or(inputs.accept_uniforms, b),
        _or(inputs.sample_uniforms, b),
        b.token_ids,
        b.token_ids.shape[1],
        b.num_emitted,
        **launch_options(inputs),
        num_warps=NUM_WARPS,
        # The backends agree only if a product and a difference stay two roundings.
        enable_fp_fusion=False,
    )
    return result


def _or(tensor: Tensor | None, b: Buffers) -> Tensor:
    return b.nothing if tensor is None else tensor
