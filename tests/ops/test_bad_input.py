"""Every wrong argument is a ValueError that names it and its shape; so is it in C++."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import pytest
import torch

from tests.ops.rejection_cases import make_case
from tests.ops.sequential_cases import make_block, make_head
from vllm_dspark.ops import draft_sequential, extension_native, rejection_sample

f64, f32, i32 = torch.float64, torch.float32, torch.int32

REJECTION: list[tuple[dict[str, Any], str]] = [
    ({"target_logits": torch.zeros(20, 50)}, r"target_logits.*\[21, any\].*\[20, 50\]"),
    ({"target_logits": torch.zeros(21)}, r"target_logits.*\[21\]"),
    ({"target_logits": torch.zeros(21, 0)}, r"target_logits.*\(21, 0\)"),
    ({"target_logits": torch.zeros(21, 50, dtype=f64)}, r"target_logits.*float64"),
    ({"target_logits": torch.zeros(50, 21).T}, r"target_logits.*strides \[1, 21\]"),
    ({"draft_token_ids": torch.zeros(16)}, r"draft_token_ids.*\[16\]"),
    ({"num_draft_tokens": torch.tensor([[16]])}, r"num_draft_tokens.*\[1, 1\]"),
    ({"num_draft_tokens": torch.tensor([3, 0, 5, 1, 6])}, r"N=16.*\[3, 0, 5, 1, 6\]"),
    ({"num_draft_tokens": torch.tensor([3, -1, 6, 1, 7])}, r"lengths >= 0"),
    ({"draft_probs": torch.zeros(16, 49)}, r"draft_probs.*\[16, 50\].*\[16, 49\]"),
    ({"draft_probs": torch.zeros(16, 50, dtype=f64)}, r"draft_probs.*float64"),
    (
        {"draft_support": torch.zeros(2, 50, dtype=i32)},
        r"support.*\[16, 50\].*\[2, 50\]",
    ),
    ({"draft_support": torch.zeros(1, 50)}, r"draft_support.*float32"),
    ({"draft_support": torch.zeros(1, 9, dtype=i32), "draft_probs": None}, "needs"),
    ({"temperature": torch.ones(4)}, r"temperature.*\[5\].*\[4\]"),
    ({"temperature": torch.ones(5, dtype=f64)}, r"temperature.*float64"),
    (
        {"accept_uniforms": torch.ones(15, dtype=f64)},
        r"accept_uniforms.*\[16\].*\[15\]",
    ),
    ({"accept_uniforms": torch.ones(16)}, r"accept_uniforms.*float32"),
    ({"sample_uniforms": torch.ones(5, 1, dtype=f64)}, r"sample_uniforms.*\[5, 1\]"),
    ({"sample_uniforms": None}, r"sample_uniforms of shape \[5\]"),
    ({"backend": "cuda"}, "unknown 'cuda'"),
    ({"method": "chain"}, "unknown 'chain'"),
]


def rejection_arguments() -> dict[str, Any]:
    case = make_case(1, vocab=50, sampling="random")
    return {
        "target_logits": case.logits,
        "draft_token_ids": case.draft_ids,
        "num_draft_tokens": case.lengths,
        **case.options,
    }


@pytest.mark.parametrize(("change", "message"), REJECTION)
def test_rejection(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        rejection_sample(**{**rejection_arguments(), **change})


@pytest.mark.parametrize(("change", "message"), REJECTION[:1] + REJECTION[5:18])
def test_rejection_in_cpp(native: None, change: dict[str, Any], message: str) -> None:
    """The extension checks for itself: it reads memory by these numbers."""
    arguments = {**rejection_arguments(), **change}
    outputs = [torch.zeros(5, 8, dtype=i32), torch.zeros(5, dtype=i32)]
    capsules = [extension_native.capsule(x) for x in [*arguments.values(), *outputs]]
    name = next(iter(change))
    with pytest.raises(ValueError, match=name if len(change) == 1 else "support"):
        extension_native.require().rejection_sample(*capsules, False)


SEQUENTIAL: list[tuple[dict[str, Any], str]] = [
    ({"base_logits": torch.zeros(6, 200)}, r"base_logits.*\[6, 200\]"),
    ({"base_logits": torch.zeros(6, 5, 201)}, r"markov_w2.*\[201, 16\].*\[200, 16\]"),
    ({"hidden": torch.zeros(6, 4, 24)}, r"hidden.*\[6, 5, any\].*\[6, 4, 24\]"),
    ({"hidden": torch.zeros(6, 5, 25)}, r"joint_weight.*\[16, 41\].*\[16, 40\]"),
    ({"anchor_ids": torch.zeros(6)}, r"anchor_ids.*float32.*\[6\]"),
    ({"temperature": torch.ones(7)}, r"temperature.*\[6\].*\[7\]"),
    ({"uniforms": torch.ones(6, 4, dtype=f64)}, r"uniforms.*\[6, 5\].*\[6, 4\]"),
    ({"uniforms": None}, r"uniforms of shape \[6, 5\]"),
    ({"topk": 0}, "topk.*at least 1, got 0"),
    ({"backend": "cuda"}, "unknown 'cuda'"),
]
HEAD: list[tuple[dict[str, Any], str]] = [
    ({"head_type": "lstm"}, "head_type: unknown 'lstm'"),
    ({"markov_w1": None}, "needs markov_w1"),
    ({"markov_w1": torch.zeros(200, 15)}, r"markov_w2.*\[200, 15\]"),
    ({"markov_w2": torch.zeros(200, 16, dtype=torch.bfloat16)}, "markov_w2.*bfloat16"),
    ({"joint_bias": torch.zeros(17)}, r"joint_bias.*\[16\].*\[17\]"),
    ({"joint_bias": None}, "needs joint_weight and bias"),
    ({"confidence_weight": torch.zeros(41)}, r"\[24\] or, with markov_w1, \[40\]"),
    ({"confidence_bias": torch.zeros(2)}, r"confidence_bias.*\[1\].*\[2\]"),
    (
        {"draft_to_target": torch.zeros(9, dtype=i32)},
        r"draft_to_target.*\[200\].*\[9\]",
    ),
]


def sequential_arguments() -> dict[str, Any]:
    block = make_block(1, make_head(1, "gated"), sampling="random")
    return {
        "base_logits": block.base,
        "hidden": block.hidden,
        "anchor_ids": block.anchors,
        "head": block.head,
        **block.options,
    }


@pytest.mark.parametrize(("change", "message"), SEQUENTIAL)
def test_sequential(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        draft_sequential(**{**sequential_arguments(), **change})


@pytest.mark.parametrize(("change", "message"), HEAD)
def test_head(change: dict[str, Any], message: str) -> None:
    arguments = sequential_arguments()
    arguments["head"] = dataclasses.replace(arguments["head"], **change)
    with pytest.raises(ValueError, match=message):
        draft_sequential(**arguments)


def test_ids_without_an_embedding(native: None) -> None:
    arguments = sequential_arguments()
    arguments["anchor_ids"] = torch.tensor([0, 1, 2, 200, 4, 5])
    with pytest.raises(ValueError, match=re.escape("anchor_ids[3] = 200")):
        draft_sequential(**arguments, backend="native")
    arguments = sequential_arguments()
    ids = torch.arange(200, dtype=i32) + 3
    arguments["head"] = dataclasses.replace(arguments["head"], draft_to_target=ids)
    with pytest.raises(ValueError, match=re.escape("draft_to_target[197] = 200")):
        draft_sequential(**arguments, backend="native")
