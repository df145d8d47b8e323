"""Planning a step: microseconds of each policy, by requests.

    python benchmarks/bench_planner.py --json planner.json
    python benchmarks/bench_planner.py --reqs 256 --rounds 200  # a second

Survivals are products of confidences drawn from a beta distribution (mean 0.8, which
gives about three accepted drafts of seven). ``light`` steps cost little more for more
tokens, so that nearly everything is verified; in ``full`` ones (the demo target's on
two cores) a draft costs nearly as much as a token of its own. ``goal`` asks for a speed
that half of the requests would have with survivals above a half verified, and
``unreachable`` for one that nobody can have. Each call includes making and checking its
`VerifyStep`.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from typing import Any

import _bench_common as common
import numpy as np

from vllm_dspark.schedule.draft_length import best_draft_length
from vllm_dspark.schedule.planner import (
    find_budget,
    fixed,
    plan,
    plan_within,
    threshold,
)
from vllm_dspark.schedule.step import Floats, Ints, VerifyStep

# Milliseconds of a step by its tokens: measured points are few, hence interpolation.
CURVES = {
    "light": ((1, 26.0), (4096, 30.0)),
    "full": ((1, 26.0), (8, 34.0), (32, 75.0), (128, 272.0), (4096, 8700.0)),
}


def seconds(curve: str) -> Callable[[Ints], Floats]:
    """A step cost that interpolates as a measured one does."""
    at, ms = np.array(CURVES[curve]).T
    return lambda batch_tokens: np.interp(batch_tokens, at, ms / 1000)


def providers(num_reqs: int, block: int, curve: str) -> dict[str, Callable[[], Any]]:
    """Each policy's call for one batch, as a scheduler would make it."""
    random = np.random.default_rng(0)
    confidence = random.beta(4.0, 1.0, (num_reqs, block))
    survival = np.cumprod(confidence, axis=1).astype(np.float32)
    drafts = random.integers(block // 2, block + 1, num_reqs)
    cost = seconds(curve)

    def step(**more: Any) -> VerifyStep:
        return VerifyStep(survival, num_reqs, cost, 0.01, **more)

    budget = find_budget(step())
    chosen = plan(step())
    usual = float(np.median(1 + (survival * (survival > 0.5)).sum(1))) / chosen.seconds
    return {
        "plan": lambda: plan(step()),
        "plan, ragged": lambda: plan(step(num_drafts=drafts)),
        "find_budget": lambda: find_budget(step()),
        "plan_within": lambda: plan_within(step(), budget),
        "fixed": lambda: fixed(step()),
        "threshold": lambda: threshold(step(), 0.5),
        "plan, goal": lambda: plan(step(slo_tps=usual)),
        "plan, unreachable": lambda: plan(step(slo_tps=1e6)),
        "find_budget, unreachable": lambda: find_budget(step(slo_tps=1e6)),
        "best_draft_length": lambda: best_draft_length(
            survival, num_reqs, num_reqs, cost, lambda reqs, k: 0.004 + 1e-5 * reqs * k
        ),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", help="write the rows and their provenance here")
    parser.add_argument("--reqs", type=int, nargs="+", default=[1, 8, 64, 256])
    parser.add_argument("--block-size", type=int, default=7)
    parser.add_argument("--rounds", type=int, default=1000, help="timings per policy")
    args = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for curve in CURVES:
        for num_reqs in args.reqs:
            calls = providers(num_reqs, args.block_size, curve)
            few = max(2, args.rounds // 50)  # the slow ones, which no limit is set for
            rounds = {n: few if "unreach" in n else args.rounds for n in calls}
            medians = common.time_in_turn(calls, rounds)
            verified = int(calls["plan"]().verify_lens.sum())
            for name, us in medians.items():
                cell = {"policy": name, "curve": curve, "num_reqs": num_reqs}
                cell |= {"block_size": args.block_size, "rounds": rounds[name]}
                rows.append({**cell, "median_us": round(us, 1)})
            print(f"{curve}, {num_reqs} requests: plan verifies {verified}", flush=True)
    names = list(dict.fromkeys(row["policy"] for row in rows))
    table = [
        [name, *(f"{r['median_us']:,.0f}" for r in rows if r["policy"] == name)]
        for name in names
    ]
    columns = [f"{curve} {n}" for curve in CURVES for n in args.reqs]
    title = f"Planning a step, median microseconds (K = {args.block_size})"
    common.print_table(title, ["policy", *columns], table)
    common.write_json(
        args.json, {"rows": rows, "curves": CURVES, "load_average": os.getloadavg()}
    )


if __name__ == "__main__":
    main()
