"""Where the time of a decoding round goes, DSpark against no speculation.

    python benchmarks/bench_round.py --target T --drafter D --json round.json
    python benchmarks/bench_round.py --tiny        # seconds, any machine

Runs the engine in this process and times the stages of every decoding step (target
forward, LM head, verification, context K/V, backbone, draft LM head, sequential head
and the rest of drafting; "python" is the rest of the step). Prefill steps are left
out. Medians over rounds; a share is of the median round. The two arms run one after
the other, so compare shares rather than milliseconds where the machine is noisy.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from vllm_dspark import provenance

STAGES = (
    "target forward",
    "target LM head",
    "verification",
    "context K/V",
    "backbone",
    "draft LM head",
    "sequential head",
    "drafting, rest",
    "python",
)
DRAFTING = STAGES[3:8]


# The call around all of DRAFTING: what its parts do not take is their rest.
PROPOSING = "proposing"


class Clock:
    """Seconds spent per stage within the current step, and the steps so far."""

    def __init__(self) -> None:
        self.current: dict[str, float] = defaultdict(float)
        self.steps: list[dict[str, float]] = []

    def time(self, owner: Any, name: str, stage: str) -> None:
        """Count the time of ``owner.name(...)`` under ``stage``."""
        inner: Callable[..., Any] = getattr(owner, name)

        def timed(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            try:
                return inner(*args, **kwargs)
            finally:
                self.current[stage] += time.perf_counter() - start

        setattr(owner, name, timed)

    def step(self, run: Callable[[], Any], keep: bool) -> Any:
        self.current.clear()
        start = time.perf_counter()
        result = run()
        total = time.perf_counter() - start
        if keep:
            whole = self.current.pop(PROPOSING, 0.0)
            parts = sum(self.current[stage] for stage in DRAFTING)
            self.current["drafting, rest"] = max(whole - parts, 0.0)
            row = dict(self.current, total=total)
            row["python"] = total - sum(self.current.values())
            self.steps.append(row)
        return result


def instrument(clock: Clock, runner: Any, speculative: bool) -> None:
    """Put the clock around the stages of one engine's worker."""
    clock.time(runner, "_model_forward", "target forward")
    clock.time(runner.model, "compute_logits", "target LM head")
    clock.time(runner, "_sample", "verification")
    if not speculative:
        return
    from vllm_dspark.integration import proposer

    clock.time(runner, "propose_draft_token_ids", PROPOSING)
    clock.time(runner.drafter.context, "_write", "context K/V")
    clock.time(runner.drafter, "_backbone", "backbone")
    clock.time(runner.drafter.model, "base_logits", "draft LM head")
    clock.time(proposer, "draft_sequential", "sequential head")


def prompts_for(target: str, count: int, seed: int = 0) -> list[list[int]]:
    """``count`` prompts: questions in the target's chat form, or random ids."""
    import random

    from transformers import AutoTokenizer

    questions = (
        "Natalia sold 48 clips in April and half as many in May. How many in all?",
        "Write a Python function that checks whether a number is prime.",
        "Explain why the sky is blue in three sentences.",
    )
    try:
        tokenizer = AutoTokenizer.from_pretrained(target)
        if tokenizer.chat_template is None:
            raise ValueError("no chat template")
    except (OSError, ValueError):
        rng = random.Random(seed)
        return [[rng.randrange(3, 100) for _ in range(24)] for _ in range(count)]
    rows = []
    for i in range(count):
        message = [{"role": "user", "content": questions[i % len(questions)]}]
        text = tokenizer.apply_chat_template(
            message, add_generation_prompt=True, tokenize=False
        )
        rows.append(tokenizer.encode(text, add_special_tokens=False))
    return rows


