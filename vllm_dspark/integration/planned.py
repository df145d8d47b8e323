"""A step of the engine: as it was decided, and as it went."""

from __future__ import annotations

from collections.abc import Container
from dataclasses import dataclass
from typing import Any

import numpy as np

from vllm_dspark.calibration.online import Prediction
from vllm_dspark.integration.report import StepReport
from vllm_dspark.schedule.drafting import Reason


@dataclass(frozen=True)
class Planned:
    """What was decided and predicted for a step, and what it reads.

    Args:
        ids: the R requests that decode in it.
        temperatures: ``[R]``.
        num_drafts: ``[R]`` drafts that were at hand.
        drafted_in: ``[R]`` numbers of the steps that made them, -1 for none.
        made: by what verify lengths were chosen; None without drafts, or where the
            device chose.
        context_tokens: tokens that the R requests attend to.
        positions: drafted at its end.
        reason: why so many.
        overhead: seconds outside the worker before it; None if the engine idled.
        after_drafts: the step before it had drafts or made some.
        built: when, on the machine's monotonic clock.
    """

    ids: tuple[str, ...]
    temperatures: tuple[float, ...]
    num_drafts: np.ndarray
    drafted_in: np.ndarray
    made: Prediction | None
    context_tokens: int
    positions: int
    reason: Reason
    overhead: float | None
    after_drafts: bool
    built: float


@dataclass(frozen=True)
class Outcome:
    """What became of the drafts of a step.

    Shape: verified, accepted ``[R]`` drafts; emitting ``[R]``, 1 for a request that
    emitted tokens. Rows as ``Planned.ids``.
    """

    verified: np.ndarray
    accepted: np.ndarray
    emitting: np.ndarray


@dataclass(frozen=True)
class Done:
    """A step that has been computed.

    Args:
        planned: what was decided.
        requests: of the decoding ones, those that took part.
        tokens: computed by the target.
        prompt_tokens: of them, those of requests that do not decode.
        verified: drafts among them.
        emitted: tokens that came out.
        report: the worker's.
    """

    planned: Planned
    requests: int
    tokens: int
    prompt_tokens: int
    verified: int
    emitted: int
    report: StepReport


def done(planned: Planned, step: Any, output: Any, report: StepReport) -> Done:
    """What a step was, from vLLM's side of it.

    Args:
        planned: what was decided.
        step: vLLM's ``SchedulerOutput``.
        output: vLLM's ``ModelRunnerOutput``.
        report: the worker's.
    """
    scheduled = step.num_scheduled_tokens
    decoding = [scheduled[i] for i in planned.ids if i in scheduled]
    tokens = step.total_num_scheduled_tokens
    drafts = sum(map(len, step.scheduled_spec_decode_tokens.values()))
    trimmed = 0
    if report.verify_lens is not None:  # the device had its say
        trimmed = drafts - sum(report.verify_lens.values())
    return Done(
        planned,
        len(decoding),
        tokens - trimmed,
        tokens - sum(decoding),
        drafts - trimmed,
        sum(map(len, output.sampled_token_ids or ())),
        report,
    )


def outcome(
    planned: Planned,
    step: Any,
    output: Any,
    verify_lens: dict[str, int] | None,
    gone: Container[str],
) -> Outcome:
    """What became of a step's drafts.

    Args:
        planned: what was decided.
        step: vLLM's ``SchedulerOutput``.
        output: vLLM's ``ModelRunnerOutput``.
        verify_lens: drafts verified by request, where the device chose.
        gone: requests that ended while the step was computed; vLLM counts nothing of
            them, as what they emitted reaches nobody.
    """
    verified = np.zeros(len(planned.ids), dtype=np.int64)
    accepted, emitting = np.zeros_like(verified), np.zeros_like(verified)
    invalid = step.num_invalid_spec_tokens or {}  # outside of a grammar: padding
    for i, req_id in enumerate(planned.ids):
        row = output.req_id_to_index.get(req_id)
        if row is None or not output.sampled_token_ids or req_id in gone:
            continue
        emitted = len(output.sampled_token_ids[row])
        drafts = len(step.scheduled_spec_decode_tokens.get(req_id, ()))
        drafts -= invalid.get(req_id, 0)
        if verify_lens is not None:
            drafts = min(drafts, verify_lens.get(req_id, 0))
        verified[i] = drafts if emitted else 0
        accepted[i] = min(max(emitted - 1, 0), verified[i])
        emitting[i] = emitted > 0
    return Outcome(verified, accepted, emitting)
