"""What online survival and the choice of draft length cost the scheduler each step.

    python benchmarks/bench_online.py --json online.json
    python benchmarks/bench_online.py --reqs 8 --rounds 20  # a second

Random confidences and outcomes; all requests known, every draft verified, which is the
most there is to do. `update` learns from one step's outcomes; the others decide.
"""

from __future__ import annotations

import argparse

import _bench_common as common
import numpy as np

from vllm_dspark.calibration.file import Calibration
from vllm_dspark.calibration.online import OnlineSurvival
from vllm_dspark.calibration.scaling import Scaling
from vllm_dspark.schedule.drafting import Drafting, StepFacts
from vllm_dspark.schedule.request_gate import RequestGate

WIDTH = 7


def time_batch(reqs: int, rounds: int) -> dict[str, float]:
    """Median microseconds of each call."""
    random = np.random.default_rng(0)
    ids = [f"request-{i}" for i in range(reqs)]
    temperatures = [1.0] * reqs
    confidence = random.uniform(0.05, 0.95, (reqs, WIDTH)).astype(np.float32)
    drafts = np.full(reqs, WIDTH)
    accepted = random.integers(0, WIDTH + 1, reqs)
    maps = Scaling((1.3,) * WIDTH, (0.1,) * WIDTH)
    online = OnlineSurvival(WIDTH, Calibration("none", {1.0: maps}, "random"))
    made = online.apply(ids, temperatures, confidence)
    gate, drafting = RequestGate(), Drafting(WIDTH)
    gate.admit(ids)
    facts = StepFacts(np.linspace(100.0, 120.0, WIDTH + 1), reqs, reqs, 0.7)
    calls = {
        "apply": lambda: online.apply(ids, temperatures, confidence),
        "history": lambda: online.history(ids, temperatures),
        "update": lambda: online.update(made, drafts, accepted),
        "choose": lambda: drafting.choose(facts),
        "admit": lambda: gate.admit(ids),
        "observe": lambda: gate.observe(ids, drafts, accepted),
    }
    return common.time_in_turn(calls, dict.fromkeys(calls, rounds))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--reqs", type=int, nargs="*", default=[1, 32, 256])
    parser.add_argument("--rounds", type=int, default=1000)
    parser.add_argument("--json", help="also write the figures here")
    args = parser.parse_args()
    rows = []
    for reqs in args.reqs:
        times = time_batch(reqs, args.rounds)
        rows += [
            {"call": name, "num_reqs": reqs, "width": WIDTH, "median_us": round(us, 1)}
            for name, us in times.items()
        ]
    common.print_table(
        "Microseconds per step",
        ("call", "requests", "median µs"),
        [[str(r["call"]), str(r["num_reqs"]), str(r["median_us"])] for r in rows],
    )
    common.write_json(args.json, {"rows": rows})


if __name__ == "__main__":
    main()
