"""Structured output with drafts in flight: always valid, and greedy text unchanged.

The grammar's bitmask reaches every verified row, also those after a draft: a mask on
the wrong row lets an invalid token through, or forbids the valid one. Drafts know
nothing of the grammar, so the scheduler cuts them where they leave it (ragged rows and
rows without drafts), and every request may end in the middle of a block. Batches mix
grammars with free text, greedy and random.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.integration.engine import Engine, engine

PROMPTS = [[5, 9, 17, 33, 8], [7] * 3, list(range(3, 40)), [100, 50]]
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "minLength": 3, "maxLength": 12},
        "kind": {"enum": ["alpha", "beta", "gamma"]},
        "sizes": {"type": "array", "items": {"type": "boolean"}, "maxItems": 3},
    },
    "required": ["name", "kind", "sizes"],
    "additionalProperties": False,
}
CHOICES = ["red and green", "red or blue", "yellow"]
REGEX = r"[a-f]{4,20}-[0-9]{3}\.(txt|json)"


def is_json(text: str) -> bool:
    # xgrammar lets a tab into a string of limited length.
    value = json.loads(text, strict=False)
    return (
        set(value) == set(SCHEMA["required"])
        and 3 <= len(value["name"]) <= 12
        and value["kind"] in ("alpha", "beta", "gamma")
        and all(isinstance(size, bool) for size in value["sizes"])
    )


# Name → constraint of vLLM's, and what its texts must be.
GRAMMARS: dict[str, tuple[dict[str, Any], Callable[[str], bool]]] = {
    "json": ({"json": SCHEMA}, is_json),
    "regex": ({"regex": REGEX}, lambda t: re.fullmatch(REGEX, t) is not None),
    "choice": ({"choice": CHOICES}, lambda t: t in CHOICES),
}

SETTINGS: dict[str, Any] = {
    "skip_tokenizer_init": False,
    # Otherwise a random model fills its answer with blanks and never ends.
    "structured_outputs_config": {
        "backend": "xgrammar",
        "disable_any_whitespace": True,
    },
}


@pytest.fixture(scope="module")
def plain(text_pair: tuple[Path, Path]) -> Iterator[Engine]:
    with engine(text_pair[0], **SETTINGS) as plain:
        yield plain


@pytest.fixture(scope="module", params=["greedy", "probabilistic"])
def dspark(
    request: pytest.FixtureRequest, text_pair: tuple[Path, Path]
) -> Iterator[Engine]:
    spec = {"draft_sample_method": request.param}
    with engine(*text_pair, spec=spec, **SETTINGS) as dspark:
        yield dspark


def constrained(name: str, **settings: Any) -> Any:
    """Parameters of a request; the end token is what ends a grammar."""
    from vllm import SamplingParams
    from vllm.sampling_params import StructuredOutputsParams

    base = {"temperature": 0.0, "max_tokens": 120}
    grammar = None
    if name != "free":
        grammar = StructuredOutputsParams(**GRAMMARS[name][0])
    return SamplingParams(**(base | settings), structured_outputs=grammar)


def texts(engine: Engine, prompts: list[list[int]], params: Any) -> list[str]:
    outputs = [o.outputs[0] for o in engine.generate(prompts, params)]
    assert all(o.finish_reason in ("stop", "length") for o in outputs)
    return [o.text for o in outputs]


@pytest.mark.parametrize("name", GRAMMARS)
def test_greedy(name: str, plain: Engine, dspark: Engine) -> None:
    params = constrained(name)
    expected = texts(plain, PROMPTS, params)
    before = dspark.stats()
    assert texts(dspark, PROMPTS, params) == expected
    after = dspark.stats()
    assert after.draft_tokens > before.draft_tokens
    assert all(GRAMMARS[name][1](text) for text in expected)
    free = texts(plain, PROMPTS, constrained("free"))
    assert all(a != b for a, b in zip(expected, free, strict=True)), "no effect"


@pytest.mark.parametrize("name", GRAMMARS)
def test_random(name: str, dspark: Engine) -> None:
    before = dspark.stats()
    params = constrained(name, temperature=1.2)
    found = texts(dspark, PROMPTS * 6, params)
    after = dspark.stats()
    assert after.draft_tokens > before.draft_tokens
    assert len(set(found)) > 1
    for text in found:
        assert GRAMMARS[name][1](text), text


def test_mixed_batch(plain: Engine, dspark: Engine) -> None:
    """Every grammar and none, greedy and random, side by side."""
    names = [*GRAMMARS, "free"] * 2
    prompts = [PROMPTS[i % 4] for i in range(2 * len(names))]
    greedy = [constrained(name, logprobs=1) for name in names]
    random = [constrained(name, temperature=1.0, seed=4) for name in names]
    expected = texts(plain, prompts[: len(names)], greedy)
    both = [p for pair in zip(greedy, random, strict=True) for p in pair]
    pairs = [p for prompt in prompts[: len(names)] for p in (prompt, prompt)]
    found = texts(dspark, pairs, both)
    assert found[0::2] == expected
    for name, text in zip(names, found[1::2], strict=True):
        assert name == "free" or GRAMMARS[name][1](text)


def test_drafts_are_accepted_inside_a_grammar(plain: Engine, dspark: Engine) -> None:
    """A grammar that everything fits: its rows accept what free rows accept."""
    from vllm import SamplingParams
    from vllm.sampling_params import StructuredOutputsParams

    anything = StructuredOutputsParams(regex=r"[!-~\s]{1,400}")
    base = {"temperature": 0.0, "max_tokens": 60, "ignore_eos": True}
    params = SamplingParams(**base, structured_outputs=anything)
    expected = texts(plain, PROMPTS, params)
    before = dspark.stats()
    assert texts(dspark, PROMPTS, params) == expected
    assert dspark.stats().accepted > before.accepted + 20
