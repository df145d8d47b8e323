"""Acceptance does not decay: τ of a fixed probe set before and after mixed load.

    python benchmarks/soak.py --target T --drafter D --minutes 10 --json soak.json

A `vllm serve` with DSpark, prefix caching, chunked prefill and a small K/V cache takes
mixed traffic from several clients: greedy and sampled requests, seeds, shared prefixes,
JSON schemas, n=2, stop strings, invalid requests, and streams dropped half-way. Before
and after, the probe prompts are asked one at a time, greedily. In float32 texts and τ
must come out the same; exits with 1 when they do not, or when a request fails that
should not.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import _bench_common as common

from vllm_dspark.cli.server import Server, speculative_arguments
from vllm_dspark.cli.settings import SERVER_ENVIRONMENT

PREFIX = "You are a careful assistant. Think before you answer. " * 8
SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "age": {"type": "integer"}},
    "required": ["name", "age"],
}


def probe(server: Server, prompts: list[Any], tokens: int) -> dict[str, Any]:
    """Texts and τ of the probe set, one request at a time."""
    before = counters(server)
    client = connect(server)
    texts = []
    for messages in prompts:
        answer = client.chat.completions.create(
            model="target", messages=messages, temperature=0.0, max_tokens=tokens
        )
        texts.append(answer.choices[0].message.content)
    after = counters(server)
    rounds = after["drafts"] - before["drafts"]
    accepted = after["accepted_tokens"] - before["accepted_tokens"]
    return {"texts": texts, "tau": 1 + accepted / rounds, "rounds": rounds}


def counters(server: Server) -> dict[str, float]:
    """vLLM's totals that the soak reports."""
    found = {}
    for (name, _), value in server.metrics().items():
        short = name.removeprefix("vllm:spec_decode_num_").removesuffix("_total")
        if short in ("drafts", "accepted_tokens"):
            found[short] = value
        if name in ("vllm:num_preemptions_total", "vllm:prefix_cache_hits_total"):
            found[name] = value
    return found


def connect(server: Server) -> Any:
    from openai import OpenAI

    return OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


class Load:
    """Clients that send mixed requests until told to stop."""

    def __init__(self, server: Server, prompts: list[Any], seed: int) -> None:
        self.server, self.prompts, self.seed = server, prompts, seed
        self.stop = threading.Event()
        self.counts: Counter[str] = Counter()
        self.failures: list[str] = []

    def run(self, clients: int, seconds: float) -> None:
        threads = [
            threading.Thread(target=self._client, args=(i,)) for i in range(clients)
        ]
        for thread in threads:
            thread.start()
        end = time.monotonic() + seconds
        while time.monotonic() < end and not self.failures:
            time.sleep(5)
            left = max(0, end - time.monotonic())
            print(f"{left:5.0f} s left, {sum(self.counts.values())} requests", end="\r")
        self.stop.set()
        for thread in threads:
            thread.join()

    def _client(self, number: int) -> None:
        rng = random.Random(self.seed * 100 + number)
        client = connect(self.server)
        kinds = ("greedy", "sampled", "seeded", "abort", "schema", "several", "invalid")
        while not self.stop.is_set():
            kind = rng.choice(kinds)
            try:
                getattr(self, f"_{kind}")(client, rng)
                self.counts[kind] += 1
            except Exception as error:
                self.failures.append(f"{kind}: {type(error).__name__}: {error}")

    def _ask(self, client: Any, rng: random.Random, **extra: Any) -> Any:
        messages = list(rng.choice(self.prompts))
        if rng.random() < 0.5:  # a shared prefix, so that blocks are reused
            messages = [{"role": "system", "content": PREFIX}, *messages[-1:]]
        settings: dict[str, Any] = {
            "temperature": 0.0,
            "max_tokens": rng.randint(1, 192),
        }
        return client.chat.completions.create(
            model="target", messages=messages, **{**settings, **extra}
        )

    def _greedy(self, client: Any, rng: random.Random) -> None:
        self._ask(client, rng, stop=["\n\n\n"])

    def _sampled(self, client: Any, rng: random.Random) -> None:
        self._ask(client, rng, temperature=rng.choice((0.5, 1.0, 1.5)), top_p=0.9)

    def _seeded(self, client: Any, rng: random.Random) -> None:
        self._ask(client, rng, temperature=1.0, seed=rng.randrange(1 << 31))

    def _abort(self, client: Any, rng: random.Random) -> None:
        stream = self._ask(client, rng, stream=True, max_tokens=128)
        for _, _chunk in zip(range(rng.randint(1, 10)), stream, strict=False):
            pass
        stream.close()

    def _schema(self, client: Any, rng: random.Random) -> None:
        form = {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}}
        self._ask(client, rng, response_format=form)

    def _several(self, client: Any, rng: random.Random) -> None:
        self._ask(client, rng, n=2, temperature=0.8, presence_penalty=0.5)

    def _invalid(self, client: Any, rng: random.Random) -> None:
        from openai import BadRequestError

        try:
            self._ask(client, rng, temperature=-1.0)
        except BadRequestError:
            return
        raise AssertionError("a negative temperature was served")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    root = Path(__file__).resolve().parent.parent
    add("--target", required=True)
    add("--drafter", required=True)
    add("--prompts", type=Path, default=root / "tests" / "data" / "prompts.jsonl")
    add("--minutes", type=float, default=10)
    add("--clients", type=int, default=8)
    add("--probe-tokens", type=int, default=64)
    add("--dtype", default="float32")
    add("--logs", type=Path, default=Path("soak-logs"))
    add("--json", type=Path)
    return parser.parse_args()


def main() -> int:
    args = parse()
    rows = [json.loads(line) for line in args.prompts.read_text().splitlines()]
    prompts = [row["messages"] for row in rows]
    spec = {
        "method": "dspark",
        "model": args.drafter,
        "draft_sample_method": "probabilistic",
    }
    serve = ["--served-model-name", "target", "--dtype", args.dtype, "--enforce-eager"]
    serve += ["--max-model-len", "1024", "--max-num-seqs", "8", "--block-size", "32"]
    serve += ["--max-num-batched-tokens", "128", "--num-gpu-blocks-override", "34"]
    serve += ["--enable-prefix-caching", *speculative_arguments(spec)]
    log = args.logs / "server.log"
    with Server(args.target, serve, log, SERVER_ENVIRONMENT) as server:
        server.wait_ready(lambda *_: None)
        probe(server, prompts[:2], 8)
        first = probe(server, prompts, args.probe_tokens)
        print(f"before: τ {first['tau']:.4f} over {first['rounds']:.0f} rounds")
        load = Load(server, prompts, seed=1)
        load.run(args.clients, 60 * args.minutes)
        last = probe(server, prompts, args.probe_tokens)
        totals = counters(server)
    same = first["texts"] == last["texts"]
    print(f"after:  τ {last['tau']:.4f} over {last['rounds']:.0f} rounds, same: {same}")
    print(f"requests {dict(load.counts)}, failures {load.failures}, totals {totals}")
    record = {
        "tau_before": first["tau"],
        "tau_after": last["tau"],
        "texts_equal": same,
        "minutes": args.minutes,
        "requests": dict(load.counts),
        "failures": load.failures,
        "totals": totals,
    }
    common.write_json(args.json, record)
    return int(not same or bool(load.failures) or last["tau"] < first["tau"] * 0.99)


if __name__ == "__main__":
    sys.exit(main())
