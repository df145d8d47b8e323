"""Throughput of arms against each other, by load, on a machine that wavers.

    python benchmarks/paired_load.py --target T --drafter D --prompts eval.jsonl \
        --out paired --dtype float32

A shared machine changes its speed within seconds, by more than the few per cent that
"never slower" is about; points of many seconds, as `serve_sweep.py` has them, then say
little. Here the engines of all arms live in this process and take turns of a second or
so, another one first each time, and each turn is compared with the others of the same
moment. What a server adds (HTTP, its own process) is left out: look at the sweep for
that.

At each load C every engine always has C requests at hand: a new one comes when one has
ended. All get the same held-out prompts in the same order, answer greedily, end where
the answer ends or after --output-tokens on average (spread over half to one and a
half). The first --start-steps steps of a load are not timed. A turn lasts until the
engine has emitted --turn-steps tokens per request, and --turn-tokens at least. Turns of
one moment differ in how many prompts happened to begin in them, so what is compared is
work per second: tokens emitted, and prompt tokens at what one takes in the first arm
against a token emitted there (`prompt_weight` in the results).

--out holds paired.json with every turn, the ratios (median over turns of the paired
throughputs, and the 95% interval of that median from resampled turns), drafts made and
verified per request and step, and provenance; paired.png shows the ratios over the
load. Arms are those of serve_sweep.py.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import _bench_common as common
import _in_process as in_process
import numpy as np
from _in_process import build, draft_counts
from _paired_turns import Turn, summary
from _sweep_arms import DEFAULT, Arm, named
from _sweep_client import answer_tokens
from _sweep_plots import DOTS_PER_INCH, load_axis
from _sweep_prompts import Prompt, Prompts, load_prompts

from vllm_dspark.calibration.plots import figure

ARMS = [name for name in DEFAULT if name != "ngram"]
LOADS = (64, 32, 16, 8, 4, 2, 1)


class Engine:
    """One arm's engine, its open requests, and its place among the prompts."""

    def __init__(self, arm: Arm, args: argparse.Namespace, prompts: Prompts) -> None:
        self.name, self._prompts, self._args = arm.name, prompts, args
        self._engine = build(
            arm,
            args,
            max_num_seqs=max(args.concurrency),
            enable_prefix_caching=False,
        )
        self._open: dict[str, int] = {}  # tokens emitted, by request
        self._prompt_tokens: dict[str, int] = {}  # of those that emitted none yet
        self._next = 0
        self._tokenizer = self._engine.get_tokenizer()

    def fill(self, load: int) -> None:
        """Ask until ``load`` requests are open."""
        from vllm import SamplingParams

        while len(self._open) < load:
            (prompt,) = self._prompts.take(self._next, 1)
            longest = answer_tokens(self._args.output_tokens, 0.5, self._next)
            name = f"{self._next}"
            self._next += 1
            ids = self._ids(prompt)
            self._prompt_tokens[name] = len(ids)
            self._engine.add_request(
                name,
                {"prompt_token_ids": ids},
                SamplingParams(temperature=0.0, max_tokens=longest),
            )
            self._open[name] = 0

    def _ids(self, prompt: Prompt) -> list[int]:
        ids: list[int] = self._tokenizer.apply_chat_template(
            prompt.messages, add_generation_prompt=True, return_dict=False
        )
        return ids

    def step(self) -> tuple[int, int]:
        """One engine step; tokens emitted, and of prompts that were done with it."""
        emitted = prompts = 0
        for output in self._engine.step():
            now = len(output.outputs[0].token_ids)
            emitted += now - self._open.get(output.request_id, 0)
            prompts += self._prompt_tokens.pop(output.request_id, 0)
            self._open[output.request_id] = now
            if output.finished:
                del self._open[output.request_id]
        return emitted, prompts

    def turn(self, load: int, at_least: int) -> Turn:
        """Serve until so many tokens are emitted."""
        drafted, verified = draft_counts(self._engine)
        tokens = prompt_tokens = steps = 0
        start = time.perf_counter()
        while tokens < at_least:
            self.fill(load)
            emitted, prompts = self.step()
            tokens += emitted
            prompt_tokens += prompts
            steps += 1
        seconds = time.perf_counter() - start
        after = draft_counts(self._engine)
        drafts = after[0] - drafted, after[1] - verified
        return Turn(tokens, prompt_tokens, seconds, steps, *drafts)

    def drain(self) -> None:
        """Give up what is open."""
        self._engine.abort_request(list(self._open))
        self._open.clear()
        self._prompt_tokens.clear()
        while self._engine.has_unfinished_requests():
            self._engine.step()


