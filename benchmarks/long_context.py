"""Acceptance and speed as conversations grow, arm against arm.

    python benchmarks/long_context.py --target T --drafter D --prompts eval.jsonl \
        --out long --dtype float32 --domain code

A conversation asks held-out questions of one domain, one after the other, and keeps the
target's answers, until it fills --max-model-len. The engines of all arms live in this
process and answer each question in turn, another one first each time, alone and
greedily, with prefix caching; the conversation goes on with the answer of the first
arm, the reference. An answer is timed from its first token to its last: what reading
the prompt takes is not in it. Ratios are of the same answer at the same moment. With
--every N only each Nth question is put to all arms, the others to the reference: long
conversations in less time.

--out holds long.json with every answer, the figures by context (tokens per step, share
of the verified drafts that were accepted, drafts made and verified per step, ratio with
its 95% interval) and provenance; long.png shows them. Arms are those of serve_sweep.py,
--arm ones included: a drafter's K/V in another type is
    --arm fp8='{"speculative_config": {"method": "dspark", "model": D,
                                       "kv_cache_dtype": "fp8"}}'
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import _bench_common as common
import _in_process as in_process
from _conversations import SHORTEST, Exchange, by_context
from _in_process import build, draft_counts
from _paired_turns import Turn
from _sweep_arms import Arm, custom, named
from _sweep_plots import DOTS_PER_INCH, load_axis
from _sweep_prompts import Prompts, load_prompts
from rich.console import Console

from vllm_dspark import provenance
from vllm_dspark.calibration.plots import figure
from vllm_dspark.cli.counting import counting

ARMS = ["none", "dspark-fixed-3", "dspark-fixed-7", "dspark-adaptive"]
_LEAST_TOKENS = 8  # of an answer that is timed: fewer say nothing of its speed


class Engine:
    """One arm's engine, for one request at a time."""

    def __init__(self, arm: Arm, args: argparse.Namespace) -> None:
        self.name, self._asked = arm.name, 0
        self._engine = build(arm, args, max_num_seqs=1, enable_prefix_caching=True)

    def answer(self, ids: list[int], most: int) -> tuple[list[int], Turn]:
        """An answer's tokens, and what it took after the first of them."""
        from vllm import SamplingParams

        self._asked += 1
        self._engine.add_request(
            str(self._asked),
            {"prompt_token_ids": ids},
            SamplingParams(temperature=0.0, max_tokens=most),
        )
        tokens: list[int] = []
        while not tokens:
            tokens = self._step() or tokens
        first, steps = len(tokens), 0
        before, start = draft_counts(self._engine), time.perf_counter()
        while self._engine.has_unfinished_requests():
            tokens = self._step() or tokens
            steps += 1
        seconds, after = time.perf_counter() - start, draft_counts(self._engine)
        drafted, verified = after[0] - before[0], after[1] - before[1]
        emitted = len(tokens) - first
        return tokens, Turn(emitted, 0, seconds, steps, drafted, verified)

    def _step(self) -> list[int] | None:
        for output in self._engine.step():
            return list(output.outputs[0].token_ids)
        return None


class Conversations:
    """Questions, and how they are put to a model."""

    def __init__(self, args: argparse.Namespace) -> None:
        from transformers import AutoTokenizer

        self._tokenizer = AutoTokenizer.from_pretrained(args.target)
        rows = load_prompts(args.prompts, self._tokenizer, args.max_prompt_tokens)
        self._prompts = Prompts(rows, args.seed, {args.domain: 1})
        self._room = args.max_model_len - args.answer_tokens
        self._asked = 0
        self.messages: list[dict[str, str]] = []

    def begin(self) -> None:
        self.messages = []

    def ask(self) -> list[int] | None:
        """The conversation with one question more, as tokens; None where it is full."""
        (prompt,) = self._prompts.take(self._asked, 1)
        self._asked += 1
        self.messages += prompt.messages
        ids: list[int] = self._tokenizer.apply_chat_template(
            self.messages, add_generation_prompt=True, return_dict=False
        )
        return ids if len(ids) <= self._room else None

    def hear(self, answer: list[int]) -> None:
        text = self._tokenizer.decode(answer, skip_special_tokens=True)
        self.messages.append({"role": "assistant", "content": text})


def hold(
    engines: Sequence[Engine],
    args: argparse.Namespace,
    number: int,
    talk: Conversations,
) -> Iterator[Exchange]:
    """One conversation to its end."""
    talk.begin()
    turn = 0
    while (ids := talk.ask()) is not None:
        timed, rest = divmod(turn, args.every)
        asked = engines[:1] if rest else common.in_turn(engines, timed)
        found = {
            engine.name: engine.answer(ids, args.answer_tokens) for engine in asked
        }
        reference = found[engines[0].name][0]
        if not rest and min(t.tokens for _, t in found.values()) >= _LEAST_TOKENS:
            turns = {engine.name: found[engine.name][1] for engine in engines}
            same = [name for name in turns if found[name][0] == reference]
            yield Exchange(number, turn, len(ids), turns, same)
        talk.hear(reference)
        turn += 1


