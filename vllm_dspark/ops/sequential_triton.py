"""`draft_sequential` on the GPU: one Triton kernel for a step of the whole batch.

A step of K: every program scores one block of columns (of the draft vocabulary for ROWS
requests that share the tile of W2, or of one request's candidates) and leaves its
block's largest logit and its sum of weights; the program of a group that finishes last
merges the blocks, draws, looks the token up in W1 and computes what the next step
multiplies with W2. One launch a step, and before the first the part of the gated and
rnn heads that no draft changes, the candidates, and the anchors' latents.

A step moves W2 once for ROWS requests, the base logits once, and writes a random row's
logits (float32) for the draw to read one block of; see ``benchmarks/aot_report.py``.

Nothing here reads a value on the host, and every shape follows from the arguments'
shapes, so that a call can be captured in a CUDA graph; `Buffers` made once keep their
addresses. Run in Triton's interpreter and on an H200 (``results/gpu-h200.json``), and
compiled for sm_80, sm_90, sm_100 and gfx942.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from vllm_dspark.ops import seq_kernels_triton as kernels
from vllm_dspark.ops.launch_triton import launch, require_device
from vllm_dspark.ops.sequential import (
    SequentialDraft,
    SequentialHead,
    SequentialInputs,
)
from vllm_dspark.ops.sequential_reference import support, whole_support
from vllm_dspark.ops.topk_triton import topk_kernel

ROWS = 16  # requests that share a tile of W2: the least a matrix product takes
BLOCK = 128  # columns of a program: 1187 programs at a vocabulary of 151,936
MERGE = 128  # blocks merged at a time
CHUNK = 64  # of the rank, the inner dimension of the products
JOINT_BF16 = 32  # the same of the joint layer: 64 spills in the rnn head
JOINT_F32 = 16  # float32 products are unrolled
SELECT_BLOCK = 4096
FINISH_BLOCK = 1024
NUM_WARPS = 4
# Products and differences stay two roundings, as on the CPU.
OPTIONS = {"num_warps": NUM_WARPS, "enable_fp_fusion": False}
HEADS = {"none": 0, "vanilla": 1, "gated": 2, "rnn": 3}


@dataclass(frozen=True)
class Buffers:
    """Everything that a call writes, for R requests, K positions and S columns.

    Made once, they keep their addresses over the replays of a CUDA graph.

    Attributes:
        token_ids, picks: ``[R, K]`` int64 target ids and int32 columns.
        finite: ``[R]`` bool.
        confidences, survivals: ``[R, K]`` float32, unwritten without a confidence head.
        logits: float32, ``[R, K, S]`` if probabilities are returned (in this very
            memory), otherwise ``[R, 1, S]`` for one step's.
        candidates: ``[R, K, S]`` int32 draft ids with topk.
        joint_hidden: ``[K, R, outputs of the joint layer]`` float32.
        hidden_logits: ``[K, R, 1]`` float32.
        latent, states: ``[R, r]`` in W2's type, ``[2, R, r]`` float32.
        tops, args, sums: ``[R, blocks]``, float32, int32 and float64.
        row_tops, row_scales: ``[R, K]`` float32.
        arrivals: ``[groups]`` int32, zero between launches.
        nothing: stands for arguments that a kernel never reads; zeros.
    """

    token_ids: Tensor
    picks: Tensor
    finite: Tensor
    confidences: Tensor
    survivals: Tensor
    logits: Tensor
    candidates: Tensor
    joint_hidden: Tensor
    hidden_logits: Tensor
    latent: Tensor
    states: Tensor
    tops: Tensor
    args: Tensor
    sums: Tensor
    row_tops: Tensor
    row_scales: Tensor
    arrivals: Tensor
    nothing: Tensor


def make_buffers(inputs: SequentialInputs) -> Buffers:
    """Buffers for inputs of these shapes."""
    base, head = inputs.base_logits, inputs.head
    r, k, vocab = base.shape
    width, rank, device = inputs.topk or vocab, head.rank, base.device
    outputs = 0 if head.joint_weight is None else head.joint_weight.shape[0]
    random = inputs.temperature is not None

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=device)

    columns = (k if inputs.return_probs else 1) if random or inputs.return_probs else 0
    blocks = triton.cdiv(width, block_of(width))
    return Buffers(
        token_ids=empty(r, k, dtype=torch.int64),
        picks=empty(r, k, dtype=torch.int32),
        finite=torch.ones(r, dtype=torch.bool, device=device),
        confidences=empty(r, k),
        survivals=empty(r, k),
        logits=empty(r, columns, width),
        candidates=empty(r, k, width if inputs.topk else 0, dtype=torch.int32),
        joint_hidden=empty(k, r, outputs),
        hidden_logits=empty(k, r, 1),
        latent=empty(r, rank, dtype=_type(head)),
        states=empty(2, r, rank if head.head_type == "rnn" else 0),
        tops=empty(r, blocks),
        args=empty(r, blocks, dtype=torch.int32),
        sums=empty(r, blocks, dtype=torch.float64),
        row_tops=empty(r, k),
        row_scales=empty(r, k),
        arrivals=torch.zeros(triton.cdiv(r, ROWS), dtype=torch.int32, device=device),
        nothing=torch.zeros(1, device=device),
    )


def block_of(width: int) -> int:
    """Columns of a program; a matrix product takes 16 at least."""
    return min(BLOCK, max(16, int(triton.next_power_of_2(width))))


def _type(head: SequentialHead) -> torch.dtype:
    return torch.float32 if head.markov_w2 is None else head.markov_w2.dtype


def checked_run(base: Tensor) -> Callable[[SequentialInputs], SequentialDraft]:
    """`run`, or RuntimeError unless the tensors are on a GPU or interpreted."""
    require_device(kernels.step_kernel, base)
    return run


def run(inputs: SequentialInputs) -> SequentialDraft:
    """One call with buffers of its own."""
    return draft(inputs, make_buffers(inputs))


def head_options(head: SequentialHead, hidden: int) -> dict[str, Any]:
    """Compile-time constants of a head whose hidden states are `hidden` wide."""
    weight = head.confidence_weight
    scored = 0 if weight is None else 1 if weight.shape[0] == hidden else 2
    return {
        "HEAD": HEADS[head.head_type],
        "SCORED": scored,
        "RANK": head.rank,
        "ROWS": ROWS,
        "CHUNK": CHUNK,
        "JOINT": JOINT_BF16 if _type(head) == torch.bfloat16 else JOINT_F32,
    }


def draft(inputs: SequentialInputs, b: Buffers) -> SequentialDraft:
    """One call that writes into `b`, whose tensors the result shares."""
    head = inputs.head
    r, k, _ = inputs.base_logits.shape
    if r and k:
        _prepare(inputs, b)
        shared = _advance_arguments(inputs, b)
        options = head_options(head, inputs.hidden.shape[2])
        groups = (triton.cdiv(r, ROWS),)
        launch(
            kernels.begin_kernel,
            groups,
            inputs.anchor_ids,
            r,
            k,
            *shared,
            **options,
            **OPTIONS,
        )
        for j in range(k):
            _step(inputs, b, j, shared, options)
        if inputs.return_probs:
            _finish(inputs, b)
    scored = head.confidence_weight is not None
    return SequentialDraft(
        b.token_ids,
        b.logits if inputs.return_probs else None,
        whole_support(head) if inputs.topk is None else support(head, b.candidates),
        b.confidences if scored else None,
        b.finite,
        "triton",
    )


def _prepare(inputs: SequentialInputs, b: Buffers) -> None:
    """Candidates, and the products that no draft changes."""
    base, head = inputs.base_logits, inputs.head
    r, k, vocab = base.shape
    if inputs.topk is not None:
        launch(
            topk_kernel,
            (r * k,),
            base,
            base.stride(0),
            base.stride(1),
            k,
            vocab,
            inputs.topk,
            b.candidates,
            PASSES=2 if base.dtype == torch.bfloat16 else 4,
            BLOCK=min(SELECT_BLOCK, triton.next_power_of_2(vocab)),
            **OPTIONS,
        )
    if head.joint_weight is not None and head.joint_bias is not None:
        column = 0 if head.head_type == "gated" else 2 * head.rank
        _project(inputs, head.joint_weight, column, head.joint_bias, b.joint_hidden)
    if head.confidence_weight is not None:
        weight = head.confidence_weight[None]
        bias = b.nothing if head.confidence_bias is None else head.confidence_bias
        _project(inputs, weight, 0, bias, b.hidden_logits)


def _project(
    inputs: SequentialInputs, weight: Tensor, column: int, bias: Tensor, out: Tensor
) -> None:
    hidden = inputs.hidden
    r, k, width = hidden.shape
    outputs = weight.shape[0]
    launch(
        kernels.project_kernel,
        (triton.cdiv(r * k, ROWS), triton.cdiv(outputs, CHUNK)),
        hidden,
        hidden.stride(0),
        hidden.stride(1),
        r,
        k,
        weight,
        weight.shape[1],
        column,
        bias,
        out,
        outputs,
        WIDTH=width,
        ROWS=ROWS,
        CHUNK=CHUNK,
        **OPTIONS,
    )


def _advance_arguments(inputs: SequentialInputs, b: Buffers) -> tuple[Any, ...]:
    """What `begin_kernel` and `step_kernel` both need to go on to the next step."""
    head, width = inputs.head, inputs.hidden.shape[2]
    joint, weight = head.joint_weight, head.confidence_weight
    return (
        _or(head.markov_w1, b),
        _or(joint, b),
        0 if joint is None else joint.shape[1],
        width if head.head_type == "gated" else head.rank,
        b.joint_hidden,
        b.states,
        b.latent,
        b.hidden_logits,
        b.nothing if weight is None else weight[width:],
        b.confidences,
        b.survivals,
        b.finite,
    )


def _step(
    inputs: SequentialInputs,
    b: Buffers,
    k: int,
    shared: tuple[Any, ...],
    options: dict[str, Any],
) -> None:
    base, head = inputs.base_logits, inputs.head
    r, positions, vocab = base.shape
    width, topk = inputs.topk or vocab, inputs.topk is not None
    block = block_of(width)
    launch(
        kernels.step_kernel,
        (triton.cdiv(width, block), r if topk else triton.cdiv(r, ROWS)),
        k,
        base,
        base.stride(0),
        base.stride(1),
        r,
        positions,
        width,
        _or(head.markov_w2, b),
        b.candidates,
        _or(head.draft_to_target, b),
        _or(inputs.temperature, b),
        _or(inputs.uniforms, b),
        b.logits,
        b.logits.stride(0),
        b.logits.stride(1) if inputs.return_probs else 0,
        b.tops,
        b.args,
        b.sums,
        b.arrivals,
        b.token_ids,
        b.picks,
        b.row_tops,
        b.row_scales,
        *shared,
        RANDOM=inputs.temperature is not None and inputs.uniforms is not None,
        TOPK=topk,
        REDUCED=head.draft_to_target is not None,
        BLOCK=block,
        MERGE=min(MERGE, triton.next_power_of_2(b.tops.shape[1])),
        **options,
        **OPTIONS,
    )


def _finish(inputs: SequentialInputs, b: Buffers) -> None:
    r, k, width = b.logits.shape
    launch(
        kernels.finish_kernel,
        (r * k, triton.cdiv(width, FINISH_BLOCK)),
        b.logits,
        b.picks,
        b.row_tops,
        b.row_scales,
        _or(inputs.temperature, b),
        k,
        width,
        RANDOM=inputs.temperature is not None and inputs.uniforms is not None,
        BLOCK=FINISH_BLOCK,
        **OPTIONS,
    )


def _or(tensor: Tensor | None, b: Buffers) -> Tensor:
    return b.nothing if tensor is None else tensor
