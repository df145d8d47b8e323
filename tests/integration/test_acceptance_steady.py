"""Acceptance does not decay under load that frees, moves and reuses everything.

A probe set is drafted for before and after a few thousand steps of mixed load on the
same engine: prompts that share beginnings (prefix hits), a K/V cache too small for the
batch (preemptions), aborts at any time, prompts in parts, greedy and sampled requests.
State that goes stale without an error (context K/V of a freed page, drafts or
probabilities of another request, a wrong row after a request has left) costs
acceptance and nothing else, so texts cannot show it; the probe's drafts do. On equal
histories they must be equal, token for token: τ then is, without any noise.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

from tests.integration.engine import engine
from tests.integration.oracle.history import Oracle
from tests.integration.recorder import (
    Recording,
    Text,
    drive,
    greedy,
    prompt,
    recording,
    user_id,
)

SETTINGS = {
    "block_size": 32,
    "num_gpu_blocks_override": 20,
    "max_num_seqs": 8,
    "max_num_batched_tokens": 64,
    "enable_prefix_caching": True,
    "spec": {"draft_sample_method": "probabilistic"},
}
LOAD_STEPS = 2500


@pytest.mark.slow
def test_the_probe_is_drafted_alike_before_and_after_load(
    tiny_target: Path, tiny_drafter: Path
) -> None:
    oracle = Oracle(tiny_target, tiny_drafter)
    with (
        engine(tiny_target, tiny_drafter, **SETTINGS) as eng,
        recording(eng.runner) as record,
    ):
        before = probe(eng, record, oracle, "before")
        aborted, finished = load(eng, record)
        metrics = {m.name: getattr(m, "value", None) for m in eng.llm.get_metrics()}
        after = probe(eng, record, oracle, "after")
    # The load did what it is for.
    assert metrics["vllm:num_preemptions"] > 20
    assert metrics["vllm:prefix_cache_hits"] > 5000
    assert aborted > 50
    assert finished > 100
    assert after == before
    tau = 1 + sum(n for _, n in before.values()) / len(before)
    assert 1.3 < tau < 5.5


def test_requests_leave_no_drafts_behind(tiny_target: Path, tiny_drafter: Path) -> None:
    """Distributions of drafts that nobody will verify are megabytes per request on a
    real vocabulary. An idle engine may hold those of its last step, no more."""
    with engine(tiny_target, tiny_drafter, **SETTINGS) as eng:
        for i in range(6):
            drive(eng, [(0, prompt(20, seed=i), greedy(10))], prefix=f"alone{i}-")
            # A server's loop tells the worker of the end in a step without tokens.
            assert eng.scheduler.has_requests()
            eng.llm.llm_engine.step()
            assert not eng.scheduler.has_requests()
        assert len(eng.runner._pending) <= 1
        assert len(eng.scheduler.draft_confidences) <= 1


def probe(
    eng: Any, record: Recording, oracle: Oracle, name: str
) -> dict[tuple[int, int], tuple[list[int], int]]:
    """Drafts and how many were accepted, by prompt and anchor position."""
    record.clear()
    arrivals = [(3 * i, prompt(20 + 9 * i, seed=99), greedy(40)) for i in range(8)]
    texts = drive(eng, arrivals, prefix=name)
    # Preemptions in the probe would change which anchors there are.
    oracle.check(record, texts)
    found = {}
    for i, text in enumerate(texts):
        for block in record.of(text):
            at = block.anchor_position
            found[i, at] = (block.drafts, _accepted(text, at, block.drafts))
    return found


def _accepted(text: Text, anchor: int, drafts: list[int]) -> int:
    after = text.tokens[anchor + 1 :]
    pairs = list(zip(drafts, after, strict=False))
    return next((i for i, (a, b) in enumerate(pairs) if a != b), len(pairs))


def load(eng: Any, record: Recording) -> tuple[int, int]:
    """Thousands of steps; returns how many requests were aborted and finished."""
    from vllm import SamplingParams

    source = random.Random(7)
    llm_engine = eng.llm.llm_engine
    beginnings = [prompt(96, seed=s) for s in range(3)]
    running: set[str] = set()
    aborted = finished = added = 0
    for step in range(LOAD_STEPS):
        while len(running) < 8 and (not running or source.random() < 0.5):
            tokens = source.choice(beginnings)[: source.choice((5, 40, 96))]
            tokens = tokens + prompt(source.randrange(1, 60), seed=added)
            params = SamplingParams(
                temperature=source.choice((0.0, 0.0, 0.7, 1.2)),
                seed=source.choice((None, added)),
                max_tokens=source.randrange(1, 90),
                detokenize=False,
            )
            name = f"load{added}"
            llm_engine.add_request(name, {"prompt_token_ids": tokens}, params)
            running.add(name)
            added += 1
        if source.random() < 0.06:
            name = source.choice(sorted(running))
            llm_engine.abort_request([name])
            running.discard(name)
            aborted += 1
        for output in llm_engine.step():
            if output.finished and user_id(output.request_id) in running:
                running.discard(user_id(output.request_id))
                finished += 1
        if step % 100 == 0:
            record.clear()
    llm_engine.abort_request(sorted(running))
    while llm_engine.has_unfinished_requests():
        llm_engine.step()
    return aborted, finished
