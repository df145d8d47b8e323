"""One row of logits as a distribution, in blocks: the device functions of the op.

The Triton sibling of csrc/row_scan.cpp: argmax, normaliser, and draws by inverse CDF
from p, from p without one id, or from max(0, p - q). Sums are float64.
"""

# Kernels are no Python functions: their arguments have no Python types.
# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"

import triton
import triton.language as tl


@triton.jit
def load(row, offsets, vocab):
    return tl.load(row + offsets, mask=offsets < vocab, other=float("-inf")).to(
        tl.float32
    )


@triton.jit
def weights(row, offsets, vocab, inv_t, top):
    shifted = load(row, offsets, vocab) * inv_t - top
    return tl.where(shifted >= -87.0, tl.exp(shifted), 0.0)


@triton.jit
def argmax(row, vocab, BLOCK: tl.constexpr):
    """Index of the largest logit, the lowest among equals."""
    lanes = tl.arange(0, BLOCK)
    best = tl.full([BLOCK], float("-inf"), tl.float32)
    index = tl.zeros([BLOCK], tl.int32)
    for start in range(0, vocab, BLOCK):
        x = load(row, start + lanes, vocab)
        above = x > best
        best = tl.where(above, x, best)
        index = tl.where(above, start + lanes, index)
    return tl.min(tl.where(best == tl.max(best, 0), index, vocab - 1), 0)


@triton.jit
def normaliser(row, vocab, inv_t, BLOCK: tl.constexpr):
    """Largest scaled logit, and the float64 sum of the weights."""
    lanes = tl.arange(0, BLOCK)
    tops = tl.full([BLOCK], float("-inf"), tl.float32)
    for start in range(0, vocab, BLOCK):
        tops = tl.maximum(tops, load(row, start + lanes, vocab) * inv_t)
    top = tl.max(tops, 0)
    sums = tl.zeros([BLOCK], tl.float64)
    for start in range(0, vocab, BLOCK):
        sums += weights(row, start + lanes, vocab, inv_t, top).to(tl.float64)
    return top, tl.sum(sums, 0)


@triton.jit
def remaining(
    row, q, offsets, vocab, inv_t, top, scale, removed, SUBTRACT: tl.constexpr
):
    """What a draw is made from: p, p without one id, or max(0, p - q)."""
    w = weights(row, offsets, vocab, inv_t, top)
    if SUBTRACT:
        drafted = tl.load(q + offsets, mask=offsets < vocab, other=0.0)
        w = tl.maximum(w * scale - drafted, 0.0)
    return tl.where(offsets == removed, 0.0, w)


@triton.jit
def mass(
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
        w = remaining(
            row, q, start + lanes, vocab, inv_t, top, scale, removed, SUBTRACT
        )
        sums += w.to(tl.float64)
    return tl.sum(sums, 0)


@triton.jit
def draw(
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
        w = remaining(row, q, offsets, vocab, inv_t, top, scale, removed, SUBTRACT)
        sums = before + tl.cumsum(w.to(tl.float64), 0)
        found = tl.min(tl.where((sums > target) & (w > 0), offsets, vocab), 0)
        last = tl.maximum(last, tl.max(tl.where(w > 0, offsets, 0), 0))
        before += tl.sum(w.to(tl.float64), 0)
        start += BLOCK
    return tl.where(found < vocab, found, last)
