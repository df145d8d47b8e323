"""The serving loop of one arm, step by step, with the project's own controller.

A step is built as vLLM's synchronous scheduler builds it: requests that decode have
their last token and the drafts that the controller lets them verify, prompts take what
is left of the token budget, waiting requests the places that are free. Then the clock
moves on by what the step takes, outcomes are drawn, and the controller is told both, as
`integration.scheduler` tells it. Nothing here knows of files or figures.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from _sim_acceptance import Acceptance, Drafter
from _sim_load import Load, Request
from _sim_parts import Arm, Counts, Limits, Machine
from _sim_step import Step
from numpy.typing import NDArray

from vllm_dspark.schedule.controller import Controller
from vllm_dspark.schedule.drafting import Reason
from vllm_dspark.schedule.facts import Batch, DraftPlan, StepTimes

Ints = NDArray[np.int64]
NO_DRAFTS = DraftPlan(0, Reason.COST)


class Engine:
    """A server of one arm; what its controller has learned stays from load to load.

    Args:
        arm: the policy.
        acceptance: of the drafter.
        machine: what steps take.
        limits: of a step.
        seed: of drafts and noise.
    """

    def __init__(
        self,
        arm: Arm,
        acceptance: Acceptance,
        machine: Machine,
        limits: Limits | None = None,
        seed: int = 0,
    ) -> None:
        self.arm, self.machine = arm, machine
        self.limits = limits or Limits()
        self.drafter = Drafter(acceptance, seed)
        self.controller: Controller | None = None
        if arm.width:
            self.controller = Controller(arm.width, arm.options)
            if arm.options.policy == "adaptive":  # no other policy looks at costs
                self.controller.price(machine.believed or machine.table)
        self._noise = np.random.default_rng((seed, 1))
        self.clock = 0.0
        self.running: list[Request] = []
        self.waiting: list[Request] = []
        self.counts = Counts()
        self._overhead: float | None = None  # of the step before; None after idling

    def begin(self, load: Load) -> None:
        """Start a load; whatever of another is still running goes on."""
        load.begin(self.clock)

    def run(
        self,
        load: Load,
        steps: int | None = None,
        show: Callable[[int, float], None] | None = None,
    ) -> Counts:
        """Serve until the load has ended, or so many steps.

        Args:
            load: that was begun.
            steps: None for no limit.
            show: called after each step, with the steps so far and the clock.

        Returns:
            What happened meanwhile.
        """
        self.counts, start = Counts(), self.clock
        while steps is None or self.counts.steps < steps:
            self.waiting += load.arrived(self.clock)
            if not self.running and not self.waiting:
                coming = load.next_arrival()
                if coming is None:
                    break
                # An idle engine: what passes is no overhead of a step.
                self.clock, self._overhead = max(self.clock, coming), None
                continue
            self._step(load)
            if show is not None:
                show(self.counts.steps, self.clock)
        self.counts.seconds = self.clock - start
        return self.counts

    # ---- a step ----

    def _step(self, load: Load) -> None:
        step = self._planned([r for r in self.running if not r.prompt])
        self._schedule(step)
        alive = np.array([r.alive for r in step.decoding], dtype=np.int64)
        accepted = np.minimum(alive, step.lens)
        if self.controller is not None and step.made is not None:
            emitting = step.taking_part.astype(np.int64)
            self.controller.observe(step.made, step.lens, accepted, emitting)
        emitting = step.emitting
        drafted_for = [r for r in emitting if r.id not in step.plan.skip]
        self._pass_time(step, len(drafted_for), len(emitting))
        self._advance(step, accepted)
        self._leave(load)
        self._draft([r for r in drafted_for if r.output], step.plan.positions)

    def _planned(self, decoding: list[Request]) -> Step:
        """What the controller says of the requests that decode."""
        count = len(decoding)
        if self.controller is None:
            nothing = np.zeros(count, dtype=np.int64)
            return Step(decoding, NO_DRAFTS, None, None, nothing, nothing > 0)
        batch = self._batch(decoding)
        plan = self.controller.draft(batch)
        chosen, made = self.controller.verify(batch, plan.positions)
        lens = chosen.verify_lens
        return Step(decoding, plan, batch, made, lens, np.zeros(count, dtype=np.bool_))

    def _batch(self, decoding: list[Request]) -> Batch:
        num_drafts = np.array([r.drafts for r in decoding], dtype=np.int64)
        confidence, width = None, int(num_drafts.max(initial=0))
        if width:
            confidence = np.full((len(decoding), width), np.nan)
            for i, request in enumerate(decoding):
                if request.confidence is not None:
                    confidence[i, : request.drafts] = request.confidence
        return Batch(
            tuple(r.id for r in decoding),
            (0.0,) * len(decoding),
            num_drafts,
            confidence,
            self._prefill_wanted(len(decoding)),
            sum(r.context for r in decoding),
            np.zeros(len(decoding)),
        )

    def _prefill_wanted(self, decoding: int) -> int:
        places = self.limits.max_num_seqs - len(self.running)
        wanted = sum(r.prompt for r in self.running)
        wanted += sum(r.prompt for r in self.waiting[: max(places, 0)])
        return max(0, min(wanted, self.limits.max_num_batched_tokens - decoding))

    def _schedule(self, step: Step) -> None:
        """Give out the token budget: running requests in order, then waiting ones."""
        left = self.limits.max_num_batched_tokens
        at = iter(range(len(step.decoding)))
        for request in self.running:
            if request.prompt:
                left -= self._prefill(step, request, left)
                continue
            i = next(at)
            step.taking_part[i] = left > 0
            step.lens[i] = min(step.lens[i], max(left - 1, 0))
            left -= int(step.taking_part[i] + step.lens[i])
        while left and self.waiting and len(self.running) < self.limits.max_num_seqs:
            request = self.waiting.pop(0)
            request.number = self.drafter.number(request.dataset)
            request.offset = self.drafter.offset()
            self.running.append(request)
            left -= self._prefill(step, request, left)

    @staticmethod
    def _prefill(step: Step, request: Request, left: int) -> int:
        tokens = min(request.prompt, left)
        if tokens:
            step.prompts.append((request, tokens))
        return tokens

    def _pass_time(self, step: Step, drafted_for: int, answers: int) -> None:
        """Move the clock; tell the controller what the step took."""
        machine, prefill = self.machine, step.prefill
        context = sum(r.context for r in step.decoding)
        factor = machine.scale
        if machine.noise:
            factor *= float(self._noise.lognormal(0, machine.noise))
        counted = step.tokens - machine.table.uncounted(prefill)
        target = factor * float(machine.table.step_seconds(counted, context))
        drafting, overhead = 0.0, machine.per_step + machine.per_answer * answers
        if self.controller is not None:
            positions, rows = step.plan.positions, max(drafted_for, 1)
            told = float(machine.table.draft_seconds(rows, positions))
            # Prompts add their rows to the context K/V that is kept up.
            told = factor * (told + self._more_context(rows, prefill))
            drafted = None
            if drafted_for and prefill <= len(step.decoding):
                drafted = (drafted_for, positions, told)
            self.controller.timed(
                StepTimes(
                    step.tokens,
                    context,
                    target,
                    drafted,
                    prefill,
                    self._overhead,
                    verified=int(step.lens.sum()),
                )
            )
            drafting = factor * self._owed_before(positions, rows)
            drafting += told if positions or not machine.puts_off else 0.0
        self._overhead = overhead
        self.clock += target + drafting + overhead
        self.counts.busy += target + drafting + overhead
        self.counts.answers += answers

    def _more_context(self, rows: int, more: int) -> float:
        """Seconds that so many rows of context K/V add to others."""
        few, many = self.machine.table.draft_seconds([rows, rows + more], 0)
        return float(many - few)

    def _owed_before(self, positions: int, rows: int) -> float:
        """Seconds for what bypasses put off, where a step drafts: it reads all of it.

        Rows of requests that have ended are never written (`integration.context`).
        """
        if not positions:
            return 0.0
        owed = sum(request.owed for request in self.running)
        for request in self.running:
            request.owed = 0
        return self._more_context(rows, owed)

    # ---- after a step ----

    def _advance(self, step: Step, accepted: Ints) -> None:
        """Tokens out, K/V in."""
        counts, rows = self.counts, step.rows
        put_off = self.machine.puts_off and not step.plan.positions
        for i in rows:
            request, tokens = step.decoding[i], 1 + int(accepted[i])
            request.drafts, request.confidence = 0, None
            request.context += tokens
            request.owed += put_off * tokens
            self._emit(request, tokens)
        for request, tokens in step.prompts:
            request.prompt -= tokens
            request.context += tokens
            request.owed += put_off * tokens
            if not request.prompt:
                request.first = self.clock
                counts.firsts += 1
                counts.ttft.append(self.clock - request.sent)
                self._emit(request, 1)
        counts.steps += 1
        counts.decode_steps += bool(rows)
        counts.bypassed += bool(rows) and step.plan.positions == 0
        counts.rounds += len(rows)
        counts.verified += int(step.lens.sum())
        counts.accepted += int(accepted.sum())

    def _emit(self, request: Request, tokens: int) -> None:
        given = min(tokens, request.output)
        self.counts.dropped += tokens - given
        self.counts.emitted += given
        request.output -= given
        request.emitted += given
        request.last = self.clock

    def _leave(self, load: Load) -> None:
        """Requests that have all their tokens."""
        done = [r for r in self.running if not r.prompt and not r.output]
        if not done:
            return
        self.running = [r for r in self.running if r.prompt or r.output]
        for request in done:
            if request.emitted > 1:
                span = request.last - request.first
                self.counts.tpot.append(span / (request.emitted - 1))
            load.answered(self.clock)
        if self.controller is not None:
            self.controller.forget([r.id for r in done])

    def _draft(self, requests: list[Request], positions: int) -> None:
        if not requests or not positions:
            return
        confidence, alive = self.drafter.draw(
            np.array([r.number for r in requests]),
            np.array([r.offset for r in requests]),
            positions,
        )
        for i, request in enumerate(requests):
            request.drafts, request.alive = positions, int(alive[i])
            request.confidence = confidence[i]
        self.counts.drafted += positions * len(requests)
        assert self.controller is not None
        self.controller.drafted(positions * len(requests))
