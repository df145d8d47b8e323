"""Points of a simulation: arms at loads, measured once what was learned has settled."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from _sim_engine import Engine
from _sim_load import Load, percentile
from _sim_parts import Counts, arm
from _sim_scenario import Scenario

WARM_STEPS, STEPS = 600, 2000


def point(
    scenario: Scenario,
    name: str,
    clients: int = 1,
    rate: float | None = None,
    seed: int = 0,
    steps: tuple[int, int] = (WARM_STEPS, STEPS),
    show: Callable[[], None] | None = None,
) -> dict[str, Any]:
    """One arm at one load: figures of ``steps[1]`` steps after ``steps[0]`` others.

    Args:
        clients: of a closed loop; rate: requests a second of an open one, instead.
        show: called after each step.
    """
    chosen = arm(name, scenario.acceptance.width)
    engine = Engine(
        chosen, scenario.acceptance, scenario.machine, scenario.limits, seed
    )
    load = Load(scenario.acceptance, scenario.work, clients, rate, seed=seed)
    engine.begin(load)

    def step(count: int, clock: float) -> None:
        if show is not None:
            show()

    engine.run(load, steps[0], step)
    counts = engine.run(load, steps[1], step)
    return figures(counts)


def figures(counts: Counts) -> dict[str, Any]:
    """What a sweep would report of it; names as there."""
    rounds = max(counts.rounds, 1)
    tpot = percentile(counts.tpot, 0.5)
    return {
        "output_throughput": counts.emitted / counts.seconds if counts.seconds else 0.0,
        "tok_s_per_user": 1 / tpot if tpot else None,
        "tpot_ms": tpot and 1000 * tpot,
        "ttft_p50_ms": 1000 * (percentile(counts.ttft, 0.5) or 0.0),
        "tau": (counts.rounds + counts.accepted) / rounds,
        "verify_length": counts.verified / rounds,
        "draft_length": counts.drafted / rounds,
        "bypass_share": counts.bypassed / max(counts.decode_steps, 1),
        "steps": counts.steps,
    }


def grid(
    scenario: Scenario,
    arms: Sequence[str],
    loads: Sequence[int] | Sequence[float],
    open_loop: bool = False,
    seed: int = 0,
    steps: tuple[int, int] = (WARM_STEPS, STEPS),
    show: Callable[[], None] | None = None,
) -> dict[str, dict[str, Any]]:
    """Figures by arm and load; ``ratio_to_none`` where that arm is there."""
    found: dict[str, dict[str, Any]] = {name: {} for name in arms}
    for load in loads:
        for name in arms:
            how = {"rate": float(load)} if open_loop else {"clients": int(load)}
            row = point(scenario, name, seed=seed, steps=steps, show=show, **how)  # type: ignore[arg-type]
            found[name][f"{load:g}"] = row
    for loads_of in found.values():
        for load_name, row in loads_of.items():
            base = found.get("none", {}).get(load_name)
            if base and base["output_throughput"]:
                ratio = row["output_throughput"] / base["output_throughput"]
                row["ratio_to_none"] = ratio
    return found
