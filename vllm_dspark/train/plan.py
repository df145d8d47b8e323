"""What is asked in which order: numbered items, the same whenever they are asked for.

Item n's prompt, temperature and seed follow from the settings alone (hashes of seed and
n), so a run that was killed goes on with exactly the items that are missing.
"""

from __future__ import annotations

import hashlib
import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from vllm_dspark.train.prompts import SELF, Ids, Prompt


@dataclass(frozen=True, slots=True)
class Settings:
    """Everything besides target and prompts that decides which samples come out.

    Args:
        temperatures: pairs of temperature and share; shares add up to 1.
        max_prompt_tokens: longer prompts are dropped.
        max_response_tokens: answers are cut there (and kept).
        min_response_tokens: shorter answers are dropped.
        max_turn_tokens: of a user turn that the target writes.
        self_share: share of items whose prompt the target writes.
        seed: of everything random.
    """

    temperatures: tuple[tuple[float, float], ...] = ((0.0, 0.5), (0.6, 0.25), (1, 0.25))
    max_prompt_tokens: int = 512
    max_response_tokens: int = 256
    min_response_tokens: int = 4
    max_turn_tokens: int = 160
    self_share: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("max_prompt", "max_response", "min_response", "max_turn"):
            if (value := getattr(self, f"{name}_tokens")) < 1:
                option = f"--{name.replace('_', '-')}-tokens"
                raise ValueError(f"{option} is {value}; at least 1")
        if self.min_response_tokens > self.max_response_tokens:
            raise ValueError(
                f"--min-response-tokens {self.min_response_tokens} is more than "
                f"--max-response-tokens {self.max_response_tokens}"
            )
        if not 0 <= self.self_share <= 1:
            raise ValueError(f"--self-share is {self.self_share}; between 0 and 1")
        for temperature, share in self.temperatures:
            if not (0 <= temperature < math.inf and 0 < share < math.inf):
                raise ValueError(
                    f"--temperatures has {temperature:g}:{share:g}; temperatures are "
                    "0 or more, shares more than 0"
                )
        if abs(sum(share for _, share in self.temperatures) - 1) > 1e-6:
            raise ValueError(f"--temperatures: shares of {self.temperatures} are not 1")


@dataclass(frozen=True, slots=True)
class Item:
    """One question.

    Args:
        number: its place in the sequence.
        prompt: None if the target writes it.
        source: name of where the prompt is from.
        temperature: of the answer.
        seed: of the answer; a self-made prompt has `turn_seed`.
        turn_seed: of the user turn.
    """

    number: int
    prompt: Ids | None
    source: str
    temperature: float
    seed: int
    turn_seed: int


def parse_temperatures(text: str) -> tuple[tuple[float, float], ...]:
    """``0:0.5,1.0:0.5`` as pairs, shares scaled to add up to 1; ``0.7`` is one of 1.

    Raises:
        ValueError: anything else.
    """
    pairs = []
    try:
        for part in text.split(","):
            temperature, _, share = part.partition(":")
            pairs.append((float(temperature), float(share or 1)))
    except ValueError:
        raise ValueError(
            f"--temperatures is {text!r}; expected temperature:share pairs such as "
            "0:0.5,0.6:0.25,1.0:0.25"
        ) from None
    total = sum(share for _, share in pairs)
    if not total > 0 or len({t for t, _ in pairs}) < len(pairs):
        raise ValueError(f"--temperatures is {text!r}; each once, shares more than 0")
    return tuple((t, share / total) for t, share in pairs)


def plan(settings: Settings, prompts: Sequence[Prompt]) -> Iterator[Item]:
    """All items in order, from number 0; endless unless nothing new could come.

    Prompts of files are gone through in a new order at each pass. A prompt is asked
    greedily once only, since it would get the same answer again; it is asked at the
    other temperatures then, and if there are none, file prompts end after one pass.

    Args:
        settings: with ``self_share`` 1, ``prompts`` are not used.
        prompts: of files, no two alike.
    """
    greedy_only = all(t == 0 for t, _ in settings.temperatures)
    answered: set[int] = set()  # prompts that had their greedy answer
    given = itertools.count()
    order: list[int] = []
    for number in itertools.count():
        own = uniform(settings.seed, "source", number) < settings.self_share
        row = None
        if not own and prompts:
            nth, place = divmod(next(given), len(prompts))
            if nth and greedy_only:
                if not settings.self_share:
                    return
            else:
                if place == 0:
                    order = _order(settings.seed, nth, len(prompts))
                row = order[place]
        draw = uniform(settings.seed, "temperature", number)
        mix = [p for p in settings.temperatures if p[0] > 0 or row not in answered]
        temperature = _pick(mix, draw)
        if row is not None and temperature == 0:
            answered.add(row)
        prompt = None if row is None else prompts[row]
        yield Item(
            number,
            prompt.ids if prompt else None,
            prompt.source if prompt else SELF,
            temperature,
            seed=_seed(settings.seed, "answer", number),
            turn_seed=_seed(settings.seed, "turn", number),
        )


def uniform(*parts: Any) -> float:
    """A number in [0, 1) that follows from the arguments, on every machine."""
    return _bits(*parts) / 2**64


def _seed(*parts: Any) -> int:
    return _bits(*parts) >> 1  # servers take 63 bits


def _bits(*parts: Any) -> int:
    text = ":".join(map(str, parts)).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little")


def _order(seed: int, nth: int, size: int) -> list[int]:
    return sorted(range(size), key=lambda row: uniform(seed, "order", nth, row))


def _pick(mix: Sequence[tuple[float, float]], draw: float) -> float:
    """The temperature at a place in [0, 1) of the shares, scaled to fill it."""
    left = draw * sum(share for _, share in mix)
    for temperature, share in mix:
        left -= share
        if left < 0:
            return temperature
    return mix[-1][0]
