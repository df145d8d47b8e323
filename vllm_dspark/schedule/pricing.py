"""What steps and drafting cost an engine, by all that is known of it so far.

The cost table that follows the machine (`correction`) has the worker's times. Around
them lies what the engine does outside of its worker, which drafts make longer, and
prompts add to both: they are computed whatever is drafted, but their rows of the
drafter's context only where something is.
"""

from __future__ import annotations

import statistics
from collections import deque

import numpy as np

from vllm_dspark.schedule.correction import LiveCost
from vllm_dspark.schedule.cost import CostTable
from vllm_dspark.schedule.draft_length import DraftCost
from vllm_dspark.schedule.facts import Batch, StepTimes
from vllm_dspark.schedule.step import Floats, Ints, StepCost
from vllm_dspark.schedule.step_bias import StepBias

# Steps whose time outside the worker is remembered: its median is robust to pauses.
_OVERHEAD_STEPS = 64
# So many of each kind, before steps with drafts are told from those without.
_FEW = 8
# Beyond, predictions say little, and would never let drafting be tried.
_MOST_DOUBT = 0.3


class Pricing:
    """Prices of one engine.

    Args:
        table: the worker's times, to start from.
    """

    def __init__(self, table: CostTable) -> None:
        self.live = LiveCost(table)
        self.overhead = 0.0  # seconds of a step outside the worker
        self.draft_overhead = 0.0  # and what drafts add to that
        self._bias = StepBias()
        self._bare: deque[float] = deque(maxlen=_OVERHEAD_STEPS)
        self._drafting: deque[float] = deque(maxlen=_OVERHEAD_STEPS)

    def learn(self, times: StepTimes) -> None:
        """Take in what a step took."""
        surprise = self.live.observe(
            times.batch_tokens,
            times.context_tokens,
            times.target_seconds,
            times.prompt_tokens,
        )
        if surprise is not None:
            self._bias.saw(times.verified > 0, surprise)
        if times.drafted is not None:
            self.live.observe_draft(*times.drafted)
        outside = times.overhead
        if outside is None or outside < 0:
            return
        (self._drafting if times.after_drafts else self._bare).append(outside)
        self._set_overheads()

    def doubt(self) -> float:
        """Log throughput that drafting is to promise more than it seems to."""
        error = self.live.error()  # NaN while nothing was seen
        return self._bias.doubt(min(error, _MOST_DOUBT)) if error > 0 else 0.0

    def _set_overheads(self) -> None:
        bare, drafting = self._bare, self._drafting
        self.draft_overhead = 0.0
        if min(len(bare), len(drafting)) < _FEW:
            self.overhead = statistics.median([*bare, *drafting])
            return
        self.overhead = statistics.median(bare)
        self.draft_overhead = max(statistics.median(drafting) - self.overhead, 0.0)

    def costs(self, batch: Batch) -> tuple[StepCost, DraftCost]:
        """Seconds of a step by its tokens, and of drafting.

        What prompts add to a step is left out: it is due whatever is verified, and with
        it in the round's time, drafts would seem to pay that other rounds do better
        without. What a draft adds is counted at the B of the whole step. A goal is
        about the whole time, though.
        """
        table, context = self.live.snapshot(), batch.context_tokens
        fixed, uncounted = self.overhead, table.uncounted(batch.prefill_tokens)
        extra, prompts = self.draft_overhead, batch.prefill_tokens
        if prompts and batch.ids:
            sizes = np.array([len(batch.ids), batch.base_tokens - uncounted])
            if not batch.slo_tps.any():
                alone, together = table.step_seconds(sizes, context)
                fixed += float(alone - together)
            few, many = table.draft_seconds([len(batch.ids), batch.base_tokens], 0)
            extra += float(many - few)

        def step(tokens: Ints) -> Floats:
            return table.step_seconds(tokens - uncounted, context) + fixed

        def drafting(num_reqs: int, positions: Ints) -> Floats:
            return table.draft_seconds(num_reqs, positions) + extra * (positions > 0)

        return step, drafting

    def predicted_seconds(
        self,
        batch_tokens: int,
        context_tokens: int,
        num_reqs: int,
        positions: int,
        prompt_tokens: int = 0,
    ) -> float:
        """Seconds of a step's target and drafting.

        Args:
            batch_tokens: B, prompts included.
            context_tokens: as in `Batch`.
            num_reqs: that are drafted for, 0 for no drafting.
            positions: of each of them.
            prompt_tokens: how many of B are of prompts.
        """
        table = self.live.snapshot()
        counted = batch_tokens - table.uncounted(prompt_tokens)
        seconds = float(table.step_seconds(counted, context_tokens))
        if num_reqs:
            seconds += float(table.draft_seconds(num_reqs, positions))
        return seconds
