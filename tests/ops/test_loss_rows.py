"""The training loss of rows in C++ equals plain torch, on every instruction set."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from vllm_dspark.ops import extension_native
from vllm_dspark.ops.loss_rows import loss_rows_

FACTORS = [(0.1, 0.9), (1.0, 0.0), (0.0, 1.0)]


def some_rows(rows: int, vocab: int, top: int) -> tuple[Tensor, ...]:
    """Logits, ids (some not draftable), probabilities with a remainder, weights."""
    g = torch.Generator().manual_seed(rows * 7 + vocab)
    logits = torch.randn(rows, vocab, generator=g) * 4
    # Most of the target's tokens are likely drafts as well, as in training.
    best = (logits + torch.randn(rows, vocab, generator=g)).topk(top, -1)
    ids = best.indices.int()
    ids[torch.rand(rows, top, generator=g) < 0.2] = -1
    probs = best.values.softmax(-1) * torch.rand(rows, 1, generator=g)
    weights = torch.linspace(0.0, 1.0, rows)
    return logits, ids, probs, weights


def both(
    logits: Tensor, rest: tuple[Tensor, ...], factors: tuple[float, float]
) -> tuple[tuple[Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]:
    """Terms and gradient by the extension and by plain torch."""
    found = []
    for backend in ("native", "reference"):
        z = logits.clone()
        ce, distance, ran = loss_rows_(z, *rest, *factors, backend=backend)
        assert ran == backend
        found.append((ce, distance, z.float()))
    return found[0], found[1]


@pytest.mark.parametrize("factors", FACTORS)
@pytest.mark.parametrize("vocab", [70, 2048, 5003])
def test_float32_equals_the_reference(isa: str, vocab: int, factors) -> None:
    logits, *rest = some_rows(9, vocab, 16)
    native, plain = both(logits, tuple(rest), factors)
    for one, other in zip(native, plain, strict=True):
        torch.testing.assert_close(one, other, rtol=2e-5, atol=2e-6)
        assert float(other.abs().max()) > 1e-3


@pytest.mark.parametrize("factors", FACTORS)
def test_bfloat16_rounds_the_gradient_once(isa: str, factors) -> None:
    logits, *rest = some_rows(6, 3001, 16)
    rounded = logits.bfloat16()
    native, plain = both(rounded, tuple(rest), factors)
    exact, _ = both(rounded.float(), tuple(rest), factors)
    torch.testing.assert_close(native[0], plain[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(native[1], plain[1], rtol=1e-4, atol=1e-5)
    # Nearest even: half a unit in the last of 8 bits.
    torch.testing.assert_close(native[2], exact[2], rtol=2**-8, atol=1e-9)


def test_the_gradient_is_that_of_the_loss() -> None:
    """By automatic differentiation of the definition, in float64."""
    logits, ids, probs, weights = some_rows(5, 40, 8)
    z = logits.double().requires_grad_()
    q, inside = z.softmax(-1), ids >= 0
    at = q.gather(1, ids.clamp_min(0).long()) * inside
    distance = (at - probs * inside).abs().sum(-1) + (probs * ~inside).sum(-1)
    distance = distance + ((1 - at.sum(-1)) - (1 - probs.sum(-1))).abs()
    logs = z.log_softmax(-1).gather(1, ids.clamp_min(0).long())
    ce = -(probs * inside * logs).sum(-1)
    (weights * (0.3 * ce + 0.7 * distance)).sum().backward()
    assert z.grad is not None
    for backend in ("native", "reference"):
        mine = logits.clone()
        got = loss_rows_(mine, ids, probs, weights, 0.3, 0.7, backend)
        torch.testing.assert_close(got[0], ce.detach().float(), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(mine, z.grad.float(), rtol=1e-4, atol=1e-6)


def test_no_row_and_rows_on_a_team(native: None) -> None:
    empty = torch.zeros(0, 8)
    none = torch.zeros(0, 3, dtype=torch.int32)
    ce, _, _ = loss_rows_(empty, none, torch.zeros(0, 3), torch.zeros(0), 1.0, 1.0)
    assert ce.shape == (0,)
    logits, *rest = some_rows(64, 4096, 8)  # enough work for several threads
    torch.set_num_threads(2)
    native_terms, plain = both(logits, tuple(rest), (0.1, 0.9))
    torch.testing.assert_close(native_terms[2], plain[2], rtol=2e-5, atol=2e-6)


def test_a_diverged_row_is_seen(isa: str) -> None:
    logits, *rest = some_rows(3, 100, 8)
    logits[1, 5] = float("nan")
    ce, distance, _ = loss_rows_(logits, *rest, 0.5, 0.5, backend="native")
    assert bool(ce[1].isnan()) and bool(distance[1].isnan())
    assert bool(logits[1].isnan().any()) and bool(logits[[0, 2]].isfinite().all())


@pytest.mark.parametrize("backend", ["native", "reference"])
def test_bad_arguments_are_named(native: None, backend: str) -> None:
    logits, ids, probs, weights = some_rows(4, 50, 8)
    bad = ids.clone()
    bad[2, 3] = 50
    with pytest.raises(ValueError, match=r"outside \[-1, 50\)"):
        loss_rows_(logits, bad, probs, weights, 0.1, 0.9, backend)
    with pytest.raises(ValueError, match="probs: expected float32 of shape"):
        loss_rows_(logits, ids, probs[:, :5].contiguous(), weights, 0.1, 0.9, backend)
    with pytest.raises(ValueError, match="ids: expected int32"):
        loss_rows_(logits, ids.long(), probs, weights, 0.1, 0.9, backend)
    with pytest.raises(ValueError, match="no vocabulary"):
        loss_rows_(torch.zeros(4, 0), ids, probs, weights, 0.1, 0.9, backend)
    with pytest.raises(ValueError, match="unknown 'magic'"):
        loss_rows_(logits, ids, probs, weights, 0.1, 0.9, "magic")


def test_the_extension_checks_for_itself(native: None) -> None:
    logits, ids, probs, weights = some_rows(4, 50, 8)
    capsules = [extension_native.capsule(t) for t in (logits, ids, probs, weights)]
    out = [extension_native.capsule(torch.empty(3)) for _ in range(2)]
    with pytest.raises(ValueError, match="cross_entropy"):
        extension_native.require().loss_rows(*capsules, 0.1, 0.9, *out)
    with pytest.raises(TypeError, match="expected 8 arguments"):
        extension_native.require().loss_rows(*capsules)
