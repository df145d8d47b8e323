"""What a run leaves for people: ``train.jsonl``, curves as PNG, a live table."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np

from vllm_dspark.train.state import FOLDER
from vllm_dspark.train.step import StepSums
from vllm_dspark.train.validate import Validation

LINES = "train.jsonl"
CURVES = "curves.png"


def step_line(step: int, sums: StepSums, norm: float, lr: float) -> dict[str, Any]:
    """One step's figures: means over rows, per position where it says so."""
    rows = np.maximum(sums.rows, 1)
    seen = sums.rows > 0
    return {
        "step": step,
        "cross_entropy": float(sums.cross_entropy.sum() / rows.sum()),
        "acceptance": [
            round(1 - 0.5 * d, 4) for d in (sums.distance / rows)[seen].tolist()
        ],
        "confidence_loss": float(sums.confidence_loss.sum() / rows.sum()),
        "gradient_norm": norm,
        "lr_factor": lr,
    }


def validation_line(step: int, result: Validation) -> dict[str, Any]:
    """One validation's figures."""
    return {
        "step": step,
        "tau": result.accepted_length,
        "acceptance_cumulative": result.acceptance,
        "ece": [None if math.isnan(x) else x for x in result.ece],
        "auroc": [None if math.isnan(x) else x for x in result.auroc],
        "rounds": result.rounds,
    }


class Log:
    """Appends to ``train.jsonl``; a resumed run drops lines past its checkpoint.

    Args:
        out: the drafter's folder.
        step: steps that are done.
    """

    def __init__(self, out: Path, step: int) -> None:
        self.file = out / FOLDER / LINES
        self.file.parent.mkdir(parents=True, exist_ok=True)
        kept = [line for line in self.lines() if line["step"] <= step]
        self.file.write_text("".join(json.dumps(line) + "\n" for line in kept))

    def lines(self) -> list[dict[str, Any]]:
        """All whole lines."""
        if not self.file.is_file():
            return []
        found = []
        for line in self.file.read_text().splitlines():
            try:
                found.append(json.loads(line))
            except ValueError:  # torn by a kill
                continue
        return found

    def add(self, line: dict[str, Any], seconds: float, blocks: int) -> None:
        """Append one line."""
        line = {**line, "seconds": round(seconds, 2), "blocks": blocks}
        with self.file.open("a") as stream:
            stream.write(json.dumps(line) + "\n")

    def draw(self) -> Path:
        """Curves over the run's minutes: acceptance, τ, calibration."""
        from matplotlib.figure import Figure

        lines = self.lines()
        steps = [x for x in lines if "acceptance" in x]
        checks = [x for x in lines if "tau" in x]
        figure = Figure(figsize=(12, 3.6), layout="constrained")
        left, middle, right = figure.subplots(1, 3)
        for k in range(max((len(x["acceptance"]) for x in steps), default=0)):
            at = [x for x in steps if len(x["acceptance"]) > k]
            left.plot(
                [x["seconds"] / 60 for x in at],
                [x["acceptance"][k] for x in at],
                linewidth=0.7,
                label=f"draft {k + 1}",
            )
        left.set(title="1 − ½‖q − p‖₁ of training blocks", xlabel="minutes")
        if steps:
            left.legend(fontsize=6)
        minutes = [x["seconds"] / 60 for x in checks]
        middle.plot(minutes, [x["tau"] for x in checks], marker="o", markersize=3)
        middle.set(title="τ on held-out text (greedy)", xlabel="minutes")
        for k in range(max((len(x["ece"]) for x in checks), default=0)):
            values = [
                x["ece"][k] if x["ece"][k] is not None else math.nan for x in checks
            ]
            right.plot(minutes, values, linewidth=0.9, label=f"draft {k + 1}")
        right.set(title="ECE of the raw survival", xlabel="minutes")
        target = self.file.parent / CURVES
        figure.savefig(target, dpi=110)
        return target
