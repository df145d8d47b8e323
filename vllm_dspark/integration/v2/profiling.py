"""Steps of a wanted size through the V2 runner, for the table of costs.

They are vLLM's dummy steps, through CUDA graphs where real ones would go through them.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


class V2StepTimer:
    """Runs steps of a wanted size and says how long they took.

    Args:
        runner: ready to serve, with no request in it.
    """

    def __init__(self, runner: Any) -> None:
        self._runner, self._speculator = runner, runner.speculator

    @contextmanager
    def running(self) -> Iterator[None]:
        """Around all calls."""
        with torch.inference_mode():
            try:
                yield
            finally:
                self._speculator.muted = False
                self._speculator.dummy_positions = None

    def time_step(self, batch_tokens: int, context_tokens: int) -> float:
        """Seconds of a target step of B tokens that reads so much context."""
        return self._time(batch_tokens, context_tokens, batch_tokens)

    def time_prompt(self, tokens: int) -> float:
        """Seconds of a step with so many tokens of a prompt, the last with logits."""
        return self._time(tokens, 0, 1)

    def _time(self, batch_tokens: int, context_tokens: int, with_logits: int) -> float:
        runner, self._speculator.muted = self._runner, True
        requests = min(batch_tokens, runner.max_num_reqs)
        self._wait()
        start = time.perf_counter()
        hidden, _ = runner._dummy_run(
            batch_tokens, context_len=context_tokens // requests
        )
        runner.model.compute_logits(hidden[:with_logits])
        self._wait()
        return time.perf_counter() - start

    def time_draft(self, num_reqs: int, positions: int) -> float:
        """Seconds of drafting for so many requests; 0 positions: context K/V alone."""
        self._speculator.muted = False
        self._speculator.dummy_positions = positions
        self._runner._dummy_run(num_reqs)
        start, end = self._speculator.dummy_marks
        seconds: float = start.seconds_to(end)
        return seconds

    def _wait(self) -> None:
        if self._runner.device.type != "cpu":
            torch.cuda.synchronize()
