"""Device functions of one step of the sequential head, for a group of requests.

A group is ROWS requests that share every tile of weights they read (16 is the least
that a matrix product takes). `store_block` keeps what a block of columns gave;
`merge_argmax` and `draw` choose from all blocks of a group; `latents` turns the tokens
drawn into what the next step multiplies with W2. Sums of products are float32, sums of
weights float64.

Values written by other programs are read past L1 (``.cg``).
"""

# Kernels are no Python functions: their arguments have no Python types.
# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"

import triton
import triton.language as tl

NONE = tl.constexpr(0)
VANILLA = tl.constexpr(1)
GATED = tl.constexpr(2)
RNN = tl.constexpr(3)
# The interpreter of Triton 3.9 multiplies the bit patterns of bfloat16 operands, and
# truncates where hardware rounds to the nearest.
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def sigmoid(x):
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def tanh(x):
    # 1 - 2 / (e^2x + 1) loses the digits of a small x; its odd series has them.
    square = x * x
    series = x * (1.0 - square * (1.0 / 3.0 - square * (2.0 / 15.0)))
    exact = 1.0 - 2.0 / (tl.exp(2.0 * x) + 1.0)
    return tl.where(tl.abs(x) < 0.02, series, exact)


@triton.jit
def _rounded(x):
    """float32 rounded so that truncation to bfloat16 gives the nearest."""
    bits = x.to(tl.int32, bitcast=True)
    return (bits + 0x7FFF + ((bits >> 16) & 1)).to(tl.float32, bitcast=True)


@triton.jit
def weights(z, top):
    """exp(z - top), zero below e^-87; zero where both are -inf."""
    shifted = z - top
    return tl.where(shifted >= -87.0, tl.exp(shifted), 0.0)


@triton.jit
def is_finite(x):
    return (x > float("-inf")) & (x < float("inf"))


@triton.jit
def product(
    x, x_stride, rows, r_mask, w, w_stride, cols, c_mask, SIZE: tl.constexpr,
    CHUNK: tl.constexpr, acc,
):  # fmt: skip
    """acc + x[rows] · w[cols] over SIZE, with float32 products whatever the types.

    A float32 x is the sum of three bfloat16, which bfloat16 weights multiply exactly.
    """
    lanes = tl.arange(0, CHUNK)
    for start in range(0, SIZE, CHUNK):
        inner = start + lanes
        inside = inner < SIZE
        a = tl.load(
            x + rows[:, None] * x_stride + inner[None, :],
            mask=r_mask[:, None] & inside[None, :],
            other=0.0,
        )
        b = tl.load(
            w + cols[None, :] * w_stride + inner[:, None],
            mask=c_mask[None, :] & inside[:, None],
            other=0.0,
        )
        if b.dtype == tl.bfloat16 and not INTERPRETED:
            if a.dtype == tl.float32:
                for _ in tl.static_range(3):
                    piece = a.to(tl.bfloat16)
                    acc = tl.dot(piece, b, acc)
                    a -= piece.to(tl.float32)
            else:
                acc = tl.dot(a, b, acc)
        else:
            a, b = a.to(tl.float32), b.to(tl.float32)
            acc = tl.dot(a, b, acc, input_precision="ieee")
    return acc


@triton.jit
def gathered_product(
    w, w_stride, ids, mask, x, SIZE: tl.constexpr, CHUNK: tl.constexpr
):
    """w[ids] · x for one vector x, ``[len(ids)]``."""
    lanes = tl.arange(0, CHUNK)
    acc = tl.zeros([ids.shape[0]], tl.float32)
    for start in range(0, SIZE, CHUNK):
        inner = start + lanes
        inside = inner < SIZE
        a = tl.load(x + inner, mask=inside, other=0.0).to(tl.float32)
        b = tl.load(
            w + ids[:, None] * w_stride + inner[None, :],
            mask=mask[:, None] & inside[None, :],
            other=0.0,
        )
        acc += tl.sum(b.to(tl.float32) * a[None, :], 1)
    return acc


