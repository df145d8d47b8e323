"""The sequential sampling loop (native), absolute and as a share of a decoding round.

    python benchmarks/bench_sequential.py --json sequential.json
    python benchmarks/bench_sequential.py --drafter DIR --reqs 1 --positions 3
    python benchmarks/bench_sequential.py --round-json round.json round-32.json

Uses the heads of a drafter (the demo drafter by default: d=576, Vd=12288, r=128), or
random ones of that shape if the folder is not there, with random bfloat16 logits and
hidden states. Modes: greedy; sampled with probabilities returned (what probabilistic
drafting needs); both over the whole draft vocabulary and over `--topk` candidates.

A share needs the length of a round of as many requests and drafts: give the files of
`bench_round.py --json` from the same machine, or lengths (`--round-ms 1:28 32:93`).
For other numbers of requests there is no share.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import _bench_common as common
import torch

from vllm_dspark.ops import SequentialHead, draft_sequential, native_status

DEMO = Path(__file__).resolve().parent.parent / "models" / "smollm2-135m-dspark"


def load_head(folder: Path) -> tuple[SequentialHead, int, int, int, str]:
    """Head, width d, draft vocabulary, positions K, and where it is from."""
    if not folder.is_dir():
        return (*random_head(), "random weights")
    from vllm_dspark.integration.heads import head_from_state
    from vllm_dspark.model.checkpoint import load_config, load_state

    config = load_config(folder)
    head = head_from_state(config, load_state(folder), torch.bfloat16)
    vocab = config.draft_vocab_size or config.vocab_size
    return head, config.hidden_size, vocab, config.block_size, folder.name


def random_head() -> tuple[SequentialHead, int, int, int]:
    """Weights of the demo drafter's shape."""
    vocab, draft_vocab, rank, width = 49_152, 12_288, 128, 576
    g = torch.Generator().manual_seed(0)
    w1 = torch.randn(vocab, rank, generator=g).mul(0.1).bfloat16()
    w2 = torch.randn(draft_vocab, rank, generator=g).mul(0.1).bfloat16()
    head = SequentialHead(
        "vanilla",
        w1,
        w2,
        confidence_weight=torch.randn(width + rank, generator=g) * 0.1,
        confidence_bias=torch.zeros(1),
        draft_to_target=torch.arange(draft_vocab, dtype=torch.int32),
    )
    return head, width, draft_vocab, 7


def modes(num: int, positions: int, topk: int) -> dict[str, dict[str, Any]]:
    """Keyword arguments of each mode."""
    sampled = {
        "temperature": torch.ones(num),
        "uniforms": torch.rand(num, positions, dtype=torch.float64),
        "return_probs": True,
    }
    return {
        "greedy": {},
        "sampled": sampled,
        f"greedy top-{topk}": {"topk": topk},
        f"sampled top-{topk}": {**sampled, "topk": topk},
    }


def round_lengths(pairs: list[str]) -> dict[int, float]:
    """``R:MS`` pairs as a dictionary."""
    lengths = {}
    for pair in pairs:
        num, _, ms = pair.partition(":")
        lengths[int(num)] = float(ms)
    return lengths


def measured_rounds(files: list[Path], positions: int) -> dict[int, float]:
    """Requests to the median round with ``positions`` drafts, from `bench_round.py`.

    Raises:
        ValueError: a file has no such round.
    """
    lengths = {}
    for file in files:
        record = json.loads(file.read_text())
        arm = record["arms"].get(f"dspark-{positions}")
        if arm is None:
            raise ValueError(
                f"{file}: no round with {positions} drafts (arms: "
                f"{', '.join(record['arms'])}); run bench_round.py with "
                f"--num-speculative-tokens {positions}"
            )
        lengths[record["concurrency"]] = arm["median_ms"]["total"]
    return lengths


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", help="write the rows and their provenance here")
    parser.add_argument("--drafter", type=Path, default=DEMO)
    parser.add_argument("--reqs", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--positions", type=int, help="K; the drafter's block size")
    parser.add_argument("--topk", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=50, help="timings per mode")
    parser.add_argument(
        "--round-ms", nargs="+", default=[], metavar="R:MS", help="round lengths"
    )
    parser.add_argument(
        "--round-json", nargs="+", type=Path, default=[], help="from bench_round.py"
    )
    args = parser.parse_args()
    head, width, vocab, block, source = load_head(args.drafter)
    positions = args.positions or block
    lengths = measured_rounds(args.round_json, positions) | round_lengths(args.round_ms)
    rows, table = [], []
    for num in args.reqs:
        g = torch.Generator().manual_seed(num)
        base = 3.0 * torch.randn(num, positions, vocab, generator=g)
        hidden = torch.randn(num, positions, width, generator=g).bfloat16()
        anchors = torch.randint(0, vocab, (num,), generator=g)
        block_inputs = (base.bfloat16(), hidden, anchors, head)
        options = modes(num, positions, args.topk)
        calls = {
            name: (lambda o=o, b=block_inputs: draft_sequential(*b, **o))
            for name, o in options.items()
        }
        assert calls["greedy"]().backend == "native"
        medians = common.time_in_turn(calls, dict.fromkeys(calls, args.rounds))
        for mode, us in medians.items():
            share = us / 1e3 / lengths[num] if num in lengths else None
            row = {"mode": mode, "num_reqs": num, "positions": positions}
            row |= {"median_us": round(us, 2), "round_ms": lengths.get(num)}
            rows.append({**row, "share_of_round": share})
            shown = "" if share is None else f"{share:.1%}"
            table.append([mode, str(num), str(positions), f"{us / 1e3:.3f}", shown])
    status = native_status()
    common.print_table(
        f"Sequential loop, {source} ({status.isa}, {status.threads} threads)",
        ["mode", "requests", "K", "median ms", "of a round"],
        table,
    )
    common.write_json(args.json, {"rows": rows, "native": vars(status)})


if __name__ == "__main__":
    main()
