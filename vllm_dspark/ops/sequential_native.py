"""`draft_sequential` in C++ (csrc/sequential.cpp), for tensors on the CPU.

A head's weights are registered with the extension on first use and stay registered as
long as the `SequentialHead` object lives. The extension keeps a packed copy of W2, so
weights changed in place are noticed by their version and registered anew.
"""

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from vllm_dspark.ops.extension_native import capsule, require, require_for
from vllm_dspark.ops.sequential import (
    SequentialDraft,
    SequentialHead,
    SequentialInputs,
)
from vllm_dspark.ops.sequential_reference import whole_support

# The extension's object, and what it was made for: see `handle`.
_handles: "weakref.WeakKeyDictionary[SequentialHead, tuple[Any, tuple[int, ...]]]" = (
    weakref.WeakKeyDictionary()
)


def checked_run(base: Tensor) -> Callable[[SequentialInputs], SequentialDraft]:
    """`run`, or RuntimeError if the extension or the device does not allow it."""
    require_for(base)
    return run


def _version(weight: Tensor | None) -> int:
    # Tensors made in inference mode keep no version; they cannot be trained either.
    return 0 if weight is None or weight.is_inference() else weight._version


def handle(head: SequentialHead, draft_vocab: int, hidden: int) -> Any:
    """The extension's object for these weights, made once."""
    made_for = (draft_vocab, hidden, _version(head.markov_w2))
    known = _handles.get(head)
    if known is not None and known[1] == made_for:
        return known[0]
    weights = (
        head.markov_w1,
        head.markov_w2,
        head.joint_weight,
        head.joint_bias,
        head.confidence_weight,
        head.confidence_bias,
        head.draft_to_target,
    )
    capsules = [capsule(None if w is None else w.detach()) for w in weights]
    made = require().head_new(head.head_type, draft_vocab, hidden, *capsules)
    _handles[head] = (made, made_for)
    return made


def run(inputs: SequentialInputs) -> SequentialDraft:
    """One call into the extension, which releases the GIL."""
    base, head, topk = inputs.base_logits, inputs.head, inputs.topk
    r, k, vocab = base.shape
    f32 = torch.float32
    tokens = torch.empty((r, k), dtype=torch.int64)
    shape = (r, k, topk or vocab)
    probs = torch.empty(shape, dtype=f32) if inputs.return_probs else None
    support = None if topk is None else torch.empty(shape, dtype=torch.int32)
    scored = head.confidence_weight is not None
    confidence = torch.empty((r, k), dtype=f32) if scored else None
    certainty = torch.empty((r, k), dtype=f32) if scored else None
    # A block of no positions has nothing that is not finite.
    finite = torch.ones((r,), dtype=torch.bool)
    require().draft_sequential(
        handle(head, vocab, inputs.hidden.shape[2]),
        capsule(base),
        capsule(inputs.hidden),
        capsule(inputs.anchor_ids.long()),
        capsule(inputs.temperature),
        capsule(inputs.uniforms),
        topk or 0,
        capsule(tokens),
        capsule(probs),
        capsule(support),
        capsule(confidence),
        capsule(certainty),
        capsule(finite),
    )
    if topk is None:
        support = whole_support(head)
    return SequentialDraft(
        tokens, probs, support, confidence, finite, "native", certainty
    )
