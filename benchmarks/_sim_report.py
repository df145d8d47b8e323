"""What simulations found: tables, which arm wins where, figures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import _bench_common as common
import numpy as np

from vllm_dspark.calibration.plots import figure

Arms = dict[str, dict[str, Any]]


def winners(arms: Arms) -> dict[str, Any]:
    """The fastest arm at each load, and where the adaptive one stands.

    ``adaptive_to_none`` and ``adaptive_to_best_fixed`` are ratios of throughput.
    """
    found = {}
    for load in next(iter(arms.values())):
        speed = {name: rows[load]["output_throughput"] for name, rows in arms.items()}
        best = max(speed, key=speed.__getitem__)
        entry: dict[str, Any] = {"best": best}
        fixed = [v for name, v in speed.items() if "fixed-" in name]
        if "adaptive" in speed:
            mine = speed["adaptive"]
            entry["adaptive_to_best"] = mine / speed[best]
            if "none" in speed:
                entry["adaptive_to_none"] = mine / speed["none"]
            if fixed:
                entry["adaptive_to_best_fixed"] = mine / max(fixed)
        found[load] = entry
    return found


def at_matched_throughput(arms: Arms, mine: str, other: str) -> dict[str, float]:
    """Per-user speed of one arm over another's where both serve as much together.

    Args:
        mine: its loads are the points; left out where the other never serves as much,
            or always more.
        other: between its loads linear, without those at which it serves less than
            with fewer clients.
    """
    known = [r for r in arms.get(other, {}).values() if r["tok_s_per_user"]]
    if mine not in arms or not known:
        return {}
    rows = sorted(known, key=lambda row: -row["tok_s_per_user"])
    speed = np.maximum.accumulate([row["output_throughput"] for row in rows])
    best = np.diff(speed, prepend=0.0) > 0
    each = np.array([row["tok_s_per_user"] for row in rows])[best]
    speed = speed[best]
    return {
        load: row["tok_s_per_user"] / float(np.interp(total, speed, each))
        for load, row in arms[mine].items()
        if row["tok_s_per_user"]
        and speed[0] <= (total := row["output_throughput"]) <= speed[-1]
    }


def show(title: str, arms: Arms) -> None:
    """Print a grid."""
    rows = [
        [
            load,
            name,
            f"{row['output_throughput']:.1f}",
            _number(row.get("ratio_to_none"), 3),
            _number(row["tok_s_per_user"], 1),
            f"{row['tau']:.2f}",
            f"{row['verify_length']:.2f}",
            f"{row['draft_length']:.2f}",
            f"{row['bypass_share']:.2f}",
        ]
        for load in next(iter(arms.values()))
        for name, row in ((n, r[load]) for n, r in arms.items())
    ]
    columns = ["load", "arm", "tok/s", "/ none", "per user", "τ", "verified"]
    common.print_table(title, [*columns, "drafted", "bypass"], rows)


def show_validation(found: dict[str, Any]) -> None:
    """Print measured against simulated."""
    rows = [
        [
            load,
            name,
            f"{row['output_throughput']['measured']:.1f}",
            f"{row['output_throughput']['simulated']:.1f}",
            f"{100 * row['error']:+.1f}",
            f"{100 * row['round_error']:+.1f}",
            f"{row['tau']['measured']:.2f}",
            f"{row['tau']['simulated']:.2f}",
            f"{row['verify_length']['measured']:.2f}",
            f"{row['verify_length']['simulated']:.2f}",
        ]
        for name, loads in found["arms"].items()
        for load, row in loads.items()
    ]
    columns = ["C", "arm", "measured", "simulated", "error %", "round %", "τ", "sim."]
    common.print_table("validation", [*columns, "verified", "sim."], rows)
    print(
        f"{found['within_10_percent']} of {found['points']} points within 10%; "
        f"overhead of the none arm: {found['overhead']}"
    )


def _number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def draw(
    title: str, arms: Arms, file: Path, published: dict[str, Any] | None = None
) -> None:
    """Frontier, throughput against no speculation, and lengths of the adaptive arm.

    Args:
        published: tokens/s by arm and load, drawn as crosses beside the ratios.
    """
    drawing, axes = figure(3)
    drawing.suptitle(title, fontsize=9)
    frontier, ratios, lengths = axes[0]
    for name, loads in arms.items():
        rows = list(loads.values())
        (line,) = frontier.plot(
            [r["tok_s_per_user"] for r in rows],
            [r["output_throughput"] for r in rows],
            marker="o",
            markersize=3,
            label=name,
        )
        at = [float(load) for load in loads]
        if all("ratio_to_none" in r for r in rows):
            style = {"color": line.get_color(), "markersize": 3}
            ratios.plot(at, [r["ratio_to_none"] for r in rows], marker="o", **style)
            theirs = _ratios((published or {}).get(name), (published or {}).get("none"))
            ratios.plot(list(theirs), list(theirs.values()), "x", **style)
        if name == "adaptive":
            for key in ("verify_length", "draft_length", "bypass_share"):
                lengths.plot(at, [r[key] for r in rows], marker=".", label=key)
    frontier.set(xlabel="tok/s per user", ylabel="output tok/s")
    ratios.set(xlabel="load", ylabel="throughput / none (x: published)")
    lengths.set(xlabel="load", ylabel="adaptive, per request and step")
    for axis in (ratios, lengths):
        axis.set_xscale("log", base=2)
    frontier.legend(fontsize=6)
    lengths.legend(fontsize=6)
    drawing.savefig(file, dpi=110)


def _ratios(mine: Any, none: Any) -> dict[float, float]:
    if not mine or not none:
        return {}
    return {float(load): mine[load] / none[load] for load in mine if load in none}
