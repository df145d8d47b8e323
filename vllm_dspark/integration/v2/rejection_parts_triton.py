"""What a program of the V2 rejection kernel does: walk over drafts, draw a token."""

# Kernels are no Python functions: their arguments have no Python types.
# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"

import triton
import triton.language as tl
from vllm.v1.worker.gpu.sample import gumbel
from vllm.v1.worker.gpu.sample.gumbel import gumbel_noised_argmax, tl_rand32

from vllm_dspark.ops.rejection_parts_triton import target_probability
from vllm_dspark.ops.row_scan_triton import load, normaliser, weights


@triton.jit
def _request_seed(seed, step):
    return seed


# vLLM 0.33 mixes the draft's number into the seed of block verification.
_step_seed = getattr(gumbel, "spec_step_seed", _request_seed)


@triton.jit
def _uniform(seed, positions, k, METHOD: tl.constexpr):
    """vLLM's uniform number for draft k of a request, in (0, 1]; float64."""
    if METHOD == "block":
        seed = _step_seed(seed, k)
    u = tl_rand32(seed, tl.load(positions + k), includes_zero=False)
    return u.to(tl.float64)


@triton.jit
def _remaining(row, q, offsets, vocab, top, scale, inv_t, q_top, q_scale):
    """max(0, scale * w - q) of some ids."""
    p = weights(row, offsets, vocab, 1.0, top) * scale
    return tl.maximum(p - weights(q, offsets, vocab, inv_t, q_top) * q_scale, 0.0)


@triton.jit
def _mass(row, q, vocab, top, scale, inv_t, q_top, q_scale, BLOCK: tl.constexpr):
    """Sum of max(0, scale * w - q), float64."""
    lanes = tl.arange(0, BLOCK)
    sums = tl.zeros([BLOCK], tl.float64)
    for start in range(0, vocab, BLOCK):
        left = _remaining(
            row, q, start + lanes, vocab, top, scale, inv_t, q_top, q_scale
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
                left = _remaining(row, q, ids, vocab, top, scale, inv_t, q_top, q_scale)
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
def _threshold(
    row,
    q,
    vocab,
    top,
    scale,
    inv_t,
    q_top,
    q_scale,
    ratio,
    px,
    DENSE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Up to which uniform number the drafts before a row may be accepted, float64."""
    if DENSE:
        scaled = ratio.to(tl.float32) * scale
        rest = _mass(row, q, vocab, top, scaled, inv_t, q_top, q_scale, BLOCK)
    else:
        rest = ratio * (1.0 - px.to(tl.float64))
    whole = rest + 1.0 - ratio
    return tl.where(whole > 0.0, rest / whole, 1.0)


@triton.jit
def walk(
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
    DENSE: tl.constexpr,
    METHOD: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Verifies the drafts of one request that is not greedy, `end` of them.

    All pointers are to the request's first element. Returns how many are accepted, the
    ratio there, and how many there were: a placeholder ends them, as if nothing were
    drafted behind it.
    """
    accepted = tl.zeros([], tl.int64)
    k = tl.zeros([], tl.int64)
    ratio = tl.full([], 1.0, tl.float64)
    accepted_ratio = tl.full([], 1.0, tl.float64)
    more = end > 0
    while more:
        x = tl.load(drafts + k).to(tl.int64)
        if x < 0:
            end = k
        else:
            row = rows + k * logits_stride
            top, total = normaliser(row, vocab, 1.0, BLOCK)
            scale = (1.0 / total).to(tl.float32)
            px = target_probability(row, x, vocab, 1.0, top, scale)
            q = draft_rows + k * step_stride
            q_top = 0.0
            q_scale = 1.0
            qx = 1.0
            if DENSE:
                q_top, q_total = normaliser(q, vocab, inv_t, BLOCK)
                q_scale = (1.0 / q_total).to(tl.float32)
                qx = target_probability(q, x, vocab, inv_t, q_top, q_scale)
            if METHOD == "block":
                if k > 0:
                    u = _uniform(seed, positions, k - 1, METHOD)
                    longer = u <= _threshold(
                        row,
                        q,
                        vocab,
                        top,
                        scale,
                        inv_t,
                        q_top,
                        q_scale,
                        ratio,
                        px,
                        DENSE,
                        BLOCK,
                    )
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
    return accepted, accepted_ratio, end


@triton.jit
def last_token(
    row,
    q,
    vocab,
    inv_t,
    ratio,
    x,
    residual,
    seed,
    position,
    t,
    DENSE: tl.constexpr,
    FP64: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A draw from the row, or with `residual` from what is left of it."""
    top = tl.zeros([], tl.float32)
    scale = tl.full([], 1.0, tl.float32)
    q_top = tl.zeros([], tl.float32)
    q_scale = tl.full([], 1.0, tl.float32)
    if DENSE:  # noqa: SIM102 - the next line is decided when run
        if residual:
            top, total = normaliser(row, vocab, 1.0, BLOCK)
            scale = ratio.to(tl.float32) * (1.0 / total).to(tl.float32)
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
    return token
