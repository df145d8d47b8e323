"""A server under mixed load for an hour: text, memory, acceptance, counts.

    python benchmarks/soak.py --target T --drafter D --minutes 60 --out soak

A `vllm serve` with DSpark (adaptive; `--arm none`: without), prefix caching, chunked
prefill and a small K/V cache takes mixed traffic from several clients, a few more than
it serves at once: greedy and sampled requests, seeds, shared prefixes, JSON schemas,
n=2, stop strings, invalid requests, streams dropped half-way and streams read slowly.
Before and after, the probe prompts are asked one at a time, greedily: in float32 texts
must come out the same.

--out holds soak.json (requests, samples of memory, τ and calibration every half minute
with their slopes, the counts of /metrics that must agree, provenance), soak.png and the
server's log. Exit status 1: a request failed that should not, the texts differ, counts
do not agree, or the log has a traceback. Memory, τ and calibration are stated, not
judged: how steady they can be is the load's affair, too.
"""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import _bench_common as common
from _soak_counts import balance
from _soak_load import KINDS, Load, connect
from _soak_watch import Watch, plot, steadiness

from vllm_dspark.cli.arms import speculation_between
from vllm_dspark.cli.server import Metrics, Server, speculative_arguments, total
from vllm_dspark.cli.settings import SERVER_ENVIRONMENT
from vllm_dspark.metrics import PREFIX
from vllm_dspark.model.checkpoint import load_config

# Totals that say what the load was like.
TOTALS = (
    "vllm:prefix_cache_hits_total",
    "vllm:num_preemptions_total",
    "vllm:generation_tokens_total",
    "vllm:prompt_tokens_total",
)
RUNNING = "vllm:num_requests_running"
MOVING = ("vllm:generation_tokens_total", PREFIX + "steps_total")
PATIENCE = 60  # seconds
WARM_UP = 2, 8  # prompts and tokens that are asked before anything is counted


def probe(server: Server, prompts: list[Any], tokens: int) -> dict[str, Any]:
    """Texts and τ of the probe set, one request at a time."""
    before = server.metrics()
    client = connect(server)
    texts = []
    for messages in prompts:
        answer = client.chat.completions.create(
            model="target", messages=messages, temperature=0.0, max_tokens=tokens
        )
        texts.append(answer.choices[0].message.content)
    counted = speculation_between(before, server.metrics())
    if counted is None or counted.accepted_length is None:  # nothing was drafted
        return {"texts": texts, "tau": 1.0, "rounds": 0}
    return {"texts": texts, "tau": counted.accepted_length, "rounds": counted.rounds}


def at_rest(server: Server) -> Metrics:
    """``/metrics`` when no request runs and no count moves any more.

    Streams that were dropped end a moment later, and counts are told once a second.
    """
    before: Metrics = {}
    for _ in range(PATIENCE):
        time.sleep(1)
        after = server.metrics()
        idle = not total(after, RUNNING)
        if idle and all(total(before, n) == total(after, n) for n in MOVING):
            return after
        before = after
    raise ValueError(f"requests still run {PATIENCE} s after the last was answered")


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line.

    Raises:
        ValueError: values that cannot be.
    """
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    root = Path(__file__).resolve().parent.parent
    add("--target", required=True)
    add("--drafter", required=True)
    add("--prompts", type=Path, default=root / "tests" / "data" / "prompts.jsonl")
    add("--arm", choices=("dspark", "none"), default="dspark")
    add("--minutes", type=float, default=60)
    add("--clients", type=int, default=10)
    add("--probe-tokens", type=int, default=64)
    add("--sample-seconds", type=float, default=30)
    add("--dtype", default="float32")
    add("--out", type=Path, required=True)
    args = parser.parse_args(argv)
    for name in ("minutes", "clients", "probe_tokens", "sample_seconds"):
        if not getattr(args, name) > 0:
            option = "--" + name.replace("_", "-")
            raise ValueError(f"{option} {getattr(args, name)}: give more than 0")
    if not args.prompts.is_file():
        raise ValueError(f"--prompts {args.prompts}: is no file")
    return args


def arguments(args: argparse.Namespace) -> list[str]:
    """Of `vllm serve`: room for 8 requests, and blocks for fewer."""
    dspark = {
        "method": "dspark",
        "model": args.drafter,
        "draft_sample_method": "probabilistic",
    }
    spec = dspark if args.arm == "dspark" else None
    serve = ["--served-model-name", "target", "--dtype", args.dtype, "--enforce-eager"]
    serve += ["--max-model-len", "1024", "--max-num-seqs", "8", "--block-size", "32"]
    serve += ["--max-num-batched-tokens", "128", "--num-gpu-blocks-override", "34"]
    return [*serve, "--enable-prefix-caching", *speculative_arguments(spec)]


def kinds(arm: str) -> list[str]:
    """Requests that an arm serves.

    vLLM 0.32 alone dies on a CPU of a seed once it reads a prompt in parts ("CPU
    Generator does not use offset").
    """
    return [kind for kind in KINDS if arm != "none" or kind != "seeded"]


def soak(
    args: argparse.Namespace, server: Server, prompts: list[Any]
) -> dict[str, Any]:
    """Probe, load, probe again; what was seen."""
    server.wait_ready(lambda *_: None)
    probe(server, prompts[: WARM_UP[0]], WARM_UP[1])
    first = probe(server, prompts, args.probe_tokens)
    print(f"before: τ {first['tau']:.4f} over {first['rounds']:.0f} rounds")
    load = Load(server, prompts, seed=1, kinds=kinds(args.arm))
    before = at_rest(server)
    watch = Watch(
        server.metrics, server.pid, load.counts.total, every=args.sample_seconds
    )
    load.run(args.clients, 60 * args.minutes, watch)
    after = at_rest(server)
    last = probe(server, prompts, args.probe_tokens)
    plot(watch.samples, args.out / "soak.png")
    width = load_config(args.drafter).block_size
    return {
        "arm": args.arm,
        "tau_before": first["tau"],
        "tau_after": last["tau"],
        "texts_equal": first["texts"] == last["texts"],
        "minutes": args.minutes,
        "requests": dict(load.counts),
        "failures": load.failures,
        "tracebacks": server.log.read_text(errors="replace").count("Traceback"),
        "totals": {name: total(after, name) - total(before, name) for name in TOTALS},
        "steadiness": steadiness(watch.samples),
        "balance": balance(before, after, width),
        "samples": [asdict(sample) for sample in watch.samples],
    }


def main() -> int:
    args = parse()
    prompts = [row["messages"] for row in common.read_rows(args.prompts)]
    log = args.out / "server.log"
    with Server(args.target, arguments(args), log, SERVER_ENVIRONMENT) as server:
        record = soak(args, server, prompts)
    shown = {k: v for k, v in record.items() if k not in ("samples", "balance")}
    for name, value in shown.items():
        print(f"{name}: {value}")
    for row in record["balance"]:
        print(f"{row['what']}: {row['left']:.0f}, {row['right']:.0f}, {row['holds']}")
    common.write_json(args.out / "soak.json", record)
    good = record["texts_equal"] and not record["failures"] and not record["tracebacks"]
    return int(not (good and all(row["holds"] for row in record["balance"])))


if __name__ == "__main__":
    sys.exit(main())
