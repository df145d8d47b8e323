"""The parts of a simulated server: its arm, what steps take, limits, and counts."""

from __future__ import annotations

from dataclasses import dataclass, field

import _bench_common  # noqa: F401  (makes the package importable)

from vllm_dspark.config import DSparkOptions
from vllm_dspark.schedule.cost import CostTable


@dataclass(frozen=True)
class Arm:
    """One way to serve.

    Args:
        name: for people.
        width: most positions drafted; 0 serves without a drafter.
        options: of the controller.
    """

    name: str
    width: int
    options: DSparkOptions = field(default_factory=DSparkOptions)


def arm(name: str, width: int) -> Arm:
    """none, fixed-K, threshold[-P], no-bypass or adaptive; "dspark-" may stand before.

    Raises:
        ValueError: none of these.
    """
    kind, _, value = name.removeprefix("dspark-").partition("-")
    try:
        if kind == "none" and not value:
            return Arm(name, 0)
        if kind == "fixed":
            return Arm(name, min(int(value), width), DSparkOptions(policy="fixed"))
        if kind == "threshold":
            least = float(value or 0.5)
            return Arm(name, width, DSparkOptions(policy="threshold", threshold=least))
        if name.removeprefix("dspark-") == "no-bypass":
            return Arm(name, width, DSparkOptions(bypass=False))
        if kind == "adaptive" and not value:
            return Arm(name, width)
    except ValueError:
        pass
    raise ValueError(
        f"no arm is called {name!r}: give none, fixed-K, threshold, threshold-0.7, "
        "no-bypass or adaptive"
    )


@dataclass(frozen=True)
class Machine:
    """What steps take, in truth.

    Args:
        table: of the target's step and of drafting.
        believed: what the controller is given; the same if None.
        scale: times the table's seconds.
        per_step: seconds of a step outside the worker,
        per_answer: and for each request that a step gives tokens to (server, client).
        noise: standard deviation of a step's log seconds.
        puts_off: whether a bypass leaves the drafter's context K/V until somebody
            drafts again, as on the V1 runner; else it is written at once.
    """

    table: CostTable
    believed: CostTable | None = None
    scale: float = 1.0
    per_step: float = 0.0
    per_answer: float = 0.0
    noise: float = 0.0
    puts_off: bool = False


@dataclass(frozen=True)
class Limits:
    """Of the engine: requests at a time, tokens of a step."""

    max_num_seqs: int = 256
    max_num_batched_tokens: int = 2048


@dataclass
class Counts:
    """What happened.

    Args:
        seconds: of the clock; busy: in steps.
        emitted: tokens to clients; firsts: those that prefill gave; dropped: accepted
            past the end of an answer.
        rounds: requests times steps that decoded them.
        drafted, verified, accepted: drafts.
        steps, decode_steps, bypassed: steps, those that decoded, without drafting.
        tpot, ttft: of finished requests.
    """

    seconds: float = 0.0
    busy: float = 0.0
    emitted: int = 0
    firsts: int = 0
    dropped: int = 0
    rounds: int = 0
    drafted: int = 0
    verified: int = 0
    accepted: int = 0
    steps: int = 0
    decode_steps: int = 0
    bypassed: int = 0
    answers: int = 0
    tpot: list[float] = field(default_factory=list)
    ttft: list[float] = field(default_factory=list)
