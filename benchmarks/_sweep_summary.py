"""What a load sweep found: medians over runs and paired ratios, as in result.json."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import _bench_common  # noqa: F401  (makes the package importable)
import _sweep_slo as slo
from _sweep_grid import GRID, OPEN, SPLIT, rate_key
from bench_e2e import DOMAINS

# Our name of a figure and vLLM's key for it in a run's record.
MEDIANS = {
    "output_throughput": "output_throughput",
    "request_throughput": "request_throughput",
    "request_goodput": "request_goodput",
    "tpot_ms": "median_tpot_ms",
    "tpot_p99_ms": "p99_tpot_ms",
    "e2e_p99_ms": "p99_e2el_ms",
    "ttft_p50_ms": "median_ttft_ms",
    "ttft_p99_ms": "p99_ttft_ms",
    "tau": "tau",
    "verify_length": "verify_length",
    "draft_length": "draft_length",
    "accepted_length_drafted": "accepted_length_drafted",
    "preemptions": "preemptions",
}
# Records by arm, load and run.
Grid = dict[str, dict[float, dict[int, dict[str, Any]]]]
SUBJECT = "dspark-adaptive"
BEST = "best other"


def summarise(
    records: dict[str, list[dict[str, Any]]],
    levels: dict[str, list[float]] | None = None,
) -> dict[str, Any]:
    """Figures of every arm and load, from the runs' records by kind of point.

    A ratio is that of two arms in the same run, then the median over runs.

    Args:
        levels: service levels to look at, by figure (`_sweep_slo`); its own if None.
    """
    grid = records.get(GRID, [])
    runs = by_load(grid, "max_concurrency")
    arms = {
        arm: {
            str(load): {
                **medians(loads[load].values()),
                "ratio_to_none": ratio(runs, arm, "none", load),
            }
            for load in sorted(loads)
        }
        for arm, loads in runs.items()
    }
    return {
        "arms": arms,
        "ratios": ratios(runs, arms),
        "by_dataset": datasets(records.get(SPLIT, [])),
        "domains": domains(grid),
        "open_loop": open_loop(records.get(OPEN, [])),
        "slo": slo.at_anchors(arms, {**slo.anchors(arms), **(levels or {})}),
        "matched": slo.matched(arms),
    }


def by_load(records: list[dict[str, Any]], key: str) -> Grid:
    """Records by arm, load and run; no speculation comes first."""
    runs: Grid = {}
    for record in sorted(records, key=lambda record: record["arm"] != slo.BASE):
        at_load = runs.setdefault(record["arm"], {}).setdefault(record[key], {})
        at_load[record["run_number"]] = record
    return runs


def open_loop(records: list[dict[str, Any]]) -> dict[str, Any]:
    """Medians by arm and rate; how much faster than without speculation.

    At a given rate all arms that keep up have the same throughput: what differs is the
    time per output token, whose ratio is none's to the arm's.
    """
    runs = by_load(records, "request_rate")
    return {
        arm: {
            rate_key(rate): {
                **medians(loads[rate].values()),
                "speed_to_none": ratio(runs, "none", arm, rate, "median_tpot_ms"),
            }
            for rate in sorted(loads)
        }
        for arm, loads in runs.items()
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


def ratio(
    runs: Grid,
    arm: str,
    other: str,
    load: float,
    key: str = "output_throughput",
) -> dict[str, Any] | None:
    """A figure of one arm to another's, over the runs that both have.

    A run counts only where one session measured both: after --resume the machine may
    have been another, and the two are no pair.
    """
    mine, theirs = (runs.get(a, {}).get(load, {}) for a in (arm, other))
    both = [
        run
        for run in sorted(set(mine) & set(theirs))
        if mine[run].get("session") == theirs[run].get("session") and theirs[run][key]
    ]
    if not both:
        return None
    each = [mine[run][key] / theirs[run][key] for run in both]
    return {"median": statistics.median(each), "runs": each}


def ratios(runs: Grid, arms: dict[str, Any]) -> dict[str, Any]:
    """Throughput of `SUBJECT` to every other arm's, by other arm and load.

    `BEST` among the other arms is the one with the highest median throughput at that
    load, chosen anew at each; its entries say which under "arm".
    """
    found: dict[str, Any] = {}
    for load in arms.get(SUBJECT, {}):
        others = {
            arm: loads[load]["output_throughput"]
            for arm, loads in arms.items()
            if arm != SUBJECT and load in loads
        }
        for other in others:
            if paired := ratio(runs, SUBJECT, other, int(load)):
                found.setdefault(other, {})[load] = paired
        if others:
            best = max(others, key=others.__getitem__)
            if best in found and load in found[best]:
                entry = {"arm": best, **found[best][load]}
                found.setdefault(BEST, {})[load] = entry
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


def domains(grid: list[dict[str, Any]]) -> dict[str, Any]:
    """What requests of each domain had among the others: arm, load, domain.

    ``verify_length``, ``draft_length`` and ``tau`` are per request step, as in
    `_sweep_client.counted`, from what each request was told at its end.
    """
    sums: dict[Any, dict[str, float]] = defaultdict(lambda: defaultdict(float))
    for record in grid:
        for dataset, row in record.get("by_dataset", {}).items():
            domain = DOMAINS.get(dataset, dataset)
            into = sums[record["arm"], record["max_concurrency"], domain]
            for key in ("steps", "drafted", "verified", "accepted"):
                into[key] += row.get(key, 0)
    found: dict[str, Any] = {}
    for (arm, load, domain), row in sorted(sums.items()):
        if steps := row["steps"]:
            found.setdefault(arm, {}).setdefault(str(load), {})[domain] = {
                "verify_length": row["verified"] / steps,
                "draft_length": row["drafted"] / steps,
                "tau": 1 + row["accepted"] / steps,
            }
    return found
