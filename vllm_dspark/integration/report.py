"""What scheduler and worker tell each other beside what vLLM does.

It travels with a step and with its output, so that it needs no message of its own.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from vllm.v1.outputs import DraftTokenIds

from vllm_dspark.schedule.cost_file import CostFile


@dataclass
class DSparkDraftTokenIds(DraftTokenIds):
    """Drafts with their confidences; pickled from the worker to the scheduler.

    Shape: confidences [num_reqs, K] float32 (rows as ``req_ids``), or None without a
    confidence head.
    """

    confidences: np.ndarray | None = field(default=None)


@dataclass(frozen=True)
class CostReport:
    """What steps cost, and what may become of it.

    Args:
        content: the table, and what it holds for.
        cache: root of the cache where corrections of it are kept; None if they are not:
            it is the user's own file, or the cache cannot be written.
    """

    content: CostFile
    cache: Path | None


@dataclass(frozen=True)
class StepReport:
    """One step of the worker.

    Args:
        drafts: for the next step, where the executor does not ask for them.
        target_seconds: of the step, drafting not included.
        draft_seconds: of drafting and of the context K/V.
        draft_requests: requests that drafting was for, 0 if there was none.
        draft_tokens: drafts made.
        owed_seconds: of context K/V that the step put off, by what it took lately;
            negative for what it wrote for steps before.
        cost: what steps cost, once, with the first step.
    """

    drafts: DraftTokenIds | None
    target_seconds: float
    draft_seconds: float
    draft_requests: int
    draft_tokens: int
    cost: CostReport | None = None
    owed_seconds: float = 0.0


def give_report(output: Any, report: StepReport) -> None:
    """Let a report travel with the output of its step."""
    output.dspark_report = report


def take_report(output: Any) -> StepReport | None:
    """The report that travelled with an output, if any did."""
    report: StepReport | None = getattr(output, "dspark_report", None)
    return report


def give_skip(step: Any, requests: frozenset[str]) -> None:
    """Tell the worker, with the step, which requests get no drafts."""
    step.dspark_skip = requests


def take_skip(step: Any) -> frozenset[str]:
    """The requests that get no drafts."""
    skip: frozenset[str] = getattr(step, "dspark_skip", frozenset())
    return skip
