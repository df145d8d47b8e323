"""The flags of the load sweep, with their help; what they mean together is checked in
`_sweep_options`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import _sweep_arms as sweep_arms


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add every flag, in groups; None stands for a default that --quick changes."""
    _what(parser.add_argument_group("what is measured").add_argument)
    _load(parser.add_argument_group("load").add_argument)
    _texts(parser.add_argument_group("quality gate").add_argument)
    _servers(parser.add_argument_group("servers").add_argument)


def _what(add: Any) -> None:
    add("--target", required=True, help="model folder")
    add("--drafter", help="drafter folder (of the DSpark arms)")
    add("--prompts", type=Path, help="JSONL: dataset, messages")
    data = "prompts of vLLM's bench: JSON of its options, dataset_name and others"
    add("--vllm-dataset", action="append", default=[], metavar="NAME=JSON", help=data)
    shares = "of math, code, chat or datasets (one of each dataset)"
    add("--mix", nargs="+", default=[], metavar="NAME=SHARE", help=shares)
    add("--out", type=Path, required=True, help="folder for everything")
    add("--resume", action="store_true", help="continue the sweep that is in --out")
    add("--quick", action="store_true", help="few arms, loads, one round: 10 minutes")
    known = ", ".join(sweep_arms.NAMES)
    add("--arms", nargs="+", help=f"of {known} ({' '.join(sweep_arms.DEFAULT)})")
    add("--arm", action="append", default=[], metavar="NAME=JSON", help="one more arm")
    taken = "one more arm: a server that runs already (then --arms: none of ours)"
    add("--url", action="append", default=[], metavar="NAME=URL", help=taken)
    model = "drafter of the arm dflash, eagle3, draft_model or mtp"
    metavar = "ARM=FOLDER"
    add("--draft-model", action="append", default=[], metavar=metavar, help=model)
    drafts = "drafts of vLLM's own methods (dflash has no default)"
    metavar = "ARM=N"
    add("--draft-tokens", nargs="+", default=[], metavar=metavar, help=drafts)
    add("--rounds", type=int, help="times the whole grid is measured (3; quick: 1)")


def _load(add: Any) -> None:
    add("--concurrency", type=int, nargs="+", metavar="C", help="1 2 4 ... 64")
    rates = "open loop: requests/s (closed loops then only with --concurrency)"
    add("--request-rate", type=float, nargs="+", default=[], metavar="R", help=rates)
    bursty = "of the open loop: 1 Poisson (default), less: in bursts, more: even"
    add("--burstiness", type=float, default=1.0, help=bursty)
    good = "what a good request keeps: ttft:MS tpot:MS e2el:MS, as vLLM's --goodput"
    add("--goodput", nargs="+", default=[], metavar="NAME:MS", help=good)
    level = "service levels to report, tok/s per user (what none keeps, less a fifth)"
    add("--slo-speed", type=float, nargs="+", metavar="S", help=level)
    level = "service levels to report, TTFT p99 in ms (none's, and a fifth)"
    add("--slo-ttft", type=float, nargs="+", metavar="MS", help=level)
    add("--output-tokens", type=int, default=128, help="tokens of an answer (128)")
    spread = "answers have 1 - this to 1 + this of those tokens (0.5)"
    add("--output-spread", type=float, default=0.5, help=spread)
    add("--stop-at-eos", action="store_true", help="answers may end earlier")
    add("--max-prompt-tokens", type=int, default=384, help="leave out longer (384)")
    add("--seconds-per-point", type=float, help="about (40; quick: 15)")
    add("--rounds-per-client", type=float, help="prompts per client, instead of that")
    add("--min-prompts", type=int, help="least number of a point (8; quick: 4)")
    add("--warmup-tokens", type=int, default=64, help="of a warm-up answer (64)")
    add("--seed", type=int, default=0, help="of the order of the prompts (0)")
    split = "also measure single domains (math, code, chat) with these concurrencies"
    add("--split-datasets", type=int, nargs="+", default=[], metavar="C", help=split)
    add("--split-arms", nargs="+", default=["dspark-adaptive"], help="arms for that")
    add("--datasets", nargs="+", help="domains or datasets for that (all domains)")


def _texts(add: Any) -> None:
    same = "greedy answers of each arm compared to none's (6; quick: 3; 0: do not)"
    add("--check-texts", type=int, metavar="N", help=same)
    other = "arm whose texts are right (none, or the first arm)"
    add("--reference", metavar="ARM", help=other)


def _servers(add: Any) -> None:
    add("--one-at-a-time", action="store_true", help="one server at a time (memory)")
    add("--suspend", action="store_true", help="halt servers while another is measured")
    size = "K/V cache of a server, GiB (what the largest load needs)"
    add("--kv-gib", type=float, help=size)
    add("--max-model-len", type=int, default=1024, help="context of a server (1024)")
    add("--max-num-seqs", type=int, help="of a server (the largest concurrency)")
    kinds = ("auto", "bfloat16", "float16", "float32")
    add("--dtype", choices=kinds, default="auto", help="of a server (the target's)")
    add("--compiled", action="store_true", help="torch.compile instead of eager")