@triton.jit
def store_block(
    x, rows, r_mask, cols, c_mask, block, t, logits, logits_stride, width, tops, args,
    sums, blocks, RANDOM: tl.constexpr,
):  # fmt: skip
    """Largest logit, its column and the sum of weights of a block ``[rows, cols]``."""
    valid = r_mask[:, None] & c_mask[None, :]
    nan = tl.max(tl.where(valid & (x != x), 1, 0), 1) > 0
    clean = tl.where(valid & (x == x), x, float("-inf"))
    top = tl.max(clean, 1)
    best = tl.where((clean == top[:, None]) & c_mask[None, :], cols[None, :], width - 1)
    at = rows * blocks + block
    tl.store(tops + at, tl.where(nan, float("nan"), top), mask=r_mask)
    tl.store(args + at, tl.min(best, 1), mask=r_mask)
    if RANDOM:
        inv_t = tl.div_rn(1.0, tl.where(t > 0, t, 1.0))
        w = weights(clean * inv_t[:, None], (top * inv_t)[:, None])
        tl.store(sums + at, tl.sum(w.to(tl.float64), 1), mask=r_mask)
        # Rows that are greedy never read their logits again.
        out = logits + rows[:, None] * logits_stride + cols[None, :]
        tl.store(out, x, mask=valid & (t >= 1e-5)[:, None])


@triton.jit
def merge_argmax(
    tops, args, rows, r_mask, blocks, width, ROWS: tl.constexpr, MERGE: tl.constexpr
):
    """Largest logit, its lowest column, and whether no logit was NaN, ``[ROWS]``."""
    lanes = tl.arange(0, MERGE)
    top = tl.full([ROWS], float("-inf"), tl.float32)
    best = tl.zeros([ROWS], tl.int32)
    nan = tl.zeros([ROWS], tl.int32)
    for start in range(0, blocks, MERGE):
        mask = r_mask[:, None] & (start + lanes < blocks)[None, :]
        at = rows[:, None] * blocks + start + lanes[None, :]
        m = tl.load(tops + at, mask=mask, other=float("-inf"), cache_modifier=".cg")
        arg = tl.load(args + at, mask=mask, other=width, cache_modifier=".cg")
        nan = tl.maximum(nan, tl.max(tl.where(m != m, 1, 0), 1))
        m = tl.where(m == m, m, float("-inf"))
        here = tl.max(m, 1)
        first = tl.min(tl.where(m == here[:, None], arg, width - 1), 1)
        best = tl.where((here > top) | (start == 0), first, best)
        top = tl.maximum(top, here)
    return top, best, nan == 0


@triton.jit
def _contributions(
    tops, sums, rows, r_mask, blocks, start, inv_t, ztop, MERGE: tl.constexpr
):
    """Weights of MERGE blocks relative to the row's largest logit, float64."""
    lanes = tl.arange(0, MERGE)
    mask = r_mask[:, None] & (start + lanes < blocks)[None, :]
    at = rows[:, None] * blocks + start + lanes[None, :]
    m = tl.load(tops + at, mask=mask, other=float("-inf"), cache_modifier=".cg")
    s = tl.load(sums + at, mask=mask, other=0.0, cache_modifier=".cg")
    return weights(m * inv_t[:, None], ztop[:, None]).to(tl.float64) * s


