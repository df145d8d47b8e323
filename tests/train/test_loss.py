"""The fused loss equals its row-by-row specification and hand-made numbers; its own
gradient equals autograd's through the specification, in float64-like settings too."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from vllm_dspark.train import loss as module
from vllm_dspark.train.loss import (
    TargetProbs,
    block_loss,
    confidence_loss,
    position_weights,
    reference_loss,
)


def some_target(rows: int, vocab: int, top: int, *, outside: bool) -> TargetProbs:
    """Random distributions; with ``outside`` a part of the tokens is not draftable."""
    g = torch.Generator().manual_seed(rows * 31 + vocab)
    full = torch.randn(rows, vocab + 5, generator=g).mul(2).softmax(-1)
    best = full.topk(top, dim=-1)
    limit = vocab - 3 if outside else vocab + 5
    ids = torch.where(best.indices < min(limit, vocab), best.indices, -1)
    return TargetProbs(ids, best.values)


def inputs(rows: int, vocab: int, rank: int) -> tuple[Tensor, ...]:
    g = torch.Generator().manual_seed(7)
    shapes = ((rows, 12), (rows, rank), (vocab, 12), (vocab, rank))
    return tuple(torch.randn(s, generator=g) * 0.7 for s in shapes)


def test_terms_by_hand() -> None:
    # q = (1/2, 1/4, 1/4); the target knows token 0 (0.6) and one that cannot be
    # drafted (0.3), and 0.1 lies elsewhere.
    logits = torch.tensor([[math.log(2.0), 0.0, 0.0]])
    target = TargetProbs(torch.tensor([[0, -1]]), torch.tensor([[0.6, 0.3]]))
    _, terms = reference_loss(logits, target, torch.ones(1), 1.0, 1.0)
    # |0.5-0.6| + 0.3 (never drafted) + |0.5 - 0.1| (everything else)
    assert terms.distance.item() == pytest.approx(0.8, abs=1e-6)
    assert terms.cross_entropy.item() == pytest.approx(0.6 * math.log(2), abs=1e-6)


def test_distance_is_the_whole_one_when_nothing_is_left_out() -> None:
    g = torch.Generator().manual_seed(1)
    logits, other = torch.randn(2, 6, 9, generator=g)
    p = other.softmax(-1)
    target = TargetProbs(torch.arange(9).expand(6, 9), p)
    _, terms = reference_loss(logits, target, torch.ones(6), 0.0, 1.0)
    full = (logits.softmax(-1) - p).abs().sum(-1)
    torch.testing.assert_close(terms.distance, full)


def test_distance_is_below_the_full_one_by_twice_the_rest_at_most() -> None:
    g = torch.Generator().manual_seed(2)
    logits, other = torch.randn(2, 50, 40, generator=g)
    p, q = other.softmax(-1), logits.softmax(-1)
    best = p.topk(8, dim=-1)
    _, terms = reference_loss(
        logits, TargetProbs(best.indices, best.values), torch.ones(50), 0.0, 1.0
    )
    full = (q - p).abs().sum(-1)
    rest = torch.minimum(1 - q.gather(1, best.indices).sum(-1), 1 - best.values.sum(-1))
    gap = full - terms.distance
    assert bool((gap >= -1e-5).all()) and bool((gap <= 2 * rest + 1e-5).all())
    assert float(gap.max()) > 0.01  # the bound is about something


@pytest.mark.parametrize("outside", [False, True])
@pytest.mark.parametrize("rank", [0, 5])
@pytest.mark.parametrize("factors", [(0.1, 0.9), (1.0, 0.0), (0.0, 1.0)])
def test_fused_equals_reference_with_gradients(
    monkeypatch: pytest.MonkeyPatch, outside: bool, rank: int, factors
) -> None:
    monkeypatch.setattr(module, "_ROWS", 4)  # several slices and a short last one
    hidden, latent, lm_head, w2 = inputs(11, 30, max(rank, 1))
    target = some_target(11, 30, 6, outside=outside)
    weights = torch.linspace(0.0, 1.0, 11)
    trained = [hidden, latent, w2] if rank else [hidden]
    for tensor in trained:
        tensor.requires_grad_()
    head = (latent, w2) if rank else (None, None)
    fused, terms = block_loss(
        hidden, head[0], lm_head, head[1], target, weights, *factors
    )
    got = torch.autograd.grad(3.0 * fused, trained)
    logits = hidden @ lm_head.T + (latent @ w2.T if rank else 0.0)
    plain, expected = reference_loss(logits, target, weights, *factors)
    wanted = torch.autograd.grad(3.0 * plain, trained)
    torch.testing.assert_close(fused, plain)
    torch.testing.assert_close(terms.distance, expected.distance)
    torch.testing.assert_close(terms.cross_entropy, expected.cross_entropy)
    for one, other in zip(got, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
        assert float(other.abs().max()) > 1e-4


def test_gradient_points_downhill_by_finite_differences() -> None:
    hidden, _, lm_head, _ = inputs(5, 20, 1)
    target = some_target(5, 20, 4, outside=True)
    hidden.requires_grad_()
    weights = torch.ones(5)

    def value(x: Tensor) -> Tensor:
        return block_loss(x, None, lm_head, None, target, weights, 0.1, 0.9)[0]

    (gradient,) = torch.autograd.grad(value(hidden), hidden)
    g = torch.Generator().manual_seed(3)
    direction = torch.randn(hidden.shape, generator=g)
    step = 1e-3  # float32: below this the difference drowns in rounding
    with torch.no_grad():
        numeric = (
            value(hidden + step * direction) - value(hidden - step * direction)
        ) / (2 * step)
    exact = (gradient * direction).sum()
    assert float(numeric) == pytest.approx(float(exact), rel=2e-2)


def test_confidence_loss_by_hand_and_without_gradient_to_the_distance() -> None:
    logits = torch.tensor([0.0, 2.0], requires_grad=True)
    distance = torch.tensor([0.5, 2.0], requires_grad=True)
    each = confidence_loss(logits, distance)
    # targets 0.75 and 0: -(.75 log .5 + .25 log .5), and -log(1 - sigmoid(2))
    expected = [math.log(2.0), math.log1p(math.exp(2.0))]
    assert each.tolist() == pytest.approx(expected, rel=1e-6)
    each.sum().backward()
    assert distance.grad is None and logits.grad is not None
    wanted = torch.sigmoid(logits) - torch.tensor([0.75, 0.0])
    torch.testing.assert_close(logits.grad, wanted)


def test_position_weights() -> None:
    weights = position_weights(4)
    assert weights.tolist() == pytest.approx([math.exp(-k / 4) for k in range(4)])


def test_minimum_is_the_target() -> None:
    """Descending on the loss brings q to p_t: distance to 0."""
    p = torch.tensor([[0.5, 0.3, 0.1, 0.1]])
    target = TargetProbs(torch.arange(4)[None], p)
    hidden = torch.zeros(1, 4, requires_grad=True)
    for step in range(400):
        loss, terms = block_loss(
            hidden, None, torch.eye(4), None, target, torch.ones(1), 0.1, 0.9
        )
        (gradient,) = torch.autograd.grad(loss, hidden)
        with torch.no_grad():
            hidden -= 0.3 / (1 + step / 40) * gradient
    torch.testing.assert_close(F.softmax(hidden, -1), p, atol=0.02, rtol=0)
    assert float(terms.distance) < 0.04
