"""End to end through the server: DSpark, vLLM's ngram and no speculation, one stream.

    python benchmarks/bench_e2e.py --target T --drafter D --prompts eval.jsonl \
        --num-speculative-tokens 3 5 7 --json e2e.json

Every arm has its own `vllm serve`; all are up at once and idle but for the one being
asked. Each prompt goes to every arm before the next prompt, in an order that rotates,
so that a change of the machine's speed hits all arms alike. Greedy, streamed with the
openai client. Prompts are JSONL rows {"dataset", "messages"}; a domain is a group of
datasets. A ratio is the median over prompts of (speed of the arm / speed of none).
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import _bench_common as common

from vllm_dspark.cli import near_tie
from vllm_dspark.cli.arms import (
    Answer,
    ask,
    connect,
    geometric_mean,
    speculation_between,
)
from vllm_dspark.cli.server import Metrics, Server, speculative_arguments
from vllm_dspark.cli.settings import SERVER_ENVIRONMENT

DOMAINS = {
    "gsm8k": "math",
    "math500": "math",
    "mbpp": "code",
    "lbpp": "code",
    "livecodebench": "code",
    "arena-hard-v2": "chat",
}
NGRAM = {
    "method": "ngram",
    "num_speculative_tokens": 5,
    "prompt_lookup_max": 4,
    "prompt_lookup_min": 2,
}


@dataclass
class Arm:
    """One server and what it answered, by the number of the prompt."""

    name: str
    spec: dict[str, Any] | None
    server: Server
    before: Metrics
    answers: dict[str, Answer] = field(default_factory=dict)

    def ask(self, number: int, messages: list[Any], limit: int) -> None:
        """Stream one answer and keep it."""
        client = connect(self.server)
        self.answers[str(number)] = ask(client, messages, limit, lambda *_: None)


def load_prompts(path: Path, per_domain: int, longest: int) -> list[tuple[str, Any]]:
    """The first ``per_domain`` prompts of each domain, domains in turn."""

    def make(messages: list[dict[str, str]]) -> list[dict[str, str]] | None:
        return messages if sum(len(m["content"]) for m in messages) <= longest else None

    def domain(dataset: str) -> str:
        return DOMAINS.get(dataset, dataset)

    return common.prompts_in_turn(path, make, domain, per_domain)


def summarise(
    arms: list[Arm], prompts: list[tuple[str, Any]], target: Path
) -> dict[str, Any]:
    """Speed, ratio to ``none`` and text equality, per domain and over all."""
    base = arms[0].answers
    out: dict[str, Any] = {}
    for arm in arms:
        domains: dict[str, Any] = {}
        for domain in sorted({d for d, _ in prompts}):
            numbers = [str(i) for i, (d, _) in enumerate(prompts) if d == domain]
            pairs = [(arm.answers[n], base[n]) for n in numbers]
            speed = [a.tokens_per_second for a, _ in pairs]
            ratios = [a.tokens_per_second / b.tokens_per_second for a, b in pairs]
            domains[domain] = {
                "tok_s": statistics.median(speed),
                "ratio": statistics.median(ratios),
                "texts_equal": sum(a.token_ids == b.token_ids for a, b in pairs),
                "prompts": len(pairs),
            }
        counted = speculation_between(arm.before, arm.server.metrics())
        out[arm.name] = {
            "domains": domains,
            "ratio": geometric_mean([d["ratio"] for d in domains.values()]),
            "speculative_config": arm.spec,
            "tau": counted.accepted_length if counted else None,
            "acceptance_per_position": (
                counted.acceptance_per_position if counted else None
            ),
            "differences": [
                asdict(d) for d in near_tie.differences(target, base, arm.answers)
            ],
        }
    return out


def show(result: dict[str, Any]) -> None:
    """Print one row per arm."""
    from rich.console import Console
    from rich.table import Table

    domains = list(next(iter(result.values()))["domains"])
    table = Table(title="ratio to no speculation (median tok/s), one stream")
    headings = ("geometric mean", "τ", "texts equal", "largest gap")
    for name in ("arm", *domains, *headings):
        table.add_column(name)
    for name, arm in result.items():
        rows = arm["domains"]
        cells = [f"{d['ratio']:.2f} ({d['tok_s']:.0f})" for d in rows.values()]
        equal = sum(d["texts_equal"] for d in rows.values())
        total = sum(d["prompts"] for d in rows.values())
        tau = f"{arm['tau']:.2f}" if arm["tau"] else "-"
        gaps = [d["gap_float32"] for d in arm["differences"]]
        cells += [f"{arm['ratio']:.3f}", tau, f"{equal}/{total}"]
        table.add_row(name, *cells, f"{max(gaps):.3f}" if gaps else "-")
    Console().print(table)


def specs(args: argparse.Namespace) -> dict[str, dict[str, Any] | None]:
    arms: dict[str, dict[str, Any] | None] = {"none": None}
    if not args.no_ngram:
        arms["ngram"] = NGRAM
    for k in args.num_speculative_tokens:
        spec = {"method": "dspark", "model": args.drafter, "num_speculative_tokens": k}
        arms[f"dspark-{k}"] = spec
    return arms


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--target", required=True)
    add("--drafter", required=True)
    add("--prompts", type=Path, required=True)
    add("--num-speculative-tokens", type=int, nargs="+", default=[3])
    add("--per-domain", type=int, default=12, help="prompts a domain")
    add("--longest", type=int, default=2500, help="characters of a prompt")
    add("--max-tokens", type=int, default=128)
    add("--no-ngram", action="store_true")
    add("--enforce-eager", action="store_true")
    add("--logs", type=Path, default=Path("e2e-logs"))
    add("--json", type=Path)
    return parser.parse_args()


def main() -> None:
    args = parse()
    prompts = load_prompts(args.prompts, args.per_domain, args.longest)
    shared = ["--max-model-len", "2048", "--max-num-seqs", "8"]
    shared += ["--no-enable-prefix-caching"]
    shared += ["--enforce-eager"] if args.enforce_eager else []
    with contextlib.ExitStack() as stack:
        arms = []
        for name, spec in specs(args).items():
            server = Server(
                args.target,
                [*shared, *speculative_arguments(spec)],
                args.logs / f"{name}.log",
                SERVER_ENVIRONMENT,
            )
            stack.enter_context(server)
            seconds = server.wait_ready(lambda *_: None)
            print(f"{name}: ready after {seconds:.0f} s", flush=True)
            # The first request compiles and warms caches; it is not counted.
            ask(connect(server), prompts[0][1], 16, lambda *_: None)
            arms.append(Arm(name, spec, server, server.metrics()))
        for i, (domain, messages) in enumerate(prompts):
            for arm in common.in_turn(arms, i):
                arm.ask(i, messages, args.max_tokens)
            print(f"{i + 1}/{len(prompts)} {domain}", end="\r", flush=True)
        result = summarise(arms, prompts, Path(args.target))
    show(result)
    common.write_json(args.json, {"arms": result})


if __name__ == "__main__":
    main()