def plot(contexts: dict[int, dict[str, Any]], file: Path) -> None:
    """Speed, tokens per step and verified drafts over the context."""
    drawing, grid = figure(3)
    ends = list(contexts)
    names = list(contexts[ends[0]])
    what = [
        ("ratio", f"tokens/s / {names[0]}"),
        ("tau", "tokens per step"),
        ("verify_length", "drafts verified per step"),
    ]
    for axis, (key, label) in zip(grid[0], what, strict=True):
        for name in names:
            values = [contexts[end][name][key] for end in ends]
            if key == "ratio":
                values = [value["median"] for value in values]
            axis.plot(ends, values, marker="o", label=name)
        load_axis(axis, ends)
        axis.set(xlabel="context, tokens up to", ylabel=label)
        axis.grid(alpha=0.3)
    grid[0, 0].legend(fontsize="small")
    drawing.savefig(file, dpi=DOTS_PER_INCH)


def show(contexts: dict[int, dict[str, Any]]) -> None:
    """The figures as a table."""
    columns = ["context", "arm", "answers", "same", "ratio", "95%", "tau", "accepted",
               "drafted", "verified"]  # fmt: skip
    rows = [
        [
            f"< {end}",
            name,
            str(row["answers"]),
            str(row["same_text"]),
            f"{row['ratio']['median']:.2f}",
            f"{row['ratio']['low']:.2f} to {row['ratio']['high']:.2f}",
            f"{row['tau']:.2f}",
            "-" if row["acceptance"] is None else f"{row['acceptance']:.2f}",
            f"{row['draft_length']:.1f}",
            f"{row['verify_length']:.1f}",
        ]
        for end, found in contexts.items()
        for name, row in found.items()
    ]
    common.print_table("answers by context", columns, rows)


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line.

    Raises:
        ValueError: values that cannot be.
    """
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    in_process.add_flags(parser, ARMS, 400, 8192, 0.6)
    add = parser.add_argument
    add("--arm", action="append", default=[], help="a further one, NAME=JSON")
    add("--domain", default="code", help="or a dataset")
    add("--conversations", type=int, default=2)
    add("--answer-tokens", type=int, default=160)
    add("--every", type=int, default=1, metavar="N")
    args = parser.parse_args(argv)
    for name in ("conversations", "every"):
        if getattr(args, name) < 1:
            raise ValueError(f"--{name} is {getattr(args, name)}; at least 1")
    if args.answer_tokens <= _LEAST_TOKENS:
        raise ValueError(
            f"--answer-tokens is {args.answer_tokens}; more than {_LEAST_TOKENS}"
        )
    if args.max_model_len < args.answer_tokens + args.max_prompt_tokens:
        raise ValueError(
            f"--max-model-len {args.max_model_len} has no room for a question of "
            f"{args.max_prompt_tokens} tokens and an answer of {args.answer_tokens}"
        )
    return args


def run(args: argparse.Namespace) -> None:
    """Measure, and write what is there after every answer."""
    args.out.mkdir(parents=True, exist_ok=True)
    talk = Conversations(args)
    arms = [named(name, args.drafter) for name in args.arms]
    arms += [custom(text) for text in args.arm]
    engines = [Engine(arm, args) for arm in arms]
    exchanges: list[Exchange] = []
    collected = provenance.collect()
    parts = args.max_model_len // SHORTEST
    with counting(
        Console(), f"{SHORTEST} tokens of context", args.conversations * parts
    ) as advance:
        for number in range(args.conversations):
            done = 0
            for exchange in hold(engines, args, number, talk):
                exchanges.append(exchange)
                result = {
                    **in_process.described(args, arms),
                    "contexts": by_context(exchanges),
                    "exchanges": [asdict(exchange) for exchange in exchanges],
                    "provenance": collected,
                }
                provenance.write_json(args.out / "long.json", result)
                for _ in range(exchange.context // SHORTEST - done):
                    advance()
                done = exchange.context // SHORTEST
            for _ in range(parts - done):
                advance()
    if not exchanges:
        print(f"no answer had {_LEAST_TOKENS} tokens")
        return
    show(by_context(exchanges))
    plot(by_context(exchanges), args.out / "long.png")


if __name__ == "__main__":
    in_process.preload()
    sys.exit(in_process.main("long_context", lambda: run(parse())))
