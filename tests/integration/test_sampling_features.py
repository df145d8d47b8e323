"""What vLLM's sampler offers is the same with drafts in flight as without them.

Every case asks for one feature, has an effect on the text, and is run in batches of
two kinds, each of which catches another bug:

* all greedy: verification reads argmaxes only, and no temperatures exist;
* mixed: greedy rows beside random ones that leave a single token to choose (top_k 1,
  a tiny top_p, min_p 1), so that temperature, min-p, top-k and top-p must reach exactly
  the rows of their request, after the penalties and biases that depend on the drafts
  before each row.

The last test puts all cases into one batch: rows that are charged to a neighbour, or
to a request that has moved within the batch, show there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.integration.engine import Engine, engine
from tests.tiny import EOS

PROMPTS = [[5, 9, 17, 33, 2, 8], [7] * 3, list(range(3, 60)), [100, 50]]
LENGTH = 40
Settings = dict[str, Any]


def bias_away(text: list[int]) -> Settings:
    # One token in ten: few enough for whole blocks to be accepted in between.
    return {"logit_bias": dict.fromkeys([text[3], *range(10, 128, 11)], -6.0)}


def min_tokens(text: list[int]) -> Settings:
    return {"min_tokens": 12, "stop_token_ids": [text[3], text[20]]}


def eos_after_min_tokens(text: list[int]) -> Settings:
    return {"min_tokens": 7, "logit_bias": {EOS: 50.0}, "ignore_eos": False}


def visible(text: str, length: int) -> list[str]:
    """Every other word without white space, of so many characters."""
    words = [text[i : i + length] for i in range(2, len(text) - length)]
    return [w for w in words if not any(c.isspace() for c in w)][::2]


# Feature → what to ask for, given the text of the same prompt without the feature.
CASES: dict[str, Callable[[list[int]], Settings]] = {
    "presence": lambda text: {"presence_penalty": -1.5},
    "frequency": lambda text: {"frequency_penalty": -0.7},
    "frequency_up": lambda text: {"frequency_penalty": -0.5, "presence_penalty": 1.0},
    "repetition": lambda text: {"repetition_penalty": 0.6},
    "logit_bias": bias_away,
    "allowed_token_ids": lambda text: {"allowed_token_ids": list(range(3, 90, 3))},
    "min_tokens": min_tokens,
    "stop_token_ids": lambda text: {"stop_token_ids": [text[17]]},
    "eos": eos_after_min_tokens,
    "max_tokens_1": lambda text: {"max_tokens": 1},
    "max_tokens_9": lambda text: {"max_tokens": 9},
    "bias_and_penalty": lambda text: (
        bias_away(text) | {"frequency_penalty": -0.6, "repetition_penalty": 0.8}
    ),
}
# These name tokens by their text.
TEXT_CASES: dict[str, Callable[[str], Settings]] = {
    "stop_string": lambda text: {"stop": [text[12:14]]},
    "stop_string_kept": lambda text: {
        "stop": [text[9:12]],
        "include_stop_str_in_output": True,
    },
    "bad_words": lambda text: {"bad_words": visible(text, 1)},
    "bad_words_of_two_tokens": lambda text: {"bad_words": visible(text, 2)},
}
NAMES = [*CASES, *TEXT_CASES]
# Random requests that can only choose the most probable token.
ONE_CHOICE: list[Settings] = [
    {"temperature": 0.9, "top_k": 1},
    {"temperature": 1.7, "top_p": 1e-6},
    {"temperature": 0.6, "min_p": 1.0},
    {"temperature": 1.2, "top_k": 1, "top_p": 0.5, "min_p": 0.2, "seed": 3},
]


@pytest.fixture(scope="module")
def plain(text_pair: tuple[Path, Path]) -> Iterator[Engine]:
    with engine(text_pair[0], skip_tokenizer_init=False) as plain:
        yield plain


@pytest.fixture(scope="module", params=["greedy", "probabilistic"])
def dspark(
    request: pytest.FixtureRequest, text_pair: tuple[Path, Path]
) -> Iterator[Engine]:
    spec = {"draft_sample_method": request.param}
    with engine(*text_pair, spec=spec, skip_tokenizer_init=False) as dspark:
        yield dspark


@pytest.fixture(scope="module")
def unchanged(plain: Engine) -> list[tuple]:
    """What the target says to each prompt when no feature is asked for."""
    return run(plain, PROMPTS, [{}] * len(PROMPTS))


def run(
    engine: Engine, prompts: list[list[int]], settings: list[Settings]
) -> list[tuple]:
    """(token ids, text, finish reason, stop reason) of each request."""
    from vllm import SamplingParams

    base = {"temperature": 0.0, "max_tokens": LENGTH, "ignore_eos": True}
    params = [SamplingParams(**(base | s)) for s in settings]
    outputs = [o.outputs[0] for o in engine.generate(prompts, params)]
    return [
        (list(o.token_ids), o.text, o.finish_reason, o.stop_reason) for o in outputs
    ]


def case(name: str, unchanged: list[tuple]) -> list[Settings]:
    """Settings of a case for each prompt."""
    if name in CASES:
        return [CASES[name](tokens) for tokens, *_ in unchanged]
    return [TEXT_CASES[name](text) for _, text, *_ in unchanged]


def drafted(engine: Engine, action: Callable[[], Any]) -> tuple[Any, int]:
    """The action's result and how many drafts were verified meanwhile."""
    before = engine.stats().draft_tokens
    result = action()
    return result, engine.stats().draft_tokens - before


