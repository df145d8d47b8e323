"""The tables that a load sweep prints."""

from __future__ import annotations

from typing import Any

import _bench_common as common
from _sweep_summary import BEST, SUBJECT


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
    _show_ratios(result["ratios"], loads)
    alone = [
        [arm, dataset, load, *_cells(row)]
        for arm, by_name in result["by_dataset"].items()
        for dataset, by_load in by_name.items()
        for load, row in by_load.items()
    ]
    if alone:
        columns = ["arm", "dataset", "C", *columns[2:]]
        common.print_table("one dataset alone", columns, alone)


def _show_ratios(ratios: dict[str, Any], loads: list[int]) -> None:
    if not ratios:
        return
    rows = []
    for other in sorted(ratios, key=lambda name: name == BEST):
        cells = [ratios[other].get(str(load)) for load in loads]
        rows.append([other, *(_number((c or {}).get("median"), 3) for c in cells)])
    names = [ratios[BEST].get(str(load), {}).get("arm", "-") for load in loads]
    rows.append(["(that is)", *(name.removeprefix("dspark-") for name in names)])
    title = f"throughput of {SUBJECT} / other arm, same round, median over rounds"
    common.print_table(title, ["C", *map(str, loads)], rows)


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
