"""How many positions to draft next, 0 (bypass) included: a choice without flapping.

The paper names it as a limitation that drafting is paid for where nothing will be
accepted. What each draft length promises is predicted from history (`draft_length`);
here that becomes a choice that keeps still while the promises only waver, follows a
change of the load at once, and while bypassing makes probes: drafts that are made in
order to learn whether drafting pays again.

Lossless: everything that enters is known before the next draft is drawn. No clock and
no random numbers: the same facts give the same choices.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from enum import StrEnum

import numpy as np
from numpy.typing import NDArray

from vllm_dspark.schedule.drafting_options import DraftingOptions
from vllm_dspark.schedule.other_lengths import OtherLengths
from vllm_dspark.schedule.probing import Probes
from vllm_dspark.schedule.step import largest

Floats = NDArray[np.float64]

# Holds after which a choice has lasted.
_LASTING = 4
# Log throughput, averaged, that drafting loses to a bypass.
_LARGE_LOSS = 0.05


class Reason(StrEnum):
    """Why a step drafts as many positions as it does."""

    PAYS = "pays"  # drafting is predicted to be faster
    COST = "cost"  # bypass: it costs more than it brings at this load
    ACCEPTANCE = "acceptance"  # bypass: hardly a draft is accepted
    PROBE = "probe"  # drafting in order to learn
    HOLD = "hold"  # the other side looks better, not by enough or not for long enough
    NO_HISTORY = "no_history"  # drafting because nothing is known yet
    SLO = "slo"  # another length would be faster, but misses the requests' goal


@dataclass(frozen=True, slots=True)
class StepFacts:
    """What is known when the next draft length is chosen.

    Args:
        throughput: ``[γ + 1]`` predicted tokens/s by draft length, drafting paid for;
            None while there is no prediction.
        requests: requests that decode, the load.
        rounds: outcomes that came in since the last choice: rounds of requests with
            drafts verified (or at least drafted, where confidences stand in).
        acceptance: predicted share of first drafts accepted, in [0, 1].
        allowed: ``[γ + 1]`` bool, lengths that meet the requests' goal (``slo_tps``);
            None without a goal. Where none does, all are allowed: the fastest is then
            the nearest to it.
        doubt: log throughput taken off what drafting promises: what drafts cost is
            certain.
        hopeful: as ``throughput``, if as much is accepted as may be (`hope`); looked at
            while `Drafting.starting`, None to draft everything then.
    """

    throughput: Floats | None
    requests: int
    rounds: int
    acceptance: float
    allowed: NDArray[np.bool_] | None = None
    doubt: float = 0.0
    hopeful: Floats | None = None


@dataclass(frozen=True, slots=True)
class DraftingChoice:
    """Positions to draft next, 0..γ, and why.

    The drafts of a probe are there to be learned from: without a confidence head, one
    of each request must be verified even if that does not pay. A probe needs no more
    than ``most_requests`` (None: all are drafted for).
    """

    positions: int
    reason: Reason
    most_requests: int | None = None


class Drafting:
    """The choice of draft length for the whole batch, step by step.

    Args:
        width: γ.
        options: margins, intervals and limits.
    """

    def __init__(self, width: int, options: DraftingOptions | None = None) -> None:
        if width < 1:
            raise ValueError(f"width {width}: drafting needs at least 1 position")
        self.width = width
        self.options = options or DraftingOptions()
        self.counts: Counter[Reason] = Counter()  # steps by reason
        self.changes = 0  # of the length; probes do not count
        self._length = width
        self._gain = np.zeros(width + 1)  # averaged log throughput over bypass
        self._load = 0  # when it was last another one
        self._steps = self._seen = 0
        self._since_change = 0
        self._opened = 0  # step in which drafting began
        self._hold = self.options.hold
        self._probes = Probes(self.options)
        self._probe_length = 1
        self._others = OtherLengths(width, self.options)
        self.starting = True  # predictions are not believed yet

    @property
    def probes(self) -> int:
        """Probes started."""
        return self._probes.started

    def choose(self, facts: StepFacts) -> DraftingChoice:
        """The next draft length; called once per step with requests that decode.

        Raises:
            ValueError: throughputs are missing, not positive or not finite.
        """
        self._steps += 1
        self._seen += facts.rounds
        if facts.throughput is not None and self.starting:
            self.starting = self._starts(facts.hopeful)
            if not self.starting and self._length > 0:
                # What was guessed so far is no choice to hold on to.
                self._since_change = _LASTING * self.options.hold
        if facts.throughput is None or self.starting:
            choice = DraftingChoice(self._length, Reason.NO_HISTORY)
        else:
            choice = self._choose(facts, self._gains(facts.throughput, facts.doubt))
        self.counts[choice.reason] += 1
        return choice

    def _starts(self, hopeful: Floats | None) -> bool:
        """Whether predictions must wait for more rounds; what is drafted until then.

        Where nothing may pay, this is a bypass like any other, which probes.
        """
        if self._seen >= self.options.warmup_rounds:
            return False
        if self._steps > self.options.warmup_steps:
            return False
        if hopeful is not None:
            gain = self._gains(hopeful, 0.0)
            lengths = self._lengths(None)
            self._length = largest(np.where(lengths, gain, -np.inf))
        return self._length > 0

    def _choose(self, facts: StepFacts, gain: Floats) -> DraftingChoice:
        self._since_change += 1
        jumped = self._jumped(facts.requests)
        if jumped:  # averages and caution belong to the load that was
            self._gain, self._hold = gain, self.options.hold
            self._others.jumped()
        else:
            self._gain = self._gain + (gain - self._gain) / self.options.average
        if self._probes.running:
            if jumped:
                self._probes.cancel()
            elif self._probes.goes_on(facts.rounds, float(gain[1:].max())):
                return self._probe()
            self._gain = gain  # the average is of what was believed before
        best = self._best(self._lengths(facts.allowed))
        # Losses end soon, large ones at once; that choices do not last is for the next
        # drafting to wait.
        hold = self.options.hold if best == 0 else self._hold
        loses = best == 0 and self._gain[self._length] < -_LARGE_LOSS
        free = loses or self._since_change >= hold
        if best != self._length and free and self._worth(best, facts):
            self._change(best)
        elif self._length == 0 and self._probes.due(jumped):
            self._probe_length = 1 + largest(self._gain[1:])
            self._probes.start(float(gain[1:].max()))
            return self._probe()
        if self._length == 0:
            self._others.bypassing()
        else:
            other = self._others.next(self._length, float(self._gain[self._length]))
            if other is not None:
                return DraftingChoice(other, Reason.PROBE, self.options.probe_rounds)
        return DraftingChoice(self._length, self._reason(facts, best))

    def _probe(self) -> DraftingChoice:
        most = self.options.probe_rounds
        return DraftingChoice(self._probe_length, Reason.PROBE, most)

    def _gains(self, throughput: Floats, doubt: float) -> Floats:
        positive = np.isfinite(throughput).all() and (throughput > 0).all()
        if throughput.shape != (self.width + 1,) or not positive:
            raise ValueError(
                f"throughput {throughput}: give {self.width + 1} positive numbers, "
                f"for 0..{self.width} positions"
            )
        gains: Floats = np.log(throughput / throughput[0])
        gains[1:] -= doubt
        return gains

    def _jumped(self, load: int) -> bool:
        """Whether the load is another one than when it last was."""
        before = self._load
        ratio = max(load, before) / max(min(load, before), 1)
        far = abs(load - before) >= self.options.load_step
        jumped = before == 0 or (far and ratio >= self.options.load_factor)
        if jumped:
            self._load = load
        return jumped

    def _lengths(self, allowed: NDArray[np.bool_] | None) -> NDArray[np.bool_]:
        """``[γ + 1]`` which lengths may be chosen."""
        lengths = np.ones(self.width + 1, dtype=np.bool_)
        lengths[0] = self.options.bypass
        if allowed is not None and (lengths & allowed).any():
            lengths &= allowed
        return lengths

    def _best(self, lengths: NDArray[np.bool_]) -> int:
        return largest(np.where(lengths, self._gain, -np.inf))

    def _worth(self, best: int, facts: StepFacts) -> bool:
        """Whether leaving the present length promises enough."""
        if not self._lengths(facts.allowed)[self._length]:
            return True  # it misses the goal, which comes before throughput
        promised = float(self._gain[best] - self._gain[self._length])
        # In doubt fewer: what drafts cost is certain, what they bring is predicted.
        fewer = best < self._length
        return promised > (0 if fewer else math.log1p(self.options.margin))

    def _reason(self, facts: StepFacts, best: int) -> Reason:
        if best == self._length and best != self._best(self._lengths(None)):
            return Reason.SLO
        if self._length > 0:
            pays = self._gain[self._length] >= 0 or not self.options.bypass
            return Reason.PAYS if pays else Reason.HOLD
        if best != 0:
            return Reason.HOLD
        low = facts.acceptance < self.options.low_acceptance
        return Reason.ACCEPTANCE if low else Reason.COST

    def _change(self, length: int) -> None:
        """Take another length; choices that do not last make the next last longer."""
        options = self.options
        short = self._since_change < _LASTING * self._hold
        self._hold = min(2 * self._hold, options.max_hold) if short else options.hold
        if length == 0:
            self._probes.bypassing(self._steps - self._opened)
        elif self._length == 0:
            self._opened = self._steps
        self._length = length
        self._since_change = 0
        self.changes += 1
