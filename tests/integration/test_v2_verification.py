"""How a step's budget becomes numbers of drafts on the device, without an engine."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from vllm_dspark.integration.report import DeviceBudget


@pytest.fixture
def manager() -> Any:
    from vllm_dspark.integration.v2.verification import DSparkV2Verification

    made = object.__new__(DSparkV2Verification)
    made._max_total_logits, made.num_bonus_tokens, made._budget = 100, 1, None
    made._confidence_probs = torch.tensor(
        [[1.0, 1.0, 1.0], [0.9, 0.8, 0.1], [0.5, 0.5, 0.5], [0.7, 0.6, 0.5]]
    )
    return made


def budget(drafts: int, **reserved: int) -> DeviceBudget:
    own = np.array(list(reserved.values()), dtype=np.int64)
    return DeviceBudget(tuple(reserved), own, drafts, None)


SLOTS = {"padded": 0, "a": 1, "b": 2, "c": 3}


def lens(manager: Any, drafts: dict[str, int]) -> tuple[int, list[int]]:
    """Drafts that the step may verify, and of each request."""
    count = manager._count(drafts)
    slots = torch.tensor([SLOTS[r] for r in drafts])
    there = torch.tensor(list(drafts.values()), dtype=torch.int32)
    return count, manager._best(list(drafts), slots, there, count).tolist()


def test_the_best_survivals_get_it(manager: Any) -> None:
    manager.expect(budget(4, a=0, b=0, c=0))
    assert lens(manager, {"a": 3, "b": 3, "c": 3}) == (4, [2, 1, 1])
    manager.expect(budget(2, a=0, b=2, c=0))  # b has a goal
    assert lens(manager, {"a": 3, "b": 3, "c": 3}) == (4, [2, 2, 0])


def test_drafts_that_nobody_made_take_none_of_it(manager: Any) -> None:
    """vLLM pads the last token of a prompt; such a slot's confidences are 1."""
    manager.expect(budget(3, a=0, b=0))
    drafts = {"padded": 3, "a": 3, "b": 3}
    assert lens(manager, drafts) == (3, [0, 2, 1])
    manager.expect(budget(9, a=0, b=0))  # more than there is
    assert lens(manager, drafts) == (6, [0, 3, 3])


def test_limits(manager: Any) -> None:
    drafts = {"a": 3, "b": 2}
    assert manager._count(drafts) == 5  # a step of vLLM's own: everything
    manager.expect(budget(9, a=3, b=3))
    assert manager._count(drafts) == 5
    manager._max_total_logits = 4  # two of them are no drafts
    assert manager._count(drafts) == 2
    manager._max_total_logits = 1
    assert manager._count(drafts) == 0


def test_the_first_draft_outside_of_a_grammar_is_verified() -> None:
    from vllm.v1.core.sched.output import GrammarOutput

    from vllm_dspark.integration.grammar import EVERYTHING, PADDING
    from vllm_dspark.integration.grammar import verify_first_forbidden as allow

    # By request: drafts, how many are acceptable, temperature, and what comes of it.
    rows: dict[str, tuple[list[int], int, float, int]] = {
        "cut": ([7, 8, 9], 1, 1.0, 2),
        "whole": ([7, 8, 9], 3, 1.0, 3),
        "greedy": ([7, 8, 9], 1, 0.0, 1),
        "unknown": ([PADDING] * 3, 0, 1.0, 0),
        "validated": ([7, PADDING, PADDING], 1, 1.0, 2),
        "unmasked": ([7, 8, 9], 1, 1.0, 1),
    }
    masks = np.zeros((len(rows) * 4, 1), dtype=np.int32)
    masks[-4:] = EVERYTHING
    made = GrammarOutput(list(rows), masks, [good for _, good, _, _ in rows.values()])
    step = SimpleNamespace(
        scheduled_spec_decode_tokens={r: row[0] for r, row in rows.items()},
        num_invalid_spec_tokens={"validated": 2},
    )
    requests = {
        r: SimpleNamespace(sampling_params=SimpleNamespace(temperature=row[2]))
        for r, row in rows.items()
    }
    allow(made, step, requests)  # type: ignore[arg-type]
    assert made.num_acceptable_drafts == [row[3] for row in rows.values()]
