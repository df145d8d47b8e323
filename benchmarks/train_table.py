"""Drafters of different shapes, each trained on the same data for as many steps.

    python benchmarks/train_table.py --target T --data DATA --out runs --steps 600 \\
        --json table.json --png curves.png
    python benchmarks/train_table.py ... --rows base head-none layers-3 --parallel 4
    python benchmarks/train_table.py ... --row mine='--layers 4 --rank 64'

Each row is a run of `vllm-dspark train` with the options of `ROWS` on top of those
after `--`. All see the same texts, anchors and held-out texts in the same order (they
follow from the seed). Rows are written as they are done; the same command goes on where
it was. Figures: greedy τ on held-out text (best validation), acceptance by position,
calibration error and AUC of the confidences, size of the drafter's file, speed; the
PNG shows τ against blocks and minutes (sample efficiency).
"""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import _bench_common as common

from vllm_dspark.train.record import LINES
from vllm_dspark.train.state import FOLDER

ROWS: dict[str, str] = {
    "base": "",
    "layers-1": "--layers 1",
    "layers-3": "--layers 3",
    "head-none": "--head none --rank 0",
    "head-none-layers-3": "--head none --rank 0 --layers 3",
    "head-gated": "--head gated",
    "head-rnn": "--head rnn",
    "gamma-4": "--block-size 4",
    "gamma-11": "--block-size 11",
    "whole-vocabulary": "--draft-vocab-size 0",
    "target-start": "--init target",
    "rank-64": "--rank 64",
}
COLUMNS = ("row", "τ", "of base", "accepted by position", "AUC 1", "ECE 1", "MB", "min")


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line.

    Raises:
        ValueError: a row that is not known or not of the form NAME='OPTIONS'.
    """
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--target", required=True)
    add("--data", nargs="+", required=True)
    add("--out", type=Path, required=True, help="folder of the runs")
    add("--steps", type=int, required=True, help="of every row")
    add("--rows", nargs="*", default=list(ROWS), metavar="ROW", help="which of ROWS")
    add("--row", action="append", default=[], metavar="NAME='OPTIONS'", help="one more")
    add("--parallel", type=int, default=1, help="runs at a time")
    add("--json", type=Path, required=True)
    add("--png", type=Path)
    add("options", nargs="*", help="after `--`: options of `train` for every row")
    args = parser.parse_args(argv)
    if unknown := [name for name in args.rows if name not in ROWS]:
        raise ValueError(f"--rows has {unknown[0]!r}; there are {', '.join(ROWS)}")
    chosen = {name: shlex.split(ROWS[name]) for name in args.rows}
    for text in args.row:
        name, equals, options = text.partition("=")
        if not equals or not name or "/" in name or name in chosen:
            raise ValueError(
                f"--row is {text!r}; it must be NAME='OPTIONS', a new name"
            )
        chosen[name] = shlex.split(options)
    args.chosen = chosen
    return args


def command(args: argparse.Namespace, name: str) -> list[str]:
    """Of one row."""
    found = [sys.executable, "-m", "vllm_dspark.cli", "train"]
    found += ["--target", args.target, "--data", *args.data]
    found += ["--out", str(args.out / name), "--steps", str(args.steps)]
    found += ["--json", str(outcome_file(args, name))]
    return found + args.options + args.chosen[name]


def outcome_file(args: argparse.Namespace, name: str) -> Path:
    """Where a finished run says how it ended."""
    return Path(args.out / f"{name}.json")


def run(command: list[str], log: Path) -> int:
    """Run a command to its end; its exit status."""
    with log.open("w") as output:
        done = subprocess.run(
            command, stdout=output, stderr=subprocess.STDOUT, check=False
        )
    return done.returncode


def train(args: argparse.Namespace, name: str) -> dict[str, Any]:
    """Run a row, or read what it was if it is done."""
    file = outcome_file(args, name)
    if not file.is_file():
        log = args.out / f"{name}.log"
        status = run(command(args, name), log)
        if status or not file.is_file():
            lines = log.read_text().strip().splitlines()
            return {"error": lines[-1] if lines else f"status {status}"}
    return figures(args, name, json.loads(file.read_text()))


def figures(args: argparse.Namespace, name: str, outcome: Any) -> dict[str, Any]:
    """A row of the table."""
    folder = args.out / name
    lines = (folder / FOLDER / LINES).read_text().split("\n")
    checks = [x for x in map(json.loads, filter(None, lines)) if "tau" in x]
    best = max(checks, key=lambda x: x["tau"])
    size = (folder / "model.safetensors").stat().st_size
    keys = ("tau", "acceptance_cumulative", "ece", "auroc", "rounds")
    return {
        "options": " ".join(args.options + args.chosen[name]),
        **{key: best[key] for key in keys},
        "bytes": size,
        "coverage": outcome["coverage"],
        "steps": outcome["steps"],
        "blocks": outcome["blocks"],
        "seconds": round(outcome["seconds"], 1),
        "validations": [
            {key: x[key] for key in ("step", "tau", "seconds", "blocks")}
            for x in checks
        ],
    }


def table(rows: dict[str, dict[str, Any]]) -> list[list[str]]:
    """For people; τ against that of `base` where it is there."""
    base = rows.get("base", {}).get("tau")
    found = []
    for name, row in rows.items():
        if "error" in row:
            found.append([name, row["error"], *[""] * (len(COLUMNS) - 2)])
            continue
        accepted = " ".join(f"{x:.2f}" for x in row["acceptance_cumulative"])
        ratio = f"{row['tau'] / base:.3f}" if base else "-"
        found.append(
            [
                name,
                f"{row['tau']:.3f}",
                ratio,
                accepted,
                _first(row["auroc"]),
                _first(row["ece"]),
                f"{row['bytes'] / 1e6:.1f}",
                f"{row['seconds'] / 60:.1f}",
            ]
        )
    return found


def _first(values: list[float | None]) -> str:
    return "-" if not values or values[0] is None else f"{values[0]:.3f}"


def draw(rows: dict[str, dict[str, Any]], file: Path) -> None:
    """τ against blocks and against minutes, a curve for each row."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 4.5), layout="constrained")
    left, right = figure.subplots(1, 2)
    for i, (name, row) in enumerate(rows.items()):
        checks = row.get("validations", [])
        tau = [x["tau"] for x in checks]
        style = {"marker": ".", "label": name, "color": f"C{i % 10}"}
        style["linestyle"] = ("-", "--", ":")[i // 10 % 3]
        left.plot([x["blocks"] / 1e3 for x in checks], tau, **style)
        right.plot([x["seconds"] / 60 for x in checks], tau, **style)
    left.set(xlabel="thousand blocks", ylabel="τ on held-out text (greedy)")
    right.set(xlabel="minutes")
    left.legend(fontsize=7)
    figure.savefig(file, dpi=110)


def main(argv: list[str] | None = None) -> int:
    """Train what is not there yet; 1 if a row failed."""
    args = parse(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    rows: dict[str, dict[str, Any]] = {}
    with ThreadPoolExecutor(args.parallel) as pool:
        done = pool.map(lambda name: train(args, name), args.chosen)
        for name, row in zip(args.chosen, done, strict=True):
            rows[name] = row
            print(name, row.get("error") or f"τ {row['tau']:.3f}", flush=True)
            common.write_json(args.json, {"steps": args.steps, "rows": rows})
    common.print_table("drafters by shape", COLUMNS, table(rows))
    if args.png:
        draw(rows, args.png)
    return int(any("error" in row for row in rows.values()))


if __name__ == "__main__":
    try:
        raise SystemExit(main())
    except ValueError as error:
        raise SystemExit(f"error: {error}") from None
