"""Figures as PNG files. Matplotlib is imported when something is drawn."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from vllm_dspark.calibration.reliability import ece, reliability
from vllm_dspark.calibration.rounds import Floats, Rounds
from vllm_dspark.calibration.summary import Summary
from vllm_dspark.calibration.threshold import Verified


class Evaluated(Protocol):
    """What `evaluations` needs to know of one drafter at one temperature."""

    @property
    def name(self) -> str: ...
    @property
    def temperature(self) -> float: ...
    @property
    def datasets(self) -> dict[str, Summary]: ...
    @property
    def macro(self) -> Summary: ...
    @property
    def sweeps(self) -> dict[str, dict[str, list[Verified]]]: ...


def figure(columns: int, rows: int = 1) -> tuple[Any, Any]:
    """A figure without a window, and its axes ``[rows, columns]``.

    Raises:
        ValueError: matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ValueError(
            "figures need matplotlib: pip install 'vllm-dspark[bench]'"
        ) from error
    size = (3.6 * columns, 3.2 * rows)
    drawing = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(drawing)
    return drawing, drawing.subplots(rows, columns, squeeze=False)


def reliabilities(
    rounds: Rounds, raw: Floats, calibrated: Floats, title: str, file: Path
) -> None:
    """Reliability diagrams by position: raw survivals above, calibrated below.

    Shape: raw, calibrated [N, K].
    """
    drawing, axes = figure(rounds.width, 2)
    drawing.suptitle(title)
    for k in range(rounds.width):
        rows = np.isfinite(raw[:, k]) & (rounds.num_drafts > k)
        hit = rounds.accepted[rows] > k
        for axis, survivals in ((axes[0][k], raw), (axes[1][k], calibrated)):
            found = reliability(survivals[rows, k], hit)
            error = ece(survivals[rows, k], hit)
            axis.plot([0, 1], [0, 1], color="grey", linewidth=0.8)
            share = 400 * found.count / max(found.count.sum(), 1)
            axis.scatter(found.predicted, found.observed, s=4 + share)
            axis.set(xlim=(0, 1), ylim=(0, 1), title=f"k={k + 1}, ECE {error:.1%}")
    axes[0][0].set_ylabel("accepted (raw)")
    axes[1][0].set_ylabel("accepted (calibrated)")
    for axis in axes[1]:
        axis.set_xlabel("predicted survival")
    drawing.savefig(file, dpi=90)


def evaluations(runs: Sequence[Evaluated], file: Path) -> None:
    """τ by dataset, acceptance by position, and the sweep of static thresholds."""
    drawing, axes = figure(3)
    bars, positions, thresholds = axes[0]
    names = [*runs[0].datasets, "macro"]
    width = 0.8 / len(runs)
    for i, run in enumerate(runs):
        label = f"{run.name}, T={run.temperature:g}"
        values = [*(run.datasets[name].tau for name in names[:-1]), run.macro.tau]
        at = [x + (i - (len(runs) - 1) / 2) * width for x in range(len(names))]
        bars.bar(at, values, width, label=label)
        shares = run.macro.acceptance_conditional
        positions.plot(range(1, len(shares) + 1), shares, marker="o", label=label)
        if run.sweeps:
            line = run.sweeps["macro"]["raw"]
            shown = [point.verified for point in line], [point.tau for point in line]
            thresholds.plot(*shown, marker=".", label=label)
    bars.set_xticks(range(len(names)), names, rotation=30, ha="right")
    bars.set_ylabel("τ, tokens per round")
    bars.legend(fontsize=7)
    positions.set(xlabel="position k", ylabel="accepted, given k−1", ylim=(0, 1))
    thresholds.set(xlabel="drafts verified a round", ylabel="τ (static threshold)")
    drawing.savefig(file, dpi=120)
