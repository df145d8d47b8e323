"""What a program of the rejection kernel does with one row, and a walk over a block.

The acceptance rules are those of ``rejection_reference.py``.
"""

# Kernels are no Python functions: their arguments have no Python types.
# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"

import triton
import triton.language as tl

from vllm_dspark.ops.row_scan_triton import argmax, draw, mass, normaliser

# How drafts were drawn (MODE, a compile-time constant of the kernel).
ONE_HOT = tl.constexpr(0)
DENSE = tl.constexpr(1)
SPARSE = tl.constexpr(2)  # with draft_support


@triton.jit
def draft_probability(
    q, support, size, x, vocab, MODE: tl.constexpr, CHUNK: tl.constexpr
):
    """q(x); x is any id."""
    valid = (x >= 0) & (x < vocab)
    value = tl.where(valid, 1.0, 0.0)
    if MODE == DENSE:
        value = tl.load(q + x, mask=valid, other=0.0)
    if MODE == SPARSE:
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
def scatter(dense, q, support, size, vocab, CLEAR: tl.constexpr, CHUNK: tl.constexpr):
    """Writes a truncated distribution into a row of zeros, or zeros over it."""
    lanes = tl.arange(0, CHUNK)
    for start in range(0, size, CHUNK):
        inside = start + lanes < size
        ids = tl.load(support + start + lanes, mask=inside, other=-1)
        probs = tl.load(q + start + lanes, mask=inside, other=0.0)
        if CLEAR:
            probs = tl.zeros([CHUNK], tl.float32)
        tl.store(dense + ids, probs, mask=inside & (ids >= 0) & (ids < vocab))
    tl.debug_barrier()  # other threads of this program read what these write


@triton.jit
def target_probability(row, x, vocab, inv_t, top, scale):
    """p(x); x is any id."""
    inside = (x >= 0) & (x < vocab)
    z = tl.load(row + tl.where(inside, x, 0)).to(tl.float32) * inv_t - top
    return tl.where(inside & (z >= -87.0), tl.exp(z), 0.0) * scale


@triton.jit
def residual_draw(
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
    """A draw from the residual of draft x, or from p for a bonus row.

    `scale` is that of p in the residual.
    """
    token = vocab
    if drafted:
        if MODE == ONE_HOT:
            rest = mass(row, q, vocab, inv_t, top, scale, x, False, BLOCK)
            if rest > 0:
                token = draw(
                    row, q, vocab, inv_t, top, scale, x, u * rest, False, BLOCK
                )
        else:
            from_q = q
            if MODE == SPARSE:
                scatter(dense, q, ids, size, vocab, False, CHUNK)
                from_q = dense
            rest = mass(row, from_q, vocab, inv_t, top, scale, -1, True, BLOCK)
            if rest > 1e-6:  # RESIDUAL_FLOOR of the reference
                token = draw(
                    row, from_q, vocab, inv_t, top, scale, -1, u * rest, True, BLOCK
                )
    if token >= vocab:
        token = draw(row, q, vocab, inv_t, top, scale, -1, u * total, False, BLOCK)
    return token.to(tl.int64)


@triton.jit
def residual_mass(
    row,
    q,
    ids,
    size,
    dense,
    vocab,
    inv_t,
    top,
    scale,
    ratio,
    px,
    MODE: tl.constexpr,
    BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Sum of max(0, ratio * p - q), float64; `px` is p of the row's draft."""
    if MODE == ONE_HOT:
        rest = ratio * (1.0 - px.to(tl.float64))
    else:
        scaled = ratio.to(tl.float32) * scale
        if MODE == SPARSE:
            scatter(dense, q, ids, size, vocab, False, CHUNK)
            rest = mass(row, dense, vocab, inv_t, top, scaled, -1, True, BLOCK)
            tl.debug_barrier()
            scatter(dense, q, ids, size, vocab, True, CHUNK)
        else:
            rest = mass(row, q, vocab, inv_t, top, scaled, -1, True, BLOCK)
    return rest


@triton.jit
def block_walk(
    rows,
    logits_stride,
    vocab,
    draft_ids,
    length,
    draft_probs,
    probs_stride,
    support,
    support_stride,
    support_size,
    dense,
    inv_t,
    accept_uniforms,
    sample_uniform,
    token_ids,
    MODE: tl.constexpr,
    BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Block verification of one request that is not greedy; how many tokens it emits.

    All pointers are to the request's first element. A row that is no distribution ends
    the block.
    """
    ratio = tl.full([], 1.0, tl.float64)
    accepted_ratio = tl.full([], 1.0, tl.float64)
    accepted = tl.zeros([], tl.int64)
    end = length
    k = tl.zeros([], tl.int64)
    # Nothing longer can be accepted behind a ratio of 0: no further row is read.
    while (k < end) & (ratio > 0.0):
        row = rows + k * logits_stride
        top, total = normaliser(row, vocab, inv_t, BLOCK)
        proper = (top > float("-inf")) & (top < float("inf"))
        end = tl.where(proper, end, k)
        if proper:
            scale = (1.0 / total).to(tl.float32)
            q = draft_probs + k * probs_stride
            ids = support + k * support_stride
            x = tl.load(draft_ids + k).to(tl.int64)
            qx = draft_probability(q, ids, support_size, x, vocab, MODE, CHUNK)
            px = target_probability(row, x, vocab, inv_t, top, scale)
            if k > 0:
                rest = residual_mass(
                    row,
                    q,
                    ids,
                    support_size,
                    dense,
                    vocab,
                    inv_t,
                    top,
                    scale,
                    ratio,
                    px,
                    MODE,
                    BLOCK,
                    CHUNK,
                )
                whole = rest + 1.0 - ratio
                threshold = tl.where(whole > 0.0, rest / whole, 1.0)
                longer = tl.load(accept_uniforms + k - 1) < threshold
                accepted = tl.where(longer, k, accepted)
                accepted_ratio = tl.where(longer, ratio, accepted_ratio)
            step = px.to(tl.float64) / tl.where(qx > 0.0, qx, 1.0).to(tl.float64)
            ratio = tl.where(qx > 0.0, tl.minimum(ratio * step, 1.0), 0.0)
            k += 1
    if end > 0:
        every = tl.load(accept_uniforms + end - 1) < ratio
        accepted = tl.where(every, end, accepted)
    k = tl.zeros([], tl.int64)
    while k < accepted:
        tl.store(token_ids + k, tl.load(draft_ids + k).to(tl.int32))
        k += 1
    row = rows + accepted * logits_stride
    top, total = normaliser(row, vocab, inv_t, BLOCK)
    if (top > float("-inf")) & (top < float("inf")):
        drafted = accepted < end
        scale = (1.0 / total).to(tl.float32)
        token = residual_draw(
            row,
            draft_probs + accepted * probs_stride,
            support + accepted * support_stride,
            support_size,
            dense,
            vocab,
            inv_t,
            top,
            total,
            accepted_ratio.to(tl.float32) * scale,
            tl.load(draft_ids + accepted, mask=drafted, other=-1).to(tl.int64),
            drafted,
            sample_uniform,
            MODE,
            BLOCK,
            CHUNK,
        )
    else:
        token = argmax(row, vocab, BLOCK).to(tl.int64)
    tl.store(token_ids + accepted, token.to(tl.int32))
    return accepted + 1
