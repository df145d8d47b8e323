"""What a load sweep found: medians over runs and paired ratios, as in result.json."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Iterable
from typing import Any

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
BEST = "best other"


def summarise(
    grid: list[dict[str, Any]], split: list[dict[str, Any]]
) -> dict[str, Any]:
    """Figures of every arm and load, from the runs' records.

    A ratio is that of two arms in the same run, then the median over runs.
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
        "ratios": ratios(runs, arms),
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
