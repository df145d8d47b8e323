"""Rejection sampling as vLLM's V2 runner asks for it, in one kernel instead of seven.

The rules are those of ``ops.rejection``, on what the V2 runner has: target logits that
are processed (temperature, top-k, top-p and the rest), draft logits before temperature
in the requests' slots, placeholders of -1, and no uniform numbers but seeds. Randomness
is drawn by vLLM's own device functions at vLLM's own places (seed, position, token), so
that the tokens are vLLM's: the two differ only where a comparison of float32 numbers
hangs on their last bits, for vLLM compares logarithms.

One program walks over one request's rows and stops at the first rejection, or for block
verification where nothing longer can be accepted. Run in the interpreter and compiled
ahead of time; never run on a GPU.
"""

# Kernels are no Python functions: their arguments have no Python types.
# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from vllm.v1.worker.gpu.sample import gumbel
from vllm.v1.worker.gpu.sample.gumbel import gumbel_noised_argmax, tl_rand32

from vllm_dspark.ops.launch_triton import launch
from vllm_dspark.ops.rejection_parts_triton import target_probability
from vllm_dspark.ops.row_scan_triton import argmax, load, normaliser, weights

BLOCK = 2048  # 4096 spills on sm_80
NUM_WARPS = 8


@triton.jit
def _request_seed(seed, step):
    return seed


# vLLM 0.33 mixes the draft's number into the seed of block verification.
_step_seed = getattr(gumbel, "spec_step_seed", _request_seed)


@triton.jit
def _uniform(
    seed,
    positions,
    k,
    METHOD: tl.constexpr,
):
    """vLLM's uniform number for draft k of a request, in (0, 1]; float64."""
    if METHOD == "block":
        seed = _step_seed(seed, k)
    u = tl_rand32(seed, tl.load(positions + k), includes_zero=False)
    return u.to(tl.float64)


@triton.jit
def _remaining(
    row, q, offsets, vocab, top, scale, inv_t, q_top, q_scale, DENSE: tl.constexpr
):
    """max(0, scale * w - q) of some ids; q is 0 without draft logits."""
    left = weights(row, offsets, vocab, 1.0, top) * scale
    if DENSE:
        left -= weights(q, offsets, vocab, inv_t, q_top) * q_scale
    return tl.maximum(left, 0.0)


@triton.jit
def _mass(row, q, vocab, top, scale, inv_t, q_top, q_scale, BLOCK: tl.constexpr):
    """Sum of max(0, scale * w - q), float64."""
    lanes = tl.arange(0, BLOCK)
    sums = tl.zeros([BLOCK], tl.float64)
    for start in range(0, vocab, BLOCK):
        left = _remaining(
            row, q, start + lanes, vocab, top, scale, inv_t, q_top, q_scale, True
        )
        sums += left.to(tl.float64)
    return tl.sum(sums, 0)


