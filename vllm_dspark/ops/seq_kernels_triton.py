"""The kernels of `sequential_triton`: before a block, for each step of it, and after.

See there for what is computed where, and `seq_parts_triton` for the parts.
"""

# Kernels are no Python functions: their arguments have no Python types.
# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"

import triton
import triton.language as tl

from vllm_dspark.ops import seq_parts_triton as step


@triton.jit(do_not_specialize=["requests", "positions"])
def project_kernel(
    hidden, stride_r, stride_k, requests, positions, joint, joint_stride, column, bias,
    out, outputs, WIDTH: tl.constexpr, ROWS: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """out[k, r] = joint[:, column:] · h[r, k] + bias, float32."""
    i = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    r_mask = i < requests * positions
    at = (i // positions).to(tl.int64) * stride_r + (i % positions) * stride_k
    cols = tl.program_id(1) * CHUNK + tl.arange(0, CHUNK)
    c_mask = cols < outputs
    acc = tl.zeros([ROWS, CHUNK], tl.float32)
    acc = step.product(hidden, 1, at, r_mask, joint + column, joint_stride, cols,
                       c_mask, WIDTH, CHUNK, acc)  # fmt: skip
    acc += tl.load(bias + cols, mask=c_mask, other=0.0).to(tl.float32)[None, :]
    row = (i % positions) * requests + i // positions
    store = out + row[:, None].to(tl.int64) * outputs + cols[None, :]
    tl.store(store, acc, mask=r_mask[:, None] & c_mask[None, :])


@triton.jit
def _advance(
    previous, rows, r_mask, requests, k, positions, w1, joint, joint_stride,
    markov_column, joint_hidden, states, latent, hidden_logits, markov_weight,
    confidences, survivals, finite, HEAD: tl.constexpr, SCORED: tl.constexpr,
    RANK: tl.constexpr, ROWS: tl.constexpr, CHUNK: tl.constexpr,
    JOINT: tl.constexpr,
):  # fmt: skip
    """What step k needs to know of the tokens before it, and their c_k and a_k."""
    if HEAD != step.NONE:
        outputs: tl.constexpr = 3 * RANK if HEAD == step.RNN else RANK
        size = requests.to(tl.int64) * RANK
        step.latents(
            previous, rows, r_mask, w1, joint, joint_stride, markov_column,
            joint_hidden + k.to(tl.int64) * requests * outputs,
            states + (k % 2) * size, states + ((k + 1) % 2) * size, latent,
            HEAD, RANK, JOINT, ROWS,
        )  # fmt: skip
    if SCORED > 0:
        at = rows * positions + k
        x = tl.load(hidden_logits + k * requests + rows, mask=r_mask, other=0.0)
        if SCORED == 2:
            x += step.markov_confidence(
                previous, r_mask, w1, markov_weight, RANK, CHUNK, ROWS
            )
        c = step.sigmoid(x)
        before = tl.load(survivals + tl.maximum(at - 1, 0), mask=r_mask, other=1.0)
        before = tl.where(k > 0, before, 1.0)
        tl.store(confidences + at, c, mask=r_mask)
        tl.store(survivals + at, before * c, mask=r_mask)
        tl.store(finite + rows, tl.zeros([ROWS], tl.int1), mask=r_mask & (c != c))


@triton.jit(do_not_specialize=["requests", "positions"])
def begin_kernel(
    anchors, requests, positions, w1, joint, joint_stride, markov_column, joint_hidden,
    states, latent, hidden_logits, markov_weight, confidences, survivals, finite,
    HEAD: tl.constexpr, SCORED: tl.constexpr, RANK: tl.constexpr, ROWS: tl.constexpr,
    CHUNK: tl.constexpr, JOINT: tl.constexpr,
):  # fmt: skip
    """Everything that the first step needs of the anchors."""
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    r_mask = rows < requests
    zero = tl.zeros([], tl.int32)
    if HEAD == step.RNN:
        lanes = tl.arange(0, CHUNK)
        for start in range(0, RANK, CHUNK):
            cols = start + lanes
            mask = r_mask[:, None] & (cols < RANK)[None, :]
            at = states + rows[:, None] * RANK + cols[None, :]
            tl.store(at, tl.zeros([ROWS, CHUNK], tl.float32), mask=mask)
        tl.debug_barrier()  # other threads of this program read what these wrote
    tl.store(finite + rows, tl.full([ROWS], 1, tl.int1), mask=r_mask)
    tl.debug_barrier()
    x = tl.load(anchors + rows, mask=r_mask, other=0).to(tl.int64)
    _advance(
        x, rows, r_mask, requests, zero, positions, w1, joint, joint_stride,
        markov_column, joint_hidden, states, latent, hidden_logits, markov_weight,
        confidences, survivals, finite, HEAD, SCORED, RANK, ROWS, CHUNK, JOINT,
    )  # fmt: skip


@triton.jit(do_not_specialize=["k", "requests", "positions"])
def step_kernel(
    k, base, stride_r, stride_k, requests, positions, width, w2, candidates,
    draft_to_target, temperature, uniforms, logits, logits_stride_r, logits_stride_k,
    tops, args, sums, arrivals, token_ids, picks, row_tops, row_scales,
    w1, joint, joint_stride, markov_column, joint_hidden, states, latent, hidden_logits,
    markov_weight, confidences, survivals, finite,
    HEAD: tl.constexpr, SCORED: tl.constexpr, RANDOM: tl.constexpr, TOPK: tl.constexpr,
    REDUCED: tl.constexpr, RANK: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
    CHUNK: tl.constexpr, JOINT: tl.constexpr, MERGE: tl.constexpr,
):  # fmt: skip
    """Step k of all requests. Grid: (blocks, groups), with TOPK (blocks, requests)."""
    logits += k * logits_stride_k
    blocks = tl.num_programs(0)
    block = tl.program_id(0)
    cols = block * BLOCK + tl.arange(0, BLOCK)
    c_mask = cols < width
    group = tl.program_id(1).to(tl.int64)
    expected = blocks
    if TOPK:
        mine = group + tl.arange(0, 1)
        group = group // ROWS
        expected = blocks * tl.minimum(ROWS, requests - group * ROWS).to(tl.int32)
    else:
        mine = group * ROWS + tl.arange(0, ROWS)
    m_mask = mine < requests
    t = tl.zeros_like(mine).to(tl.float32)
    if RANDOM:
        t = tl.load(temperature + mine, mask=m_mask, other=0.0)
    if TOPK:
        r = tl.program_id(1).to(tl.int64)
        at = candidates + (r * positions + k) * width + cols
        ids = tl.load(at, mask=c_mask, other=0).to(tl.int64)
        x = tl.load(base + r * stride_r + k * stride_k + ids, mask=c_mask, other=0.0)
        x = x.to(tl.float32)
        if HEAD != step.NONE:
            x += step.gathered_product(
                w2, RANK, ids, c_mask, latent + r * RANK, RANK, CHUNK
            )
        x = x[None, :]
    else:
        at = base + mine[:, None] * stride_r + k * stride_k + cols[None, :]
        x = tl.load(at, mask=m_mask[:, None] & c_mask[None, :], other=0.0)
        x = x.to(tl.float32)
        if HEAD != step.NONE:
            bias = tl.zeros([ROWS, BLOCK], tl.float32)
            x += step.product(latent, RANK, mine, m_mask, w2, RANK, cols.to(tl.int64),
                              c_mask, RANK, CHUNK, bias)  # fmt: skip
    step.store_block(x, mine, m_mask, cols, c_mask, block, t, logits, logits_stride_r,
                     width, tops, args, sums, blocks, RANDOM)  # fmt: skip
    tl.debug_barrier()  # all threads have stored before one of them says so
    arrived = tl.atomic_add(arrivals + group, 1, sem="acq_rel")
    if arrived == expected - 1:
        tl.store(arrivals + group, 0)  # for the next step
        rows = group * ROWS + tl.arange(0, ROWS)
        r_mask = rows < requests
        top, pick, clean = step.merge_argmax(
            tops, args, rows, r_mask, blocks, width, ROWS, MERGE
        )
        place = rows * positions + k
        scale = tl.zeros([ROWS], tl.float32)
        ztop = tl.full([ROWS], float("nan"), tl.float32)  # NaN: the choice was greedy
        if RANDOM:
            temp = tl.load(temperature + rows, mask=r_mask, other=0.0)
            inv_t = tl.div_rn(1.0, tl.where(temp > 0, temp, 1.0))
            proper = (temp >= 1e-5) & step.is_finite(top * inv_t) & r_mask
            u = tl.load(uniforms + place, mask=r_mask, other=0.0)
            drawn, total = step.draw(
                logits, logits_stride_r, tops, sums, rows, proper, blocks, width, inv_t,
                top * inv_t, u, ROWS, BLOCK, MERGE,
            )  # fmt: skip
            pick = tl.where(proper, drawn, pick)
            ztop = tl.where(proper, top * inv_t, ztop)
            scale = tl.where(proper, (1.0 / total).to(tl.float32), scale)
        bad = r_mask & ((clean == 0) | (step.is_finite(top) == 0))
        tl.store(finite + rows, tl.zeros([ROWS], tl.int1), mask=bad)
        tl.store(picks + place, pick, mask=r_mask)
        tl.store(row_tops + place, ztop, mask=r_mask)
        tl.store(row_scales + place, scale, mask=r_mask)
        token = pick.to(tl.int64)
        if TOPK:
            token = tl.load(candidates + place * width + token, mask=r_mask, other=0)
            token = token.to(tl.int64)
        if REDUCED:
            token = tl.load(draft_to_target + token, mask=r_mask, other=0).to(tl.int64)
        tl.store(token_ids + place, token, mask=r_mask)
        if k + 1 < positions:
            _advance(
                token, rows, r_mask, requests, k + 1, positions, w1, joint,
                joint_stride, markov_column, joint_hidden, states, latent,
                hidden_logits, markov_weight, confidences, survivals, finite,
                HEAD, SCORED, RANK, ROWS, CHUNK, JOINT,
            )  # fmt: skip


@triton.jit(do_not_specialize=["positions"])
def finish_kernel(
    probs,
    picks,
    row_tops,
    row_scales,
    temperature,
    positions,
    width,
    RANDOM: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Logits into probabilities, in place; one-hot where the choice was greedy."""
    i = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = cols < width
    p = tl.where(cols == tl.load(picks + i), 1.0, 0.0)
    top = tl.load(row_tops + i)
    if RANDOM:
        drawn = top == top
        x = tl.load(probs + i * width + cols, mask=mask, other=float("-inf"))
        inv_t = tl.div_rn(1.0, tl.load(temperature + i // positions))
        w = step.weights(x * inv_t, top) * tl.load(row_scales + i)
        p = tl.where(drawn, w, p)
    tl.store(probs + i * width + cols, p, mask=mask)
