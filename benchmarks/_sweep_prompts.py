"""The prompts of the load sweep: an endless, balanced sequence, equal for all arms."""

from __future__ import annotations

import json
import random
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True, slots=True)
class Prompt:
    """A conversation and where it came from."""

    dataset: str
    number: int
    messages: list[dict[str, str]]
    tokens: int


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

    def take(self, start: int, count: int, dataset: str | None = None) -> list[Prompt]:
        """Prompts ``start`` to ``start + count - 1``, of all datasets or one alone.

        Raises:
            ValueError: there is no such dataset.
        """
        names = self.datasets if dataset is None else [dataset]
        if unknown := set(names) - set(self._datasets):
            raise ValueError(
                f"no prompt is of dataset {unknown.pop()!r} "
                f"(there are: {', '.join(self.datasets)})"
            )
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
