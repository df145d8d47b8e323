"""The loop that samples a block left to right through the sequential head (3.1).

The bias of position k depends on the token drawn at k-1, so K small products follow one
another; everything else about a block has been done in parallel by the backbone.
``sequential_reference.py`` is the specification.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from vllm_dspark.ops.arguments import (
    F32,
    FLOATS,
    INTEGERS,
    require,
    require_randomness,
    require_vocabulary,
    resolve_backend,
)

BACKENDS = ("auto", "reference", "native", "triton")
HEAD_TYPES = ("none", "vanilla", "gated", "rnn")


@dataclass(frozen=True, eq=False)
class SequentialHead:
    """Weights of the sequential and the confidence head (3.1, 3.2.1).

    All of `markov_*` and `joint_*` share one dtype, float32 or bfloat16.

    Attributes:
        head_type: vanilla, gated, rnn or none.
        markov_w1: ``[V, r]``, embedding of the previous token (a target id).
        markov_w2: ``[Vd, r]``.
        joint_weight: gated ``[r, d+r]``, input [h ; W1[x]]; rnn ``[3r, 2r+d]``, input
            [s ; W1[x] ; h], output split into gate, candidate, output.
        joint_bias: gated ``[r]``; rnn ``[3r]``.
        confidence_weight: ``[d]`` or ``[d+r]`` float32, input [h ; W1[x]].
        confidence_bias: ``[1]`` float32.
        draft_to_target: ``[Vd]`` int32, target id of each draft id; None: identity.
    """

    head_type: str
    markov_w1: Tensor | None = None
    markov_w2: Tensor | None = None
    joint_weight: Tensor | None = None
    joint_bias: Tensor | None = None
    confidence_weight: Tensor | None = None
    confidence_bias: Tensor | None = None
    draft_to_target: Tensor | None = None

    @property
    def rank(self) -> int:
        """Width r of the markov embedding, 0 without."""
        return 0 if self.markov_w1 is None else int(self.markov_w1.shape[1])


@dataclass(frozen=True)
class SequentialDraft:
    """A drafted block.

    Attributes:
        token_ids: ``[R, K]`` int64, target ids.
        draft_probs: ``[R, K, S]`` float32, the distributions drawn from (one-hot for
            greedy requests), or None if not asked for.
        draft_support: target ids of the S columns, int32: ``[R, K, S]`` with topk,
            ``[1, 1, Vd]`` with a reduced vocabulary, None where column i is id i.
        confidence: ``[R, K]`` float32 in (0, 1), or None without a confidence head.
        certainty: ``[R, K]`` float32, log(p / (1 − p)) of the likeliest candidate's
            probability p at temperature 1, at most −log 1e-4; it depends on x_{k-1},
            never on x_k. None without a confidence head, and from the triton backend,
            which does not compute it.
        finite: ``[R]`` bool, False if a request's logits held NaN or no finite
            maximum, or its confidence was not finite. Its tokens are then in range
            but otherwise unspecified.
        backend: the backend that ran: reference, native or triton.
    """

    token_ids: Tensor
    draft_probs: Tensor | None
    draft_support: Tensor | None
    confidence: Tensor | None
    finite: Tensor
    backend: str
    certainty: Tensor | None = None


@dataclass(frozen=True)
class SequentialInputs:
    """Checked arguments of `draft_sequential`; topk is at most Vd."""

    base_logits: Tensor
    hidden: Tensor
    anchor_ids: Tensor
    head: SequentialHead
    temperature: Tensor | None
    uniforms: Tensor | None
    topk: int | None
    return_probs: bool


def draft_sequential(
    base_logits: Tensor,
    hidden: Tensor,
    anchor_ids: Tensor,
    head: SequentialHead,
    *,
    temperature: Tensor | None = None,
    uniforms: Tensor | None = None,
    topk: int | None = None,
    return_probs: bool = False,
    backend: str = "auto",
) -> SequentialDraft:
    """Draws x_k from ``softmax((U_k + B_k(x_<k)) / T)`` for k = 1..K (3.1, 3.2.1).

    Draws are by inverse CDF in ascending draft id, greedy choices take the lowest id
    among equals.

    Args:
        base_logits: Shape ``[R, K, Vd]``, float32 or bfloat16: U.
        hidden: Shape ``[R, K, d]``, float32 or bfloat16: h.
        anchor_ids: Shape ``[R]``, int32 or int64 target ids: x_0.
        head: the weights.
        temperature: Shape ``[R]`` float32; below 1e-5 greedy. None: all greedy.
        uniforms: Shape ``[R, K]`` float64 in [0, 1).
        topk: keep only the k largest base logits of a position as candidates (lowest
            ids among equals); more than Vd means Vd.
        return_probs: whether to return the distributions drawn from.
        backend: auto, reference, native or triton. auto is triton for CUDA tensors,
            native for CPU tensors where the extension is built.

    Raises:
        ValueError: a shape, dtype or device is not as above; names the shape.
        RuntimeError: the backend asked for is not available here.
    """
    run = _choose(backend, base_logits)
    _check(base_logits, hidden, anchor_ids, head, temperature, uniforms, topk)
    if topk is not None:
        topk = min(topk, base_logits.shape[2])
    inputs = SequentialInputs(
        base_logits, hidden, anchor_ids, head, temperature, uniforms, topk, return_probs
    )
    return run(inputs)


def _choose(
    backend: str, base: Tensor
) -> Callable[[SequentialInputs], SequentialDraft]:
    backend = resolve_backend(backend, BACKENDS, base)
    if backend == "triton":
        from vllm_dspark.ops import sequential_triton

        return sequential_triton.checked_run(base)
    if backend == "native":
        from vllm_dspark.ops import sequential_native

        return sequential_native.checked_run(base)
    from vllm_dspark.ops import sequential_reference

    return sequential_reference.run


def _check(
    base: Tensor,
    hidden: Tensor,
    anchors: Tensor,
    head: SequentialHead,
    temperature: Tensor | None,
    uniforms: Tensor | None,
    topk: int | None,
) -> None:
    require("base_logits", base, FLOATS, (None, None, None), base, inner_only=True)
    r, k, vocab = base.shape
    require_vocabulary("base_logits", base)
    require("hidden", hidden, FLOATS, (r, k, None), base, inner_only=True)
    require("anchor_ids", anchors, INTEGERS, (r,), base)
    if topk is not None and topk < 1:
        raise ValueError(f"topk: expected at least 1, got {topk}")
    check_head(head, vocab, hidden.shape[2], base)
    uniform_numbers = {"uniforms": (uniforms, (r, k))}
    require_randomness(temperature, r, uniform_numbers, base)


def check_head(head: SequentialHead, vocab: int, width: int, like: Tensor) -> None:
    """ValueError naming the shape unless the weights fit Vd and d."""
    if head.head_type not in HEAD_TYPES:
        raise ValueError(f"head_type: unknown {head.head_type!r}, one of {HEAD_TYPES}")
    rank = head.rank
    if head.markov_w1 is not None:
        require("markov_w1", head.markov_w1, FLOATS, (None, None), like)
    if head.head_type != "none":
        if head.markov_w1 is None or head.markov_w2 is None:
            raise ValueError(f"a {head.head_type} head needs markov_w1 and markov_w2")
        same = (head.markov_w1.dtype,)
        require("markov_w2", head.markov_w2, same, (vocab, rank), like)
        if head.head_type != "vanilla":
            if head.joint_weight is None or head.joint_bias is None:
                raise ValueError(f"a {head.head_type} head needs joint_weight and bias")
            rows, inputs = (
                (rank, width + rank)
                if head.head_type == "gated"
                else (3 * rank, width + 2 * rank)
            )
            require("joint_weight", head.joint_weight, same, (rows, inputs), like)
            require("joint_bias", head.joint_bias, same, (rows,), like)
    if head.confidence_weight is not None:
        size = head.confidence_weight.numel()
        if size != width and (head.markov_w1 is None or size != width + rank):
            raise ValueError(
                f"confidence_weight: expected shape [{width}] or, with markov_w1, "
                f"[{width + rank}], got {list(head.confidence_weight.shape)}"
            )
        require("confidence_weight", head.confidence_weight, F32, (size,), like)
        if head.confidence_bias is not None:
            require("confidence_bias", head.confidence_bias, F32, (1,), like)
    if head.draft_to_target is not None:
        ints = (torch.int32,)
        require("draft_to_target", head.draft_to_target, ints, (vocab,), like)
