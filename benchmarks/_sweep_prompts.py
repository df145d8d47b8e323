"""The prompts of the load sweep: an endless, balanced sequence, equal for all arms."""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import random
from collections import defaultdict
from collections.abc import Mapping, Sequence
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

    Every block of prompts holds one of each dataset (or as many of each as its share),
    in an order drawn anew for each block: clients that move in step must not keep one
    dataset each. A dataset that runs out starts again.

    Args:
        prompts: all of them.
        seed: of every draw.
        shares: how many of a block are of a dataset or domain; one of each dataset
            where there are none. What is not named is left out.

    Raises:
        ValueError: a share is of something unknown.
    """

    def __init__(
        self,
        prompts: Sequence[Prompt],
        seed: int,
        shares: Mapping[str, int] | None = None,
    ) -> None:
        self._datasets: dict[str, list[Prompt]] = defaultdict(list)
        for prompt in prompts:
            self._datasets[prompt.dataset].append(prompt)
        self._seed = seed
        for name, rows in self._datasets.items():
            random.Random(f"{seed} {name}").shuffle(rows)
        self._shares = dict(shares or dict.fromkeys(self.datasets, 1))
        for name in self._shares:
            self._of(name)

    @property
    def datasets(self) -> list[str]:
        return sorted(self._datasets)

    @property
    def domains(self) -> list[str]:
        """Of the datasets that have a share."""
        used = {name for share in self._shares for name in self._of(share)}
        return sorted({self._datasets[name][0].domain for name in used})

    def _of(self, name: str) -> list[str]:
        """The datasets of a domain, or the one of that name."""
        if name in self._datasets:
            return [name]
        found = [d for d in self.datasets if self._datasets[d][0].domain == name]
        if not found:
            names = {row.domain for rows in self._datasets.values() for row in rows}
            known = ", ".join(sorted({*self.datasets, *names}))
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
        shares = self._shares
        if only is not None:
            shares = dict.fromkeys(self._of(only), 1)
        names = [name for name, share in shares.items() for _ in range(share)]
        found = []
        for i in range(start, start + count):
            block, place = divmod(i, len(names))
            order = random.Random(f"{self._seed} block {block}").sample(
                names, len(names)
            )
            name = order[place]
            number = block * shares[name] + order[:place].count(name)
            found.append(self._row(name, number))
        return found

    def _row(self, name: str, number: int) -> Prompt:
        """A dataset's prompt; a domain's datasets take turns."""
        turn, place = divmod(number, len(datasets := self._of(name)))
        rows = self._datasets[datasets[place]]
        return rows[turn % len(rows)]


def load(args: argparse.Namespace, tokenizer: Any, longest: int) -> list[Prompt]:
    """Every prompt that the options ask for, of at most ``longest`` tokens.

    Raises:
        ValueError: there is none, or a source cannot be read.
    """
    found = []
    if args.prompts is not None:
        found += load_prompts(args.prompts, tokenizer, longest)
    for text in args.vllm_dataset:
        found += vllm_prompts(text, tokenizer, longest, args.seed)
    return found


def load_prompts(path: Path, tokenizer: Any, longest: int) -> list[Prompt]:
    """The prompts of a JSONL file that have at most ``longest`` tokens.

    Raises:
        ValueError: none has, or a row is not {"dataset", "messages"}.
    """
    found = []
    # Not splitlines: texts may hold U+2028.
    for number, line in enumerate(path.read_text().rstrip("\n").split("\n")):
        try:
            row = json.loads(line)
            dataset, messages = row["dataset"], row["messages"]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f'{path}, line {number + 1}: expected {{"dataset": ..., "messages": '
                f"[...]}} ({type(error).__name__}: {error})"
            ) from None
        if (tokens := _tokens(messages, tokenizer)) <= longest:
            found.append(Prompt(dataset, number, messages, tokens))
    if not found:
        raise ValueError(
            f"{path} has no prompt of at most {longest} tokens (--max-prompt-tokens)"
        )
    return found


def vllm_prompts(text: str, tokenizer: Any, longest: int, seed: int) -> list[Prompt]:
    """Prompts of one of vLLM's benchmark datasets, each as a user's message.

    Args:
        text: NAME=JSON; the JSON has the options of `vllm bench serve` that begin with
            its dataset's, without dashes: {"dataset_name": "random", ...}.
        tokenizer: the target's.
        longest: tokens of a prompt; longer ones are left out.
        seed: of the dataset's draws, unless the options have one.

    Raises:
        ValueError: no dataset of vLLM's is meant, or it has no text.
    """
    from vllm.benchmarks.datasets import get_samples

    name, equals, raw = text.partition("=")
    form = f"--vllm-dataset is {text!r}; it must be NAME='{{\"dataset_name\": ...}}'"
    if not equals or not name:
        raise ValueError(form)
    try:
        options = json.loads(raw)
        words = [f"--{k.replace('_', '-')}={v}" for k, v in options.items()]
    except (ValueError, AttributeError) as error:
        raise ValueError(f"{form} ({type(error).__name__}: {error})") from None
    samples = get_samples(_vllm_arguments(words, seed, form), tokenizer)
    found = []
    for number, sample in enumerate(samples):
        if not isinstance(sample.prompt, str) or not sample.prompt:
            raise ValueError(f"--vllm-dataset {name}: its prompts are no text")
        messages = [{"role": "user", "content": sample.prompt}]
        if (tokens := _tokens(messages, tokenizer)) <= longest:
            found.append(Prompt(name, number, messages, tokens))
    if not found:
        raise ValueError(
            f"--vllm-dataset {name}: no prompt has at most {longest} tokens "
            "(--max-prompt-tokens)"
        )
    return found


def _vllm_arguments(words: list[str], seed: int, form: str) -> argparse.Namespace:
    from vllm.benchmarks.datasets import add_dataset_parser
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = FlexibleArgumentParser(add_help=False)
    add_dataset_parser(parser)
    errors = io.StringIO()
    try:
        with contextlib.redirect_stderr(errors):
            args: argparse.Namespace = parser.parse_args([f"--seed={seed}", *words])
    except SystemExit:
        last = errors.getvalue().strip().splitlines()[-1:]
        raise ValueError(f"{form}: {' '.join(last)}") from None
    if args.dataset_name == "spec_bench":
        raise ValueError(
            f"{form}; of spec_bench vLLM makes prompts with the chat template in them, "
            "which the server would apply again: convert it to a --prompts file"
        )
    args.skip_chat_template = True  # the server applies it
    args.backend = "openai-chat"
    return args


def _tokens(messages: list[dict[str, str]], tokenizer: Any) -> int:
    text = tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=False
    )
    return len(tokenizer(text, add_special_tokens=False).input_ids)
