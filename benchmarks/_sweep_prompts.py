"""The prompts of the load sweep: an endless, balanced sequence, equal for all arms."""

from __future__ import annotations

import json
import random
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench_e2e import DOMAINS


@dataclass(frozen=True, slots=True)
class Prompt:
    """A conversation and where it came from."""

    dataset: str
    number: int
    messages: list[dict[str, str]]
    tokens: int

    @property
    def domain(self) -> str:
        """The kind of work: math, code, chat; its dataset where that is unknown."""
        return DOMAINS.get(self.dataset, self.dataset)


class Prompts:
    """An endless sequence of prompts, the same for every arm.

    Every block of as many prompts as there are datasets holds one of each, in an order
    drawn anew for each block (clients that move in step must not keep one dataset
    each). A dataset that runs out starts again.

    Args:
        prompts: all of them.
        seed: of every draw.
    """

    def __init__(self, prompts: Sequence[Prompt], seed: int) -> None:
        self._datasets: dict[str, list[Prompt]] = defaultdict(list)
        for prompt in prompts:
            self._datasets[prompt.dataset].append(prompt)
        self._seed = seed
        for name, rows in self._datasets.items():
            random.Random(f"{seed} {name}").shuffle(rows)

    @property
    def datasets(self) -> list[str]:
        return sorted(self._datasets)

    @property
    def domains(self) -> list[str]:
        return sorted({rows[0].domain for rows in self._datasets.values()})

    def _of(self, name: str) -> list[str]:
        """The datasets of a domain, or the one of that name."""
        if name in self._datasets:
            return [name]
        found = [d for d in self.datasets if self._datasets[d][0].domain == name]
        if not found:
            known = ", ".join(sorted({*self.datasets, *self.domains}))
            raise ValueError(
                f"no prompt is of dataset or domain {name!r} (there are: {known})"
            )
        return found

    def take(self, start: int, count: int, only: str | None = None) -> list[Prompt]:
        """Prompts ``start`` to ``start + count - 1``.

        Args:
            only: a dataset or a domain; all where None.

        Raises:
            ValueError: there is no such dataset or domain.
        """
        names = self.datasets if only is None else self._of(only)
        found = []
        for i in range(start, start + count):
            block, place = divmod(i, len(names))
            order = random.Random(f"{self._seed} block {block}").sample(
                names, len(names)
            )
            rows = self._datasets[order[place]]
            found.append(rows[block % len(rows)])
        return found


def load_prompts(path: Path, tokenizer: Any, longest: int) -> list[Prompt]:
    """The prompts of a JSONL file that have at most ``longest`` tokens.

    Raises:
        ValueError: none has, or a row is not {"dataset", "messages"}.
    """
    found = []
    for number, line in enumerate(path.read_text().splitlines()):
        try:
            row = json.loads(line)
            dataset, messages = row["dataset"], row["messages"]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f'{path}, line {number + 1}: expected {{"dataset": ..., "messages": '
                f"[...]}} ({type(error).__name__}: {error})"
            ) from None
        text = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, tokenize=False
        )
        tokens = len(tokenizer(text, add_special_tokens=False).input_ids)
        if tokens <= longest:
            found.append(Prompt(dataset, number, messages, tokens))
    if not found:
        raise ValueError(
            f"{path} has no prompt of at most {longest} tokens (--max-prompt-tokens)"
        )
    return found
