"""The OpenAI API fuzzed with and without DSpark: the same findings.

    python benchmarks/fuzz_api.py --schemathesis st --json fuzz-api.json

Two `vllm serve` of one tiny random model in turn: vLLM alone (``VLLM_PLUGINS`` empty),
and DSpark with the adaptive policy. schemathesis (its command may be of another
environment) makes requests, valid and not, from the server's own schema, with one seed;
in its copy of the schema the model's name is the one served, or every request would end
with 404; a second half has requests of few keys, most of which reach the engine.
A finding is an operation, the check that it fails, and the status. Exits with
1 unless both servers have the same schema and findings, both answer at the end, and no
traceback in the log has a frame of ours.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import urllib.request
from collections import Counter, defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import _bench_common as common

from tests.tiny import make_tiny_drafter, make_tiny_target, make_tiny_tokenizer
from vllm_dspark.cli.server import Server, speculative_arguments, total

PATHS = ("/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize")
PATHS += ("/v1/models", "/health", "/metrics")
NAME = "tiny"
SERVE = ["--served-model-name", NAME, "--dtype", "float32", "--enforce-eager"]
SERVE += ["--max-model-len", "128", "--max-num-seqs", "8"]
SERVE += ["--kv-cache-memory-bytes", str(64 << 20)]
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
    # The limit of "n": 16384 answers of one request would take an hour.
    "VLLM_MAX_N_SEQUENCES": "16",
}
# What the narrow half of the requests is made of: with all of the schema's keys hardly
# one request in a hundred is accepted, and the engine sees none.
NARROW: dict[str, Any] = {
    "prompt": {
        "type": "string",
        "minLength": 1,
        "maxLength": 20,
        "pattern": "^[a-z ]+$",
    },
    "messages": {
        "type": "array",
        "minItems": 1,
        "maxItems": 3,
        "items": {
            "type": "object",
            "properties": {
                "role": {"enum": ["user", "system"]},
                "content": {"type": "string", "maxLength": 20, "pattern": "^[a-z ]+$"},
            },
            "required": ["role", "content"],
            "additionalProperties": False,
        },
    },
    "max_tokens": {"type": "integer", "minimum": 1, "maximum": 24},
    "temperature": {"type": "number", "minimum": 0, "maximum": 2},
    "top_p": {"type": "number", "minimum": 0.1, "maximum": 1},
    "top_k": {"type": "integer", "minimum": 1, "maximum": 50},
    "n": {"type": "integer", "minimum": 1, "maximum": 3},
    "seed": {"type": "integer", "minimum": 0, "maximum": 2**31},
    "presence_penalty": {"type": "number", "minimum": -2, "maximum": 2},
    "ignore_eos": {"type": "boolean"},
    "stream": {"type": "boolean"},
}
GENERATING = {"CompletionRequest": "prompt", "ChatCompletionRequest": "messages"}
Interaction = dict[str, Any]


def served_schema(schema: dict[str, Any]) -> dict[str, Any]:
    """The server's schema in which `model` is the model served; the rest is kept."""
    pinned = json.loads(json.dumps(schema))
    for component in pinned.get("components", {}).get("schemas", {}).values():
        properties = component.get("properties", {})
        if "model" in properties and "Request" in component.get("title", ""):
            properties["model"] = {"type": "string", "enum": [NAME]}
    return pinned


def narrow_schema(schema: dict[str, Any]) -> dict[str, Any]:
    """One in which requests that generate text have the keys of `NARROW` only."""
    narrow = served_schema(schema)
    for name, needed in GENERATING.items():
        component = narrow["components"]["schemas"][name]
        keys = component["properties"]
        other = set(GENERATING.values()) - {needed}
        kept = {key: rule for key, rule in NARROW.items() if key not in other}
        component["properties"] = {"model": keys["model"], **kept}
        component["required"] = [needed, "model"]
        component["additionalProperties"] = False
    return narrow


def fuzz(server: Server, args: argparse.Namespace, work: Path) -> list[Interaction]:
    """What schemathesis asked and got, by the whole schema and by the narrow one."""
    with urllib.request.urlopen(f"{server.url}/openapi.json", timeout=60) as answer:
        schema = json.load(answer)
    (work / "schema.json").write_text(json.dumps(schema))
    whole = run_schemathesis(server, args, work / "whole", served_schema(schema), PATHS)
    generating = tuple(path for path in PATHS if path.endswith("completions"))
    narrow = narrow_schema(schema)
    return whole + run_schemathesis(server, args, work / "narrow", narrow, generating)


def run_schemathesis(
    server: Server,
    args: argparse.Namespace,
    work: Path,
    schema: dict[str, Any],
    paths: Iterable[str],
) -> list[Interaction]:
    """A cassette's interactions.

    Raises:
        RuntimeError: it did not end as with or without findings.
    """
    import yaml

    work.mkdir()
    (work / "schema.json").write_text(json.dumps(schema))
    cassette = work / "cassette.yaml"
    command = [args.schemathesis, "run", "schema.json", "--url", server.url]
    command += [word for path in paths for word in ("--include-path", path)]
    command += ["--phases", "examples,fuzzing", "--max-examples", str(args.examples)]
    command += ["--seed", str(args.seed), "--generation-database", "none"]
    command += ["--no-shrink", "--continue-on-failure", "--no-color"]
    command += ["--suppress-health-check", "all", "--request-timeout", "60"]
    command += ["--report-vcr-path", str(cassette)]
    with (work / "schemathesis.log").open("w") as log:
        done = subprocess.run(
            command, cwd=work, stdout=log, stderr=log, timeout=args.limit, check=False
        )
    # 1 is its status for findings.
    if done.returncode not in (0, 1) or not cassette.exists():
        tail = (work / "schemathesis.log").read_text()[-2000:]
        raise RuntimeError(f"schemathesis ended with {done.returncode}:\n{tail}")
    found = yaml.load(cassette.read_text(), yaml.CSafeLoader)
    return list(found["http_interactions"])


