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
import json
import math
import statistics
import sys
import time
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from vllm_dspark import provenance
from vllm_dspark.cli.server import Server, speculative_arguments
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
class Answer:
    """One streamed answer."""

    domain: str
    seconds: float
    first_token: float
    tokens: int
    text: str

    @property
    def speed(self) -> float:
        """Tokens per second from sending the request to the last token."""
        return self.tokens / self.seconds


@dataclass
class Arm:
    """One server and what it answered."""

    name: str
    spec: dict[str, Any] | None
    server: Server
    answers: list[Answer] = field(default_factory=list)

    def ask(self, model: str, messages: list[Any], domain: str, limit: int) -> Answer:
        """Stream one answer and note how long it took."""
        from openai import OpenAI

        client = OpenAI(base_url=f"{self.server.url}/v1", api_key="none")
        start = time.perf_counter()
        stream = client.chat.completions.create(
            model=model,
            messages=messages,
            temperature=0.0,
            max_tokens=limit,
            stream=True,
            stream_options={"include_usage": True},
        )
        first, tokens, pieces = 0.0, 0, []
        for chunk in stream:
            if chunk.choices and chunk.choices[0].delta.content:
                first = first or time.perf_counter() - start
                pieces.append(chunk.choices[0].delta.content)
            if chunk.usage:
                tokens = chunk.usage.completion_tokens
        seconds = time.perf_counter() - start
        return Answer(domain, seconds, first, tokens, "".join(pieces))


def load_prompts(path: Path, per_domain: int, longest: int) -> list[tuple[str, Any]]:
    """The first ``per_domain`` prompts of each domain, domains in turn."""
    rows: dict[str, list[Any]] = defaultdict(list)
    for line in path.read_text().splitlines():
        row = json.loads(line)
        domain = DOMAINS.get(row["dataset"], row["dataset"])
        if sum(len(m["content"]) for m in row["messages"]) <= longest:
            rows[domain].append(row["messages"])
    return [
        (domain, rows[domain][i])
        for i in range(per_domain)
        for domain in rows
        if i < len(rows[domain])
    ]


def spec_metrics(server: Server) -> dict[str, Any]:
    """τ and acceptance per position since the server started."""
    names = ("drafts", "accepted_tokens", "accepted_tokens_per_pos")
    found: dict[str, Any] = {"accepted_tokens_per_pos": {}}
    for (name, labels), value in server.metrics().items():
        short = name.removeprefix("vllm:spec_decode_num_").removesuffix("_total")
        if short == "accepted_tokens_per_pos":
            found[short][int(dict(labels)["position"])] = value
        elif name.endswith("_total") and short in names:
            found[short] = value
    drafts = found.get("drafts")
    if not drafts:
        return {}
    positions = sorted(found["accepted_tokens_per_pos"].items())
    return {
        "tau": 1 + found["accepted_tokens"] / drafts,
        "acceptance_per_position": [v / drafts for _, v in positions],
    }


def summarise(arms: list[Arm]) -> dict[str, Any]:
    """Speed, ratio to ``none`` and text equality, per domain and over all."""
    base = arms[0].answers
    out: dict[str, Any] = {}
    for arm in arms:
        domains: dict[str, Any] = {}
        for domain in sorted({a.domain for a in base}):
            pairs = [
                (a, b)
                for a, b in zip(arm.answers, base, strict=True)
                if a.domain == domain
            ]
            speed = [a.speed for a, _ in pairs]
            ratios = [a.speed / b.speed for a, b in pairs]
            domains[domain] = {
                "tok_s": statistics.median(speed),
                "ratio": statistics.median(ratios),
                "ttft_ms": 1000 * statistics.median(a.first_token for a, _ in pairs),
                "texts_equal": sum(a.text == b.text for a, b in pairs),
                "prompts": len(pairs),
            }
        logs = [math.log(d["ratio"]) for d in domains.values()]
        out[arm.name] = {
            "domains": domains,
            "ratio": math.exp(sum(logs) / len(logs)),
            "speculative_config": arm.spec,
            **spec_metrics(arm.server),
        }
    return out


def show(result: dict[str, Any]) -> None:
    """Print one row per arm."""
    from rich.console import Console
    from rich.table import Table

    domains = list(next(iter(result.values()))["domains"])
    table = Table(title="ratio to no speculation (median tok/s), one stream")
    for name in ("arm", *domains, "geometric mean", "τ", "texts equal"):
        table.add_column(name)
    for name, arm in result.items():
        rows = arm["domains"]
        cells = [f"{d['ratio']:.2f} ({d['tok_s']:.0f})" for d in rows.values()]
        equal = sum(d["texts_equal"] for d in rows.values())
        total = sum(d["prompts"] for d in rows.values())
        tau = f"{arm['tau']:.2f}" if "tau" in arm else "-"
        table.add_row(name, *cells, f"{arm['ratio']:.3f}", tau, f"{equal}/{total}")
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
    common = ["--max-model-len", "2048", "--max-num-seqs", "8"]
    common += ["--no-enable-prefix-caching", "--served-model-name", "target"]
    common += ["--enforce-eager"] if args.enforce_eager else []
    with contextlib.ExitStack() as stack:
        arms = []
        for name, spec in specs(args).items():
            server = Server(
                args.target,
                [*common, *speculative_arguments(spec)],
                args.logs / f"{name}.log",
                SERVER_ENVIRONMENT,
            )
            stack.enter_context(server)
            seconds = server.wait_ready(lambda *_: None)
            print(f"{name}: ready after {seconds:.0f} s", flush=True)
            arms.append(Arm(name, spec, server))
        for arm in arms:  # the first request compiles and warms caches
            arm.ask("target", prompts[0][1], "", 16)
        for i, (domain, messages) in enumerate(prompts):
            order = arms[i % len(arms) :] + arms[: i % len(arms)]
            for arm in order:
                answer = arm.ask("target", messages, domain, args.max_tokens)
                arm.answers.append(answer)
            print(f"{i + 1}/{len(prompts)} {domain}", end="\r", flush=True)
        result = summarise(arms)
    show(result)
    if args.json:
        record = {"arms": result, "provenance": provenance.collect()}
        args.json.write_text(json.dumps(record, indent=1))


if __name__ == "__main__":
    main()
