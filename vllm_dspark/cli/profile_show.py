"""Showing a cost table: for people, as a figure, for machines.

The part of `vllm-dspark profile` that needs no engine. Making a table ends in `show` as
well: what was measured is shown like what was found in the cache.
"""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from vllm_dspark import provenance
from vllm_dspark.calibration.plots import figure
from vllm_dspark.schedule import cost_file
from vllm_dspark.schedule.cost import CostTable
from vllm_dspark.schedule.cost_file import CostFile


def show(
    path: Path, console: Console, plot: Path | None = None, out: Path | None = None
) -> None:
    """Show a cost table's file.

    Args:
        path: the file, as in the cache.
        plot: where to put a PNG.
        out: where to put JSON for machines (``--json``).

    Raises:
        ValueError: the file cannot be used, with the reason; or a figure is asked for
            and matplotlib is missing.
    """
    content = cost_file.read(path)
    console.print(f"cost table {path}", highlight=False, markup=False, soft_wrap=True)
    for line in describe(content):
        console.print(f"  {line}", highlight=False, markup=False, soft_wrap=True)
    console.print(step_table(content.table))
    console.print(draft_table(content.table))
    if plot is not None:
        draw(content, plot)
        console.print(f"written: {plot}", highlight=False, soft_wrap=True)
    if out is not None:
        provenance.write_json(out, as_json(content))
        console.print(f"written: {out}", highlight=False, soft_wrap=True)


def describe(content: CostFile) -> list[str]:
    """What the table holds for and how it was measured, in lines."""
    key, table = content.key, content.table
    threads = f"{key.threads} threads" if key.threads else "any threads"
    mode = "compiled" if key.compiled else "eager"
    slope = table.per_context_token * 1e6
    measured = ", ".join(f"{name} {value}" for name, value in content.measured.items())
    return [
        f"target {key.target[:12]}…, drafter {key.drafter[:12]}…, {key.dtype}",
        f"{key.device}, {threads}, {mode}, tensor parallel {key.tensor_parallel}, "
        f"vLLM {key.vllm_version}",
        f"measured: {measured or 'unknown how'}",
        f"1000 context tokens add {slope:.3g} ms to a step",
        f"a prompt's token counts as {table.prompt_share:.2f} of a token of B",
    ]


def step_table(table: CostTable) -> Table:
    """The target's step by B: time, time per token, and speed (SPS)."""
    shown = Table(title="target step, without context")
    for name in ("tokens B", "ms", "ms/token", "steps/s", "× 1 token"):
        shown.add_column(name, justify="right")
    first = float(table.step_seconds(1))
    for b, seconds in zip(table.tokens, table.step, strict=True):
        ms = 1000 * seconds
        shown.add_row(
            f"{b}",
            f"{ms:.2f}",
            f"{ms / b:.3f}",
            f"{1 / seconds:.1f}",
            f"{seconds / first:.2f}",
        )
    return shown


def draft_table(table: CostTable) -> Table:
    """Milliseconds of drafting by requests and positions."""
    shown = Table(title="drafting, ms (0 positions: context K/V alone)")
    shown.add_column("requests", justify="right")
    for k in table.positions:
        shown.add_column(f"{k} pos.", justify="right")
    for r, row in zip(table.requests, table.draft, strict=True):
        shown.add_row(f"{r}", *(f"{1000 * seconds:.2f}" for seconds in row))
    return shown


def draw(content: CostFile, file: Path) -> None:
    """A PNG: step time, steps per second, and drafting; beyond the points dotted."""
    table = content.table
    drawing, axes = figure(3)
    drawing.suptitle(
        f"{content.key.device}, {content.key.dtype}, "
        f"{'compiled' if content.key.compiled else 'eager'}",
        fontsize=9,
    )
    time, speed, drafts = axes[0]
    last = table.tokens[-1]
    inside = np.unique(np.geomspace(1, last, 200).round())
    beyond = np.linspace(last, 1.5 * last, 20)
    for b, style in ((inside, "-"), (beyond, ":")):
        seconds = table.step_seconds(b)
        time.plot(b, 1000 * seconds, style, color="C0")
        speed.plot(b, 1 / seconds, style, color="C0")
    time.plot(table.tokens, 1000 * np.array(table.step), ".", color="C0")
    time.set(xlabel="tokens B of a step", ylabel="target step, ms", ylim=(0, None))
    speed.set(xlabel="tokens B of a step", ylabel="steps per second", xscale="log")
    for k, column in zip(table.positions, np.array(table.draft).T, strict=True):
        drafts.plot(table.requests, 1000 * column, marker=".", label=f"{k} positions")
    drafts.set(xlabel="requests", ylabel="drafting, ms", ylim=(0, None))
    drafts.legend(fontsize=7)
    drawing.savefig(file, dpi=120)


def as_json(content: CostFile) -> dict[str, Any]:
    """The content for machines; milliseconds, as they are shown."""
    table = content.table
    return {
        "key": asdict(content.key),
        "measured": dict(content.measured),
        "provenance": dict(content.provenance),
        "step": [
            {"tokens": b, "ms": 1000 * seconds, "steps_per_second": 1 / seconds}
            for b, seconds in zip(table.tokens, table.step, strict=True)
        ],
        "ms_per_1000_context_tokens": 1e6 * table.per_context_token,
        "prompt_share": table.prompt_share,
        "draft": [
            {"requests": r, "positions": k, "ms": 1000 * seconds}
            for r, row in zip(table.requests, table.draft, strict=True)
            for k, seconds in zip(table.positions, row, strict=True)
        ],
    }