@triton.jit
def _gumbel_draw(
    row,
    q,
    vocab,
    top,
    scale,
    inv_t,
    q_top,
    q_scale,
    x,
    residual,
    seed,
    position,
    t,
    DENSE: tl.constexpr,
    FP64: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The id of the largest noised logit, and that value (-inf: nothing to draw from).

    Of the row, or with `residual` of what is left of it once draft x is rejected.
    """
    lanes = tl.arange(0, BLOCK)
    best = tl.full([], float("-inf"), tl.float64 if FP64 else tl.float32)
    token = tl.zeros([], tl.int64)
    for start in range(0, vocab, BLOCK):
        ids = start + lanes
        z = load(row, ids, vocab)
        if residual:
            if DENSE:
                left = _remaining(
                    row, q, ids, vocab, top, scale, inv_t, q_top, q_scale, True
                )
                z = tl.where(left > 0.0, tl.log(left), float("-inf"))
            else:
                z = tl.where(ids == x, float("-inf"), z)
        value, index = gumbel_noised_argmax(
            z,
            ids,
            ids < vocab,
            seed,
            position,
            t,
            IS_DRAFTING=False,
            USE_FP64=FP64,
            APPLY_TEMPERATURE=False,
        )
        token = tl.where(value > best, (start + index).to(tl.int64), token)
        best = tl.maximum(best, value)
    return token, best


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
    positions += first
    out = sampled + r * width
    accepted = tl.zeros([], tl.int64)
    k = tl.zeros([], tl.int64)
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
        ratio = tl.full([], 1.0, tl.float64)
        accepted_ratio = tl.full([], 1.0, tl.float64)
        more = end > 0
        while more:
            x = tl.load(drafts + k).to(tl.int64)
            if x < 0:  # a placeholder ends the block, as if nothing were drafted there
                end = k
            else:
                row = rows + k * logits_stride
                top, total = normaliser(row, vocab, 1.0, BLOCK)
                scale = (1.0 / total).to(tl.float32)
                px = target_probability(row, x, vocab, 1.0, top, scale)
                qx = 1.0
                if DENSE:
                    q = draft_logits + slot * slot_stride + k * step_stride
                    q_top, q_total = normaliser(q, vocab, inv_t, BLOCK)
                    q_scale = (1.0 / q_total).to(tl.float32)
                    qx = target_probability(q, x, vocab, inv_t, q_top, q_scale)
                if METHOD == "block":
                    if k > 0:
                        if DENSE:
                            rest = _mass(
                                row,
                                q,
                                vocab,
                                top,
                                ratio.to(tl.float32) * scale,
                                inv_t,
                                q_top,
                                q_scale,
                                BLOCK,
                            )
                        else:
                            rest = ratio * (1.0 - px.to(tl.float64))
                        whole = rest + 1.0 - ratio
                        threshold = tl.where(whole > 0.0, rest / whole, 1.0)
                        u = _uniform(seed, positions, k - 1, METHOD)
                        longer = u <= threshold
                        accepted = tl.where(longer, k, accepted)
                        accepted_ratio = tl.where(longer, ratio, accepted_ratio)
                    step = px.to(tl.float64) / qx
                    ratio = tl.where(px > 0.0, tl.minimum(ratio * step, 1.0), 0.0)
                    more = ratio > 0.0
                else:
                    u = _uniform(seed, positions, k, METHOD)
                    more = u * qx < px.to(tl.float64)
                    accepted += more.to(tl.int64)
                k += 1
            more = more & (k < end)
        if METHOD == "block":  # noqa: SIM102 - the next line is decided when run
            if end > 0:
                u = _uniform(seed, positions, end - 1, METHOD)
                accepted = tl.where(u <= ratio, end, accepted)
        k = tl.zeros([], tl.int64)
        while k < accepted:
            tl.store(out + k, tl.load(drafts + k).to(tl.int64))
            k += 1
        row = rows + accepted * logits_stride
        residual = accepted < end
        x = tl.load(drafts + accepted, mask=residual, other=-1).to(tl.int64)
        position = tl.load(positions + accepted)
        q = rows
        top = tl.zeros([], tl.float32)
        scale = tl.full([], 1.0, tl.float32)
        q_top = tl.zeros([], tl.float32)
        q_scale = tl.full([], 1.0, tl.float32)
        if DENSE:
            q = draft_logits + slot * slot_stride + accepted * step_stride
            if residual:
                top, total = normaliser(row, vocab, 1.0, BLOCK)
                scale = accepted_ratio.to(tl.float32) * (1.0 / total).to(tl.float32)
                q_top, q_total = normaliser(q, vocab, inv_t, BLOCK)
                q_scale = (1.0 / q_total).to(tl.float32)
        token = tl.zeros([], tl.int64)
        more = True
        while more:
            token, best = _gumbel_draw(
                row,
                q,
                vocab,
                top,
                scale,
                inv_t,
                q_top,
                q_scale,
                x,
                residual,
                seed,
                position,
                t,
                DENSE,
                FP64,
                BLOCK,
            )
            # p = q up to rounding: nothing is left, the token comes from p.
            more = residual & (best == float("-inf"))
            residual = residual & (best > float("-inf"))
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
