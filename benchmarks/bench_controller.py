"""What the controller takes of a step: microseconds of each of its parts, by requests.

    python benchmarks/bench_controller.py --json controller.json

A `Controller` runs as the scheduler runs it, on made-up steps: it chooses what to draft
and what to verify, for which the device waits; then it learns from outcomes and from
the step's time and looks ahead, while the device computes the next one. ``drafting``:
steps cost little more for more tokens, and four drafts in five are accepted.
``bypass``: a draft costs nearly as much as a token of its own, and one in four is
accepted, so that drafting stops but for probes. In both requests come and go (one in
100 steps of each). Medians say little of what is done now and then, so means are given:
of the middle nine tenths of the steps, as a busy machine has pauses.

What is around it (vLLM's objects to arrays, the worker's report) is not in it.
"""

from __future__ import annotations

import argparse
import os
import time
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import _bench_common as common
import numpy as np

from vllm_dspark.schedule.controller import Controller
from vllm_dspark.schedule.cost import CostTable
from vllm_dspark.schedule.facts import Batch, StepTimes

# Milliseconds of a step by its tokens, and how many drafts are accepted.
STATES = {
    "drafting": (((1, 26.0), (64, 27.0), (4096, 60.0)), 0.8),
    "bypass": (((1, 26.0), (8, 34.0), (32, 75.0), (128, 272.0)), 0.25),
}
WAITED_FOR, MEANWHILE = ("draft", "verify"), ("observe", "timed", "foresee")
PARTS = (*WAITED_FOR, *MEANWHILE)
SUMS = ("waited_for", "total")
WIDTH = 7
_STAY = 0.99  # of requests, from a step to the next


class Steps:
    """One controller and the made-up engine around it."""

    def __init__(self, state: str, num_reqs: int) -> None:
        curve, self._accept = STATES[state]
        tokens, ms = zip(*curve, strict=True)
        self._table = CostTable(
            tokens,
            tuple(m / 1000 for m in ms),
            0.0,
            (1, 64),
            (0, WIDTH),
            ((0.001, 0.004), (0.002, 0.012)),
        )
        self.controller = Controller(WIDTH)
        self.controller.price(self._table)
        self._random = np.random.default_rng(0)
        self._ids = [str(i) for i in range(num_reqs)]
        self._made = num_reqs
        self._drafted = 0
        self.lengths: list[int] = []
        self.seconds: dict[str, list[float]] = defaultdict(list)

    def run(self, steps: int) -> None:
        for _ in range(steps):
            self._step()

    def _timed(self, part: str, call: Callable[..., Any], *args: Any) -> Any:
        start = time.perf_counter()
        result = call(*args)
        self.seconds[part].append(time.perf_counter() - start)
        return result

    def _step(self) -> None:
        controller, random, n = self.controller, self._random, len(self._ids)
        for gone in np.flatnonzero(random.random(n) > _STAY):
            controller.forget([self._ids[gone]])
            self._ids[gone] = str(self._made)
            self._made += 1
        chance = np.clip(self._accept + random.normal(0, 0.1, (n, WIDTH)), 0, 1)
        k = self._drafted
        shown = chance[:, :k] if k else None
        batch = Batch(
            tuple(self._ids),
            (0.0,) * n,
            np.full(n, k),
            shown,
            0,
            200 * n,
            np.zeros(n),
        )
        choice = self._timed("draft", controller.draft, batch)
        plan, made = self._timed("verify", controller.verify, batch, choice.positions)
        lens = plan.verify_lens
        if made is not None:
            alive = np.cumprod(random.random((n, WIDTH)) < chance, axis=1).sum(axis=1)
            accepted, ones = np.minimum(alive, lens), np.ones(n, dtype=np.int64)
            self._timed("observe", controller.observe, made, lens, accepted, ones)
        tokens = n + int(lens.sum())
        noise = random.lognormal(0, 0.05, 2)
        target = float(self._table.step_seconds(tokens)) * noise[0]
        drafting = float(self._table.draft_seconds(n, choice.positions)) * noise[1]
        drafts = (n, choice.positions, drafting)
        times = StepTimes(tokens, 200 * n, target, drafts, overhead=0.002)
        self._timed("timed", controller.timed, times)
        self._timed("foresee", controller.foresee, batch)
        self._drafted = choice.positions
        self.lengths.append(choice.positions)


def mean_us(seconds: list[float], steps: int) -> float:
    """Microseconds a step, of the middle nine tenths of the calls."""
    if not seconds:
        return 0.0
    low, high = np.quantile(seconds, (0.05, 0.95))
    middle = [s for s in seconds if low <= s <= high]
    return float(np.mean(middle)) * 1e6 * len(seconds) / steps


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", help="write the rows and their provenance here")
    parser.add_argument("--reqs", type=int, nargs="+", default=[1, 8, 64, 256])
    parser.add_argument("--steps", type=int, default=1000)
    args = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for state in STATES:
        for num_reqs in args.reqs:
            steps = Steps(state, num_reqs)
            steps.run(200)
            steps.seconds.clear()
            steps.run(args.steps)
            parts = {p: mean_us(steps.seconds[p], args.steps) for p in PARTS}
            rows.append(
                {
                    "state": state,
                    "num_reqs": num_reqs,
                    "positions": float(np.mean(steps.lengths[-args.steps :])),
                    **{f"{name}_us": round(us, 1) for name, us in parts.items()},
                    "waited_for_us": round(sum(parts[p] for p in WAITED_FOR), 1),
                    "total_us": round(sum(parts.values()), 1),
                }
            )
    table = [
        [
            row["state"],
            str(row["num_reqs"]),
            f"{row['positions']:.1f}",
            *(f"{row[f'{name}_us']:,.0f}" for name in (*PARTS, *SUMS)),
        ]
        for row in rows
    ]
    columns = ["state", "requests", "drafted", *PARTS, *SUMS]
    common.print_table("The controller's microseconds of a step", columns, table)
    common.write_json(args.json, {"rows": rows, "load_average": os.getloadavg()})


if __name__ == "__main__":
    main()