@pytest.mark.parametrize("name", NAMES)
def test_all_greedy(
    name: str, plain: Engine, dspark: Engine, unchanged: list[tuple]
) -> None:
    settings = case(name, unchanged)
    expected = run(plain, PROMPTS, settings)
    got, drafts = drafted(dspark, lambda: run(dspark, PROMPTS, settings))
    assert got == expected
    assert all(a != b for a, b in zip(expected, unchanged, strict=True)), "no effect"
    assert drafts > 0 or name == "max_tokens_1"
    assert dspark.runner.rejection_sampler.last_backend == "native"


@pytest.mark.parametrize("name", NAMES)
def test_mixed_with_random_rows_of_one_choice(
    name: str, plain: Engine, dspark: Engine, unchanged: list[tuple]
) -> None:
    greedy = case(name, unchanged)
    expected = run(plain, PROMPTS, greedy)
    prompts, settings, wanted = [], [], []
    for i, (prompt, base) in enumerate(zip(PROMPTS, greedy, strict=True)):
        for extra in ({}, ONE_CHOICE[i], ONE_CHOICE[i - 1]):
            prompts.append(prompt)
            settings.append(base | extra)
            wanted.append(expected[i])
    got, drafts = drafted(dspark, lambda: run(dspark, prompts, settings))
    assert got == wanted
    assert drafts > 0 or name == "max_tokens_1"


def test_all_cases_in_one_batch(
    plain: Engine, dspark: Engine, unchanged: list[tuple]
) -> None:
    prompts, settings = [], []
    for number, name in enumerate(NAMES):
        for i, base in enumerate(case(name, unchanged)):
            prompts.append(PROMPTS[i])
            extra = ONE_CHOICE[number % 4] if (number + i) % 3 == 0 else {}
            settings.append(base | extra)
    greedy = [{k: v for k, v in s.items() if k not in RANDOM_KEYS} for s in settings]
    expected = run(plain, prompts, greedy)
    got, drafts = drafted(dspark, lambda: run(dspark, prompts, settings))
    assert got == expected
    assert drafts > 1000


RANDOM_KEYS = {"temperature", "top_k", "top_p", "min_p", "seed"}


def test_several_completions(
    plain: Engine, dspark: Engine, unchanged: list[tuple]
) -> None:
    """n > 1: copies of one request, each with drafts of its own."""
    from vllm import SamplingParams

    params = SamplingParams(n=3, temperature=1.0, top_k=1, max_tokens=LENGTH)
    outputs = dspark.generate(PROMPTS, params)
    for output, (tokens, *_) in zip(outputs, unchanged, strict=True):
        assert [list(o.token_ids) for o in output.outputs] == [tokens] * 3
    free = SamplingParams(n=4, temperature=1.5, max_tokens=LENGTH, seed=1)
    for output in dspark.generate(PROMPTS, free):
        assert len({tuple(o.token_ids) for o in output.outputs}) == 4


def test_acceptance_is_neither_nothing_nor_everything(dspark: Engine) -> None:
    """Otherwise the cases above would not see a rejected, or an accepted, draft."""
    stats = dspark.stats()
    assert 0.1 < stats.accepted / stats.draft_tokens < 0.9
    assert stats.accepted_per_position[-1] > 0
