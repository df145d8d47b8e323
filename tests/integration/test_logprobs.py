"""Logprobs of emitted tokens are those of an engine without speculation.

In every mode of vLLM's: of the raw logits, and of the processed ones (penalties, bias,
temperature and cuts of the right row). A round emits several tokens of several rows, so
that values of a neighbouring row, or of a rejected draft, would be wrong by far more
than the tolerance, which is float32 rounding in batches of other sizes. Sampled text is
checked against the prompt logprobs of the same text.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.integration.engine import Engine, engine

PROMPTS = [[5, 9, 17, 33, 8], [7] * 3, list(range(3, 40)), [100, 50]]
LENGTH = 30
TOLERANCE = 1e-5
MODES = [
    "raw_logprobs",
    "processed_logprobs",
    pytest.param("raw_logits", marks=pytest.mark.slow),
    pytest.param("processed_logits", marks=pytest.mark.slow),
]
# Deterministic, greedy and not.
SETTINGS: list[dict[str, Any]] = [
    {"temperature": 0.0},
    {"temperature": 0.7, "top_k": 1},
    {"temperature": 0.0, "frequency_penalty": -0.6, "logit_bias": {20: -4.0}},
    {"temperature": 1.4, "top_p": 1e-6, "repetition_penalty": 0.8, "seed": 3},
]


@pytest.fixture(scope="module", params=MODES)
def engines(
    request: pytest.FixtureRequest, tiny_target: Path, tiny_drafter: Path
) -> Iterator[tuple[Engine, Engine]]:
    """Without and with speculation."""
    mode = {"logprobs_mode": request.param, "max_logprobs": -1}
    spec = {"draft_sample_method": "probabilistic"}
    with (
        engine(tiny_target, **mode) as plain,
        engine(tiny_target, tiny_drafter, spec=spec, **mode) as dspark,
    ):
        yield plain, dspark


def run(engine: Engine, settings: list[dict[str, Any]]) -> list[Any]:
    from vllm import SamplingParams

    base = {"max_tokens": LENGTH, "ignore_eos": True}
    return engine.generate(PROMPTS, [SamplingParams(**(base | s)) for s in settings])


def assert_close(found: Any, expected: Any) -> None:
    """Equal tokens and ranks, and values within the tolerance, position by position.

    Ranks and the members of a top-k list may swap where their values tie.
    """
    assert len(found) == len(expected)
    for position, (a, b) in enumerate(zip(found, expected, strict=True)):
        if a is None or b is None:  # the first token of a prompt
            assert a is None and b is None
            continue
        finite = [t for t in b if math.isfinite(b[t].logprob)]
        assert all(t in a for t in finite), position
        assert len(a) == len(b), position
        for token in finite:
            expected_value = b[token].logprob
            assert a[token].logprob == pytest.approx(
                expected_value, rel=TOLERANCE, abs=TOLERANCE
            ), (position, token)
            assert a[token].rank == b[token].rank, (position, token)


def check(engines: tuple[Engine, Engine], extra: list[dict[str, Any]]) -> list[Any]:
    plain, dspark = engines
    settings = [a | b for a, b in zip(SETTINGS, extra, strict=True)]
    expected = run(plain, settings)
    before = dspark.stats()
    found = run(dspark, settings)
    after = dspark.stats()
    assert after.accepted > before.accepted
    assert after.draft_tokens - before.draft_tokens > after.accepted - before.accepted
    for a, b in zip(found, expected, strict=True):
        assert a.outputs[0].token_ids == b.outputs[0].token_ids
        if b.outputs[0].logprobs is None:
            assert a.outputs[0].logprobs is None
            continue
        assert len(a.outputs[0].logprobs) == LENGTH
        assert_close(a.outputs[0].logprobs, b.outputs[0].logprobs)
    return list(zip(found, expected, strict=True))


@pytest.mark.parametrize("number", [0, 3, -1])
def test_top(engines: tuple[Engine, Engine], number: int) -> None:
    """Of the emitted token alone, of the best three as well, of all."""
    for found, _ in check(engines, [{"logprobs": number}] * 4):
        logprobs = found.outputs[0].logprobs
        for token, row in zip(found.outputs[0].token_ids, logprobs, strict=True):
            assert token in row
            assert len(row) in {0: (1,), 3: (3, 4), -1: (128,)}[number]


def test_some_requests_only(engines: tuple[Engine, Engine]) -> None:
    check(engines, [{"logprobs": 2}, {}, {"logprobs": 5}, {}])


def test_chosen_tokens(engines: tuple[Engine, Engine]) -> None:
    """``logprob_token_ids``: of these tokens instead of the best."""
    ids = [[4, 9], [60, 61, 62], [7], [100, 3]]
    pairs = check(engines, [{"logprob_token_ids": row} for row in ids])
    for (found, _), row in zip(pairs, ids, strict=True):
        assert all(set(row) <= set(r) for r in found.outputs[0].logprobs)


def test_of_the_prompt(engines: tuple[Engine, Engine]) -> None:
    for found, expected in check(engines, [{"prompt_logprobs": 2, "logprobs": 1}] * 4):
        assert_close(found.prompt_logprobs, expected.prompt_logprobs)


def test_of_sampled_text(engines: tuple[Engine, Engine]) -> None:
    """Emitted tokens' logprobs are what the target gives to that text as a prompt."""
    from vllm import SamplingParams

    plain, dspark = engines
    if dspark.runner.sampler.logprobs_mode != "raw_logprobs":
        pytest.skip("prompt logprobs are raw")
    before = dspark.stats()
    free = [{"temperature": 1.0, "logprobs": 0, "seed": i} for i in range(4)]
    outputs = run(dspark, free)
    assert dspark.stats().accepted > before.accepted
    texts = [list(o.outputs[0].token_ids) for o in outputs]
    again = plain.generate(
        [p + t for p, t in zip(PROMPTS, texts, strict=True)],
        SamplingParams(max_tokens=1, prompt_logprobs=0),
    )
    for output, prompt, text in zip(outputs, again, texts, strict=True):
        scored = prompt.prompt_logprobs[-LENGTH:]
        for token, a, b in zip(text, output.outputs[0].logprobs, scored, strict=True):
            assert a[token].logprob == pytest.approx(b[token].logprob, abs=1e-4)
            assert a[token].rank == b[token].rank
