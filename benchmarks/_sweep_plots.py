"""The figures of a load sweep, as PNG files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import _bench_common  # noqa: F401  (makes the package importable)
import _sweep_slo as slo
from _sweep_summary import SUBJECT

from vllm_dspark.calibration.plots import figure

DOTS_PER_INCH = 140
Lines = dict[str, dict[float, float]]


def draw(result: dict[str, Any], folder: Path) -> list[Path]:
    """Write the figures that the result has something for; returns their files."""
    arms = result["arms"]
    if not arms:
        return _drawn(folder, {"open_loop.png": _open_loop(result)})
    panels = {
        "pareto.png": lambda file: _pareto(arms, file),
        "throughput.png": _panels(
            ("output tok/s", _by_load(arms, "output_throughput")),
            ("ratio to none", _by_load(arms, "ratio")),
        ),
        "lengths.png": _panels(
            ("drafts verified per request step", _by_load(arms, "verify_length")),
            ("drafts made per request step", _by_load(arms, "draft_length")),
        ),
        "slo.png": lambda file: _bars(result["slo"], list(arms), file),
        "matched.png": _panels(
            ("speed per user to none's", _numbers(result["matched"])),
            over="output tok/s",
            loads=False,
        ),
        "domains.png": _domains(result["domains"]),
        "open_loop.png": _open_loop(result),
    }
    return _drawn(folder, panels)


Panels = Callable[[Path], Path | None]


def _drawn(folder: Path, panels: dict[str, Panels]) -> list[Path]:
    files = [make(folder / name) for name, make in panels.items()]
    return [file for file in files if file is not None]


def _by_load(arms: dict[str, Any], key: str) -> Lines:
    found: Lines = {}
    for arm, loads in arms.items():
        values = {int(load): _value(row, key) for load, row in loads.items()}
        found[arm] = {c: v for c, v in values.items() if v is not None}
    return found


def _value(row: dict[str, Any], key: str) -> float | None:
    if key == "ratio":
        key, row = "median", row["ratio_to_none"] or {}
    value: float | None = row.get(key)
    return value


def _numbers(by_arm: dict[str, dict[str, float]]) -> Lines:
    return {
        arm: {float(x.removesuffix("/s")): y for x, y in values.items()}
        for arm, values in by_arm.items()
    }


def _domains(found: dict[str, Any]) -> Panels:
    """Drafts verified of each domain, all of them served together."""
    loads = found.get(SUBJECT, {})
    lines: Lines = {}
    for load, by_domain in loads.items():
        for domain, row in by_domain.items():
            lines.setdefault(domain, {})[int(load)] = row["verify_length"]
    ordered = {d: dict(sorted(line.items())) for d, line in lines.items()}
    return _panels((f"drafts verified, {SUBJECT}", ordered))


def _open_loop(result: dict[str, Any]) -> Panels:
    def line(key: str) -> Lines:
        rows = {
            arm: {rate: row[key] for rate, row in rates.items() if row.get(key)}
            for arm, rates in result["open_loop"].items()
        }
        return _numbers(rows)

    return _panels(
        ("tok/s per user", line("tok_s_per_user")),
        ("TTFT p99, ms", line("ttft_p99_ms")),
        over="requests/s",
    )


def _pareto(arms: dict[str, Any], file: Path) -> Path:
    drawing, axes = figure(2)
    axis, legend = axes[0]
    for arm, loads in arms.items():
        rows = [(c, row) for c, row in loads.items() if row["tok_s_per_user"]]
        xs = [row["tok_s_per_user"] for _, row in rows]
        ys = [row["output_throughput"] for _, row in rows]
        (line,) = axis.plot(xs, ys, marker="o", markersize=3, label=arm)
        for (c, _), x, y in zip(rows, xs, ys, strict=True):
            axis.annotate(c, (x, y), fontsize=6, color=line.get_color())
    axis.set(xlabel="tok/s per user (1 / TPOT)", ylabel="output tok/s")
    _legend(legend, axis)
    drawing.savefig(file, dpi=DOTS_PER_INCH)
    return file


def _panels(
    *panels: tuple[str, Lines], over: str = "concurrent requests", loads: bool = True
) -> Panels:
    """One panel per figure, one line per arm.

    Args:
        over: names the horizontal axis.
        loads: whether that is of the measured loads, logarithmic.
    """

    def make(file: Path) -> Path | None:
        xs = sorted({x for _, lines in panels for line in lines.values() for x in line})
        if not xs:
            return None
        drawing, axes = figure(len(panels) + 1)
        *drawn, legend = axes[0]
        for axis, (label, lines) in zip(drawn, panels, strict=True):
            for arm, line in lines.items():
                axis.plot([*line], [*line.values()], marker="o", ms=3, label=arm)
            if loads:
                load_axis(axis, xs)
            axis.set(xlabel=over, ylabel=label)
        _legend(legend, drawn[0])
        drawing.savefig(file, dpi=DOTS_PER_INCH)
        return file

    return make


def load_axis(axis: Any, xs: list[float]) -> None:
    """A logarithmic axis with the measured loads for ticks, in plain figures."""
    axis.set_xscale("log", base=2)
    axis.set_xticks(xs, [f"{x:g}" for x in xs])
    axis.minorticks_off()


def _legend(place: Any, axis: Any) -> None:
    place.axis("off")
    place.legend(*axis.get_legend_handles_labels(), loc="center left", fontsize=8)


def _bars(found: dict[str, Any], arms: list[str], file: Path) -> Path | None:
    """Throughput at each service level, arms side by side; a gap: not kept."""
    kinds = [kind for kind in (slo.SPEED, slo.TTFT) if found.get(kind[0])]
    if not kinds:
        return None
    drawing, axes = figure(len(kinds) + 1)
    *drawn, legend = axes[0]
    width = 0.8 / len(arms)
    for axis, (key, label, at_least) in zip(drawn, kinds, strict=True):
        levels = found[key]
        for i, arm in enumerate(arms):
            xs = [n + (i + 0.5) * width - 0.4 for n in range(len(levels))]
            ys = [row[arm] or 0.0 for row in levels.values()]
            axis.bar(xs, ys, width, label=arm)
        sign = "≥" if at_least else "≤"
        axis.set_xticks(range(len(levels)), [f"{sign} {level}" for level in levels])
        axis.tick_params(axis="x", labelsize=7)
        axis.set(xlabel=label, ylabel="output tok/s")
    _legend(legend, drawn[0])
    drawing.savefig(file, dpi=DOTS_PER_INCH)
    return file
