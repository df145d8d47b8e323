"""What the benchmarks share: prompts, timing in turn, tables, files with provenance."""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from vllm_dspark import provenance

Arm = TypeVar("Arm")
Prompt = TypeVar("Prompt")


def read_rows(path: Path) -> list[Any]:
    """The rows of a JSONL file."""
    # Not splitlines: texts may hold U+2028.
    return [json.loads(line) for line in path.read_text().split("\n") if line]


def prompts_in_turn(
    path: Path,
    make: Callable[[list[dict[str, str]]], Prompt | None],
    group: Callable[[str], str] = str,
    most: int | None = None,
) -> list[tuple[str, Prompt]]:
    """(group, prompt) of a JSONL file's rows, the groups taking turns.

    Args:
        path: rows {"dataset", "messages"}.
        make: the prompt of a row's messages; None leaves the row out.
        group: the group of a dataset.
        most: prompts of a group.
    """
    groups: dict[str, list[Prompt]] = defaultdict(list)
    for row in read_rows(path):
        if (prompt := make(row["messages"])) is not None:
            groups[group(row["dataset"])].append(prompt)
    return [
        (name, prompts[i])
        for i in range(max(map(len, groups.values()), default=0))
        for name, prompts in groups.items()
        if i < min(len(prompts), len(prompts) if most is None else most)
    ]


def in_turn(arms: Sequence[Arm], moment: int) -> list[Arm]:
    """All of them, another one first at each moment."""
    first = moment % len(arms)
    return [*arms[first:], *arms[:first]]


def time_in_turn(
    providers: dict[str, Callable[[], object]], rounds: dict[str, int]
) -> dict[str, float]:
    """Median microseconds of each provider.

    The providers run one after the other within each round, so that a busy moment of
    the machine meets all of them; each runs twice untimed first.

    Args:
        providers: name to the call being timed.
        rounds: how often each is timed.
    """
    for call in providers.values():
        call()
        call()
    times: dict[str, list[float]] = {name: [] for name in providers}
    for i in range(max(rounds[name] for name in providers)):
        for name, call in providers.items():
            if i < rounds[name]:
                start = time.perf_counter()
                call()
                times[name].append(time.perf_counter() - start)
    return {name: statistics.median(t) * 1e6 for name, t in times.items()}


def print_table(title: str, columns: Sequence[str], rows: list[list[str]]) -> None:
    """A table for people: rich's where it is installed, plain text elsewhere."""
    try:
        from rich.console import Console
        from rich.table import Table
    except ImportError:
        print(title, "\n".join("  ".join(r) for r in [list(columns), *rows]), sep="\n")
        return
    table = Table(title=title)
    for column in columns:
        table.add_column(column, justify="right")
    for row in rows:
        table.add_row(*row)
    Console(width=110).print(table)


def write_json(path: str | Path | None, result: dict[str, Any]) -> None:
    """Writes `result` with a provenance record, if there is a path."""
    if path is None:
        return
    result = {**result, "provenance": provenance.collect()}
    provenance.write_json(path, result)
    print(f"written: {path}")
