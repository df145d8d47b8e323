"""Drafts that wait for verification: rows find their distributions.

Regimes: one block (the common case); blocks of different steps in one batch, in mixed
order (a request that was skipped); a block without distributions beside one with them
(greedy requests drafted alone); per-row and shared supports; finished requests.
"""

from __future__ import annotations

import numpy as np
import torch

from vllm_dspark.integration.pending import Drafted, PendingDrafts
from vllm_dspark.types import DraftBlock

K, S = 3, 4


def block(first: float, *, rows: int, probs: bool = True, support: str) -> DraftBlock:
    """Entry (r, k, s) of the distributions is ``first + 100 r + 10 k + s``."""
    grid = torch.arange(rows).view(-1, 1, 1) * 100 + torch.arange(K).view(1, -1, 1) * 10
    values = (first + grid + torch.arange(S)).float()
    ids = {
        "none": None,
        "shared": torch.arange(S, dtype=torch.int32).view(1, 1, S) * 2,
        "rows": values.to(torch.int32),
    }[support]
    return DraftBlock(
        token_ids=torch.zeros((rows, K), dtype=torch.int64),
        draft_probs=values if probs else None,
        draft_support=ids if probs or support == "shared" else None,
        confidence=None,
        finite=torch.ones(rows, dtype=torch.bool),
    )


def first_column(pending: PendingDrafts, ids: list[str], counts: list[int]) -> list:
    found = pending.distributions(ids, counts)
    assert found is not None
    return found.probs[:, 0].tolist()


def test_rows_of_one_block_are_cut_to_what_is_verified() -> None:
    pending = PendingDrafts()
    drafted = Drafted(np.array([0, 2]), block(0, rows=2, support="rows"))
    pending.update(["a", "b", "c"], drafted, {"a", "b", "c"})
    assert first_column(pending, ["c", "b", "a"], [2, 0, 1]) == [100, 110, 0]
    found = pending.distributions(["c", "b", "a"], [2, 0, 1])
    assert found is not None and found.support is not None
    assert found.support[:, 1].tolist() == [101, 111, 1]


def test_blocks_of_two_steps_come_in_batch_order() -> None:
    pending = PendingDrafts()
    alive = {"a", "b", "c"}
    old = Drafted(np.array([0, 1]), block(0, rows=2, support="shared"))
    pending.update(["a", "b"], old, alive)
    new = Drafted(np.array([0, 1]), block(1000, rows=2, support="shared"))
    pending.update(["c", "a"], new, alive)  # b was not scheduled
    ids, counts = ["a", "b", "c"], [1, 3, 2]
    assert first_column(pending, ids, counts) == [1100, 100, 110, 120, 1000, 1010]
    found = pending.distributions(ids, counts)
    assert found is not None and found.support is not None
    assert found.support.tolist() == [[0, 2, 4, 6]]


def test_greedy_block_beside_a_sampled_one_does_not_make_it_one_hot() -> None:
    pending = PendingDrafts()
    greedy = block(0, rows=1, probs=False, support="none")
    pending.update(["g"], Drafted(np.array([0]), greedy), {"g", "s"})
    sampled = block(500, rows=1, support="rows")
    pending.update(["s"], Drafted(np.array([0]), sampled), {"g", "s"})
    assert first_column(pending, ["g", "s"], [2, 2]) == [0, 0, 500, 510]
    assert pending.distributions(["g"], [2]) is None


def test_finished_requests_are_forgotten() -> None:
    pending = PendingDrafts()
    drafted = Drafted(np.array([0, 1]), block(0, rows=2, support="none"))
    pending.update(["a", "b"], drafted, {"a", "b"})
    assert len(pending) == 2
    pending.update([], None, {"b"})
    assert len(pending) == 1