def run_arm(args: argparse.Namespace, spec: dict[str, Any] | None) -> dict[str, Any]:
    """Time one arm; returns its stage table."""
    from vllm import LLM, SamplingParams
    from vllm.distributed import cleanup_dist_env_and_memory

    llm = LLM(
        model=args.target,
        dtype=args.dtype,
        enforce_eager=args.enforce_eager,
        max_model_len=1024,
        max_num_seqs=max(args.concurrency, 2),
        kv_cache_memory_bytes=1 << 30,
        skip_tokenizer_init=args.tiny,
        speculative_config=spec,
        enable_prefix_caching=False,
    )
    core = llm.llm_engine.engine_core.engine_core
    runner = core.model_executor.driver_worker.worker.model_runner
    clock = Clock()
    instrument(clock, runner, spec is not None)
    params = SamplingParams(
        temperature=args.temperature, max_tokens=args.tokens, ignore_eos=True
    )
    rows = [{"prompt_token_ids": p} for p in prompts_for(args.target, args.concurrency)]
    inner = core.step_fn

    def step() -> Any:
        decoding = all(not r.is_prefill_chunk for r in core.scheduler.running)
        decoding = decoding and len(core.scheduler.running) == args.concurrency
        return clock.step(inner, decoding)

    core.step_fn = step
    for _ in range(args.repeats):
        llm.generate(rows, params, use_tqdm=False)
    backends = None
    if spec is not None:
        backends = {
            "rejection": runner.rejection_sampler.last_backend,
            "sequential": runner.drafter.last_backend,
        }
    del llm
    cleanup_dist_env_and_memory()
    tokens = args.tokens * args.concurrency * args.repeats
    return summary(clock, tokens) | {"backends": backends}


def summary(clock: Clock, tokens: int) -> dict[str, Any]:
    """Median milliseconds per stage and per round."""
    steps = clock.steps[len(clock.steps) // 10 :]  # the first rounds warm caches
    median = {
        stage: 1000 * statistics.median(s.get(stage, 0.0) for s in steps)
        for stage in (*STAGES, "total")
    }
    seconds = sum(s["total"] for s in clock.steps)
    return {
        "rounds": len(clock.steps),
        "median_ms": median,
        "tokens_per_s": tokens / seconds,
        "tokens_per_round": tokens / len(clock.steps),
        "drafting_share": sum(median[s] for s in DRAFTING) / median["total"],
        "sequential_share": median["sequential head"] / median["total"],
    }


def show(arms: dict[str, dict[str, Any]]) -> None:
    """Print the stage table of all arms."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title="median milliseconds of a decoding step")
    table.add_column("stage")
    for name in arms:
        table.add_column(name, justify="right")
    for stage in (*STAGES, "total"):
        cells = (f"{a['median_ms'][stage]:.2f}" for a in arms.values())
        table.add_row(stage, *cells)
    for key in (
        "drafting_share",
        "sequential_share",
        "tokens_per_round",
        "tokens_per_s",
    ):
        table.add_row(key, *(f"{a[key]:.3f}" for a in arms.values()))
    Console().print(table)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--target")
    parser.add_argument("--drafter")
    parser.add_argument("--tiny", action="store_true", help="random models")
    parser.add_argument("--num-speculative-tokens", type=int, nargs="+", default=[3])
    parser.add_argument("--concurrency", type=int, default=1)
    parser.add_argument("--tokens", type=int, default=128, help="new tokens a request")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--enforce-eager", action="store_true")
    parser.add_argument("--no-baseline", action="store_true", help="DSpark only")
    parser.add_argument("--json", type=Path, help="write the figures here")
    args = parser.parse_args()
    if not args.tiny and not (args.target and args.drafter):
        parser.error(
            "give --target and --drafter (`vllm-dspark demo --paths` prints the demo "
            "pair), or --tiny"
        )
    return args


def main() -> None:
    args = parse()
    with tempfile.TemporaryDirectory() as folder:
        if args.tiny:
            from tests.tiny import make_tiny_drafter, make_tiny_target

            args.target = str(make_tiny_target(Path(folder) / "target"))
            args.drafter = str(
                make_tiny_drafter(Path(folder) / "drafter", Path(args.target))
            )
            args.dtype, args.enforce_eager = "float32", True
        arms = {} if args.no_baseline else {"none": run_arm(args, None)}
        for k in args.num_speculative_tokens:
            spec = {
                "method": "dspark",
                "model": args.drafter,
                "num_speculative_tokens": k,
                "draft_sample_method": "probabilistic"
                if args.temperature
                else "greedy",
            }
            arms[f"dspark-{k}"] = run_arm(args, spec)
    show(arms)
    if args.json:
        record = {
            "arms": arms,
            "concurrency": args.concurrency,
            "temperature": args.temperature,
            "enforce_eager": args.enforce_eager,
            "provenance": provenance.collect(),
        }
        args.json.write_text(json.dumps(record, indent=1))


if __name__ == "__main__":
    main()
