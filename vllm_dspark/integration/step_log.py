"""A file with every engine step, for those who want to see how lengths follow load.

``additional_config={"dspark": {"step_log": FILE}}`` appends one JSON line per step in
which something was computed:

* ``step`` (from 0), ``time`` (when it was built, on the machine's monotonic clock)
* ``requests`` (those that decode), ``prompt_tokens``
* ``drafts`` (at hand when it was built), ``verified`` (of them, in the end)
* ``positions`` (drafted for each request at its end), ``reason`` (of that number)
* ``predicted_seconds`` (of target and drafting together; null while nothing is known of
  costs), ``target_seconds`` and ``draft_seconds`` (measured in the worker)
* ``emitted`` (tokens, those past the end of a text included)

Lines are written in whole blocks: at the latest when no request is left, and when the
engine shuts down in order.
"""

from __future__ import annotations

import logging
from typing import Any

from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.outputs import ModelRunnerOutput

from vllm_dspark.integration.json_lines import JsonLines
from vllm_dspark.integration.planned import Planned
from vllm_dspark.integration.report import StepReport
from vllm_dspark.schedule.controller import Controller

logger = logging.getLogger("vllm_dspark")


class StepLog:
    """Appends steps to a file; trouble with it is said once and ends it.

    Args:
        path: the file; created, or appended to.
    """

    def __init__(self, path: str) -> None:
        self._steps = 0
        self._lines: JsonLines | None = None
        try:
            self._lines = JsonLines(path, "step log")
        except OSError as error:
            logger.warning("DSpark: there is no step log, %s: %s", path, error)

    def step(
        self,
        controller: Controller,
        planned: Planned,
        step: SchedulerOutput,
        output: ModelRunnerOutput,
        report: StepReport,
    ) -> None:
        """Note a step, before the controller learns how long it took."""
        if self._lines is None:
            return
        tokens, scheduled = step.total_num_scheduled_tokens, step.num_scheduled_tokens
        decoding = [scheduled[i] for i in planned.ids if i in scheduled]
        predicted = controller.predicted_seconds(
            tokens, planned.context_tokens, report.draft_requests, planned.positions
        )
        fields: dict[str, Any] = {
            "step": self._steps,
            "time": planned.built,
            "requests": len(decoding),
            "prompt_tokens": tokens - sum(decoding),
            "drafts": int(planned.num_drafts.sum()),
            "verified": sum(map(len, step.scheduled_spec_decode_tokens.values())),
            "positions": planned.positions,
            "reason": planned.reason,
            "predicted_seconds": predicted,
            "target_seconds": report.target_seconds,
            "draft_seconds": report.draft_seconds,
            "emitted": sum(map(len, output.sampled_token_ids)),
        }
        self._steps += 1
        self._lines.add(**fields)

    def flush(self) -> None:
        """Write what is kept."""
        if self._lines is not None:
            self._lines.flush()
