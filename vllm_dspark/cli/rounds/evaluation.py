"""One evaluated (drafter, temperature): figures per dataset, as objects and JSON."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from vllm_dspark.calibration.rounds import Floats, Rounds
from vllm_dspark.calibration.summary import KEYS, Summary, macro, summarise
from vllm_dspark.calibration.threshold import Verified, sweep


@dataclass(frozen=True)
class Evaluation:
    """What one drafter (or other method) reached at one temperature.

    Args:
        name: of the drafter, for people.
        model: its folder; None for methods without one.
        method: vLLM's name of the method.
        temperature: of the requests.
        num_speculative_tokens: drafts a round.
        datasets: figures by dataset.
        macro: their mean.
        pooled: of all rounds together; None when only counters are known.
        sweeps: ``raw`` and ``calibrated`` static thresholds by dataset, ``macro`` too.
        rounds: the rounds themselves, if recorded.
        calibrated: [N, K] their calibrated confidences, if there is a calibration.
    """

    name: str
    model: str | None
    method: str
    temperature: float
    num_speculative_tokens: int
    datasets: dict[str, Summary]
    macro: Summary
    pooled: Summary | None = None
    sweeps: dict[str, dict[str, list[Verified]]] = field(default_factory=dict)
    rounds: Rounds | None = None
    calibrated: Floats | None = None


def figures(rounds: Rounds, calibrated: Floats | None) -> dict[str, Any]:
    """The fields of `Evaluation` that come from recorded rounds."""
    parts, sweeps = {}, {}
    for name in rounds.datasets():
        mask = rounds.dataset == name
        mine = rounds.select(mask)
        after = None if calibrated is None else calibrated[mask]
        parts[name] = summarise(mine, after)
        if mine.has_confidence:
            sweeps[name] = {"raw": sweep(mine, mine.confidence)}
            if after is not None:
                sweeps[name]["calibrated"] = sweep(mine, after)
    if sweeps:
        sweeps["macro"] = {
            kind: _mean_sweep([sweeps[name][kind] for name in parts if name in sweeps])
            for kind in next(iter(sweeps.values()))
        }
    return {
        "datasets": parts,
        "macro": macro(list(parts.values())),
        "pooled": summarise(rounds, calibrated),
        "sweeps": sweeps,
        "rounds": rounds,
        "calibrated": calibrated,
    }


def _mean_sweep(sweeps: Sequence[list[Verified]]) -> list[Verified]:
    return [
        Verified(
            **{
                f.name: _known_mean([getattr(point, f.name) for point in points])
                for f in fields(Verified)
            }
        )
        for points in zip(*sweeps, strict=True)
    ]


def _known_mean(values: Sequence[float]) -> float:
    known = [value for value in values if not math.isnan(value)]
    return sum(known) / len(known) if known else math.nan


def as_json(evaluations: Sequence[Evaluation]) -> dict[str, Any]:
    """The result of the command: ``datasets``, ``macro`` and ``pooled`` of the first
    one, in the keys of `KEYS`, and all that is known of each one under ``runs``."""
    first = evaluations[0]
    short = {name: _keys(summary) for name, summary in first.datasets.items()}
    result = {
        "name": first.name,
        "temperature": first.temperature,
        "datasets": short,
        "macro": _keys(first.macro),
        "pooled": _keys(first.pooled) if first.pooled else None,
        "runs": [_run(evaluation) for evaluation in evaluations],
    }
    return {key: finite(value) for key, value in result.items()}


def _keys(summary: Summary) -> dict[str, Any]:
    return {key: getattr(summary, key) for key in KEYS}


def _run(evaluation: Evaluation) -> dict[str, Any]:
    return {
        "name": evaluation.name,
        "model": evaluation.model,
        "method": evaluation.method,
        "temperature": evaluation.temperature,
        "num_speculative_tokens": evaluation.num_speculative_tokens,
        "datasets": {n: asdict(s) for n, s in evaluation.datasets.items()},
        "macro": asdict(evaluation.macro),
        "pooled": asdict(evaluation.pooled) if evaluation.pooled else None,
        "sweep": {
            name: {kind: [asdict(point) for point in line] for kind, line in by.items()}
            for name, by in evaluation.sweeps.items()
        },
    }


def finite(value: Any) -> Any:
    """JSON has no NaN: null there."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [finite(inner) for inner in value]
    return value
