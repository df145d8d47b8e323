"""What scheduler and worker tell each other beside what vLLM does.

It travels with a step and with its output, so that it needs no message of its own.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from vllm.v1.outputs import DraftTokenIds

from vllm_dspark.calibration.online import SurvivalMaps
from vllm_dspark.schedule.cost_file import CostFile


@dataclass
class DSparkDraftTokenIds(DraftTokenIds):
    """Drafts with what is known of them; pickled from the worker to the scheduler.

    Shape: confidences, certainties [num_reqs, K] float32 (rows as ``req_ids``); None
    without a confidence head, certainties also where no backend computes them.
    """

    confidences: np.ndarray | None = field(default=None)
    certainties: np.ndarray | None = field(default=None)


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
class DeviceBudget:
    """How many drafts a step may verify; the device chooses which.

    Args:
        ids: R requests.
        reserved: ``[R]`` drafts of each that come first.
        drafts: further ones, those that survive best.
        maps: what makes survivals of confidences; None: as they are.
    """

    ids: tuple[str, ...]
    reserved: np.ndarray
    drafts: int
    maps: SurvivalMaps | None


@dataclass(frozen=True)
class StepPlan:
    """What the worker is told with a step.

    Args:
        number: of the step, from 0.
        skip: requests that get no drafts at its end.
        budget: where the device trims; else everything that is scheduled is verified.
    """

    number: int
    skip: frozenset[str] = frozenset()
    budget: DeviceBudget | None = None


@dataclass(frozen=True)
class Confidences:
    """Raw confidences of the drafts that one step made.

    Args:
        number: the step's.
        ids: its requests.
        values: ``[R, K]`` float32.
    """

    number: int
    ids: tuple[str, ...]
    values: np.ndarray


@dataclass(frozen=True)
class StepReport:
    """One step of the worker.

    Where the scheduler does not wait for the device (V2 runner), what is said of
    drafting is of the step before: its end is not known yet when a step's tokens are.

    Args:
        drafts: for the next step, where the executor does not ask for them.
        target_seconds: of the step, drafting not included.
        draft_seconds: of drafting and of the context K/V.
        draft_requests: requests that drafting was for, 0 if there was none.
        draft_tokens: drafts made.
        owed_seconds: of context K/V that the step put off, by what it took lately;
            negative for what it wrote for steps before.
        cost: what steps cost, once, with the first step.
        verify_lens: drafts verified by request, where the device chose.
        confidences: of drafts made by the step before, where the device trims.
    """

    drafts: DraftTokenIds | None
    target_seconds: float
    draft_seconds: float
    draft_requests: int
    draft_tokens: int
    cost: CostReport | None = None
    owed_seconds: float = 0.0
    verify_lens: dict[str, int] | None = None
    confidences: Confidences | None = None


def give_report(output: Any, report: StepReport) -> None:
    """Let a report travel with the output of its step."""
    output.dspark_report = report


def take_report(output: Any) -> StepReport | None:
    """The report that travelled with an output, if any did."""
    report: StepReport | None = getattr(output, "dspark_report", None)
    return report


def give_plan(step: Any, plan: StepPlan) -> None:
    """Let a plan travel with its step."""
    step.dspark_plan = plan


def take_plan(step: Any) -> StepPlan:
    """The plan that travelled with a step; of vLLM's own steps (dummies), nothing."""
    plan: StepPlan = getattr(step, "dspark_plan", StepPlan(-1))
    return plan
