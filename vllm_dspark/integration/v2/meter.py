"""Times and confidences of steps, for the scheduler, without waiting for the device.

Marks are set where the host launches work; what lies between two of them is read when
the device has passed both. A step's tokens are there before its drafts, so a step's
report says of drafting what the step before took (`report.StepReport`).
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from vllm.v1.outputs import AsyncModelRunnerOutput, ModelRunnerOutput
from vllm.v1.worker.gpu.async_utils import async_copy_to_np, stream

from vllm_dspark.integration.report import (
    Confidences,
    CostReport,
    StepReport,
    give_report,
)


class Mark:
    """A moment of the device's time; of the host's where the device is a CPU."""

    def __init__(self, device: torch.device) -> None:
        self._at, self._event = time.perf_counter(), None
        if device.type != "cpu":
            self._event = torch.cuda.Event(enable_timing=True)
            self._event.record()

    def seconds_to(self, later: Mark) -> float:
        """Until another mark; waits for it."""
        if self._event is None or later._event is None:
            return later._at - self._at
        later._event.synchronize()
        return float(self._event.elapsed_time(later._event)) / 1e3


@dataclass(frozen=True)
class Drafting:
    """What one step drafted.

    Args:
        number: of the step.
        started, ended: around it, context K/V included.
        ids: its requests.
        positions: of each of them.
        values: ``[R, positions]`` confidences on their way to the host, or None.
        landed: when they are there.
    """

    number: int
    started: Mark
    ended: Mark
    ids: tuple[str, ...]
    positions: int
    values: np.ndarray | None
    landed: Any

    def confidences(self) -> Confidences | None:
        """Raw confidences; waits for them."""
        if self.values is None:
            return None
        self.landed.synchronize()
        return Confidences(self.number, self.ids, self.values)


class Meter:
    """Follows the steps of one runner.

    Args:
        device: the runner's.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._copies = torch.cuda.Stream(device)
        self._number = -1
        self._start: Mark | None = None
        self._drafting: Mark | None = None
        self.drafted: Drafting | None = None  # by the last step that drafted

    def step(self, number: int) -> None:
        """A step begins."""
        self._number, self._start = number, Mark(self._device)
        self._drafting = None

    def begin(self) -> Mark:
        """Its drafting begins."""
        self._drafting = Mark(self._device)
        return self._drafting

    def end(
        self, ids: list[str], positions: int, confidence: torch.Tensor | None
    ) -> None:
        """Its drafting is launched.

        Args:
            ids: its R requests.
            positions: drafted for each.
            confidence: ``[R, positions]`` of the drafts; None if nobody wants them.
        """
        assert self._drafting is not None
        ended, values, landed = Mark(self._device), None, None
        if confidence is not None and positions:
            main = torch.cuda.current_stream(self._device)
            own = confidence.clone()  # the next step writes where it was
            self._copies.wait_stream(main)
            landed = torch.cuda.Event(blocking=True)
            with stream(self._copies, main):
                values = async_copy_to_np(own)
                landed.record()
            if own.device.type != "cpu":
                own.record_stream(self._copies)
        self.drafted = Drafting(
            self._number, self._drafting, ended, tuple(ids), positions, values, landed
        )

    def reporting(
        self,
        output: Any,
        before: Drafting | None,
        lens: tuple[list[str], np.ndarray] | None,
        with_confidences: bool,
        cost: CostReport | None,
    ) -> ReportedOutput:
        """A step's output that will carry its report.

        Args:
            output: vLLM's.
            before: what the step before drafted.
            lens: requests and drafts verified of each, where the device chose.
            with_confidences: whether those of ``before`` are wanted.
            cost: what steps cost, once.
        """
        start, drafting = self._start, self._drafting
        assert start is not None and drafting is not None
        if before is not None and before.number < 0:
            before = None  # vLLM's own, in warming up

        def make() -> StepReport:
            made = 0 if before is None else len(before.ids)
            seconds = 0.0
            if before is not None:
                seconds = before.started.seconds_to(before.ended)
            known = None
            if with_confidences and before is not None:
                known = before.confidences()
            chosen = None
            if lens is not None:
                chosen = dict(zip(lens[0], lens[1].tolist(), strict=True))
            return StepReport(
                None,
                start.seconds_to(drafting),
                seconds,
                made,
                0 if before is None else made * before.positions,
                cost,
                verify_lens=chosen,
                confidences=known,
            )

        return ReportedOutput(output, make)


class ReportedOutput(AsyncModelRunnerOutput):
    """A step's output; the report is made once its tokens are there."""

    def __init__(self, output: Any, make: Callable[[], StepReport]) -> None:
        self._output, self._make = output, make

    def get_output(self) -> ModelRunnerOutput:
        """vLLM's output with the report."""
        output = self._output
        if isinstance(output, AsyncModelRunnerOutput):
            output = output.get_output()
        give_report(output, self._make())
        return output
