"""The Triton kernels on a GPU: equal to the reference on the CPU, and in CUDA graphs.

float32 weights, whose sums and exponentials differ in their last bits only: token for
token, but in blocks where a choice of the reference itself hangs on such bits. Whoever
has a GPU runs ``pytest -m gpu tests/ops``; elsewhere all of it is skipped.
"""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.ops import rejection_cases
from tests.ops.rejection_cases import KINDS, Case, make_case
from tests.ops.sequential_cases import HEADS, Block, make_block, make_head
from tests.ops.test_sequential import assert_same
from vllm_dspark.ops import SequentialDraft

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"),
]


def moved(value: Any, device: str) -> Any:
    """A tensor, or a dataclass or dictionary of them, on a device."""
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, dict):
        return {name: moved(v, device) for name, v in value.items()}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
        return dataclasses.replace(value, **moved(fields, device))
    return value


@pytest.mark.parametrize("topk", [None, 1, 12])
@pytest.mark.parametrize("head_type", HEADS)
def test_sequential_equals_reference(head_type: str, topk: int | None) -> None:
    for seed, (sampling, draft_vocab) in enumerate(
        itertools.product(("greedy", "random", "mixed"), (None, 900))
    ):
        head = make_head(seed, head_type, vocab=5000, draft_vocab=draft_vocab, rank=64)
        block: Block = make_block(
            seed, head, requests=17, sampling=sampling, topk=topk, masked=0.3
        )
        expected, clear = block.run("reference"), decided(block)
        assert int(clear.sum()) >= 15
        result = moved(moved(block, "cuda").run("triton"), "cpu")
        assert_same(of_rows(expected, clear), of_rows(result, clear))


def decided(block: Block) -> Tensor:
    """Requests ``[R]`` whose tokens stay the same when all logits move a little."""
    tokens = block.run("reference").token_ids
    same = torch.ones(len(tokens), dtype=torch.bool)
    for seed in range(8):
        noise = torch.randn(
            block.base.shape, generator=torch.Generator().manual_seed(seed)
        )
        moving = dataclasses.replace(block, base=block.base + 5e-6 * noise)
        same &= (moving.run("reference").token_ids == tokens).all(dim=1)
    return same


def of_rows(draft: SequentialDraft, rows: Tensor) -> SequentialDraft:
    fields = {f.name: getattr(draft, f.name) for f in dataclasses.fields(draft)}
    first = {
        name: value[rows]
        for name, value in fields.items()
        if isinstance(value, Tensor) and len(value) == len(rows)
    }
    return dataclasses.replace(draft, **first)


def test_sequential_of_a_large_vocabulary_in_bfloat16() -> None:
    """bfloat16 sums may fall on either side of a near tie: few blocks may differ."""
    head = make_head(3, "vanilla", vocab=151_936, rank=256, dtype=torch.bfloat16)
    block = make_block(4, head, requests=32, sampling="greedy", dtype=torch.bfloat16)
    expected = block.run("reference").token_ids
    drafted = moved(block, "cuda").run("triton").token_ids.cpu()
    assert int((drafted != expected).any(dim=1).sum()) <= 2


@pytest.mark.parametrize("method", ["standard", "block"])
@pytest.mark.parametrize("drafts", KINDS)
def test_rejection_equals_reference(drafts: str, method: str) -> None:
    for seed, sampling in enumerate(("greedy", "random", "mixed")):
        for dtype in (torch.float32, torch.bfloat16):
            case: Case = make_case(
                seed, drafts=drafts, sampling=sampling, method=method, dtype=dtype
            )
            result = moved(case, "cuda").run("triton")
            rejection_cases.assert_same(case.run("reference"), moved(result, "cpu"))


def captured(part: Block | Case) -> tuple[torch.cuda.CUDAGraph, Any]:
    """A graph of one call, and the result that each replay writes."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        part.run("triton")  # compiles; a capture may not
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = part.run("triton")
    return graph, result


@pytest.mark.parametrize("head_type", HEADS)
def test_a_replayed_graph_drafts_from_its_buffers(head_type: str) -> None:
    head = make_head(1, head_type)
    first, second = (make_block(seed, head) for seed in (1, 2))
    buffers = moved(first, "cuda")
    graph, result = captured(buffers)
    for block in (second, first):
        for name in ("base", "hidden", "anchors"):
            getattr(buffers, name).copy_(getattr(block, name))
        for name in ("temperature", "uniforms"):
            buffers.options[name].copy_(block.options[name])
        graph.replay()
        assert_same(block.run("reference"), moved(result, "cpu"))


def test_a_replayed_graph_verifies_from_its_buffers() -> None:
    first, second = (make_case(seed, vocab=300) for seed in (1, 2))
    buffers = moved(first, "cuda")
    graph, result = captured(buffers)
    for case in (second, first):
        for name in ("logits", "draft_ids", "lengths"):
            getattr(buffers, name).copy_(getattr(case, name))
        for name, value in case.options.items():
            if value is not None:
                buffers.options[name].copy_(value)
        graph.replay()
        rejection_cases.assert_same(case.run("reference"), moved(result, "cpu"))
