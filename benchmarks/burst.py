"""How soon drafting follows a jump of load: 1 client, 64 at once, and 1 again.

    python benchmarks/burst.py --target T --drafter D --prompts eval.jsonl --out burst
    python benchmarks/burst.py ... --loads 1 8 1 --phase-seconds 20   # a first look

One `vllm serve` with the adaptive policy writes a step log while streaming clients ask
greedy questions of the prompts (JSONL, {"dataset", "messages"}), each one after the
other. At a jump the new clients all begin at once, and those that are too many break
off. For each jump --out/burst.json and a table say after how many engine steps the
positions drafted and the drafts verified per request are where they stay for the rest
of the phase (how that is told: `_burst_analysis.py`), and whether within 50;
burst.png shows both over the steps. Steps are counted from the jump itself:
the prompts of the new clients are among them ("load").

A phase must be long enough for 100 steps, better 300: with --phase-seconds 90 on two
cores. Exit status 1: a jump was not followed in time, or nothing can be said of it.
--analyse reads an earlier --out again, without a server.
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
import time
from pathlib import Path
from typing import Any

import _bench_common as common
from _burst_analysis import WITHIN, Rows, jumps, series, split
from _burst_load import Load
from _sweep_arms import Arm
from _sweep_fleet import Fleet
from _sweep_prompts import Prompts, load_prompts

from vllm_dspark.calibration.plots import figure
from vllm_dspark.cli.signals import interrupt

# What the figures depend on, besides the loads.
SETTINGS = (
    "target",
    "drafter",
    "phase_seconds",
    "output_tokens",
    "output_spread",
    "max_prompt_tokens",
    "max_model_len",
    "kv_gib",
    "seed",
    "compiled",
)
FIGURES = {"positions": "positions drafted", "verify_length": "verified per request"}


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line.

    Raises:
        ValueError: values that cannot be.
    """
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--target", help="model folder")
    add("--drafter", help="drafter folder")
    add("--prompts", type=Path, help="JSONL: dataset, messages")
    add("--out", type=Path, required=True, help="folder for everything")
    add("--loads", type=int, nargs="+", default=[1, 64, 1], help="clients (1 64 1)")
    add("--phase-seconds", type=float, default=90.0, help="of each load (90)")
    add("--output-tokens", type=int, default=128, help="of an answer (128)")
    add("--output-spread", type=float, default=0.5, help="as in serve_sweep.py (0.5)")
    add("--max-prompt-tokens", type=int, default=384, help="leave out longer (384)")
    add("--max-model-len", type=int, default=1024, help="context of the server (1024)")
    add("--kv-gib", type=float, default=1, help="its K/V cache, GiB (1)")
    add("--seed", type=int, default=0, help="of the order of the prompts (0)")
    add("--compiled", action="store_true", help="torch.compile instead of eager")
    add("--analyse", action="store_true", help="only read the log that is in --out")
    args = parser.parse_args(argv)
    if args.analyse:
        return args
    for name in ("target", "drafter", "prompts"):
        if getattr(args, name) is None:
            raise ValueError(f"--{name} is missing")
    if not args.prompts.is_file():
        raise ValueError(f"--prompts: {args.prompts} is no file")
    if len(args.loads) < 2 or min(args.loads) < 1:
        raise ValueError(f"--loads {args.loads}: give two or more, each at least 1")
    if args.phase_seconds <= 0:
        raise ValueError(f"--phase-seconds is {args.phase_seconds}; give more than 0")
    longest = round(args.output_tokens * (1 + args.output_spread))
    if args.max_prompt_tokens + longest > args.max_model_len:
        raise ValueError(
            f"prompts of {args.max_prompt_tokens} tokens and answers of {longest} do "
            f"not fit into --max-model-len {args.max_model_len}"
        )
    return args


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Serve the loads; leaves steps.jsonl and run.json (what is returned) in --out."""
    from vllm.tokenizers import get_tokenizer

    args.out.mkdir(parents=True, exist_ok=True)
    log = (args.out / "steps.jsonl").absolute()
    log.unlink(missing_ok=True)
    rows = load_prompts(
        args.prompts, get_tokenizer(args.target), args.max_prompt_tokens
    )
    shared = ["--max-model-len", str(args.max_model_len)]
    shared += ["--max-num-seqs", str(max(args.loads)), "--no-enable-prefix-caching"]
    shared += [] if args.compiled else ["--enforce-eager"]
    arm = Arm(
        "burst",
        {"method": "dspark", "model": args.drafter},
        {"dspark": {"policy": "adaptive", "step_log": str(log)}},
    )
    with Fleet(args.target, shared, args.kv_gib, args.out / "logs") as fleet:
        print("starting the server", flush=True)
        seconds = fleet.start(arm, lambda *_: None)
        print(f"ready after {seconds:.0f} s", flush=True)
        load = Load(
            fleet.servers[arm.name].url,
            args.target,
            Prompts(rows, args.seed),
            args.output_tokens,
            args.output_spread,
        )
        marks = load.run(args.loads, args.phase_seconds, _say)
    run = {
        "settings": {name: getattr(args, name) for name in SETTINGS},
        "arm": arm.as_json(),
        "loads": args.loads,
        "marks": marks,
        "provenance": common.provenance.collect(),
    }
    common.provenance.write_json(args.out / "run.json", run)
    return run


def _say(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {text}", flush=True)


def read_log(file: Path) -> list[dict[str, Any]]:
    """The steps of a log; a last line that was cut off is left out.

    Raises:
        ValueError: there is none, or another line is damaged.
    """
    if not file.is_file():
        raise ValueError(f"there is no step log {file}")
    *lines, last = file.read_text().split("\n")
    del last
    try:
        return [json.loads(line) for line in lines]
    except ValueError as error:
        raise ValueError(f"{file} is damaged: {error}") from None


def show(found: list[dict[str, Any]]) -> None:
    """Print the table."""
    rows = []
    for jump in found:
        for name, label in FIGURES.items():
            part = jump[name]
            rows.append(
                [
                    f"{jump['from']} -> {jump['to']}",
                    label,
                    _number(part["before"]),
                    _number(part["steady"]),
                    _number(part["band"]),
                    str(part["settled_after"]),
                    str(jump["load_steps"]),
                    str(jump["steps"]),
                ]
            )
    columns = ("clients", "", "before", "steady", "±", "settled", "load", "of steps")
    common.print_table("engine steps from a jump", columns, rows)
    for jump in found:
        words = {
            True: "yes",
            False: "NO",
            None: "the phase is too short, or lengths too unsteady, to say",
        }
        print(
            f"{jump['from']} -> {jump['to']}: within {WITHIN} steps: "
            f"{words[jump['within']]} ({jump['settled_after']})"
        )


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def draw(
    rows: Rows, run: dict[str, Any], found: list[dict[str, Any]], file: Path
) -> None:
    """Requests, positions and verify length over the steps of all phases."""
    drawing, axes = figure(1, 3)
    drawing.set_size_inches(9, 7)
    phases = split(rows, run["marks"])
    start = 0
    for i, phase in enumerate(phases):
        steps = range(start, start + len(phase))
        axes[0][0].plot(steps, [row["requests"] for row in phase], color="C0")
        before = phases[i - 1][-1] if i else None
        for axis, name in zip(axes[1:, 0], FIGURES, strict=True):
            of = series(phase, name, before)
            axis.plot(start + of.steps, of.values, ".", color="C1", markersize=2)
            axis.plot(start + of.steps, of.medians, color="C0", linewidth=1)
            settled = found[i - 1][name]["settled_after"] if i else None
            if settled is not None:
                axis.axvline(start + settled, color="C2", linestyle=":")
        for axis in axes[:, 0] if i else ():
            axis.axvline(start, color="black", linewidth=0.8)
            axis.axvspan(start, start + WITHIN, color="C2", alpha=0.1)
        start += len(phase)
    for axis, label in zip(axes[:, 0], ["requests", *FIGURES.values()], strict=True):
        axis.set_ylabel(label)
    axes[2][0].set_xlabel(
        f"engine steps (green: {WITHIN} after a jump; dotted: where lengths stay)"
    )
    drawing.savefig(file, dpi=140)


def main() -> int:
    signal.signal(signal.SIGTERM, interrupt)
    try:
        args = parse()
        if args.analyse:
            run = json.loads((args.out / "run.json").read_text())
        else:
            run = measure(args)
        rows = read_log(args.out / "steps.jsonl")
        found = jumps(rows, run["loads"], run["marks"])
        show(found)
        draw(rows, run, found, args.out / "burst.png")
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    result = {**run, "within_steps": WITHIN, "steps": len(rows), "jumps": found}
    common.provenance.write_json(args.out / "burst.json", result)
    print(f"written: {args.out / 'burst.json'}, {args.out / 'burst.png'}")
    return 0 if all(jump["within"] for jump in found) else 1


if __name__ == "__main__":
    sys.exit(main())
