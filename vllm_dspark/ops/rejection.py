"""Rejection sampling of drafts from the target's logits (paper section 2.1).

``rejection_reference.py`` is the specification; the other backends return the same
tokens for the same uniform numbers. Probabilities of the target are never handed in:
a backend reads the logits of a row only once it knows that the row is needed.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

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
METHODS = ("standard", "block")


@dataclass(frozen=True)
class RejectionResult:
    """What one verification emits.

    Attributes:
        token_ids: ``[R, max(l)+1]`` int32, padded with -1.
        num_emitted: ``[R]`` int32, 1..l_r+1.
        backend: the backend that ran: reference, native or triton.
    """

    token_ids: Tensor
    num_emitted: Tensor
    backend: str


@dataclass(frozen=True)
class RejectionInputs:
    """Checked arguments of `rejection_sample`; no l_r is larger than `most`."""

    target_logits: Tensor
    draft_token_ids: Tensor
    num_draft_tokens: Tensor
    most: int
    draft_probs: Tensor | None
    draft_support: Tensor | None
    temperature: Tensor | None
    accept_uniforms: Tensor | None
    sample_uniforms: Tensor | None
    method: str = METHODS[0]

    def outputs(self) -> tuple[Tensor, Tensor]:
        """Uninitialised ``token_ids`` and ``num_emitted``."""
        device, num = self.target_logits.device, self.num_draft_tokens.shape[0]
        width = self.most + 1
        return (
            torch.empty((num, width), dtype=torch.int32, device=device),
            torch.empty((num,), dtype=torch.int32, device=device),
        )


def rejection_sample(
    target_logits: Tensor,
    draft_token_ids: Tensor,
    num_draft_tokens: Tensor,
    *,
    draft_probs: Tensor | None = None,
    draft_support: Tensor | None = None,
    temperature: Tensor | None = None,
    accept_uniforms: Tensor | None = None,
    sample_uniforms: Tensor | None = None,
    max_draft_tokens: int | None = None,
    method: str = METHODS[0],
    backend: str = "auto",
) -> RejectionResult:
    """Accepts a prefix of each request's drafts and emits one token more (2.1).

    Request r owns ``l_r`` draft rows of `target_logits` and then its bonus row. Draft
    x is accepted if ``u * q(x) < p(x)``; the first rejection ends the request with a
    draw from ``max(0, p - q)``, a request without one ends with a draw from its bonus
    row. Greedy requests emit argmax and stop at the first draft that is not it.

    Method ``block`` (Sun et al., 2024) tests the drafts of a request together: the same
    distribution, and never fewer accepted in expectation (`rejection_reference`).

    Args:
        target_logits: Shape ``[N+R, V]``, float32 or bfloat16; rows may be strided.
        draft_token_ids: Shape ``[N]``, int32 or int64; an id outside [0, V) is never
            accepted.
        num_draft_tokens: Shape ``[R]``, int32 or int64, l_r >= 0, sums to N.
        draft_probs: Shape ``[N, S]`` float32, the distributions the drafts were drawn
            from. None: one-hot drafts, q(x) = 1.
        draft_support: Shape ``[N, S]`` or ``[1, S]`` int32, target ids of the columns
            of `draft_probs`, distinct in a row, in any order; -1 pads. None: S = V.
        temperature: Shape ``[R]`` float32; below 1e-5 greedy. None: all greedy.
        accept_uniforms: Shape ``[N]`` float64 in [0, 1).
        sample_uniforms: Shape ``[R]`` float64 in [0, 1), for the one final draw.
        max_draft_tokens: no l_r is larger; the result has one column more. Lengths are
            then not read on the host to be checked, so that a call with Triton can be
            captured in a CUDA graph. None: the largest l_r, after a check of all.
        method: standard or block; greedy requests know no difference.
        backend: auto, reference, native or triton. auto is triton for CUDA tensors,
            native on the CPU, reference without the extension.

    Raises:
        ValueError: a shape, dtype or device is not as above; names the shape. An
            unknown method or backend.
        RuntimeError: the backend asked for is not available here.

    Example:
        >>> logits = torch.tensor([[0.0, 9.0], [9.0, 0.0]])
        >>> ids, length = torch.tensor([1]), torch.tensor([1])
        >>> rejection_sample(logits, ids, length).token_ids.tolist()
        [[1, 0]]
    """
    if method not in METHODS:
        raise ValueError(f"method: unknown {method!r}, one of {METHODS}")
    run = _choose(backend, target_logits)
    inputs = _check(
        target_logits,
        draft_token_ids,
        num_draft_tokens,
        draft_probs,
        draft_support,
        temperature,
        accept_uniforms,
        sample_uniforms,
        max_draft_tokens,
    )
    return run(replace(inputs, method=method))


def _choose(
    backend: str, logits: Tensor
) -> Callable[[RejectionInputs], RejectionResult]:
    """Imports are late: triton is optional, and slow to import."""
    backend = resolve_backend(backend, BACKENDS, logits)
    if backend == "triton":
        from vllm_dspark.ops import rejection_triton

        return rejection_triton.checked_run(logits)
    if backend == "native":
        from vllm_dspark.ops import rejection_native

        return rejection_native.checked_run(logits)
    from vllm_dspark.ops import rejection_reference

    return rejection_reference.run


def _check(
    logits: Tensor,
    ids: Tensor,
    counts: Tensor,
    probs: Tensor | None,
    support: Tensor | None,
    temperature: Tensor | None,
    accept: Tensor | None,
    sample: Tensor | None,
    most: int | None,
) -> RejectionInputs:
    require("draft_token_ids", ids, INTEGERS, (None,), logits)
    require("num_draft_tokens", counts, INTEGERS, (None,), logits)
    n, r = ids.shape[0], counts.shape[0]
    require("target_logits", logits, FLOATS, (n + r, None), logits, inner_only=True)
    require_vocabulary("target_logits", logits)
    if most is None:
        most = _largest(counts, n)
    if probs is not None:
        columns = logits.shape[1] if support is None else None
        require("draft_probs", probs, F32, (n, columns), logits, inner_only=True)
    if support is not None:
        if probs is None:
            raise ValueError("draft_support needs draft_probs")
        rows = 1 if support.dim() == 2 and support.shape[0] == 1 else n
        shape = (rows, probs.shape[1])
        require("draft_support", support, (torch.int32,), shape, logits, True)
    uniforms = {"accept_uniforms": (accept, (n,)), "sample_uniforms": (sample, (r,))}
    require_randomness(temperature, r, uniforms, logits)
    return RejectionInputs(
        logits, ids, counts, most, probs, support, temperature, accept, sample
    )


def _largest(counts: Tensor, n: int) -> int:
    """The largest length; ValueError unless they are lengths that add up to N."""
    lengths: list[int] = counts.tolist()
    if sum(lengths) != n or min(lengths, default=0) < 0:
        raise ValueError(
            f"num_draft_tokens: expected {len(lengths)} lengths >= 0 that add up to "
            f"N={n}, the shape [{n}] of draft_token_ids; got {lengths[:8]}"
        )
    return max(lengths, default=0)
