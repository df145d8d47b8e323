"""Options that `calibrate` and `evaluate` share, and what becomes of them."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from vllm_dspark.calibration.rounds import PromptRounds
from vllm_dspark.cli.counting import counting
from vllm_dspark.cli.rounds import engine_torch, engine_vllm
from vllm_dspark.cli.rounds.prompts import Prompt, read_rows, tokenize
from vllm_dspark.cli.rounds.settings import DRAFT_SAMPLE_METHOD, Decoding, Drafting

METHODS = ("greedy", "probabilistic")


def add(parser: argparse.ArgumentParser) -> None:
    """Add the shared options."""
    add = parser.add_argument
    add("--target", required=True, help="target model: a folder or a name")
    add("--prompts", type=Path, nargs="+", required=True, metavar="FILE",
        help="JSON lines with messages (or prompt) and dataset")  # fmt: skip
    add("--limit", type=int, metavar="N", help="first N prompts of each dataset only")
    add("--temperature", type=float, nargs="+", default=[0.0, 1.0], metavar="T")
    add("--max-tokens", type=int, default=128, help="new tokens (default %(default)s)")
    add("--num-speculative-tokens", type=int, metavar="K",
        help="drafts a round (default: the drafter's block size)")  # fmt: skip
    add("--draft-sample-method", choices=METHODS, default=DRAFT_SAMPLE_METHOD,
        help="how to draft at temperatures above 0 (default %(default)s)")  # fmt: skip
    add("--engine", choices=("vllm", "torch"), default="vllm",
        help="vllm: real serving; torch: decode.py, slower")  # fmt: skip
    add("--dtype", default="auto", choices=("auto", "float32", "bfloat16", "float16"))
    add("--concurrency", type=int, default=8, help="requests in flight (%(default)s)")
    add("--max-prompt-tokens", type=int, default=1024, metavar="N",
        help="leave out longer prompts (default %(default)s)")  # fmt: skip


def check(arguments: argparse.Namespace) -> None:
    """Refuse values that cannot be, before anything takes time."""
    names = ("limit", "max_tokens", "num_speculative_tokens", "concurrency")
    for name in (*names, "max_prompt_tokens"):
        value = getattr(arguments, name)
        if value is not None and value < 1:
            raise ValueError(f"--{name.replace('_', '-')} is {value}; at least 1")
    if arguments.max_tokens < 2:
        raise ValueError(
            "--max-tokens is 1, but the first token comes from the prompt's prefill "
            "and needs no round; ask for at least 2"
        )
    for temperature in arguments.temperature:
        if not 0 <= temperature <= 2:
            raise ValueError(f"--temperature is {temperature}; choose from 0 to 2")
    if len(set(arguments.temperature)) < len(arguments.temperature):
        raise ValueError(f"--temperature {arguments.temperature} names one twice")


def check_folder_of(option: str, file: Path | None) -> None:
    """Say now, not after minutes of work, that a result cannot be written."""
    if file is not None and not file.absolute().parent.is_dir():
        raise ValueError(f"{option}: there is no folder {file.absolute().parent}")


def decoding(arguments: argparse.Namespace) -> Decoding:
    """What to decode."""
    return Decoding(
        target=arguments.target,
        temperatures=tuple(arguments.temperature),
        max_tokens=arguments.max_tokens,
        dtype=arguments.dtype,
        concurrency=arguments.concurrency,
    )


def drafting(arguments: argparse.Namespace, drafter: Path) -> Drafting:
    """How to draft with a drafter's folder.

    Raises:
        ValueError: no drafter in it, one for another target, or a block too short.
    """
    from vllm_dspark.config import resolve_num_speculative_tokens
    from vllm_dspark.model.checkpoint import check_checkpoint
    from vllm_dspark.model.fit import check_fit

    config = check_checkpoint(drafter).config
    file = Path(arguments.target) / "config.json"
    if file.is_file():
        check_fit(config, json.loads(file.read_text()))
    return Drafting(
        "dspark",
        str(drafter.absolute()),
        resolve_num_speculative_tokens(
            arguments.num_speculative_tokens, config.block_size
        ),
        arguments.draft_sample_method,
    )


def load_prompts(arguments: argparse.Namespace, console: Console) -> list[Prompt]:
    """The prompts, tokenised; says how many and from where."""
    rows = read_rows(arguments.prompts, arguments.limit)
    prompts, left_out = tokenize(arguments.target, rows, arguments.max_prompt_tokens)
    names = list(dict.fromkeys(prompt.dataset for prompt in prompts))
    console.print(f"{len(prompts)} prompts of {', '.join(names)}", highlight=False)
    if left_out:
        limit = arguments.max_prompt_tokens
        console.print(f"{left_out} prompts left out: more than {limit} tokens")
    return prompts


def collect(
    arguments: argparse.Namespace,
    drafts: Drafting,
    prompts: Sequence[Prompt],
    console: Console,
) -> dict[float, list[PromptRounds]]:
    """Rounds by temperature, from the engine asked for."""
    asked = decoding(arguments)
    total = len(prompts) * len(asked.temperatures)
    if arguments.engine == "torch":
        with counting(console, "decoding", total) as advance:
            return engine_torch.collect(asked, drafts, prompts, advance)
    with (
        engine_vllm.running(asked, drafts, prompts, console) as collecting,
        counting(console, "decoding", total) as advance,
    ):
        return collecting(advance)
