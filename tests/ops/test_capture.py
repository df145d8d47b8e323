"""What a CUDA graph may capture of the Triton paths, shown without a GPU.

Arguments are fake tensors, which have no values, and launches are recorded instead of
made: a value read on the host, or a shape that depends on one, is an error. What a
captured launch was given must be there at each replay: with the same buffers, every
pointer of every launch is the same.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
)

from tests.ops.rejection_cases import KINDS, make_case
from tests.ops.sequential_cases import HEADS, make_block, make_head
from vllm_dspark.ops import draft_sequential, rejection_sample
from vllm_dspark.ops.rejection import RejectionInputs
from vllm_dspark.ops.sequential import SequentialInputs

if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)

from vllm_dspark.ops import rejection_triton, sequential_triton

Launches = list[tuple[str, tuple[int, ...], tuple[Any, ...]]]


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> Launches:
    """Name, grid and arguments of what would have been launched."""
    made: Launches = []

    def record(
        kernel: Any, grid: tuple[int, ...], *args: Any, **constants: Any
    ) -> None:
        options = {"num_warps", "enable_fp_fusion"}
        names = [p for p in kernel.arg_names if p not in constants]
        assert len(args) == len(names), kernel.__name__
        assert set(kernel.arg_names) == set(names) | (set(constants) - options)
        made.append((kernel.__name__, grid, args))

    for module in (rejection_triton, sequential_triton):
        monkeypatch.setattr(module, "launch", record)
        monkeypatch.setattr(module, "require_device", lambda kernel, tensor: None)
    return made


def fake(value: Any) -> Any:
    """Within FakeTensorMode, a fake tensor of the same shape and strides."""
    if not isinstance(value, Tensor):
        return value
    return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype)


@pytest.mark.parametrize("topk", [None, 12])
@pytest.mark.parametrize("head_type", HEADS)
def test_drafting_reads_nothing_on_the_host(
    launches: Launches, head_type: str, topk: int | None
) -> None:
    block = make_block(1, make_head(1, head_type, draft_vocab=77), topk=topk)
    with FakeTensorMode():
        head = replace(block.head, **{k: fake(v) for k, v in vars(block.head).items()})
        options = {k: fake(v) for k, v in block.options.items()}
        tensors = map(fake, (block.base, block.hidden, block.anchors))
        result = draft_sequential(*tensors, head, **options, backend="triton")
    assert result.backend == "triton"
    names = [name for name, _, _ in launches]
    assert names.count("step_kernel") == block.base.shape[1]


@pytest.mark.parametrize("drafts", KINDS)
def test_verifying_reads_nothing_on_the_host(launches: Launches, drafts: str) -> None:
    case = make_case(1, drafts=drafts)
    with FakeTensorMode():
        args = list(map(fake, (case.logits, case.draft_ids, case.lengths)))
        options: Any = {k: fake(v) for k, v in case.options.items()}
        result = rejection_sample(
            *args, **options, max_draft_tokens=7, backend="triton"
        )
        assert result.backend == "triton"
        assert result.token_ids.shape == (5, 8)
        # Without the bound the lengths are read, and fake tensors say so.
        with pytest.raises(DataDependentOutputException):
            rejection_sample(*args, **options)
    assert len(launches) == 1


@pytest.mark.parametrize(
    ("read", "error"),
    [
        (lambda x: x.sum().item(), DataDependentOutputException),
        (lambda x: bool((x > 0).any()), DataDependentOutputException),
        (lambda x: x.nonzero(), DynamicOutputShapeException),
        (lambda x: x[x > 0], DynamicOutputShapeException),
    ],
)
def test_a_read_would_be_seen(
    read: Callable[[Tensor], Any], error: type[Exception]
) -> None:
    with FakeTensorMode(), pytest.raises(error):
        read(torch.empty(3))


def pointers(launches: Launches) -> list[Any]:
    found = [
        [a.data_ptr() if isinstance(a, Tensor) else a for a in args]
        for _, _, args in launches
    ]
    launches.clear()
    return found


@pytest.mark.parametrize("topk", [None, 12])
def test_drafting_keeps_its_addresses(launches: Launches, topk: int | None) -> None:
    block = make_block(1, make_head(1, "rnn"), topk=topk)
    o = block.options
    inputs = SequentialInputs(
        block.base,
        block.hidden,
        block.anchors,
        block.head,
        o["temperature"],
        o["uniforms"],
        topk,
        True,
    )
    buffers = sequential_triton.make_buffers(inputs)
    sequential_triton.draft(inputs, buffers)
    first = pointers(launches)
    sequential_triton.draft(inputs, buffers)
    assert pointers(launches) == first
    other = sequential_triton.make_buffers(inputs)
    sequential_triton.draft(inputs, other)
    assert pointers(launches) != first


@pytest.mark.parametrize("drafts", KINDS)
def test_verifying_keeps_its_addresses(launches: Launches, drafts: str) -> None:
    case = make_case(1, drafts=drafts)
    o = case.options
    inputs = RejectionInputs(
        case.logits,
        case.draft_ids,
        case.lengths,
        7,
        o["draft_probs"],
        o["draft_support"],
        o["temperature"],
        o["accept_uniforms"],
        o["sample_uniforms"],
    )
    buffers = rejection_triton.make_buffers(inputs)
    result = rejection_triton.verify(inputs, buffers)
    first = pointers(launches)
    assert result.token_ids.data_ptr() == buffers.token_ids.data_ptr()
    rejection_triton.verify(inputs, buffers)
    assert pointers(launches) == first
    rejection_triton.verify(inputs, rejection_triton.make_buffers(inputs))
    assert pointers(launches) != first