def operation(interaction: Interaction) -> str:
    request = interaction["request"]
    return f"{request['method']} {urlsplit(request['uri']).path}"


def status(interaction: Interaction) -> str:
    response = interaction.get("response")
    return str(response["status"]["code"]) if response else "no response"


def findings(interactions: Iterable[Interaction]) -> set[tuple[str, str, str]]:
    """(operation, failed check, status) of the interactions."""
    return {
        (operation(one), check["name"], status(one))
        for one in interactions
        for check in one.get("checks", ())
        if check["status"] == "FAILURE"
    }


def statuses(interactions: Iterable[Interaction]) -> dict[str, dict[str, int]]:
    """Operation to how often each status came."""
    counted: defaultdict[str, Counter[str]] = defaultdict(Counter)
    for one in interactions:
        counted[operation(one)][status(one)] += 1
    return {
        name: dict(sorted(counts.items())) for name, counts in sorted(counted.items())
    }


def by_request(interactions: Iterable[Interaction]) -> dict[str, set[str]]:
    """Each different request (operation, query, body) to its statuses."""
    asked: defaultdict[str, set[str]] = defaultdict(set)
    for one in interactions:
        query = urlsplit(one["request"]["uri"]).query
        body = json.dumps(one["request"].get("body"), sort_keys=True, default=str)
        asked[f"{operation(one)}?{query} {body}"].add(status(one))
    return asked


def compare(
    without: list[Interaction], with_dspark: list[Interaction]
) -> dict[str, Any]:
    """Findings of one server only, and the requests of both with another status."""
    one, two = findings(without), findings(with_dspark)
    asked, asked_too = by_request(without), by_request(with_dspark)
    both = sorted(asked.keys() & asked_too.keys())
    differ = [request for request in both if asked[request] != asked_too[request]]
    return {
        "findings_of_both": sorted(one & two),
        "findings_only_without": sorted(one - two),
        "findings_only_with": sorted(two - one),
        "different_requests": [len(asked), len(asked_too)],
        "requests_of_both": len(both),
        "status_differs": {
            request[:500]: [sorted(asked[request]), sorted(asked_too[request])]
            for request in differ
        },
    }


def our_frames(log: str) -> int:
    """Lines of tracebacks that are in this package."""
    return len(re.findall(r'File "[^"]*vllm_dspark/', log))


def serve_and_fuzz(
    target: Path, spec: dict[str, Any] | None, args: argparse.Namespace, work: Path
) -> tuple[list[Interaction], dict[str, Any]]:
    """One server's interactions, and what it was like at the end."""
    work.mkdir(parents=True)
    extra = {} if spec else {"VLLM_PLUGINS": ""}
    arguments = SERVE + speculative_arguments(spec)
    log = work / "server.log"
    with Server(target, arguments, log, ENVIRONMENT | extra) as server:
        server.wait_ready(lambda *_: None)
        interactions = fuzz(server, args, work)
        metrics = server.metrics()
        state = {
            "answers_at_the_end": answers(server),
            "requests": len(interactions),
            "statuses": statuses(interactions),
            "generated_tokens": total(metrics, "vllm:generation_tokens_total"),
            "drafts": total(metrics, "vllm:spec_decode_num_drafts_total"),
        }
    text = log.read_text(errors="replace")
    state["tracebacks"] = text.count("Traceback (most recent call last)")
    state["frames_of_vllm_dspark"] = our_frames(text)
    return interactions, state


def answers(server: Server) -> bool:
    """Whether it still completes a prompt."""
    body = json.dumps({"model": NAME, "prompt": "the rain", "max_tokens": 4}).encode()
    request = urllib.request.Request(
        f"{server.url}/v1/completions", body, {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=60) as answer:
        return bool(json.load(answer)["choices"])


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--schemathesis", default="st", help="its command")
    parser.add_argument("--examples", type=int, default=30, help="of an operation")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--limit", type=int, default=900, help="seconds of a server")
    parser.add_argument("--logs", type=Path, help="folder for logs and cassettes")
    parser.add_argument("--json", type=Path, metavar="FILE")
    return parser.parse_args()


def main() -> int:
    """Fuzzes both, prints and writes; 1 if they differ or one is not sound."""
    args = arguments()
    work = (args.logs or Path(tempfile.mkdtemp(prefix="fuzz-api-"))).resolve()
    target = make_tiny_target(work / "target")
    make_tiny_tokenizer(target)
    drafter = make_tiny_drafter(work / "drafter", target)
    os.environ.pop("VLLM_PLUGINS", None)
    spec = {"method": "dspark", "model": str(drafter)}
    without, alone = serve_and_fuzz(target, None, args, work / "without")
    with_dspark, ours = serve_and_fuzz(target, spec, args, work / "with")
    schemas = [(work / arm / "schema.json").read_text() for arm in ("without", "with")]
    compared = compare(without, with_dspark)
    result = {
        "examples": args.examples,
        "seed": args.seed,
        "schema_equal": schemas[0] == schemas[1],
        "compared": compared,
        "without": alone,
        "with": ours,
    }
    print(json.dumps(result, indent=1))
    common.write_json(args.json, result)
    same = not compared["findings_only_without"] + compared["findings_only_with"]
    sound = alone["answers_at_the_end"] and ours["answers_at_the_end"]
    sound = sound and not ours["frames_of_vllm_dspark"] and ours["drafts"] > 0
    return int(not (same and sound and result["schema_equal"]))


if __name__ == "__main__":
    sys.exit(main())
