"""The drafter stays equal to its plain-torch twin whatever the scheduler does.

As in ``test_drafter_equal.py`` every draft step is recomputed from the text alone. What
each regime would catch that the others would not:

- chunked prefill with requests joining and leaving: rows of one request drafted with
  another's page table, drafts from a prompt that is not finished;
- prefix hits: context K/V that is not kept with the target's pages;
- preemption: context K/V of pages that were given to another request;
- a request at the end of the context, or of the drafter's own shorter one: neighbours
  that lose their drafts, or silently their context, because of it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.integration.engine import engine
from tests.integration.oracle.history import Oracle
from tests.integration.recorder import drive, greedy, prompt, recording, text_of
from tests.tiny import make_tiny_drafter

BLOCK = 32  # tokens per K/V page; vLLM's default on CPU is 128


@pytest.fixture(scope="module")
def pair(tiny_target: Path, tmp_path_factory: Any) -> tuple[Path, Path]:
    """A stateful head, two layers, three taps."""
    folder = tmp_path_factory.mktemp("pair") / "drafter"
    drafter = make_tiny_drafter(folder, tiny_target, head_type="rnn")
    return tiny_target, drafter


@pytest.fixture(scope="module")
def oracle(pair: tuple[Path, Path]) -> Oracle:
    return Oracle(*pair)


def test_chunked_prefill_with_requests_joining_and_leaving(
    pair: tuple[Path, Path], oracle: Oracle
) -> None:
    arrivals = [
        (0, prompt(150), greedy(20)),
        (0, prompt(3), greedy(60)),
        (2, prompt(97), greedy(7)),
        (5, prompt(40), greedy(33)),
        (6, prompt(200), greedy(25)),
        (9, prompt(64), greedy(1)),
        (12, prompt(33), greedy(50)),
        (13, prompt(120), greedy(15)),
    ]
    with (
        engine(
            *pair, block_size=BLOCK, max_num_batched_tokens=50, max_num_seqs=6
        ) as eng,
        recording(eng.runner) as record,
    ):
        texts = drive(eng, arrivals)
    assert len(texts) == len(arrivals)
    oracle.check(record, texts)
    mixed = [s for s in record.steps if s[0] > 0 and s[1] > 0]
    assert len(mixed) >= 5, "no step held both a prompt in parts and drafts"
    assert {b.batch for b in record.blocks} >= {1, 2, 3, 4}


def test_prefix_hits_bring_their_context(
    pair: tuple[Path, Path], oracle: Oracle
) -> None:
    first, other = prompt(150), prompt(150)[:100] + prompt(60, seed=7)
    with (
        engine(
            *pair,
            block_size=BLOCK,
            enable_prefix_caching=True,
            max_num_batched_tokens=64,
        ) as eng,
        recording(eng.runner) as record,
    ):
        cold = [text_of(o) for o in eng.generate([first], greedy(40))]
        longer = cold[0].tokens + prompt(5, seed=8)  # its own output is cached too
        warm = [text_of(o) for o in eng.generate([first, other, longer], greedy(40))]
    assert [t.cached for t in cold] == [0]
    # Whole pages, less the last one: vLLM gives it up for drafters that read hidden
    # states.
    assert [t.cached for t in warm] == [96, 64, 128]
    oracle.check(record, cold + warm)
    again = {b.anchor_position: b.drafts for b in record.of(warm[0])}
    assert again == {b.anchor_position: b.drafts for b in record.of(cold[0])}


def test_preempted_requests_get_their_context_back(
    pair: tuple[Path, Path], oracle: Oracle
) -> None:
    arrivals = [(2 * i, prompt(30 + 11 * i), greedy(90)) for i in range(6)]
    with (
        engine(
            *pair,
            block_size=BLOCK,
            num_gpu_blocks_override=14,
            max_num_batched_tokens=64,
        ) as eng,
        recording(eng.runner) as record,
    ):
        texts = drive(eng, arrivals)
        metrics = {m.name: m for m in eng.llm.get_metrics()}
    assert metrics["vllm:num_preemptions"].value >= 3
    assert len(texts) == len(arrivals)
    tally = oracle.check(record, texts, every_round=False)
    assert tally.blocks > 50


def test_a_request_at_the_end_of_the_context_does_not_disturb_others(
    pair: tuple[Path, Path], oracle: Oracle
) -> None:
    """vLLM stops drafting, and writing context, for the whole batch then."""
    arrivals = [
        (0, prompt(225), greedy(60)),
        (0, prompt(10), greedy(70)),
        (1, prompt(75), greedy(70)),
    ]
    with (
        engine(*pair, block_size=BLOCK, max_model_len=256) as eng,
        recording(eng.runner) as record,
    ):
        full, *others = drive(eng, arrivals)
    assert len(full.tokens) == 256
    oracle.check(record, [full], every_round=False)
    oracle.check(record, others)
    anchors = [b.anchor_position for b in record.of(full)]
    assert 240 < max(anchors) <= 256 - 5
    # Others went on drafting in steps in which it could not.
    assert any(0 < drafting < 3 for _, drafting in record.steps[5:])


def test_a_drafter_with_a_shorter_context_than_the_target(
    tiny_target: Path, tmp_path: Path
) -> None:
    """Its rotary table ends at 96: nothing is drafted past it, nothing breaks."""
    drafter = make_tiny_drafter(
        tmp_path / "drafter", tiny_target, overrides={"max_position_embeddings": 96}
    )
    oracle = Oracle(tiny_target, drafter)
    arrivals = [
        (0, prompt(70), greedy(60)),
        (0, prompt(130), greedy(40)),
        (3, prompt(8), greedy(50)),
    ]
    with (
        engine(tiny_target, drafter, block_size=BLOCK) as eng,
        recording(eng.runner) as record,
    ):
        crossing, beyond, short = drive(eng, arrivals)
    oracle.check(record, [short])
    tally = oracle.check(record, [crossing, beyond], every_round=False)
    assert tally.blocks == len(record.of(crossing)) >= 5
    assert max(b.anchor_position for b in record.of(crossing)) <= 96 - 5
    assert record.of(beyond) == []
