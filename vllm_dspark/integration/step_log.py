"""A file with every engine step, for those who want to see how lengths follow load.

``additional_config={"dspark": {"step_log": FILE}}`` appends one JSON line per step in
which something was computed:

* ``step`` (from 0), ``time`` (when it was built, on the machine's monotonic clock)
* ``requests`` (those that decode), ``prompt_tokens``, ``context_tokens`` (that
  attention reads)
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

from vllm_dspark.integration.json_lines import JsonLines
from vllm_dspark.integration.planned import Done
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

    def step(self, controller: Controller, done: Done) -> None:
        """Note a step, before the controller learns how long it took."""
        if self._lines is None:
            return
        planned, report = done.planned, done.report
        predicted = None
        if controller.prices is not None:
            predicted = controller.prices.predicted_seconds(
                done.tokens,
                planned.context_tokens,
                report.draft_requests,
                planned.positions,
                done.prompt_tokens,
            )
        fields: dict[str, Any] = {
            "step": self._steps,
            "time": planned.built,
            "requests": done.requests,
            "prompt_tokens": done.prompt_tokens,
            "context_tokens": planned.context_tokens,
            "drafts": int(planned.num_drafts.sum()),
            "verified": done.verified,
            "positions": planned.positions,
            "reason": planned.reason,
            "predicted_seconds": predicted,
            "target_seconds": report.target_seconds,
            "draft_seconds": report.draft_seconds,
            "emitted": done.emitted,
        }
        self._steps += 1
        self._lines.add(**fields)

    def flush(self) -> None:
        """Write what is kept."""
        if self._lines is not None:
            self._lines.flush()
