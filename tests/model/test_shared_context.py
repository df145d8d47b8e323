"""Fused attention over a shared context equals the specification, with gradients."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from vllm_dspark.model.backbone import Attention
from vllm_dspark.model.shared_context import attend_shared


def tensors(blocks: int, context: int, dtype: torch.dtype) -> list[Tensor]:
    g = torch.Generator().manual_seed(blocks * 100 + context)
    shapes = [
        (blocks, 5, 2, 3, 32),
        *[(context, 2, 32)] * 2,
        *[(blocks, 5, 2, 32)] * 2,
    ]
    made = [torch.randn(s, generator=g).to(dtype).requires_grad_() for s in shapes]
    return made


def specification(query, key, value, own_key, own_value, see) -> Tensor:
    blocks, size = query.shape[:2]
    own = torch.ones(blocks, size, dtype=torch.bool)
    mask = torch.cat([see, own], -1)[:, None].expand(-1, size, -1)
    context = (key[None], value[None])
    out: Tensor = Attention._attend(None, query, context, (own_key, own_value), mask)
    return out


@pytest.mark.parametrize(
    "blocks, context", [(1, 1), (4, 9), (30, 200)], ids=["least", "small", "large"]
)
def test_equals_the_specification(blocks: int, context: int) -> None:
    given = tensors(blocks, context, torch.float32)
    g = torch.Generator().manual_seed(1)
    anchors = torch.randint(1, context + 1, (blocks,), generator=g)
    see = torch.arange(context) < anchors[:, None]
    query, key, value, own_key, own_value = given
    out = attend_shared(query, (key, value), (own_key, own_value), see)
    wanted = specification(*given, see)
    torch.testing.assert_close(out, wanted, rtol=1e-5, atol=1e-6)
    upstream = torch.randn(out.shape, generator=g)
    got = torch.autograd.grad(out, given, upstream)
    expected = torch.autograd.grad(wanted, given, upstream)
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
        assert float(other.abs().max()) > 1e-3


def test_bfloat16_is_as_near_to_float32_as_the_specification() -> None:
    given = tensors(20, 90, torch.float32)
    see = torch.arange(90) < torch.arange(1, 21)[:, None] * 4
    exact = specification(*given, see).detach()
    half = [t.detach().bfloat16() for t in given]
    query, key, value, own_key, own_value = half
    fused = attend_shared(query, (key, value), (own_key, own_value), see)
    plain = specification(*half, see)
    assert fused.dtype is torch.bfloat16

    def error(x: Tensor) -> float:
        return float((x.float() - exact).abs().max())

    assert error(fused) < 2 * error(plain)
