"""Everything that only a machine with a GPU can show, in one report.

    make gpu-check                                  # with the demo pair
    make gpu-check GPU_ARGS='--target T --drafter D --json gpu.json'
    make gpu-check GPU_ARGS='--parts servers --arms none --serve-args "--dtype half"'

1. Kernels on the device against their references: pytest's ``gpu`` tests, the V2
   runner's rejection kernel against vLLM's own, token for token, and the sequential
   head against the plain loop.
2. Their times, medians of CUDA events, beside vLLM's kernels.
3. Whole servers, one after another: no speculation, vLLM's DSpark alone (fixed and
   adaptive), and with this plugin; one stream and several.
4. A file with all of it and where it came from.

A part that fails says so in the report, and the others run; a server's log ends there,
too. The file is written after each part, so a run that is cut off leaves what it found.
Without an NVIDIA GPU
nothing is run, nothing is written, and the exit status is 3.
"""

from __future__ import annotations

import argparse
import shlex
import subprocess
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import _bench_common as common
import _gpu_arms as arms
import _gpu_kernels as kernels

NO_GPU = 3
PARTS = ("tests", "kernels", "servers")
ROOT = Path(__file__).resolve().parent.parent


def trouble() -> str | None:
    """Why nothing can be checked here, if so."""
    import torch

    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA"
    if not torch.cuda.is_available():
        return "torch sees no CUDA device"
    return None


def device() -> dict[str, Any]:
    """The GPU, as torch knows it."""
    import torch

    found = torch.cuda.get_device_properties(0)
    return {
        "name": found.name,
        "compute_capability": f"{found.major}.{found.minor}",
        "memory_gib": round(found.total_memory / 2**30, 1),
        "cuda": torch.version.cuda,
        "count": torch.cuda.device_count(),
    }


def gpu_tests() -> dict[str, Any]:
    """The tests that are marked for a GPU."""
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-m",
        "gpu",
        "tests/ops",
        "tests/train",
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    lines = (done.stdout + done.stderr).strip().splitlines()
    found = {"passed": done.returncode == 0, "summary": lines[-1] if lines else ""}
    if not found["passed"]:
        found["output"] = lines[-60:]
    return found


def attempt(name: str, part: Callable[[], Any]) -> Any:
    """What a part found, or the error that ended it."""
    print(f"== {name}", flush=True)
    try:
        found = part()
    except Exception as error:
        traceback.print_exc()
        found = {"error": f"{type(error).__name__}: {error}"}
    return found


def failed(report: Any) -> bool:
    """Whether anything in a report is an error or a check that did not hold."""
    if isinstance(report, dict):
        if "error" in report or report.get("passed") is False:
            return True
        return any(map(failed, report.values()))
    return isinstance(report, list) and any(map(failed, report))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--target", help="target folder (default: the demo's)")
    add("--drafter", help="its drafter (default: the demo's)")
    add("--streams", type=int, nargs="+", default=[1, 16], help="requests at a time")
    add("--max-tokens", type=int, default=128)
    add("--num-speculative-tokens", type=int, help="default: the drafter's block")
    add("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    add("--arms", nargs="+", metavar="ARM", help="of the servers; default: all")
    add(
        "--serve-args",
        type=shlex.split,
        default=[],
        metavar="'...'",
        help="further arguments of every arm's `vllm serve`",
    )
    add(
        "--drafter-attention",
        metavar="BACKEND",
        help="vLLM's attention backend of the drafters (default: vLLM chooses)",
    )
    add("--at-once", action="store_true", help="all servers live, asked in turns")
    add("--rounds", type=int, default=3, help="of all arms, with --at-once")
    add("--arm-seconds", type=float, default=1200.0, help="limit of one arm's server")
    add("--json", type=Path, default=Path("gpu-check.json"))
    add("--logs", type=Path, default=Path("gpu-check-logs"))
    arguments = parser.parse_args()
    if (arguments.target is None) != (arguments.drafter is None):
        parser.error("give --target and --drafter, or neither (the demo pair)")
    known = list(arms.arms_of("", None))
    arguments.arms = arguments.arms or known
    if unknown := set(arguments.arms) - set(known):
        parser.error(f"no arms {sorted(unknown)}; there are {known}")
    return arguments


def main() -> int:
    arguments = parse()
    if why := trouble():
        print(
            f"No NVIDIA GPU can be used here ({why}): nothing was checked and nothing "
            "was written. Run this on a machine with one."
        )
        return NO_GPU
    report: dict[str, Any] = {"device": device()}
    parts: dict[str, Callable[[], Any]] = {
        "tests": lambda: attempt("tests marked gpu", gpu_tests),
        "kernels": lambda: {n: attempt(n, part) for n, part in kernels.PARTS.items()},
        "servers": lambda: attempt("servers", lambda: arms.measure(arguments)),
    }
    for name in arguments.parts:
        report[name] = parts[name]()
        common.write_json(arguments.json, report)
    print("something failed: see the report" if failed(report) else "all parts passed")
    return int(failed(report))


if __name__ == "__main__":
    raise SystemExit(main())
