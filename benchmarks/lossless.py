"""Greedy text with DSpark equals vLLM's without, token for token, in float32.

    python benchmarks/lossless.py --target T --drafter D --prompts eval.jsonl \
        --json lossless.json

Settings: one request at a time, 16 at a time, prefix caching (every prompt asked
twice), chunked prefill (64 tokens a step) and a K/V cache small enough to preempt. The
reference is an engine without speculation that answers 16 requests at a time. Exits
with 1 when a single token differs; then it prints the target's logit gap there.

float32 sums depend on how they are shared out over threads and on the shape of a
batch, so a tie at the sixth digit may fall either way. ``--control`` also answers
without speculation again, and again with prompts in parts: what differs there is
vLLM's own, not DSpark's.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
import _bench_common as common

# Engine arguments of each setting; "asks" is how often every prompt is asked,
# "kv_share" how much of the K/V cache that 16 requests need there is.
SETTINGS: dict[str, dict[str, Any]] = {
    "concurrency 1": {"max_num_seqs": 1},
    "concurrency 16": {},
    "prefix caching": {"enable_prefix_caching": True, "asks": 2, "block_size": 32},
    "chunked prefill": {"max_num_batched_tokens": 64},
    "preemption": {"kv_share": 0.4, "block_size": 32},
}


def load_prompts(path: Path, target: str, count: int, longest: int) -> list[list[int]]:
    """``count`` prompts as token ids, datasets in turn, none over ``longest``."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(target)

    def make(messages: list[dict[str, str]]) -> list[int] | None:
        text = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, tokenize=False
        )
        ids: list[int] = tokenizer.encode(text, add_special_tokens=False)
        return ids if len(ids) <= longest else None

    rows = [prompt for _, prompt in common.prompts_in_turn(path, make)]
    if len(rows) < count:
        raise SystemExit(f"{path} has {len(rows)} prompts that fit, {count} wanted")
    return rows[:count]


def answer(
    args: argparse.Namespace, prompts: list[list[int]], speculate: bool, setting: dict
) -> tuple[list[list[int]], dict[str, Any]]:
    """Greedy token ids of every prompt and what the engine counted."""
    from vllm import LLM, SamplingParams
    from vllm.distributed import cleanup_dist_env_and_memory

    setting = dict(setting)
    asks = setting.pop("asks", 1)
    longest = max(map(len, prompts)) + args.tokens + 8
    if share := setting.pop("kv_share", None):
        size = setting["block_size"]
        needed = sorted(-(-(len(p) + args.tokens) // size) for p in prompts)[-16:]
        # At least the longest request with its drafts must fit alone.
        least = -(-longest // size) + 1
        setting["num_gpu_blocks_override"] = max(least, int(share * sum(needed)))
    engine: dict[str, Any] = {
        "max_num_seqs": 16,
        "enable_prefix_caching": False,
        "kv_cache_memory_bytes": 1 << 30,
        **setting,
    }
    if speculate:
        engine["speculative_config"] = {"method": "dspark", "model": args.drafter}
        engine["additional_config"] = {"dspark": {"policy": args.policy}}
    llm = LLM(
        model=args.target,
        dtype="float32",
        enforce_eager=True,
        max_model_len=longest,
        disable_log_stats=False,
        **engine,
    )
    params = SamplingParams(temperature=0.0, max_tokens=args.tokens)
    rows = [{"prompt_token_ids": p} for p in prompts]
    start = time.perf_counter()
    for _ in range(asks):
        outputs = llm.generate(rows, params, use_tqdm=False)
    facts = counted(llm) | {"seconds": time.perf_counter() - start} | cores()
    del llm
    cleanup_dist_env_and_memory()
    return [list(o.outputs[0].token_ids) for o in outputs], facts


def counted(llm: Any) -> dict[str, Any]:
    """vLLM's own counters: τ, preemptions, prefix hits."""
    values = {m.name: getattr(m, "value", None) for m in llm.get_metrics()}
    drafts = values.get("vllm:spec_decode_num_drafts")
    accepted = values.get("vllm:spec_decode_num_accepted_tokens")
    return {
        "tau": 1 + accepted / drafts if drafts else None,
        "preemptions": values.get("vllm:num_preemptions"),
        "prefix_cache_hits": values.get("vllm:prefix_cache_hits"),
    }


def cores() -> dict[str, int]:
    """What this process, where the engines run, computes with now."""
    import torch

    return {
        "threads": torch.get_num_threads(),
        "cores": len(os.sched_getaffinity(0)),
    }


def first_difference(
    prompts: list[list[int]], got: list[list[int]], want: list[list[int]]
) -> list[dict[str, Any]]:
    """Per differing prompt: where, and the two tokens."""
    found = []
    for i, (a, b) in enumerate(zip(got, want, strict=True)):
        if a != b:
            same = (x == y for x, y in zip(a, b, strict=False))
            at = next((j for j, ok in enumerate(same) if not ok), min(len(a), len(b)))
            found.append({"prompt": i, "at": at, "got": a[at:][:1], "want": b[at:][:1]})
    return found


def add_gaps(args: argparse.Namespace, prompts: list, want: list, rows: list) -> None:
    """The target's logit gap between the two candidates of each difference."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(args.target, dtype=torch.float32)
    for row in rows:
        ids = prompts[row["prompt"]] + want[row["prompt"]][: row["at"]]
        with torch.no_grad():
            logits = model(torch.tensor([ids])).logits[0, -1]
        if row["got"] and row["want"]:
            row["gap"] = float(logits[row["want"][0]] - logits[row["got"][0]])


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--target", required=True)
    add("--drafter", required=True)
    add("--prompts", type=Path, required=True, help='rows {"dataset", "messages"}')
    add("--count", type=int, default=48)
    add("--tokens", type=int, default=128)
    add("--longest", type=int, default=400, help="tokens of a prompt")
    add("--settings", nargs="+", default=list(SETTINGS), choices=list(SETTINGS))
    add("--policy", default="adaptive", choices=["adaptive", "fixed", "threshold"])
    add("--control", action="store_true")
    add("--json", type=Path)
    return parser.parse_args()


def main() -> int:
    args = parse()
    prompts = load_prompts(args.prompts, args.target, args.count, args.longest)
    want, facts = answer(args, prompts, False, {})
    print(f"no speculation: {facts['seconds']:.0f} s", flush=True)
    results: dict[str, Any] = {"no speculation": facts}
    arms = [(name, True, SETTINGS[name]) for name in args.settings]
    if args.control:
        parts = SETTINGS["chunked prefill"]
        arms[:0] = [("control", False, {}), ("control, chunked", False, parts)]
    for name, speculate, setting in arms:
        got, facts = answer(args, prompts, speculate, setting)
        different = first_difference(prompts, got, want)
        add_gaps(args, prompts, want, different) if different else None
        results[name] = facts | {"different": different}
        equal = len(prompts) - len(different)
        print(f"{name}: {equal}/{len(prompts)} equal, {results[name]}", flush=True)
    common.write_json(args.json, {"policy": args.policy, "results": results})
    return int(
        any(r.get("different") for n, r in results.items() if "control" not in n)
    )


if __name__ == "__main__":
    sys.exit(main())
