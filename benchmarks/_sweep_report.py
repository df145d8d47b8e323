"""What a load sweep found: medians over runs, paired ratios, a table and figures."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import _bench_common as common

from vllm_dspark.calibration.plots import figure

# Our name of a figure and vLLM's key for it in a run's record.
MEDIANS = {
    "output_throughput": "output_throughput",
    "tpot_ms": "median_tpot_ms",
    "ttft_p50_ms": "median_ttft_ms",
    "ttft_p99_ms": "p99_ttft_ms",
    "tau": "tau",
    "verify_length": "verify_length",
    "draft_length": "draft_length",
    "accepted_length_drafted": "accepted_length_drafted",
    "preemptions": "preemptions",
}
Grid = dict[str, dict[int, dict[int, dict[str, Any]]]]
SUBJECT = "dspark-adaptive"


def summarise(
    grid: list[dict[str, Any]], split: list[dict[str, Any]]
) -> dict[str, Any]:
    """Figures of every arm and load, from the runs' records.

    A ratio is that of two arms in the same run, then the median over runs; the best of
    the others is chosen anew at each load, by its median throughput.
    """
    runs: Grid = {}
    for record in grid:
        loads = runs.setdefault(record["arm"], {})
        at_load = loads.setdefault(record["max_concurrency"], {})
        at_load[record["run_number"]] = record
    arms: dict[str, Any] = {}
    for arm, loads in runs.items():
        arms[arm] = {}
        for load in sorted(loads):
            found = medians(loads[load].values())
            found["ratio_to_none"] = ratio(runs, arm, "none", load)
            arms[arm][str(load)] = found
    return {
        "arms": arms,
        "adaptive_to_best_other": best_others(runs, arms),
        "by_dataset": datasets(split),
    }


def medians(records: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """The median of each figure over the runs that have it, and its extremes."""
    rows = list(records)
    found: dict[str, Any] = {"runs": len(rows), "num_prompts": rows[0]["num_prompts"]}
    for name, key in MEDIANS.items():
        values = [row[key] for row in rows if row.get(key) is not None]
        found[name] = statistics.median(values) if values else None
    speeds = [row["output_throughput"] for row in rows]
    found["output_throughput_range"] = [min(speeds), max(speeds)]
    per_user = [1000 / r["median_tpot_ms"] for r in rows if r["median_tpot_ms"]]
    found["tok_s_per_user"] = statistics.median(per_user) if per_user else None
    return found


def ratio(runs: Grid, arm: str, other: str, load: int) -> dict[str, Any] | None:
    """Throughput of one arm to another's, over the runs that both have.

    A run counts only where one session measured both: after --resume the machine may
    have been another, and the two are no pair.
    """
    mine, theirs = (runs.get(a, {}).get(load, {}) for a in (arm, other))
    both = [
        run
        for run in sorted(set(mine) & set(theirs))
        if mine[run].get("session") == theirs[run].get("session")
    ]
    if not both:
        return None
    each = [
        mine[run]["output_throughput"] / theirs[run]["output_throughput"]
        for run in both
    ]
    return {"median": statistics.median(each), "runs": each}


def best_others(runs: Grid, arms: dict[str, Any]) -> dict[str, Any]:
    """`SUBJECT` to the fastest other arm, at each load."""
    found = {}
    for load in arms.get(SUBJECT, {}):
        others = {
            arm: loads[load]["output_throughput"]
            for arm, loads in arms.items()
            if arm != SUBJECT and load in loads
        }
        if others:
            best = max(others, key=others.__getitem__)
            found[load] = {
                "best_other": best,
                "ratio": ratio(runs, SUBJECT, best, int(load)),
            }
    return found


def datasets(split: list[dict[str, Any]]) -> dict[str, Any]:
    """Medians of the points with one dataset alone: arm, dataset, load."""
    groups: dict[tuple[str, str, int], list[dict[str, Any]]] = defaultdict(list)
    for record in split:
        key = record["arm"], record["dataset"], record["max_concurrency"]
        groups[key].append(record)
    found: dict[str, Any] = {}
    for (arm, dataset, load), records in sorted(groups.items()):
        entry = found.setdefault(arm, {}).setdefault(dataset, {})
        entry[str(load)] = medians(records)
    return found


def show(result: dict[str, Any]) -> None:
    """Print the tables."""
    loads = sorted({int(load) for a in result["arms"].values() for load in a})
    rows = []
    for load in loads:
        for arm, found in result["arms"].items():
            if row := found.get(str(load)):
                rows.append([str(load), arm, *_cells(row)])
    columns = ["C", "arm", "tok/s", "/ none", "tok/s/user", "TTFT p50", "p99 ms"]
    columns += ["τ", "verified", "drafted"]
    common.print_table("output throughput by load (medians)", columns, rows)
    best = [
        [load, entry["best_other"], _number((entry["ratio"] or {}).get("median"), 3)]
        for load, entry in result["adaptive_to_best_other"].items()
    ]
    if best:
        title = f"{SUBJECT} / best other arm"
        common.print_table(title, ["C", "best other", "ratio"], best)
    alone = [
        [arm, dataset, load, *_cells(row)]
        for arm, by_name in result["by_dataset"].items()
        for dataset, by_load in by_name.items()
        for load, row in by_load.items()
    ]
    if alone:
        columns = ["arm", "dataset", "C", *columns[2:]]
        common.print_table("one dataset alone", columns, alone)


def _cells(row: dict[str, Any]) -> list[str]:
    to_none = (row.get("ratio_to_none") or {}).get("median")
    return [
        _number(row["output_throughput"], 1),
        _number(to_none, 3),
        _number(row["tok_s_per_user"], 1),
        _number(row["ttft_p50_ms"], 0),
        _number(row["ttft_p99_ms"], 0),
        _number(row["tau"], 2),
        _number(row["verify_length"], 2),
        _number(row["draft_length"], 2),
    ]


def _number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def draw(result: dict[str, Any], folder: Path) -> list[Path]:
    """Write the figures; returns their files."""
    arms = {
        arm: {int(load): row for load, row in loads.items()}
        for arm, loads in result["arms"].items()
    }
    lengths = [("verify_length", "drafts verified"), ("draft_length", "drafts made")]
    return [
        _pareto(arms, folder / "pareto.png"),
        _against_load(
            arms,
            [("output_throughput", "output tok/s"), ("ratio", "ratio to none")],
            folder / "throughput.png",
        ),
        _against_load(
            arms,
            [(key, f"{what} per request step") for key, what in lengths],
            folder / "lengths.png",
        ),
    ]


def _pareto(arms: dict[str, Any], file: Path) -> Path:
    drawing, axes = figure(2)
    axis, legend = axes[0]
    for arm, loads in arms.items():
        rows = [(c, row) for c, row in loads.items() if row["tok_s_per_user"]]
        xs = [row["tok_s_per_user"] for _, row in rows]
        ys = [row["output_throughput"] for _, row in rows]
        (line,) = axis.plot(xs, ys, marker="o", markersize=3, label=arm)
        for (c, _), x, y in zip(rows, xs, ys, strict=True):
            axis.annotate(str(c), (x, y), fontsize=6, color=line.get_color())
    axis.set(xlabel="tok/s per user (1 / TPOT)", ylabel="output tok/s")
    legend.axis("off")
    legend.legend(*axis.get_legend_handles_labels(), loc="center left", fontsize=8)
    drawing.savefig(file, dpi=140)
    return file


def _against_load(
    arms: dict[str, Any], panels: list[tuple[str, str]], file: Path
) -> Path:
    """One panel per figure, one line per arm, load on a logarithmic axis."""
    drawing, axes = figure(len(panels) + 1)
    *drawn, legend = axes[0]
    for axis, (key, label) in zip(drawn, panels, strict=True):
        for arm, loads in arms.items():
            values = {c: _value(row, key) for c, row in loads.items()}
            known = {c: v for c, v in values.items() if v is not None}
            axis.plot([*known], [*known.values()], marker="o", markersize=3, label=arm)
        axis.set_xscale("log", base=2)
        axis.set(xlabel="concurrent requests", ylabel=label)
    legend.axis("off")
    legend.legend(*drawn[0].get_legend_handles_labels(), loc="center left", fontsize=8)
    drawing.savefig(file, dpi=140)
    return file


def _value(row: dict[str, Any], key: str) -> float | None:
    if key == "ratio":
        key, row = "median", row["ratio_to_none"] or {}
    value: float | None = row.get(key)
    return value
