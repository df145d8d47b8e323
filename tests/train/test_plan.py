"""The plan: which item is what, the same each time, nothing asked in vain."""

from __future__ import annotations

import itertools
from collections import Counter

import pytest

from vllm_dspark.train.plan import Settings, parse_temperatures, plan, uniform
from vllm_dspark.train.prompts import SELF, Prompt

PROMPTS = [Prompt((i,), f"set{i % 2}") for i in range(10)]
MIX = ((0.0, 0.5), (0.6, 0.25), (1.0, 0.25))


def first(count: int, settings: Settings, prompts=PROMPTS) -> list:
    return list(itertools.islice(plan(settings, prompts), count))


def test_items_follow_from_the_settings() -> None:
    settings = Settings(MIX, self_share=0.3)
    items = first(200, settings)
    assert items == first(200, settings) and items[:50] == first(50, settings)
    assert [i.number for i in items] == list(range(200))
    assert items != first(200, Settings(MIX, self_share=0.3, seed=1))
    # Written down: a change here would break folders that are half done.
    assert uniform(0, "temperature", 7) == pytest.approx(0.580585, abs=1e-5)


def test_shares_and_seeds() -> None:
    items = first(4000, Settings(MIX, self_share=1.0), [])
    shares = Counter(i.temperature for i in items)
    # Three standard deviations of 4000 draws are 0.024.
    for temperature, share in MIX:
        assert shares[temperature] / 4000 == pytest.approx(share, abs=0.024)
    seeds = {s for i in items for s in (i.seed, i.turn_seed)}
    assert len(seeds) == 8000 and min(seeds) >= 0 and max(seeds) < 2**63
    both = first(4000, Settings(MIX, self_share=0.25))
    own = sum(i.prompt is None for i in both)
    assert own / 4000 == pytest.approx(0.25, abs=0.021)
    assert all((i.source == SELF) == (i.prompt is None) for i in both)


def test_each_pass_has_every_prompt_once_in_another_order() -> None:
    items = first(30, Settings(((1.0, 1.0),)))
    passes = [[i.prompt for i in items[n : n + 10]] for n in (0, 10, 20)]
    assert all(sorted(p) == [q.ids for q in PROMPTS] for p in passes)
    assert passes[0] != passes[1] != passes[2]
    assert {i.source for i in items} == {"set0", "set1"}


def test_a_prompt_is_asked_greedily_once() -> None:
    greedy = Counter(i.prompt for i in first(200, Settings(MIX)) if not i.temperature)
    assert set(greedy.values()) == {1} and len(greedy) == 10


def test_only_greedy_prompts_end_after_one_pass() -> None:
    settings = Settings(((0.0, 1.0),))
    assert len(first(50, settings)) == 10
    # The target's own prompts go on.
    items = first(100, Settings(((0.0, 1.0),), self_share=0.5))
    assert sum(i.prompt is not None for i in items) == 10 and len(items) == 100


@pytest.mark.parametrize(
    ("text", "pairs"),
    [
        ("0:0.5,1.0:0.5", ((0.0, 0.5), (1.0, 0.5))),
        ("0:2,0.6:1,1:1", ((0.0, 0.5), (0.6, 0.25), (1.0, 0.25))),
        ("0.7", ((0.7, 1.0),)),
    ],
)
def test_temperatures_are_read(text, pairs) -> None:
    assert parse_temperatures(text) == pairs
    Settings(pairs)


@pytest.mark.parametrize("text", ["", "a:1", "0:0.5,0:0.5", "1:0", "1:nan", "0:1:2"])
def test_other_temperatures_are_refused(text) -> None:
    with pytest.raises(ValueError, match=r"--temperatures is"):
        parse_temperatures(text)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperatures": ((-1.0, 1.0),)}, "-1:1"),
        ({"temperatures": ((1.0, 0.5),)}, "shares"),
        ({"max_turn_tokens": 0}, "--max-turn-tokens is 0"),
        ({"min_response_tokens": 300}, "300 is more than --max-response-tokens 256"),
        ({"self_share": 1.5}, r"--self-share is 1\.5"),
    ],
)
def test_settings_that_cannot_be(settings, message) -> None:
    with pytest.raises(ValueError, match=message):
        Settings(**settings)
