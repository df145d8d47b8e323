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
    if rows:
        common.print_table("output throughput by load (medians)", columns, rows)
    _show_open_loop(result["open_loop"], columns)
    _show_ratios(result["ratios"], loads)
    _show_domains(result["domains"])
    for arm, entry in result.get("texts", {}).get("arms", {}).items():
        print(f"texts of {arm}: {entry['verdict']}")
    alone = [
        [arm, dataset, load, *_cells(row)]
        for arm, by_name in result["by_dataset"].items()
        for dataset, by_load in by_name.items()
        for load, row in by_load.items()
    ]
    if alone:
        columns = ["arm", "dataset", "C", *columns[2:]]
        common.print_table("one dataset alone", columns, alone)


def _show_open_loop(found: dict[str, Any], columns: list[str]) -> None:
    """By rate: the ratio is that of speeds per request, none's time to the arm's."""
    rates = {rate for loads in found.values() for rate in loads}
    rows = [
        [rate, arm, *_cells({**row, "ratio_to_none": row["speed_to_none"]})]
        for rate in sorted(rates, key=lambda text: float(text.removesuffix("/s")))
        for arm, loads in found.items()
        if (row := loads.get(rate))
    ]
    if rows:
        columns = ["rate", "arm", "tok/s", "speed", *columns[4:]]
        common.print_table("open loop (medians)", columns, rows)


def _show_ratios(ratios: dict[str, Any], loads: list[int]) -> None:
    if not ratios:
        return
    rows = []
    for other in sorted(ratios, key=lambda name: name == BEST):
        cells = [ratios[other].get(str(load)) for load in loads]
        rows.append([other, *(number((c or {}).get("median"), 3) for c in cells)])
    names = [ratios[BEST].get(str(load), {}).get("arm", "-") for load in loads]
    rows.append(["(that is)", *(name.removeprefix("dspark-") for name in names)])
    title = f"throughput of {SUBJECT} / other arm, same round, median over rounds"
    common.print_table(title, ["C", *map(str, loads)], rows)


def _show_domains(found: dict[str, Any]) -> None:
    """Drafts verified for each domain while all were served together."""
    found = {SUBJECT: found[SUBJECT]} if SUBJECT in found else found
    names = sorted({d for a in found.values() for by in a.values() for d in by})
    rows = [
        [load, arm, *(_domain(by_domain.get(name)) for name in names)]
        for arm, loads in found.items()
        for load, by_domain in loads.items()
    ]
    if rows:
        rows.sort(key=lambda row: int(row[0]))  # stable
        title = "drafts verified per request step (τ), domains served together"
        common.print_table(title, ["C", "arm", *names], rows)


def _domain(row: dict[str, Any] | None) -> str:
    return f"{row['verify_length']:.2f} ({row['tau']:.2f})" if row else "-"


def _cells(row: dict[str, Any]) -> list[str]:
    to_none = (row.get("ratio_to_none") or {}).get("median")
    return [
        *figures(row, "output_throughput"),
        number(to_none, 3),
        *figures(row, "tok_s_per_user", "ttft_p50_ms", "ttft_p99_ms"),
        *figures(row, "tau", "verify_length", "draft_length"),
    ]


# Digits of each figure behind the point.
DIGITS = {
    "output_throughput": 1,
    "tok_s_per_user": 1,
    "ttft_p50_ms": 0,
    "ttft_p99_ms": 0,
    "request_goodput": 2,
    "tau": 2,
    "verify_length": 2,
    "draft_length": 2,
}


def figures(row: dict[str, Any], *keys: str) -> list[str]:
    """Figures of an arm at a load, as all tables write them."""
    return [number(row[key], DIGITS[key]) for key in keys]


def number(value: float | None, digits: int) -> str:
    """A figure with some digits; a dash where there is none."""
    return "-" if value is None else f"{value:.{digits}f}"
