"""The step log agrees with what vLLM and the controller count, and harms nobody."""

from __future__ import annotations

import json
import logging
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from tests.integration.engine import engine
from tests.integration.recorder import drive
from tests.integration.test_adaptive import ARRIVALS, cost_table, jagged
from tests.integration.test_kept_cost import said
from vllm_dspark.schedule.facts import StepTimes

pytestmark = pytest.mark.slow

KEYS = {
    *("step", "time", "requests", "prompt_tokens", "context_tokens"),
    *("drafts", "verified", "positions"),
    *("reason", "predicted_seconds", "target_seconds", "draft_seconds", "emitted"),
}


def rows(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_every_step_is_there(
    tiny_target: Path, tiny_drafter: Path, tmp_path: Path
) -> None:
    file = tmp_path / "steps.jsonl"
    table = cost_table(tmp_path, jagged)
    ours = {"policy": "adaptive", "cost_table": table, "step_log": str(file)}
    config = {"dspark": ours}
    with engine(tiny_target, tiny_drafter, additional_config=config) as eng:
        # Logged, but not learned from: what is drafted is the same on every machine.
        timed: list[StepTimes] = []
        eng.scheduler.controller.timed = timed.append
        texts = drive(eng, ARRIVALS)
        found = rows(file)  # complete as soon as nothing is left to do
        stats, totals = eng.stats(), eng.scheduler.controller.totals
        reasons = eng.scheduler.controller.drafting.counts
    assert rows(file) == found
    assert all(set(row) == KEYS for row in found)
    assert [row["step"] for row in found] == list(range(len(found)))
    times = [row["time"] for row in found]
    assert times == sorted(times)
    prompts = sum(len(ids) for _, ids, _ in ARRIVALS)
    new = sum(len(t.tokens) for t in texts) - prompts
    # The round that ends a text may go on past its end.
    assert new <= sum(r["emitted"] for r in found) <= new + 5 * len(ARRIVALS)
    assert sum(r["prompt_tokens"] for r in found) == prompts
    assert max(r["requests"] for r in found) > 2
    assert all((r["context_tokens"] > 0) == (r["requests"] > 0) for r in found)
    assert sum(r["verified"] for r in found) == stats.draft_tokens > 40
    assert sum(r["drafts"] for r in found) > stats.draft_tokens  # some were trimmed
    # Nothing is computed in the steps that only say that a request has ended.
    drafted = Counter(r["positions"] for r in found)
    assert drafted <= totals.draft_lens and set(totals.draft_lens - drafted) <= {5}
    decoding = [r for r in found if r["requests"]]
    assert sum(reasons.values()) > 20
    assert Counter(r["reason"] for r in decoding) >= reasons
    priced = [r["predicted_seconds"] for r in found[1:]]  # costs come with the first
    assert found[0]["predicted_seconds"] is None and min(priced) > 0
    assert all(r["target_seconds"] > 0 and r["draft_seconds"] >= 0 for r in found)
    agrees_with_what_is_learned_from(found, timed)


def agrees_with_what_is_learned_from(
    found: list[dict[str, Any]], timed: list[StepTimes]
) -> None:
    """The controller is told the same times, and which steps follow drafts."""
    assert [t.target_seconds for t in timed] == [r["target_seconds"] for r in found]
    assert [t.prompt_tokens for t in timed] == [r["prompt_tokens"] for r in found]
    drafts = [r["positions"] > 0 or r["drafts"] > 0 for r in found]
    told = [t.after_drafts for t in timed[1:] if t.overhead is not None]
    assert told == [
        before
        for before, t in zip(drafts, timed[1:], strict=False)
        if t.overhead is not None
    ]
    assert True in told


def test_a_full_disk_is_said_once(
    tiny_target: Path,
    tiny_drafter: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(logging.getLogger("vllm"), "level", logging.INFO)
    config = {"dspark": {"step_log": "/dev/full"}}
    with (
        caplog.at_level("WARNING", "vllm_dspark"),
        engine(tiny_target, tiny_drafter, additional_config=config) as eng,
    ):
        first, again = (drive(eng, ARRIVALS) for _ in range(2))
    assert [t.tokens for t in first] == [t.tokens for t in again]
    (message,) = said(caplog, "step log")
    assert "/dev/full" in message and "No space" in message


def test_a_file_that_cannot_be_opened_is_said_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    from vllm_dspark.integration.step_log import StepLog

    with caplog.at_level("WARNING", "vllm_dspark"):
        log = StepLog(str(tmp_path))  # a folder
        log.flush()
    (message,) = said(caplog, "step log")
    assert "Is a directory" in message


def test_the_folder_must_be_there(tiny_target: Path, tiny_drafter: Path) -> None:
    config = {"dspark": {"step_log": "/nowhere/steps.jsonl"}}
    with (
        pytest.raises(ValueError, match=r"'step_log'.*there is no folder /nowhere"),
        engine(tiny_target, tiny_drafter, additional_config=config),
    ):
        pass