def measure(
    engines: Sequence[Engine], load: int, args: argparse.Namespace
) -> dict[str, list[Turn]]:
    """Turns of every engine at one load, by arm; entry i of all is of one moment."""
    turns: dict[str, list[Turn]] = {engine.name: [] for engine in engines}
    for engine in engines:
        for _ in range(args.start_steps):
            engine.fill(load)
            engine.step()
    at_least = max(load * args.turn_steps, args.turn_tokens)
    for i in range(args.turns):
        for engine in common.in_turn(engines, i):
            turns[engine.name].append(engine.turn(load, at_least))
    for engine in engines:
        engine.drain()
    return turns


def plot(loads: dict[int, Any], reference: str, file: Path) -> None:
    """Ratios to the reference arm over the load."""
    drawing, grid = figure(1)
    axes = grid[0, 0]
    drawing.set_size_inches(6.4, 4.2)
    order = sorted(loads)
    for name in loads[order[0]]["arms"]:
        rows = [loads[c]["arms"][name]["ratio"] for c in order]
        middle = np.array([r["median"] for r in rows])
        low = middle - [r["low"] for r in rows]
        high = [r["high"] for r in rows] - middle
        axes.errorbar(order, middle, (low, high), marker="o", capsize=2, label=name)
    load_axis(axes, order)
    axes.set(xlabel="requests at a time", ylabel=f"throughput / {reference}")
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    drawing.savefig(file, dpi=DOTS_PER_INCH)


def show(loads: dict[int, Any]) -> None:
    """The figures as a table."""
    columns = ["requests", "arm", "tok/s", "ratio", "95%", "drafted", "verified"]
    rows = [
        [
            str(load),
            name,
            f"{row['output_throughput']:.1f}",
            f"{row['ratio']['median']:.3f}",
            f"{row['ratio']['low']:.3f} to {row['ratio']['high']:.3f}",
            f"{row['draft_length']:.2f}",
            f"{row['verify_length']:.2f}",
        ]
        for load, found in loads.items()
        for name, row in found["arms"].items()
    ]
    common.print_table("engines in turn", columns, rows)


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line.

    Raises:
        ValueError: values that cannot be.
    """
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    in_process.add_flags(parser, ARMS, 300, 1024, 1.0)
    add = parser.add_argument
    add("--concurrency", nargs="+", type=int, default=list(LOADS))
    add("--turns", type=int, default=12)
    add("--turn-steps", type=int, default=8)
    add("--turn-tokens", type=int, default=64)
    add("--start-steps", type=int, default=50)
    add("--output-tokens", type=int, default=128)
    args = parser.parse_args(argv)
    for name in ("turns", "turn_steps", "turn_tokens", "output_tokens"):
        if getattr(args, name) < 1:
            option = "--" + name.replace("_", "-")
            raise ValueError(f"{option} is {getattr(args, name)}; at least 1 is needed")
    if min(args.concurrency) < 1 or len(args.arms) < 2:
        raise ValueError(
            f"--concurrency {args.concurrency}, --arms {args.arms}: loads of at least "
            "1, and an arm to compare with the first, are needed"
        )
    return args


def run(args: argparse.Namespace) -> None:
    """Measure, and write what is there after every load."""
    from transformers import AutoTokenizer

    args.out.mkdir(parents=True, exist_ok=True)
    tokenizer = AutoTokenizer.from_pretrained(args.target)
    rows = load_prompts(args.prompts, tokenizer, args.max_prompt_tokens)
    prompts = Prompts(rows, args.seed)
    arms = [named(name, args.drafter) for name in args.arms]
    engines = [Engine(arm, args, prompts) for arm in arms]
    loads: dict[int, Any] = {}
    for load in args.concurrency:
        loads[load] = summary(measure(engines, load, args), load)
        show({load: loads[load]})
        result = {**in_process.described(args, arms), "loads": loads}
        common.write_json(args.out / "paired.json", result)
    plot(loads, arms[0].name, args.out / "paired.png")
    show(loads)


if __name__ == "__main__":
    in_process.preload()
    sys.exit(in_process.main("paired_load", lambda: run(parse())))
