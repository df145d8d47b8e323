"""The report of `vllm-dspark calibrate`: markdown and figures in a folder."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from vllm_dspark.calibration import plots, report
from vllm_dspark.calibration.fitting import Fit
from vllm_dspark.calibration.reliability import BINS, conditionals
from vllm_dspark.calibration.rounds import Rounds
from vllm_dspark.calibration.throughput import CostCurve, simulate

REQUESTS = (1, 8, 32)


def write(
    folder: Path,
    title: str,
    found: Mapping[float, tuple[Rounds, Fit]],
    allow_bias: bool,
    cost: CostCurve,
) -> dict[float, dict[str, Any]]:
    """Write ``report.md`` and its figures.

    Args:
        folder: made if it is not there.
        title: names drafter and target.
        found: rounds and fit by the requests' temperature.

    Returns:
        The report's figures by temperature, for machines.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lines = [f"# Calibration of {title}", "", _HOW, ""]
    numbers: dict[float, dict[str, Any]] = {}
    for temperature, (rounds, fit) in found.items():
        image = f"reliability-{temperature:g}.png"
        plots.reliabilities(
            rounds,
            report.raw_survival(rounds),
            fit.held_out,
            f"temperature {temperature:g}, {len(rounds)} rounds",
            folder / image,
        )
        numbers[temperature] = mine = figures(rounds, fit, allow_bias, cost)
        lines += _section(temperature, rounds, fit, mine, image)
    (folder / "report.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return numbers


_HOW = (
    f"ECE: {BINS} bins of equal width; survival a_k against “draft k was accepted”, "
    "over all rounds that verified k drafts. “After” is cross-validated by prompt. "
    "“Perfect” is what perfectly calibrated predictions would show on as many rounds: "
    "an ECE near it cannot be told from 0."
)


def figures(
    rounds: Rounds, fit: Fit, allow_bias: bool, cost: CostCurve
) -> dict[str, Any]:
    """Bias by domain and depth, drift between domains, throughput by policy."""
    masks = report.groups(rounds)
    raw = report.raw_survival(rounds)
    held = conditionals(fit.held_out)
    return {
        "bias": {
            name: {
                "rounds": int(mask.sum()),
                "raw": report.bias(rounds.select(mask), raw[mask]),
                "calibrated": report.bias(rounds.select(mask), fit.held_out[mask]),
            }
            for name, mask in masks.items()
        },
        "drift": report.drift(rounds, fit, allow_bias),
        "throughput": {n: simulate(rounds, held, n, cost) for n in REQUESTS},
    }


def _section(
    temperature: float, rounds: Rounds, fit: Fit, mine: dict[str, Any], image: str
) -> list[str]:
    positions = [str(k) for k in range(1, rounds.width + 1)]
    return [
        f"## Temperature {temperature:g}",
        "",
        *([f"**{fit.note}**", ""] if fit.note else []),
        f"![reliability diagrams]({image})",
        "",
        *_table(["position", *positions], _reliability_rows(fit)),
        "### Bias by domain and depth",
        "",
        "Mean prediction minus share accepted, in percentage points; positive is "
        "overconfident.",
        "",
        *_table(["rounds of", "", "number", *positions], _bias_rows(mine["bias"])),
        "### Drift",
        "",
        "ECE in %, mean over positions: fitted on the row, measured on the column.",
        "",
        *_table(
            ["fitted on", *rounds.datasets()],
            [[name, *map(_percent, row)] for name, row in mine["drift"].items()],
        ),
        "### Throughput",
        "",
        "Tokens per second by the cost curve, simulated over these rounds: drafts "
        "verified up to a fixed length, by Algorithm 1 on raw and on calibrated "
        "confidences, and by an oracle that verifies exactly what will be accepted.",
        "",
        *_table(_policies(mine["throughput"]), _speed_rows(mine["throughput"])),
    ]


def _reliability_rows(fit: Fit) -> list[list[str]]:
    return [
        ["ECE before, %", *map(_percent, fit.ece_before)],
        ["ECE after, %", *map(_percent, fit.ece_after)],
        ["ECE of perfect, %", *map(_percent, fit.ece_floor)],
        ["AUC before", *map(_auc, fit.auc_before)],
        ["AUC after", *map(_auc, fit.auc_after)],
        *_mixing_rows(fit),
        ["temperature", *(f"{t:.2f}" for t in fit.scaling.temperature)],
        ["bias", *(f"{b:+.2f}" for b in fit.scaling.bias)],
        ["rounds", *map(str, fit.fit_size)],
    ]


def _mixing_rows(fit: Fit) -> list[list[str]]:
    """What is mixed in, and what is left without it."""
    mixing = fit.scaling.mixing
    if mixing is None:
        return []
    return [
        ["ECE after without certainty, %", *map(_percent, fit.ece_alone)],
        ["with it: weight", *(f"{w:.2f}" for w in mixing.weight)],
        ["with it: certainty", *(f"{u:+.2f}" for u in mixing.certainty)],
        ["with it: bias", *(f"{b:+.2f}" for b in mixing.bias)],
    ]


def _bias_rows(bias: Mapping[str, Mapping[str, Any]]) -> Iterable[list[str]]:
    for name, row in bias.items():
        for kind in ("raw", "calibrated"):
            shown = [_points(value) for value in row[kind]]
            yield [name, kind, str(row["rounds"]), *shown]


def _policies(speeds: Mapping[int, Mapping[str, float]]) -> list[str]:
    return ["requests at a time", *next(iter(speeds.values()))]


def _speed_rows(speeds: Mapping[int, Mapping[str, float]]) -> list[list[str]]:
    return [
        [str(requests), *(f"{value:.1f}" for value in row.values())]
        for requests, row in speeds.items()
    ]


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    lines = [head, ["---"] * len(head), *rows]
    return [*("| " + " | ".join(line) + " |" for line in lines), ""]


def _percent(value: float) -> str:
    return "-" if math.isnan(value) else f"{100 * value:.1f}"


def _auc(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.3f}"


def _points(value: float) -> str:
    return "-" if math.isnan(value) else f"{100 * value:+.1f}"
