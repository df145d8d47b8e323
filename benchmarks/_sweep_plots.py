"""The figures of a load sweep, as PNG files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import _bench_common  # noqa: F401  (makes the package importable)

from vllm_dspark.calibration.plots import figure


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
        _load_axis(axis, sorted({c for loads in arms.values() for c in loads}))
        axis.set(xlabel="concurrent requests", ylabel=label)
    legend.axis("off")
    legend.legend(*drawn[0].get_legend_handles_labels(), loc="center left", fontsize=8)
    drawing.savefig(file, dpi=140)
    return file


def _load_axis(axis: Any, loads: list[int]) -> None:
    """A logarithmic axis with the measured loads for ticks, in plain figures."""
    axis.set_xscale("log", base=2)
    axis.set_xticks(loads, [str(load) for load in loads])
    axis.minorticks_off()


def _value(row: dict[str, Any], key: str) -> float | None:
    if key == "ratio":
        key, row = "median", row["ratio_to_none"] or {}
    value: float | None = row.get(key)
    return value
