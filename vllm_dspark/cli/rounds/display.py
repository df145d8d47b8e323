"""Tables of an evaluation, for the terminal."""

from __future__ import annotations

import math
from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from vllm_dspark.calibration.summary import Summary
from vllm_dspark.cli.rounds.evaluation import Evaluation

# Thresholds that the terminal shows; JSON has all.
_SHOWN = (0.0, 0.2, 0.4, 0.6, 0.8)


def print_evaluations(
    console: Console, temperature: float, evaluations: Sequence[Evaluation]
) -> None:
    """Everything found at one temperature."""
    console.rule(f"temperature {temperature:g}")
    console.print(_lengths(evaluations))
    for evaluation in evaluations:
        if not all(map(math.isnan, evaluation.macro.acceptance_cumulative)):
            console.print(_positions(evaluation))
        if evaluation.sweeps:
            console.print(_sweep(evaluation))


def _lengths(evaluations: Sequence[Evaluation]) -> Table:
    table = Table(title="τ, tokens per round")
    table.add_column("drafter")
    names = list(evaluations[0].datasets)
    for name in (*names, "macro", "rounds"):
        table.add_column(name, justify="right")
    for e in evaluations:
        taus = [e.datasets[name].tau for name in names]
        cells = [f"{tau:.2f}" for tau in (*taus, e.macro.tau)]
        table.add_row(e.name, *cells, str(e.macro.rounds))
    return table


def _positions(evaluation: Evaluation) -> Table:
    """Acceptance and confidences by position: macro average."""
    title = f"{evaluation.name}: by position, mean of the datasets"
    table = Table(title=title)
    table.add_column("")
    for k in range(1, evaluation.num_speculative_tokens + 1):
        table.add_column(str(k), justify="right")
    mean = evaluation.macro
    for label, values, percent in _rows(mean, evaluation.pooled):
        if any(not math.isnan(value) for value in values):
            table.add_row(label, *(_cell(value, percent) for value in values))
    return table


def _rows(
    mean: Summary, pooled: Summary | None
) -> list[tuple[str, tuple[float, ...], bool]]:
    rows = [
        ("accepted, given k−1", mean.acceptance_conditional, False),
        ("accepted, 1 to k", mean.acceptance_cumulative, False),
        ("AUC of c_k", mean.auc, False),
        ("AUC of c_k, calibrated", mean.auc_calibrated, False),
        ("AUC of survival", mean.auc_survival, False),
        ("Brier, raw", mean.brier_raw, False),
        ("Brier, calibrated", mean.brier_calibrated, False),
        ("ECE raw, %", mean.ece_raw, True),
        ("ECE calibrated, %", mean.ece_calibrated, True),
        ("ECE of perfect, %", mean.ece_floor, True),
    ]
    if pooled is not None:
        rows += [
            ("pooled: ECE raw, %", pooled.ece_raw, True),
            ("pooled: ECE calibrated, %", pooled.ece_calibrated, True),
            ("pooled: ECE of perfect, %", pooled.ece_floor, True),
            ("pooled: AUC of c_k", pooled.auc, False),
            ("pooled: AUC of c_k, calibrated", pooled.auc_calibrated, False),
        ]
    return rows


def _cell(value: float, percent: bool) -> str:
    if math.isnan(value):
        return "-"
    return f"{100 * value:.1f}" if percent else f"{value:.2f}"


def _sweep(evaluation: Evaluation) -> Table:
    title = f"{evaluation.name}: verify draft k while the survival is at least…"
    table = Table(title=title)
    table.add_column("threshold")
    for name in ("τ", "accepted of verified", "verified a round"):
        table.add_column(name, justify="right")
    for kind, line in evaluation.sweeps["macro"].items():
        for point in line:
            if point.threshold in _SHOWN:
                cells = (point.tau, point.acceptance, point.verified)
                label = f"{point.threshold:.2f} ({kind})"
                table.add_row(label, *(_cell(value, False) for value in cells))
    return table
