"""What is simulated: a machine, a drafter, a load; read from files, or derived.

A scenario file (``data/*.json``) holds published figures and what had to be assumed to
make a cost table of them. Throughput without speculation at R requests gives the step
of R tokens; that of a fixed block of γ, with its τ, the step of R·(1 + γ) tokens; where
both say something about the same number of tokens, the difference is due to what the
requests themselves cost, their context.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import _sim_acceptance as acceptance_files
import numpy as np
from _sim_acceptance import Acceptance
from _sim_load import Workload
from _sim_parts import Limits, Machine

from vllm_dspark.schedule import cost_file
from vllm_dspark.schedule.cost import CostTable

KIND = "dspark-scenario"


@dataclass(frozen=True)
class Scenario:
    """One thing to simulate.

    Args:
        name: for people.
        acceptance: of the drafter.
        machine: what steps take.
        limits: of a step.
        work: what requests are like.
        clients: closed loops.
        published: output tokens/s by arm and clients, where somebody measured it.
        source: where the figures are from, and what was assumed.
    """

    name: str
    acceptance: Acceptance
    machine: Machine
    limits: Limits = field(default_factory=Limits)
    work: Workload = field(default_factory=Workload)
    clients: tuple[int, ...] = (1, 4, 16, 64)
    published: dict[str, dict[int, float]] = field(default_factory=dict)
    source: dict[str, Any] = field(default_factory=dict)


def read(path: Path) -> Scenario:
    """A scenario file.

    Raises:
        ValueError: it is none.
    """
    raw = json.loads(path.read_text())
    if raw.get("kind") != KIND:
        raise ValueError(f"{path}: 'kind' is {raw.get('kind')!r:.60}, not {KIND!r}")
    published = {
        name: {int(load): float(v) for load, v in loads.items()}
        for name, loads in raw.get("published", {}).items()
    }
    parts = raw["acceptance"]
    acceptance = Acceptance(
        parts["name"],
        {n: acceptance_files.dataset(d) for n, d in parts["datasets"].items()},
        parts.get("request_spread", 0.0),
    )
    work = Workload(**raw["workload"])
    if "cost_from" in raw:
        table = read(path.parent / raw["cost_from"]).machine.table
    else:
        tau = float(np.mean([d.tau for d in acceptance.datasets.values()]))
        table = derived_table(published, tau, work, raw["derived"])
    return Scenario(
        raw["name"],
        acceptance,
        Machine(table, noise=raw.get("noise", 0.0)),
        Limits(**raw["limits"]),
        work,
        tuple(raw["clients"]),
        published,
        raw["source"],
    )


def derived_table(
    published: dict[str, dict[int, float]],
    tau: float,
    work: Workload,
    assumed: dict[str, Any],
) -> CostTable:
    """A cost table from published throughputs.

    Args:
        published: of arms ``none`` and ``fixed-K``, tokens/s by clients.
        tau: tokens per round of the fixed arm.
        work: of the measurement; its prompts' prefill is part of what was measured and
            so of the table.
        assumed: ``draft_share``, drafting γ positions for R requests against a step of
            R tokens; ``upkeep_share``, the context K/V alone.
    """
    kind = next(name for name in published if name.startswith("fixed-"))
    width = int(kind.removeprefix("fixed-"))
    none = {r: r / speed for r, speed in published["none"].items()}
    plain = np.array(sorted(none))
    step_none = np.array([none[r] for r in plain])
    drafting = {
        r: assumed["draft_share"] * float(np.interp(r, plain, step_none))
        for r in published[kind]
    }
    block = {r: r * tau / s - drafting[r] for r, s in published[kind].items()}
    context = work.prompt_tokens + work.output_tokens / 2
    slope = _slope(none, block, width, context)
    points: dict[int, list[float]] = {}
    for r, seconds in none.items():
        points.setdefault(r, []).append(seconds - slope * context * r)
    for r, seconds in block.items():
        tokens = r * (1 + width)
        points.setdefault(tokens, []).append(seconds - slope * context * r)
    tokens = sorted(points)
    step = [float(np.mean(points[b])) for b in tokens]
    requests = sorted(published[kind])
    shares = (assumed["upkeep_share"], 0.9 * assumed["draft_share"])
    grid = [
        [share * float(np.interp(r, plain, step_none)) for share in shares]
        + [drafting[r]]
        for r in requests
    ]
    return CostTable.fit(tokens, step, slope, requests, (0, 1, width), grid)


def _slope(
    none: dict[int, float], block: dict[int, float], width: int, context: float
) -> float:
    """Seconds per context token, from steps of as many tokens for fewer requests."""
    found = []
    for r, seconds in block.items():
        tokens = r * (1 + width)
        if tokens in none:
            found.append((none[tokens] - seconds) / (context * (tokens - r)))
    return max(float(np.median(found)), 0.0) if found else 0.0


def own(
    cost: Path, acceptance: Path, temperature: float | None, **more: Any
) -> Scenario:
    """A cost table of this project and a measured acceptance."""
    table = cost_file.read(cost).table
    drafter = acceptance_files.read(acceptance, temperature)
    return Scenario(
        f"{drafter.name} on {cost.name}",
        drafter,
        Machine(table, noise=more.pop("noise", 0.05), puts_off=True),
        **more,
    )


def distorted(table: CostTable, how: str) -> CostTable:
    """A cost table that is wrong in a way, for the controller to believe.

    Args:
        how: ``steps*F`` and ``drafting*F`` (times F), ``flat`` (more tokens cost
            nothing), ``slope*F`` (what further tokens cost, times F).
    """
    kind, _, factor = how.partition("*")
    step, draft = np.array(table.step), np.array(table.draft)
    if kind == "steps":
        step = step * float(factor)
    elif kind == "drafting":
        draft = draft * float(factor)
    elif kind == "slope":
        step = step[0] + (step - step[0]) * float(factor)
    elif kind == "flat":
        step = np.full_like(step, step[0])
    else:
        raise ValueError(f"distortion {how!r}: steps*F, drafting*F, slope*F or flat")
    return CostTable.fit(
        table.tokens,
        step,
        table.per_context_token,
        table.requests,
        table.positions,
        draft,
        table.prompt_share,
    )


def wrong(scenario: Scenario, how: str) -> Scenario:
    """The scenario with one thing wrong that the controller does not know of.

    Args:
        how: of `distorted`, ``bias±X`` or ``temper*X`` (raw confidences' logits),
            ``uninformed`` (a head that shows the mean), ``exact`` (calibrated).
    """
    drafter, machine = scenario.acceptance, scenario.machine
    if how == "exact":
        return replace(scenario, acceptance=drafter.calibrated())
    if how == "uninformed":
        return replace(scenario, acceptance=replace(drafter, informed=False))
    if how.startswith("bias"):
        worse = replace(drafter.calibrated(), bias=float(how.removeprefix("bias")))
        return replace(scenario, acceptance=worse)
    if how.startswith("temper*"):
        worse = replace(drafter.calibrated(), slope=float(how.removeprefix("temper*")))
        return replace(scenario, acceptance=worse)
    believed = distorted(machine.table, how)
    return replace(
        scenario,
        acceptance=drafter.calibrated(),
        machine=replace(machine, believed=believed),
    )
