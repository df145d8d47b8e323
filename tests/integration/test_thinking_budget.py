"""A thinking budget with drafts in flight gives the text it gives without them.

vLLM counts the tokens between the start and the end of thinking, and forces the end
token by token once the budget is spent. Without speculation it looks once a token; with
drafts a block may open a thought, spend the budget or end the thought anywhere, and the
end has to be forced at exactly the row where plain decoding would.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.integration.engine import Engine, engine

# One token and three: "(" and ")/&" in the tiny tokenizer.
START, END = [ord("(") - 30], [ord(")") - 30, ord("/") - 30, ord("&") - 30]
REASONING = {"reasoning_start_str": "(", "reasoning_end_str": ")/&"}
PLAIN = [[5, 9, 17, 33, 6], [7] * 3, list(range(12, 60)), [100, 50]]
LENGTH = 60
SETTINGS: dict[str, Any] = {
    "skip_tokenizer_init": False,
    "reasoning_config": REASONING,
}
# In the prompt a thought is open, with some tokens spent; or it is closed again.
PROMPTS = {
    "open": [p + START for p in PLAIN],
    "begun": [p + START + [40, 41, 42] for p in PLAIN],
    "closed": [p + START + [40] + END + [50] for p in PLAIN],
    "none": PLAIN,
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


def params(budget: int | None, **settings: Any) -> Any:
    from vllm import SamplingParams

    base = {"temperature": 0.0, "max_tokens": LENGTH, "ignore_eos": True}
    return SamplingParams(**(base | settings), thinking_token_budget=budget)


@pytest.mark.parametrize("budget", [0, 1, 5, 11, 24])
@pytest.mark.parametrize("where", PROMPTS)
def test_greedy(where: str, budget: int, plain: Engine, dspark: Engine) -> None:
    prompts = PROMPTS[where]
    expected = plain.tokens(prompts, params(budget))
    before = dspark.stats()
    assert dspark.tokens(prompts, params(budget)) == expected
    assert dspark.stats().accepted > before.accepted
    if where in ("open", "begun"):
        free = plain.tokens(prompts, params(None))
        assert all(a != b for a, b in zip(expected, free, strict=True)), "no effect"


def test_budgets_side_by_side(plain: Engine, dspark: Engine) -> None:
    """Other budgets and none in one batch, requests that end early, random rows."""
    prompts = [p for place in PROMPTS.values() for p in place] * 2
    budgets = [[None, 0, 3, 9, 17, 30, 2][i % 7] for i in range(len(prompts))]
    extras = [
        {"max_tokens": LENGTH - 3 * (i % 5), "frequency_penalty": -0.3 * (i % 2)}
        for i in range(len(prompts))
    ]
    settings = list(zip(budgets, extras, strict=True))
    expected = plain.tokens(prompts, [params(b, **extra) for b, extra in settings])
    random = [{"temperature": 0.8, "top_k": 1}, {}, {"seed": 1}]
    mixed = [params(b, **e, **random[i % 3]) for i, (b, e) in enumerate(settings)]
    before = dspark.stats()
    assert dspark.tokens(prompts, mixed) == expected
    assert dspark.stats().accepted > before.accepted
