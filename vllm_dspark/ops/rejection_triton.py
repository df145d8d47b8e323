"""`rejection_sample` on the GPU: one Triton program per request.

A program walks over its request's rows and stops at the first rejection. A row is read
in blocks: once for a greedy choice, twice for the maximum and the normaliser of a
random one, and once more where a token is drawn. With TRITON_INTERPRET=1, set before
triton is imported, the same kernel runs on CPU tensors.
"""

from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from vllm_dspark.ops.rejection import RejectionInputs, RejectionResult

BLOCK = 4096
NUM_WARPS = 8
# How drafts were drawn; a compile-time constant of the kernel.
ONE_HOT, DENSE, SPARSE = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)


@triton.jit
def _load(row, offsets, vocab):  # type: ignore[no-untyped-def]
    return tl.load(row + offsets, mask=offsets < vocab, other=float("-inf")).to(
        tl.float32
    )


@triton.jit
def _weights(row, offsets, vocab, inv_t, top):  # type: ignore[no-untyped-def]
    shifted = _load(row, offsets, vocab) * inv_t - top
    return tl.where(shifted >= -87.0, tl.exp(shifted), 0.0)


@triton.jit
def _argmax(row, vocab, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """Index of the largest logit, the lowest among equals."""
    lanes = tl.arange(0, BLOCK)
    best = tl.full([BLOCK], float("-inf"), tl.float32)
    index = tl.zeros([BLOCK], tl.int32)
    for start in range(0, vocab, BLOCK):
        x = _load(row, start + lanes, vocab)
        above = x > best
        best = tl.where(above, x, best)
        index = tl.where(above, start + lanes, index)
    return tl.min(tl.where(best == tl.max(best, 0), index, vocab - 1), 0)


@triton.jit
def _normaliser(row, vocab, inv_t, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """Largest scaled logit, and the float64 sum of the weights."""
    lanes = tl.arange(0, BLOCK)
    tops = tl.full([BLOCK], float("-inf"), tl.float32)
    for start in range(0, vocab, BLOCK):
        tops = tl.maximum(tops, _load(row, start + lanes, vocab) * inv_t)
    top = tl.max(tops, 0)
    sums = tl.zeros([BLOCK], tl.float64)
    for start in range(0, vocab, BLOCK):
        sums += _weights(row, start + lanes, vocab, inv_t, top).to(tl.float64)
    return top, tl.sum(sums, 0)


@triton.jit
def _remaining(  # type: ignore[no-untyped-def]
    row, q, offsets, vocab, inv_t, top, scale, removed, SUBTRACT: tl.constexpr
):
    """What a draw is made from: p, p without one id, or max(0, p - q)."""
    w = _weights(row, offsets, vocab, inv_t, top)
    if SUBTRACT:
        drafted = tl.load(q + offsets, mask=offsets < vocab, other=0.0)
        w = tl.maximum(w * scale - drafted, 0.0)
    return tl.where(offsets == removed, 0.0, w)


@triton.jit
def _mass(  # type: ignore[no-untyped-def]
    row,
    q,
    vocab,
    inv_t,
    top,
    scale,
    removed,
    SUBTRACT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    lanes = tl.arange(0, BLOCK)
    sums = tl.zeros([BLOCK], tl.float64)
    for start in range(0, vocab, BLOCK):
        w = _remaining(
            row, q, start + lanes, vocab, inv_t, top, scale, removed, SUBTRACT
        )
        sums += w.to(tl.float64)
    return tl.sum(sums, 0)


@triton.jit
def _draw(  # type: ignore[no-untyped-def]
    row,
    q,
    vocab,
    inv_t,
    top,
    scale,
    removed,
    target,
    SUBTRACT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """First id of positive weight whose cumulative weight exceeds `target`."""
    lanes = tl.arange(0, BLOCK)
    before = tl.zeros([], tl.float64)
    found = vocab
    last = 0  # the last id of positive weight, should rounding leave nothing above
    start = 0
    while (start < vocab) & (found >= vocab):
        offsets = start + lanes
        w = _remaining(row, q, offsets, vocab, inv_t, top, scale, removed, SUBTRACT)
        sums = before + tl.cumsum(w.to(tl.float64), 0)
        found = tl.min(tl.where((sums > target) & (w > 0), offsets, vocab), 0)
        last = tl.maximum(last, tl.max(tl.where(w > 0, offsets, 0), 0))
        before += tl.sum(w.to(tl.float64), 0)
        start += BLOCK
    return tl.where(found < vocab, found, last)


@triton.jit
def _draft_probability(  # type: ignore[no-untyped-def]
    q, support, size, x, vocab, MODE: tl.constexpr, CHUNK: tl.constexpr
):
    """q(x); x is any id."""
    valid = (x >= 0) & (x < vocab)
    value = tl.where(valid, 1.0, 0.0)
    if MODE == 1:
        value = tl.load(q + x, mask=valid, other=0.0)
    if MODE == 2:
        value = 0.0
        lanes = tl.arange(0, CHUNK)
        # A bonus row has no support to read.
        size = tl.where(valid, size, 0)
        for start in range(0, size, CHUNK):
            inside = start + lanes < size
            ids = tl.load(support + start + lanes, mask=inside, other=-1)
            probs = tl.load(q + start + lanes, mask=inside, other=0.0)
            value += tl.sum(tl.where(ids == x, probs, 0.0), 0)
    return value


@triton.jit
def _scatter(  # type: ignore[no-untyped-def]
    dense, q, support, size, vocab, CHUNK: tl.constexpr
):
    """Writes a truncated distribution into a row of zeros."""
    lanes = tl.arange(0, CHUNK)
    for start in range(0, size, CHUNK):
        inside = start + lanes < size
        ids = tl.load(support + start + lanes, mask=inside, other=-1)
        probs = tl.load(q + start + lanes, mask=inside, other=0.0)
        tl.store(dense + ids, probs, mask=inside & (ids >= 0) & (ids < vocab))
    tl.debug_barrier()  # other threads of this program read what these wrote


@triton.jit
def rejection_kernel(  # type: ignore[no-untyped-def]
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
    more = True
    while more:
        row = logits + (first + r + k) * logits_stride
        drafted = k < length
        i = tl.where(drafted, first + k, 0)
        x = tl.load(draft_ids + i, mask=drafted, other=-1).to(tl.int64)
        token = tl.zeros([], tl.int64)
        proper = False
        if RANDOM:  # noqa: SIM102 - decided when compiling, the next line when run
            if not greedy:
                inv_t = tl.div_rn(1.0, t)
                top, total = _normaliser(row, vocab, inv_t, BLOCK)
                proper = (top > float("-inf")) & (top < float("inf"))
                if proper:
                    scale = (1.0 / total).to(tl.float32)
                    q = draft_probs + i * probs_stride
                    ids = support + i * support_stride
                    u = tl.load(accept_uniforms + i, mask=drafted, other=0.0)
                    qx = _draft_probability(q, ids, support_size, x, vocab, MODE, CHUNK)
                    inside = (x >= 0) & (x < vocab)
                    at = tl.where(inside, x, 0)
                    z = tl.load(row + at).to(tl.float32) * inv_t - top
                    px = tl.where(z >= -87.0, tl.exp(z), 0.0) * scale
                    more = drafted & inside & (qx > 0)
                    more = more & (u * qx.to(tl.float64) < px.to(tl.float64))
                    token = x
                    if not more:
                        u = tl.load(sample_uniforms + r)
                        token = _residual_draw(
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
            token = _argmax(row, vocab, BLOCK).to(tl.int64)
            more = drafted & (token == x)
        tl.store(token_ids + r * width + k, token.to(tl.int32))
        k += 1
    tl.store(num_emitted + r, k.to(tl.int32))


@triton.jit
def _residual_draw(  # type: ignore[no-untyped-def]
    row,
    q,
    ids,
    size,
    dense,
    vocab,
    inv_t,
    top,
    total,
    scale,
    x,
    drafted,
    u,
    MODE: tl.constexpr,
    BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """A draw from the residual of draft x, or from p for a bonus row."""
    token = vocab
    if drafted:
        if MODE == 0:
            mass = _mass(row, q, vocab, inv_t, top, scale, x, False, BLOCK)
            if mass > 0:
                token = _draw(
                    row, q, vocab, inv_t, top, scale, x, u * mass, False, BLOCK
                )
        else:
            from_q = q
            if MODE == 2:
                _scatter(dense, q, ids, size, vocab, CHUNK)
                from_q = dense
            mass = _mass(row, from_q, vocab, inv_t, top, scale, -1, True, BLOCK)
            if mass > 1e-6:  # RESIDUAL_FLOOR of the reference
                token = _draw(
                    row, from_q, vocab, inv_t, top, scale, -1, u * mass, True, BLOCK
                )
    if token >= vocab:
        token = _draw(row, q, vocab, inv_t, top, scale, -1, u * total, False, BLOCK)
    return token.to(tl.int64)


def checked_run(logits: Tensor) -> Callable[[RejectionInputs], RejectionResult]:
    """`run`, or RuntimeError unless the tensors are on a GPU or interpreted."""
    interpreted = not isinstance(rejection_kernel, triton.runtime.JITFunction)
    if not logits.is_cuda and not interpreted:
        raise RuntimeError(
            f"backend 'triton' needs CUDA tensors, got {logits.device}; use 'auto', or "
            "set TRITON_INTERPRET=1 before triton is imported to interpret it"
        )
    return run


def launch_options(inputs: RejectionInputs, block: int = BLOCK) -> dict[str, Any]:
    """Compile-time constants for these inputs."""
    mode = 0
    if inputs.draft_probs is not None:
        mode = 1 if inputs.draft_support is None else 2
    return {
        "MODE": mode,
        "RANDOM": inputs.temperature is not None,
        "BLOCK": block,
        "CHUNK": min(block, 1024),
    }


def run(inputs: RejectionInputs) -> RejectionResult:
    """Launches one program per request."""
    token_ids, num_emitted = inputs.outputs()
    token_ids.fill_(-1)
    num, vocab = len(inputs.lengths), inputs.target_logits.shape[1]
    if num == 0:
        return RejectionResult(token_ids, num_emitted, "triton")
    counts, q, support = (
        inputs.num_draft_tokens,
        inputs.draft_probs,
        inputs.draft_support,
    )
    device = inputs.target_logits.device
    unused = torch.empty(1, device=device)  # a pointer the kernel never follows
    shared = support is None or support.shape[0] == 1
    rejection_kernel[(num,)](
        inputs.target_logits,
        inputs.target_logits.stride(0),
        vocab,
        inputs.draft_token_ids,
        counts.cumsum(0),
        counts,
        unused if q is None else q,
        0 if q is None else q.stride(0),
        unused if support is None else support,
        0 if support is None or shared else support.stride(0),
        0 if support is None else support.shape[1],
        unused if support is None else torch.zeros((num, vocab), device=device),
        _or(inputs.temperature, unused),
        _or(inputs.accept_uniforms, unused.double()),
        _or(inputs.sample_uniforms, unused.double()),
        token_ids,
        token_ids.shape[1],
        num_emitted,
        **launch_options(inputs),
        num_warps=NUM_WARPS,
        # The backends agree only if a product and a difference stay two roundings.
        enable_fp_fusion=False,
    )
    return RejectionResult(token_ids, num_emitted, "triton")


def _or(tensor: Tensor | None, default: Tensor) -> Tensor:
    return default if tensor is None else tensor
