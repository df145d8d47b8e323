"""Losslessness (2.1): emitted continuations have the target's distribution.

With both methods; block verification accepts more drafts than the standard one.

A Markov target and a Markov drafter over five tokens; rounds of drafting and
verification with ragged, token-independent lengths go on until every chain has three
tokens. Their 125 frequencies are compared with the exact ones (chi-square). A wrong
acceptance rule must fail the same test.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from vllm_dspark.ops import rejection_sample

V, BLOCK, WANTED, CHAINS = 5, 3, 3, 40_000
TEMPERATURE = 0.8
KINDS = ("dense", "truncated", "onehot")
METHODS = ("standard", "block")


def tables() -> tuple[Tensor, Tensor]:
    """Target logits and drafter logits given the previous token, ``[V, V]``."""
    g = torch.Generator().manual_seed(11)
    target = torch.randn(V, V, generator=g, dtype=torch.float32)
    target[2, 4] = -float("inf")
    return target, target.clamp(min=-3.0) + torch.randn(V, V, generator=g)


def exact(target: Tensor, start: int) -> Tensor:
    """Probability of each continuation of three tokens, ``[V**3]``."""
    p = (target.double() / TEMPERATURE).softmax(-1)
    joint = p[start][:, None, None] * p[:, :, None] * p[None, :, :]
    return joint.reshape(-1)


def draft(q: Tensor, last: Tensor, g: torch.Generator) -> tuple[Tensor, Tensor]:
    """A block drawn from the drafter: its inputs and its tokens, ``[R, BLOCK]``."""
    inputs, tokens = [], []
    for _ in range(BLOCK):
        inputs.append(last)
        last = torch.multinomial(q[last], 1, generator=g)[:, 0]
        tokens.append(last)
    return torch.stack(inputs, 1), torch.stack(tokens, 1)


def one_round(
    kind: str, method: str, last: Tensor, g: torch.Generator, broken: bool
) -> Tensor:
    """Drafts, verifies a ragged part of each block, returns emitted ids (-1 pads)."""
    target, drafter = tables()
    q = drafter.softmax(-1)
    if kind == "truncated":
        kept = drafter.topk(3).indices
        q = torch.zeros_like(q).scatter(1, kept, drafter.gather(1, kept).softmax(-1))
    num = last.shape[0]
    inputs, tokens = draft(q, last, g)
    lengths = torch.randint(0, BLOCK + 1, (num,), generator=g)
    used = torch.arange(BLOCK) < lengths[:, None]
    rows = torch.cat([inputs, tokens[:, -1:]], 1)
    rows[torch.arange(num), lengths] = torch.where(
        lengths > 0, tokens[torch.arange(num), (lengths - 1).clamp(min=0)], last
    )
    verified = torch.arange(BLOCK + 1) <= lengths[:, None]
    probs, support = q[inputs[used]], None
    if kind == "truncated":
        support = kept[inputs[used]]
        probs = probs.gather(1, support)
    accept = torch.rand(int(used.sum()), generator=g, dtype=torch.float64)
    result = rejection_sample(
        target[rows[verified]],
        tokens[used],
        lengths,
        draft_probs=None if kind == "onehot" else probs,
        draft_support=None if support is None else support.to(torch.int32),
        temperature=torch.full((num,), TEMPERATURE),
        # The broken rule accepts at twice the rate it should.
        accept_uniforms=accept / 2 if broken else accept,
        sample_uniforms=torch.rand(num, generator=g, dtype=torch.float64),
        method=method,
    )
    return result.token_ids.long()


def p_value(kind: str, method: str, seed: int, broken: bool = False) -> float:
    """Of the chi-square test of CHAINS continuations against the exact ones."""
    g = torch.Generator().manual_seed(seed)
    chains = torch.full((CHAINS, WANTED + BLOCK + 1), -1)
    filled = torch.zeros(CHAINS, dtype=torch.int64)
    last = torch.zeros(CHAINS, dtype=torch.int64)
    while bool((filled < WANTED).any()):
        todo = (filled < WANTED).nonzero()[:, 0]
        emitted = one_round(kind, method, last[todo], g, broken)
        for k in range(emitted.shape[1]):
            there = emitted[:, k] >= 0
            rows, ids = todo[there], emitted[there, k]
            chains[rows, filled[rows]] = ids
            filled[rows] += 1
            last[rows] = ids
    codes = (chains[:, :WANTED] * torch.tensor([V * V, V, 1])).sum(1)
    observed = torch.bincount(codes, minlength=V**WANTED).double()
    expected = exact(tables()[0], 0) * CHAINS
    assert int(observed[expected == 0].sum()) == 0
    cells = expected > 0
    chi = ((observed - expected)[cells] ** 2 / expected[cells]).sum()
    half = torch.tensor((int(cells.sum()) - 1) / 2, dtype=torch.float64)
    return float(torch.special.gammaincc(half, chi / 2))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", KINDS)
def test_continuations_have_the_target_distribution(kind: str, method: str) -> None:
    assert p_value(kind, method, seed=5) > 1e-3


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_wrong_acceptance_rule_is_noticed(kind: str, method: str) -> None:
    assert p_value(kind, method, seed=5, broken=True) < 1e-6


@pytest.mark.parametrize("kind", KINDS)
def test_block_verification_accepts_more(kind: str) -> None:
    """By more than five standard errors, on the same drafts and uniform numbers.

    One-hot drafts leave nothing to gain: p(x) / q(x) is never above 1.
    """
    emitted = {}
    for method in METHODS:
        g = torch.Generator().manual_seed(6)
        last = torch.arange(4 * CHAINS) % V
        emitted[method] = (one_round(kind, method, last, g, False) >= 0).sum(1).double()
    gain = emitted["block"] - emitted["standard"]
    error = gain.std() / len(gain) ** 0.5
    assert float(error) > 0
    if kind == "onehot":
        assert abs(float(gain.mean())) < 5 * float(error)
    else:
        assert float(gain.mean()) > 5 * float(error)
