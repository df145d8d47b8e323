"""Rejection sampling as vLLM's V2 runner asks for it, in one kernel instead of six.

The rules are those of ``ops.rejection``, on what the V2 runner has: target logits that
are processed (temperature, top-k, top-p and the rest), draft logits before temperature
in the requests' slots, placeholders of -1, and no uniform numbers but seeds. Randomness
is drawn by vLLM's own device functions at vLLM's own places (seed, position, token), so
that the tokens are vLLM's: the two differ only where a comparison of float32 numbers
hangs on their last bits, for vLLM compares logarithms.

One program walks over one request's rows and stops at the first rejection, or for block
verification where nothing longer can be accepted. Run in the interpreter, compiled
ahead of time, and on an H200 (``results/gpu-h200.json``): tokens as vLLM's, and slower
than vLLM's kernels where many requests or a large vocabulary would need more than one
program a request.
"""

# Kernels are no Python functions: their arguments have no Python types.
# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from vllm_dspark.integration.v2.rejection_parts_triton import last_token, walk
from vllm_dspark.ops.launch_triton import launch
from vllm_dspark.ops.row_scan_triton import argmax

BLOCK = 2048  # 4096 spills on sm_80
NUM_WARPS = 8


@triton.jit
def v2_rejection_kernel(
    logits,
    logits_stride,
    vocab,
    draft_ids,
    starts,
    slots,
    draft_logits,
    slot_stride,
    step_stride,
    temperature,
    seeds,
    positions,
    sampled,
    width,
    num_sampled,
    DENSE: tl.constexpr,
    METHOD: tl.constexpr,
    FP64: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Verifies one request. The draft of a row is the next row's `draft_ids`."""
    r = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots + r).to(tl.int64)
    first = tl.load(starts + r).to(tl.int64)
    end = tl.load(starts + r + 1).to(tl.int64) - first - 1
    t = tl.load(temperature + slot).to(tl.float32)
    seed = tl.load(seeds + slot)
    rows = logits + first * logits_stride
    drafts = draft_ids + first + 1
    draft_rows = draft_logits + slot * slot_stride
    positions += first
    out = sampled + r * width
    accepted = tl.zeros([], tl.int64)
    if t == 0.0:
        token = argmax(rows, vocab, BLOCK).to(tl.int64)
        x = tl.load(drafts, mask=end > 0, other=-1).to(tl.int64)
        while (accepted < end) & (token == x):
            tl.store(out + accepted, token)
            accepted += 1
            token = argmax(rows + accepted * logits_stride, vocab, BLOCK).to(tl.int64)
            x = tl.load(drafts + accepted, mask=accepted < end, other=-1).to(tl.int64)
    else:
        inv_t = tl.div_rn(1.0, t)
        accepted, ratio, end = walk(
            rows,
            logits_stride,
            vocab,
            drafts,
            end,
            draft_rows,
            step_stride,
            inv_t,
            seed,
            positions,
            DENSE,
            METHOD,
            BLOCK,
        )
        k = tl.zeros([], tl.int64)
        while k < accepted:
            tl.store(out + k, tl.load(drafts + k).to(tl.int64))
            k += 1
        token = last_token(
            rows + accepted * logits_stride,
            draft_rows + accepted * step_stride,
            vocab,
            inv_t,
            ratio,
            tl.load(drafts + accepted, mask=accepted < end, other=-1).to(tl.int64),
            accepted < end,
            seed,
            tl.load(positions + accepted),
            t,
            DENSE,
            FP64,
            BLOCK,
        )
    tl.store(out + accepted, token)
    tl.store(num_sampled + r, (accepted + 1).to(tl.int32))


@dataclass(frozen=True)
class V2Inputs:
    """What vLLM's ``rejection_sample`` gets; L rows of R requests in M slots.

    Attributes:
        target_logits: ``[L, V]`` processed, any float; rows may be strided.
        draft_logits: ``[M, K, >= V]`` before temperature; None: one-hot drafts.
        draft_sampled: ``[L]`` ids; draft k of a request is in its row k + 1. -1: none.
        cu_num_logits: ``[R + 1]``, where each request's rows begin.
        pos: ``[L]`` positions.
        idx_mapping: ``[R]`` slots.
        temperature, seed: ``[M]``; temperature 0 is greedy.
        num_speculative_steps: K.
        method: standard or block.
        use_fp64: of the noise.
    """

    target_logits: Tensor
    draft_logits: Tensor | None
    draft_sampled: Tensor
    cu_num_logits: Tensor
    pos: Tensor
    idx_mapping: Tensor
    temperature: Tensor
    seed: Tensor
    num_speculative_steps: int
    method: str
    use_fp64: bool


def launch_options(inputs: V2Inputs) -> dict[str, Any]:
    """Compile-time constants for these inputs."""
    return {
        "DENSE": inputs.draft_logits is not None,
        "METHOD": inputs.method,
        "FP64": inputs.use_fp64,
        "BLOCK": BLOCK,
    }


def rejection_sample(inputs: V2Inputs) -> tuple[Tensor, Tensor]:
    """Tokens ``[R, K + 1]`` int64, padded with -1, and how many of them ``[R]`` int32.

    Reads no value on the host.
    """
    target, draft = inputs.target_logits, inputs.draft_logits
    num = inputs.cu_num_logits.shape[0] - 1
    width = inputs.num_speculative_steps + 1
    sampled = inputs.seed.new_full((num, width), -1)
    num_sampled = inputs.seed.new_empty(num, dtype=torch.int32)
    vocab = target.shape[1] if draft is None else min(target.shape[1], draft.shape[2])
    launch(
        v2_rejection_kernel,
        (num,),
        target,
        target.stride(0),
        vocab,
        inputs.draft_sampled,
        inputs.cu_num_logits,
        inputs.idx_mapping,
        target if draft is None else draft,
        0 if draft is None else draft.stride(0),
        0 if draft is None else draft.stride(1),
        inputs.temperature,
        inputs.seed,
        inputs.pos,
        sampled,
        width,
        num_sampled,
        **launch_options(inputs),
        num_warps=NUM_WARPS,
    )
    return sampled, num_sampled
