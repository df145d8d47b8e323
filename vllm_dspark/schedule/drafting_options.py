"""Settings of the choice of draft length, each with its one default."""

from __future__ import annotations

from dataclasses import dataclass, fields


@dataclass(frozen=True)
class DraftingOptions:
    """Settings of `drafting`, `other_lengths`, `probing` and `request_gate`.

    Steps are engine steps with requests that decode; a round is one request's part in
    a step that drafted for it.

    Args:
        bypass: False to draft at least one position always.
        margin: relative gain in throughput that a change must promise, except one to
            fewer positions, which need only promise any.
        hold: steps that a choice lasts at least,
        max_hold: what that grows to before a bypass ends or another length is taken,
            doubling while choices do not last.
        average: steps over which promises are averaged.
        load_factor: a load this many times larger or smaller is another load,
        load_step: if it also differs by this many requests.
        warmup_rounds: rounds to see before predictions are believed,
        warmup_steps: or steps. Until then drafts are made as far as they may pay
            (`hope`), from the start on none where none may.
        hopeful_rate: share of drafts accepted at each position, given those before
            it, that a good drafter reaches.
        probe_interval: steps of bypass before the first probe.
        max_probe_interval: what that grows to, doubling with every probe in vain.
        probe_rounds: rounds that a probe collects before it is judged.
        max_probe_steps: steps that a probe lasts at most.
        explore_interval: steps of drafting less than γ after which all γ positions
            are drafted, to learn about those that are left out,
        explore_steps: for so many steps.
        explore_share: share of throughput that steps without drafts may cost, made
            while drafting to learn what they take (`other_lengths`),
        min_explore_interval: so many steps apart at least, however little drafting
            gains,
        max_explore_interval: and so many at most, however much.
        encouraging: share of the distance to break-even that a probe must close to
            be continued.
        low_acceptance: acceptance of first drafts below which a bypass is put down to
            acceptance, not to cost.
        request_rounds: rounds after which a request may be judged by itself.
        request_acceptance: drafts accepted per round below which it gets none.
        request_probe_rounds: rounds of a probe of one request; intervals as above.
    """

    bypass: bool = True
    margin: float = 0.03
    hold: int = 8
    max_hold: int = 64
    average: float = 8.0
    load_factor: float = 1.5
    load_step: int = 4
    warmup_rounds: int = 32
    warmup_steps: int = 64
    hopeful_rate: float = 0.9
    probe_interval: int = 32
    max_probe_interval: int = 1024
    probe_rounds: int = 16
    max_probe_steps: int = 64
    explore_interval: int = 96
    explore_steps: int = 2
    explore_share: float = 0.0025
    min_explore_interval: int = 16
    max_explore_interval: int = 768
    encouraging: float = 0.25
    low_acceptance: float = 0.3
    request_rounds: int = 24
    request_acceptance: float = 0.05
    request_probe_rounds: int = 4

    def __post_init__(self) -> None:
        for option in fields(self):
            value = getattr(self, option.name)
            # A step is needed to see outcomes at all, so counts are at least 1.
            least = 1 if option.type in ("int", int) else 0
            if not least <= value < float("inf"):
                raise ValueError(
                    f"{option.name} {value}: give a finite number, at least {least}"
                )
        if not self.explore_share > 0:
            raise ValueError(
                f"explore_share {self.explore_share}: give more than 0; what is never "
                "tried is never known"
            )
        for name, above in (("load_factor", 1), ("average", 0.999)):
            if not getattr(self, name) > above:
                raise ValueError(
                    f"{name} {getattr(self, name)}: give more than {above}"
                )
        if not 0 < self.hopeful_rate <= 1:
            raise ValueError(
                f"hopeful_rate {self.hopeful_rate}: give a share, above 0 and up to 1"
            )
        for low, high in (
            ("hold", "max_hold"),
            ("probe_interval", "max_probe_interval"),
            ("min_explore_interval", "max_explore_interval"),
        ):
            if getattr(self, high) < getattr(self, low):
                raise ValueError(
                    f"{high} {getattr(self, high)}: give at least the {low}, "
                    f"{getattr(self, low)}"
                )