@triton.jit
def draw(
    logits, logits_stride, tops, sums, rows, r_mask, blocks, width, inv_t, ztop, u,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, MERGE: tl.constexpr,
):  # fmt: skip
    """Columns by inverse CDF, and the totals: first the block, then within it."""
    total = tl.zeros([ROWS], tl.float64)
    for start in range(0, blocks, MERGE):
        part = _contributions(
            tops, sums, rows, r_mask, blocks, start, inv_t, ztop, MERGE
        )
        total += tl.sum(part, 1)
    goal = u * total
    lanes = tl.arange(0, MERGE)
    reached = tl.zeros([ROWS], tl.float64)
    before = tl.zeros([ROWS], tl.float64)
    block = tl.zeros([ROWS], tl.int32) + blocks
    last = tl.zeros([ROWS], tl.int32)
    for start in range(0, blocks, MERGE):
        part = _contributions(
            tops, sums, rows, r_mask, blocks, start, inv_t, ztop, MERGE
        )
        ids = (start + lanes)[None, :]
        upto = reached[:, None] + tl.cumsum(part, 1)
        hit = (upto > goal[:, None]) & (part > 0)
        first = tl.min(tl.where(hit, ids, blocks), 1)
        new = (block >= blocks) & (first < blocks)
        ahead = tl.sum(tl.where(ids == first[:, None], upto - part, 0.0), 1)
        before = tl.where(new, ahead, before)
        block = tl.where(new, first, block)
        last = tl.maximum(last, tl.max(tl.where(part > 0, ids, 0), 1))
        reached += tl.sum(part, 1)
    # Where rounding left nothing above the goal, the last column of positive weight.
    goal = tl.where(block < blocks, goal - before, float("inf"))
    block = tl.where(block < blocks, block, last)
    cols = block[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    mask = r_mask[:, None] & (cols < width)
    x = tl.load(
        logits + rows[:, None] * logits_stride + cols,
        mask=mask,
        other=float("-inf"),
        cache_modifier=".cg",
    )
    w = weights(x * inv_t[:, None], ztop[:, None])
    hit = (tl.cumsum(w.to(tl.float64), 1) > goal[:, None]) & (w > 0)
    column = tl.min(tl.where(hit, cols, width), 1)
    end = tl.max(tl.where(w > 0, cols, 0), 1)
    return tl.where(column < width, column, end), total


@triton.jit
def latents(
    previous, rows, r_mask, w1, joint, joint_stride, markov_column, joint_hidden,
    state, new_state, latent, HEAD: tl.constexpr, RANK: tl.constexpr,
    CHUNK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Stores what W2 multiplies (paper 3.1); rnn also its next state.

    `joint_hidden` points at the group's share of the product that no draft changes,
    bias included; `markov_column` is where W1[x] begins in the input of `joint`.
    """
    lanes = tl.arange(0, CHUNK)
    outputs: tl.constexpr = 3 * RANK if HEAD == RNN else RANK
    for start in range(0, RANK, CHUNK):
        cols = start + lanes
        c_mask = cols < RANK
        mask = r_mask[:, None] & c_mask[None, :]
        at = rows[:, None] * RANK + cols[None, :]
        markov = w1 + previous[:, None] * RANK + cols[None, :]
        value = tl.load(markov, mask=mask, other=0.0).to(tl.float32)
        if HEAD == GATED:
            part = joint_hidden + rows[:, None] * outputs + cols[None, :]
            gate = tl.load(part, mask=mask, other=0.0)
            gate = product(w1, RANK, previous, r_mask, joint + markov_column,
                           joint_stride, cols, c_mask, RANK, CHUNK, gate)  # fmt: skip
            value = sigmoid(gate) * value
        if HEAD == RNN:
            for part in tl.static_range(3):
                out = part * RANK + cols
                acc = tl.load(
                    joint_hidden + rows[:, None] * outputs + out[None, :],
                    mask=mask,
                    other=0.0,
                )
                acc = product(state, RANK, rows, r_mask, joint, joint_stride, out,
                              c_mask, RANK, CHUNK, acc)  # fmt: skip
                acc = product(w1, RANK, previous, r_mask, joint + markov_column,
                              joint_stride, out, c_mask, RANK, CHUNK, acc)  # fmt: skip
                if part == 0:
                    gate = sigmoid(acc)
                elif part == 1:
                    old = tl.load(state + at, mask=mask, other=0.0)
                    new = gate * old + (1.0 - gate) * tanh(acc)
                    tl.store(new_state + at, new, mask=mask)
                else:
                    value = tanh(acc)
        if latent.dtype.element_ty == tl.bfloat16 and INTERPRETED:
            value = _rounded(value)
        tl.store(latent + at, value.to(latent.dtype.element_ty), mask=mask)


@triton.jit
def markov_confidence(
    previous,
    r_mask,
    w1,
    weight,
    RANK: tl.constexpr,
    CHUNK: tl.constexpr,
    ROWS: tl.constexpr,
):
    """W1[x]'s share of the confidence's logit, ``[ROWS]``."""
    lanes = tl.arange(0, CHUNK)
    acc = tl.zeros([ROWS], tl.float32)
    for start in range(0, RANK, CHUNK):
        cols = start + lanes
        inside = cols < RANK
        w = tl.load(weight + cols, mask=inside, other=0.0)
        e = tl.load(
            w1 + previous[:, None] * RANK + cols[None, :],
            mask=r_mask[:, None] & inside[None, :],
            other=0.0,
        )
        acc += tl.sum(e.to(tl.float32) * w[None, :], 1)
    return acc
