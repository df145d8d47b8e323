"""Simulated against measured: the points of a load sweep, one by one.

The same number of requests, answers and rounds as in the sweep, from an idle server
after the same warm-up. What the server and its client take is not in a cost table; it
is had from the throughput of the sweep's `none` arm alone: seconds per step, and per
answer that a step adds to. Everything else is predicted. A factor of the whole table
(the machine at another hour) can be fitted as well (`--fit-scale`), but that arm hardly
tells it from seconds per answer, as each of its answers is a token of the step.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
from _sim_engine import Engine
from _sim_load import Load, Workload
from _sim_parts import Counts, Limits, Machine, arm
from _sim_run import figures
from _sim_scenario import Scenario

# What a duration is made of: the table's seconds, steps, answers.
PARTS = ("scale", "per_step", "per_answer")
FIT_ROUNDS = 3


def like(scenario: Scenario, settings: dict[str, Any]) -> Scenario:
    """The scenario with the load and limits of a sweep."""
    work = replace(
        scenario.work,
        output_tokens=settings["output_tokens"],
        spread=settings["output_spread"],
    )
    loads = tuple(settings["concurrency"])
    most = settings["max_num_seqs"] or max(loads)
    limits = Limits(most, scenario.limits.max_num_batched_tokens)
    return replace(scenario, work=work, clients=loads, limits=limits)


def simulate_sweep(
    scenario: Scenario,
    name: str,
    settings: dict[str, Any],
    rounds: int,
    seed: int,
    show: Callable[[], None] | None = None,
) -> dict[int, list[Counts]]:
    """One arm through a whole sweep, its controller learning as it goes."""
    chosen = arm(name, scenario.acceptance.width)
    engine = Engine(
        chosen, scenario.acceptance, scenario.machine, scenario.limits, seed
    )
    found: dict[int, list[Counts]] = {c: [] for c in scenario.clients}

    def serve(work: Workload, clients: int, count: int, start: int) -> Counts:
        load = Load(scenario.acceptance, work, clients, count=count, start=start)
        engine.begin(load)
        counts = engine.run(load)
        if show is not None:
            show()
        return counts

    warm = replace(scenario.work, output_tokens=settings["warmup_tokens"], spread=0.0)
    for clients in scenario.clients:
        serve(warm, clients, max(clients, 2), 10_000)
    for run, clients in itertools.product(range(rounds), scenario.clients):
        count = settings["num_prompts"][str(clients)]
        found[clients].append(serve(scenario.work, clients, count, run * count))
    return found


def fit_overhead(
    scenario: Scenario,
    settings: dict[str, Any],
    measured: dict[str, Any],
    fitted: tuple[str, ...] = PARTS[1:],
) -> Machine:
    """The machine with the overheads that the `none` arm's throughput shows.

    A duration is a sum of so many seconds of the table, steps and answers: linear least
    squares, a few times, as how many they are depends a little on their times.

    Args:
        measured: of that arm, by load.
        fitted: which of `PARTS`; the others stay as they are.
    """
    machine = replace(scenario.machine, per_step=0.0, per_answer=0.0)
    for _ in range(FIT_ROUNDS):
        exact = replace(scenario, machine=replace(machine, noise=0.0))
        rows, wanted = _durations(exact, settings, measured)
        columns = [PARTS.index(name) for name in fitted]
        factor, per_step, per_answer = _not_negative(rows, wanted, columns)
        machine = replace(
            machine,
            scale=factor * machine.scale,
            per_step=per_step,
            per_answer=per_answer,
        )
    return machine


def _durations(
    scenario: Scenario, settings: dict[str, Any], measured: dict[str, Any]
) -> tuple[np.ndarray, np.ndarray]:
    """What the `none` arm's measured durations consist of, and all that is to be.

    Shape: ``[loads, 3]`` in the order of `PARTS`, ``[loads]``; shares of the duration.
    """
    machine, rows, wanted = scenario.machine, [], []
    runs = max(row["runs"] for row in measured.values())
    for clients, each in simulate_sweep(scenario, "none", settings, runs, 0).items():
        speed = measured[str(clients)]["output_throughput"]
        seconds = sum(c.emitted for c in each) / speed
        steps, answers = sum(c.steps for c in each), sum(c.answers for c in each)
        outside = machine.per_step * steps + machine.per_answer * answers
        table = sum(c.busy for c in each) - outside
        rows.append(np.array([table, steps, answers]) / seconds)
        wanted.append(1 - sum(c.seconds - c.busy for c in each) / seconds)
    return np.array(rows), np.array(wanted)


def _not_negative(
    rows: np.ndarray, wanted: np.ndarray, columns: list[int]
) -> list[float]:
    """Least squares in some columns, none below 0; the first is 1 if not among them."""
    best, least = [1.0, 0.0, 0.0], np.inf
    free = [1.0 if 0 not in columns else 0.0, 0.0, 0.0]
    rest = wanted - rows @ np.array(free)
    for count in range(1, len(columns) + 1):
        for used in itertools.combinations(columns, count):
            x, *_ = np.linalg.lstsq(rows[:, used], rest, rcond=None)
            full = np.array(free)
            full[list(used)] = x
            error = float(((rows @ full - wanted) ** 2).sum())
            if (x >= 0).all() and full[0] > 0 and error < least:
                best, least = full.tolist(), error
    return best


def validate(
    scenario: Scenario,
    result: dict[str, Any],
    seeds: int = 5,
    fit_scale: bool = False,
    show: Callable[[], None] | None = None,
) -> dict[str, Any]:
    """Every measured point beside the simulated one.

    Args:
        scenario: cost table and acceptance; load and limits become the sweep's.
        result: result.json of ``serve_sweep.py``.
        seeds: simulations that are averaged.
        fit_scale: whether a factor of the table is fitted too.

    Raises:
        ValueError: the sweep has no `none` arm.
    """
    if "none" not in result["arms"]:
        raise ValueError("the sweep has no arm none, which overheads are taken from")
    settings = result["settings"]
    scenario = like(scenario, settings)
    fitted = PARTS if fit_scale else PARTS[1:]
    machine = fit_overhead(scenario, settings, result["arms"]["none"], fitted)
    scenario = replace(scenario, machine=machine)
    arms: dict[str, Any] = {}
    for name, loads in result["arms"].items():
        runs = max(row["runs"] for row in loads.values())
        rows: dict[int, list[dict[str, Any]]] = {c: [] for c in scenario.clients}
        for seed in range(seeds):
            by_load = simulate_sweep(scenario, name, settings, runs, seed, show)
            for clients, counts in by_load.items():
                rows[clients] += [figures(c) for c in counts]
        arms[name] = {c: _beside(loads[c], rows[int(c)]) for c in loads}
    errors = [abs(row["error"]) for loads in arms.values() for row in loads.values()]
    return {
        "overhead": {
            "scale": machine.scale,
            "per_step_ms": 1000 * machine.per_step,
            "per_answer_ms": 1000 * machine.per_answer,
        },
        "arms": arms,
        "largest_error": max(errors),
        "within_10_percent": sum(e <= 0.1 for e in errors),
        "points": len(errors),
    }


def points(result: dict[str, Any], seeds: int) -> int:
    """How many `show` calls a validation makes."""
    loads = len(result["settings"]["concurrency"])
    runs = [
        max(r["runs"] for r in loads_.values()) for loads_ in result["arms"].values()
    ]
    return seeds * sum(loads * (1 + r) for r in runs)


def _beside(measured: dict[str, Any], rows: list[dict[str, Any]]) -> dict[str, Any]:
    """A measured point and the mean of simulated ones.

    ``error`` is of the throughput; ``round_error`` of the time between two rounds of a
    request (TPOT · τ), which the luck of few prompts with τ does not enter.
    """

    def mean(key: str) -> float:
        return float(np.mean([row[key] for row in rows if row[key] is not None]))

    keys = ("output_throughput", "tpot_ms", "tau", "verify_length", "ttft_p50_ms")
    found: dict[str, Any] = {
        key: {"measured": measured[key], "simulated": mean(key)} for key in keys
    }
    simulated = mean("output_throughput")
    found["error"] = simulated / measured["output_throughput"] - 1
    between = mean("tpot_ms") * mean("tau") / (measured["tpot_ms"] * measured["tau"])
    found["round_error"] = between - 1
    speeds = [row["output_throughput"] for row in rows]
    found["simulated_range"] = [min(speeds), max(speeds)]
    found["measured_range"] = measured["output_throughput_range"]
    found["bypass_share"] = mean("bypass_share")
    found["draft_length"] = mean("draft_length")
    return found
