"""Serving in simulation: which policy wins at which load, in seconds instead of hours.

    python benchmarks/simulate.py --scenario benchmarks/data/rocm-deepseek-v4.json
    python benchmarks/simulate.py --cost TABLE.json --acceptance evaluate.json \
        --clients 1 8 64 --json simulate.json --png simulate.png
    python benchmarks/simulate.py --cost TABLE.json --acceptance evaluate.json \
        --validate benchmarks/results/serve-sweep/result.json

A discrete-event model of the serving loop: vLLM's synchronous scheduler (prompts in
parts, a budget of tokens, a limit of requests), closed loop (--clients) or open loop
(--rates), and this project's own planner and controller, which learn from the simulated
outcomes and times as they do in a server. What steps take comes from a cost table
(`vllm-dspark profile`), acceptance and confidences from an evaluation (`vllm-dspark
evaluate --json`) or from a file of `data/`. The same seed gives the same figures.

Arms: none, fixed-K, threshold[-P], no-bypass, adaptive. fixed-1 is what an MTP head of
one token is like.

--wrong makes one thing wrong that the controller does not know of, and compares:
steps*F, drafting*F, slope*F, flat (its cost table), bias+X, bias-X, temper*X (logits of
raw confidences), uninformed (confidences that say nothing), exact (all is right).

--validate simulates the points of a load sweep (`serve_sweep.py`) one by one and says
how far off they are; what server and client take is fitted to the sweep's none arm.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import _bench_common as common
import _sim_report as report
import _sim_run as run
import _sim_scenario as scenarios
import _sim_validate as validation
from _sim_load import Workload
from _sim_parts import Limits
from _sim_scenario import Scenario
from rich.console import Console

from vllm_dspark.cli.counting import counting

ARMS = ("none", "fixed-1", "fixed-3", "fixed-7", "threshold", "no-bypass", "adaptive")
console = Console(stderr=True)  # for progress


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--scenario", type=Path, help="a file of data/: machine, drafter and load")
    add("--cost", type=Path, help="a cost table, instead")
    add("--acceptance", type=Path, help="with it: an evaluation or acceptance file")
    add("--temperature", type=float, help="which of an evaluation's (its first)")
    add("--arms", nargs="+", default=list(ARMS), help="(%(default)s)")
    add("--clients", type=int, nargs="+", help="closed loops (the scenario's)")
    add("--rates", type=float, nargs="+", help="open loops instead, requests a second")
    add("--prompt-tokens", type=int, default=128, help="mean, where not known (128)")
    add("--output-tokens", type=int, default=128, help="mean (128)")
    add("--max-num-seqs", type=int, default=256, help="of the engine (256)")
    add("--max-num-batched-tokens", type=int, default=2048, help="of a step (2048)")
    steps = "before measuring, and measured (600 2000)"
    default = (run.WARM_STEPS, run.STEPS)
    add("--steps", type=int, nargs=2, default=default, metavar="N", help=steps)
    add("--seed", type=int, default=0)
    add("--wrong", nargs="+", default=[], metavar="HOW", help="sensitivity (adaptive)")
    add("--validate", type=Path, metavar="RESULT", help="result.json of a sweep")
    add("--seeds", type=int, default=5, help="simulations a validated point (5)")
    scale = "with it: also fit a factor of the cost table to the none arm"
    add("--fit-scale", action="store_true", help=scale)
    add("--json", type=Path, help="write everything here")
    add("--png", type=Path, help="draw it here")
    args = parser.parse_args(argv)
    if (args.scenario is None) == (args.cost is None):
        raise ValueError("give either --scenario, or --cost with --acceptance")
    if args.cost is not None and args.acceptance is None:
        raise ValueError("--cost needs --acceptance: what is accepted of the drafts")
    return args


def chosen(args: argparse.Namespace) -> Scenario:
    """What is to be simulated."""
    if args.scenario is not None:
        return scenarios.read(args.scenario)
    return scenarios.own(
        args.cost,
        args.acceptance,
        args.temperature,
        limits=Limits(args.max_num_seqs, args.max_num_batched_tokens),
        work=Workload(args.prompt_tokens, args.output_tokens),
    )


def simulate(args: argparse.Namespace, scenario: Scenario) -> dict[str, Any]:
    """The grid of arms and loads."""
    loads = args.rates or args.clients or scenario.clients
    steps = tuple(args.steps)
    total = len(args.arms) * len(loads) * sum(steps)
    with counting(console, "simulating", total) as advance:
        arms = run.grid(
            scenario, args.arms, loads, bool(args.rates), args.seed, steps, advance
        )
    report.show(scenario.name, arms)
    found: dict[str, Any] = {
        "arms": arms,
        "winners": report.winners(arms),
        "per_user_at_matched_throughput": {
            other: report.at_matched_throughput(arms, "adaptive", other)
            for other in arms
            if other != "adaptive"
        },
    }
    if args.png:
        report.draw(scenario.name, arms, args.png, scenario.published)
        print(f"written: {args.png}")
    if scenario.published:
        found["published"] = scenario.published
        found["to_published"] = {
            name: {
                str(load): arms[name][str(load)]["output_throughput"] / speed
                for load, speed in by_load.items()
                if str(load) in arms[name]
            }
            for name, by_load in scenario.published.items()
            if name in arms
        }
        print("simulated / published:", found["to_published"])
    return found


def sensitivity(args: argparse.Namespace, scenario: Scenario) -> dict[str, Any]:
    """The adaptive arm with one thing wrong, against the same with all right."""
    loads = args.clients or scenario.clients
    steps = tuple(args.steps)
    kinds = ["exact", *(how for how in args.wrong if how != "exact")]
    found: dict[str, Any] = {}
    total = len(kinds) * len(loads) * sum(steps)
    with counting(console, "one thing wrong", total) as show:
        for how in kinds:
            worse = scenarios.wrong(scenario, how)
            one = run.grid(worse, ["adaptive"], loads, False, args.seed, steps, show)
            found[how] = one["adaptive"]
    rows = []
    for how, by_load in found.items():
        for load, row in by_load.items():
            exact = found["exact"][load]["output_throughput"]
            row["to_exact"] = row["output_throughput"] / exact
        rows.append([how, *(f"{row['to_exact']:.3f}" for row in by_load.values())])
    title = f"{scenario.name}: throughput with one thing wrong, against none wrong"
    common.print_table(title, ["wrong", *map(str, loads)], rows)
    return found


def main(argv: list[str] | None = None) -> int:
    try:
        args = parse(argv)
        scenario = chosen(args)
        result: dict[str, Any] = {
            "scenario": scenario.name,
            "source": scenario.source,
            "settings": {k: str(v) for k, v in vars(args).items()},
        }
        if args.validate:
            sweep = json.loads(args.validate.read_text())
            total = validation.points(sweep, args.seeds)
            with counting(console, "simulating the sweep", total) as advance:
                found = validation.validate(
                    scenario, sweep, args.seeds, args.fit_scale, advance
                )
            report.show_validation(found)
            result["validation"] = found
        else:
            result |= simulate(args, scenario)
            if args.wrong:
                result["sensitivity"] = sensitivity(args, scenario)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    common.write_json(args.json, result)
    return 0


if __name__ == "__main__":
    sys.exit(main())
