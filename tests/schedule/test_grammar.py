"""Blocks that a grammar ends: what may be cut and what may not, by enumeration.

The grammar forbids token C after some prefixes: the target's masked p has none of it,
but the drafter, which knows no grammar, draws it with probability q(C). A draft is
accepted with min(1, p/q), and what a rejection draws from (p - q)+ makes up for the
rest. If a forbidden draft is cut, the round's last token is drawn from p instead: that
is right only where (p - q)+ is p itself, as with one-hot q. If the forbidden draft is
the last of its block, it is rejected for certain, and all is well.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pytest

from tests.schedule.curves import curve
from vllm_dspark.schedule.planner import VerifyStep, plan

K, V, FORBIDDEN = 2, 3, 2
BLOCKS = list(itertools.product(range(V), repeat=K))
PREFIXES = [p for n in range(K + 1) for p in itertools.product(range(V), repeat=n)]
Prefix = tuple[int, ...]
# Lengths of all requests from their survivals [R, K] and drafts there are [R].
Policy = Callable[[np.ndarray, np.ndarray], np.ndarray]


@dataclass(frozen=True)
class Request:
    """Target p (masked) and drafter q after each prefix, ``[V]``; c after it."""

    p: dict[Prefix, np.ndarray]
    q: dict[Prefix, np.ndarray]
    c: dict[Prefix, float]


def random_request(random: np.random.Generator, one_hot: bool = False) -> Request:
    p = {prefix: random.dirichlet(np.ones(V)) for prefix in PREFIXES}
    q = {prefix: random.dirichlet(np.ones(V)) for prefix in PREFIXES}
    if one_hot:
        q = {prefix: np.eye(V)[row.argmax()] for prefix, row in q.items()}
    for row in p.values():
        if random.random() < 0.7:
            row[FORBIDDEN] = 0.0
            row /= row.sum()
    return Request(p, q, {x: float(random.choice([0.2, 0.7, 1.0])) for x in PREFIXES})


def allowed(request: Request, block: Prefix, keep: bool) -> int:
    """Drafts that a grammar leaves of a block, with or without the one it forbids."""
    for k, token in enumerate(block):
        if request.p[block[:k]][token] == 0:
            return k + keep
    return len(block)


def emitted(request: Request, block: Prefix, length: int) -> np.ndarray:
    """Distribution of the first K + 1 tokens, ``[V] * (K + 1)``."""
    out = np.zeros((V,) * (K + 1))

    def go_on(prefix: Prefix, weight: float) -> None:
        if len(prefix) == K + 1:
            out[prefix] += weight
            return
        for token, share in enumerate(request.p[prefix]):
            go_on((*prefix, token), weight * share)

    reached = 1.0
    for k in range(length):
        p, q = request.p[block[:k]], request.q[block[:k]]
        accept = min(1.0, p[block[k]] / q[block[k]])
        if accept < 1:
            residual = np.maximum(p - q, 0.0)
            for token, share in enumerate(residual / residual.sum()):
                go_on((*block[:k], token), reached * (1 - accept) * share)
        reached *= accept
    go_on(block[:length], reached)
    return out


def bias(requests: list[Request], keep: bool, policy: Policy) -> float:
    """Total variation of the joint text of all requests from the target's."""
    total, right = 0.0, np.ones(1)
    for request in requests:
        right = np.outer(right, emitted(request, BLOCKS[0], 0)).ravel()
    for blocks in itertools.product(BLOCKS, repeat=len(requests)):
        pairs = list(zip(requests, blocks, strict=True))
        drawn = math.prod(
            r.q[block[:k]][block[k]] for r, block in pairs for k in range(K)
        )
        if not drawn:
            continue
        survival = np.array(
            [np.cumprod([r.c[block[:k]] for k in range(K)]) for r, block in pairs]
        )
        num_drafts = np.array([allowed(r, block, keep) for r, block in pairs])
        lens = policy(survival, num_drafts)
        joint = np.ones(1)
        for (request, block), length in zip(pairs, lens.tolist(), strict=True):
            joint = np.outer(joint, emitted(request, block, length)).ravel()
        total = total + drawn * joint
    return 0.5 * float(np.abs(total - right).sum())


def everything(survival: np.ndarray, num_drafts: np.ndarray) -> np.ndarray:
    return num_drafts


def adaptive(seconds: np.ndarray) -> Policy:
    def policy(survival: np.ndarray, num_drafts: np.ndarray) -> np.ndarray:
        cost = curve(seconds)
        step = VerifyStep(survival, len(survival), cost, num_drafts=num_drafts)
        return plan(step).verify_lens

    return policy


def biases(keep: bool, one_hot: bool = False) -> list[float]:
    """Of one and of two requests, all verified and by the planner on jagged costs."""
    random = np.random.default_rng(0)
    found = []
    for _ in range(20):
        requests = [random_request(random, one_hot) for _ in range(2)]
        stairs = 1.0 + np.cumsum(random.choice([0.0, 0.05, 0.3, 1.0], size=8))
        for policy in (everything, adaptive(stairs)):
            found += [bias(requests[:1], keep, policy), bias(requests, keep, policy)]
    return found


def test_a_cut_is_biased() -> None:
    # p = (½, ½, 0), q = (½, 0, ½): A is accepted when drawn, and B is all the residual.
    p, q = np.array([0.5, 0.5, 0.0]), np.array([0.5, 0.0, 0.5])
    request = Request(dict.fromkeys(PREFIXES, p), dict.fromkeys(PREFIXES, q), {})
    first = sum(
        (0.25 if block[0] != 1 else 0) * emitted(request, block, length).sum((1, 2))
        for block in [(0, 0), (0, 2), (2, 0), (2, 2)]
        for length in [allowed(request, block, keep=False)]
    )
    assert first == pytest.approx([0.75, 0.25, 0.0])
    assert max(biases(keep=False)) > 0.1


@pytest.mark.parametrize("one_hot", [False, True])
def test_the_forbidden_draft_as_the_last_one_is_not(one_hot: bool) -> None:
    assert max(biases(True, one_hot)) < 1e-12


def test_a_cut_of_one_hot_drafts_is_not() -> None:
    assert max(biases(keep=False, one_hot=True)) < 1e-12
