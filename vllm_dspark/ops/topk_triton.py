"""The k largest logits of each row, the lowest ids among equals, in ascending order.

One Triton program per row. The k-th largest value is found eight bits at a time (a
radix select: four passes, two for bfloat16), one more pass writes the ids. Reads
``passes + 1`` times the row, which stays in L2 after the first.

Run in Triton's interpreter and on an H200, and compiled ahead of time.
"""

# Kernels are no Python functions: their arguments have no Python types.
# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"

import triton
import triton.language as tl


@triton.jit
def _ordered(row, offsets, vocab, HALF: tl.constexpr):
    """Integers ordered as the logits are: NaN above all, -0 equal to 0."""
    x = tl.load(row + offsets, mask=offsets < vocab, other=float("-inf"))
    x = x.to(tl.float32)
    x = tl.where(x == 0.0, 0.0, x)
    bits = x.to(tl.int32, bitcast=True)
    keys = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    keys = tl.where(x == x, keys, 0x7FFFFFFF)
    if HALF:
        keys = keys >> 16  # a bfloat16 has nothing below; the order stays
    return keys


@triton.jit
def topk_kernel(
    logits, stride_r, stride_k, positions, vocab, topk, ids,
    PASSES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """ids[row] = the candidates; `topk` is at most `vocab`."""
    i = tl.program_id(0).to(tl.int64)
    row = logits + (i // positions) * stride_r + (i % positions) * stride_k
    lanes = tl.arange(0, BLOCK)
    bins = tl.arange(0, 256)
    # How many of those equal to the prefix so far are wanted.
    need = tl.zeros([], tl.int32) + topk
    prefix = tl.zeros([], tl.int32)
    for p in tl.static_range(PASSES):
        shift = 8 * (PASSES - 1 - p)
        counts = tl.zeros([256], tl.int32)
        for start in range(0, vocab, BLOCK):
            offsets = start + lanes
            keys = _ordered(row, offsets, vocab, PASSES == 2)
            digit = (keys >> shift) & 255
            if p == 0:
                digit = digit ^ 128  # the sign bit: negative keys come first
                counted = offsets < vocab
            else:
                counted = (offsets < vocab) & ((keys >> (shift + 8)) == prefix)
            counts += tl.histogram(digit, 256, mask=counted)
        above = tl.sum(counts, 0) - tl.cumsum(counts, 0)  # in larger bins
        mine = (above < need) & (above + counts >= need)
        found = tl.sum(tl.where(mine, bins, 0), 0)
        need -= tl.sum(tl.where(mine, above, 0), 0)
        if p == 0:
            prefix = (found ^ 128) - 2 * ((found ^ 128) & 128)
        else:
            prefix = prefix * 256 + found
    written = tl.zeros([], tl.int32)
    equals = tl.zeros([], tl.int32)
    for start in range(0, vocab, BLOCK):
        offsets = start + lanes
        keys = _ordered(row, offsets, vocab, PASSES == 2)
        inside = offsets < vocab
        equal = ((keys == prefix) & inside).to(tl.int32)
        rank = equals + tl.cumsum(equal, 0)
        chosen = ((keys > prefix) & inside) | ((equal > 0) & (rank <= need))
        kept = chosen.to(tl.int32)
        place = written + tl.cumsum(kept, 0) - kept
        tl.store(ids + i * topk + place, offsets, mask=chosen)
        written += tl.sum(kept, 0)
        equals += tl.sum(equal, 0)
