"""Requests that drafting never pays for, by their own history.

The batch drafts, but hardly a draft of this text is accepted: such a request gets no
drafts, except for probes of its own, whose intervals double while they are in vain.
Lossless: a request's earlier rounds decide, never the drafts at hand.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from vllm_dspark.schedule.drafting_options import DraftingOptions

Ints = NDArray[np.int64]


@dataclass(slots=True)
class _History:
    """One request's.

    Args:
        rounds, accepted: faded counts of rounds and of their accepted drafts.
        drafting: rounds since it was last admitted.
        interval: steps between probes.
        wait: steps until the next probe; None while it is drafted for.
        probing: rounds of a probe still to come; 0 outside of probes.
    """

    interval: int
    rounds: float = 0.0
    accepted: float = 0.0
    drafting: int = 0
    wait: int | None = None
    probing: int = 0


class RequestGate:
    """Which requests of a batch are drafted for.

    Args:
        options: those whose names begin with ``request`` and ``probe_interval``.
    """

    def __init__(self, options: DraftingOptions | None = None) -> None:
        self.options = options or DraftingOptions()
        self.probes = 0
        self._histories: dict[Hashable, _History] = {}
        self._fade = 1 - 1 / (4 * self.options.request_rounds)

    def __len__(self) -> int:
        """Requests remembered."""
        return len(self._histories)

    def admit(self, ids: Sequence[Hashable]) -> NDArray[np.bool_]:
        """``[R]`` bool, True where to draft; called once per step that drafts."""
        admitted = np.ones(len(ids), dtype=np.bool_)
        for i, name in enumerate(ids):
            history = self._histories.get(name)
            if history is None:
                history = _History(self.options.probe_interval)
                self._histories[name] = history
            if history.wait is None:
                continue
            history.wait -= 1
            if history.wait > 0:
                admitted[i] = False
                continue
            self.probes += 1
            history.wait, history.probing = None, self.options.request_probe_rounds
        return admitted

    def observe(
        self, ids: Sequence[Hashable], num_drafts: Ints, accepted: Ints
    ) -> None:
        """Note the outcomes of a step.

        Args:
            ids: the R requests.
            num_drafts: ``[R]`` drafts verified; 0 says nothing, and neither do
                requests that were never asked about or are forgotten.
            accepted: ``[R]`` how many of them were accepted.
        """
        rows = zip(ids, num_drafts.tolist(), accepted.tolist(), strict=True)
        for name, verified, count in rows:
            history = self._histories.get(name)
            if history is not None and verified > 0:
                self._note(history, count)

    def _note(self, history: _History, accepted: int) -> None:
        options = self.options
        if history.probing:
            self._note_probe(history, accepted)
            return
        history.rounds = self._fade * history.rounds + 1
        history.accepted = self._fade * history.accepted + accepted
        history.drafting += 1
        if history.wait is not None or history.drafting < options.request_rounds:
            return
        if history.accepted < options.request_acceptance * history.rounds:
            if history.drafting > 4 * options.request_rounds:
                history.interval = options.probe_interval
            self._refuse(history)

    def _note_probe(self, history: _History, accepted: int) -> None:
        history.probing -= 1
        if accepted:
            history.rounds, history.accepted = 1.0, float(accepted)
            history.drafting = history.probing = 0
        elif history.probing == 0:
            self._refuse(history)

    def _refuse(self, history: _History) -> None:
        history.wait = history.interval
        longer = 2 * history.interval
        history.interval = min(longer, self.options.max_probe_interval)

    def forget(self, ids: Iterable[Hashable]) -> None:
        """Drop requests that have ended; unknown ones are fine."""
        for name in ids:
            self._histories.pop(name, None)
