"""The options of the load sweep: defaults, checks, and what is kept of them."""

from __future__ import annotations

import argparse
import hashlib
from pathlib import Path
from typing import Any

import _sweep_arms as sweep_arms
from _sweep_arms import Arm

# Defaults of what --quick makes shorter.
FULL: dict[str, Any] = {
    "arms": list(sweep_arms.DEFAULT),
    "concurrency": [1, 2, 4, 8, 16, 32, 64],
    "rounds": 3,
    "seconds_per_point": 40.0,
    "min_prompts": 8,
}
QUICK: dict[str, Any] = {
    "arms": ["none", "dspark-fixed-3", "dspark-fixed-7", "dspark-adaptive"],
    "concurrency": [1, 8, 32],
    "rounds": 1,
    "seconds_per_point": 15.0,
    "min_prompts": 4,
}
# What the figures depend on, besides arms and prompts.
SETTINGS = (
    "target",
    "drafter",
    "concurrency",
    "output_tokens",
    "output_spread",
    "stop_at_eos",
    "max_prompt_tokens",
    "seconds_per_point",
    "rounds_per_client",
    "min_prompts",
    "warmup_tokens",
    "seed",
    "kv_gib",
    "max_model_len",
    "max_num_seqs",
    "compiled",
    "one_at_a_time",
    "suspend",
)


def parse(description: str, argv: list[str] | None = None) -> argparse.Namespace:
    """The command line, with the defaults of --quick or the full sweep filled in.

    Raises:
        ValueError: values that do not go together.
    """
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    _what(parser.add_argument_group("what is measured").add_argument)
    _load(parser.add_argument_group("load").add_argument)
    _servers(parser.add_argument_group("servers").add_argument)
    args = parser.parse_args(argv)
    for key, value in (QUICK if args.quick else FULL).items():
        if getattr(args, key) is None:
            setattr(args, key, value)
    args.concurrency = sorted(set(args.concurrency))
    args.split_arms = [sweep_arms.full_name(name) for name in args.split_arms]
    _check(args)
    return args


def _what(add: Any) -> None:
    add("--target", required=True, help="model folder")
    add("--drafter", required=True, help="drafter folder")
    add("--prompts", type=Path, required=True, help="JSONL: dataset, messages")
    add("--out", type=Path, required=True, help="folder for everything")
    add("--resume", action="store_true", help="continue the sweep that is in --out")
    add("--quick", action="store_true", help="few arms, loads, one round: 10 minutes")
    known = ", ".join(sweep_arms.NAMES)
    add("--arms", nargs="+", help=f"of {known} ({' '.join(sweep_arms.DEFAULT)})")
    add("--arm", action="append", default=[], metavar="NAME=JSON", help="one more arm")
    model = "drafter of the arm dflash, eagle3, draft_model or mtp"
    metavar = "ARM=FOLDER"
    add("--draft-model", action="append", default=[], metavar=metavar, help=model)
    add("--rounds", type=int, help="times the whole grid is measured (3; quick: 1)")


def _load(add: Any) -> None:
    add("--concurrency", type=int, nargs="+", metavar="C", help="1 2 4 ... 64")
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


def _servers(add: Any) -> None:
    add("--one-at-a-time", action="store_true", help="one server at a time (memory)")
    add("--suspend", action="store_true", help="halt servers while another is measured")
    size = "K/V cache of a server, GiB (what the largest load needs)"
    add("--kv-gib", type=float, help=size)
    add("--max-model-len", type=int, default=1024, help="context of a server (1024)")
    add("--max-num-seqs", type=int, help="of a server (the largest concurrency)")
    add("--compiled", action="store_true", help="torch.compile instead of eager")


def _check(args: argparse.Namespace) -> None:
    if not args.prompts.is_file():
        raise ValueError(f"--prompts: {args.prompts} is no file")
    least_one = ("rounds", "min_prompts", "max_prompt_tokens")
    for key in least_one:
        if getattr(args, key) < 1:
            raise ValueError(f"{_option(key)} is {getattr(args, key)}; at least 1")
    for key in ("output_tokens", "warmup_tokens"):
        if getattr(args, key) < 2:  # of one token there is no time per token
            raise ValueError(f"{_option(key)} is {getattr(args, key)}; at least 2")
    loads = [*args.concurrency, *args.split_datasets]
    if min(loads) < 1:
        raise ValueError(f"a concurrency is {min(loads)}; at least 1")
    if args.max_num_seqs is not None and args.max_num_seqs < max(loads):
        raise ValueError(
            f"--max-num-seqs is {args.max_num_seqs}, less than the largest "
            f"concurrency, {max(loads)}: requests would wait in the server"
        )
    for key in ("seconds_per_point", "rounds_per_client", "kv_gib"):
        if (value := getattr(args, key)) is not None and value <= 0:
            raise ValueError(f"{_option(key)} is {value}; it must be above 0")
    if not 0 <= args.output_spread < 1:
        raise ValueError(f"--output-spread is {args.output_spread}; from 0 to below 1")
    answer = round(args.output_tokens * (1 + args.output_spread))
    longest = args.max_prompt_tokens + max(answer, args.warmup_tokens)
    if longest > args.max_model_len:
        raise ValueError(
            f"prompts of {args.max_prompt_tokens} tokens and their answers do not fit "
            f"into --max-model-len {args.max_model_len}"
        )


def _option(key: str) -> str:
    return "--" + key.replace("_", "-")


def _draft_models(typed: list[str]) -> dict[str, str]:
    found = {}
    for text in typed:
        name, equals, folder = text.partition("=")
        if not equals or not folder:
            raise ValueError(f"--draft-model is {text!r}; it must be ARM=FOLDER")
        found[name] = folder
    return found


def chosen_arms(args: argparse.Namespace) -> dict[str, Arm]:
    """The arms by name, in the order typed.

    Raises:
        ValueError: an unknown or repeated name, or a split arm that is not there.
    """
    models = _draft_models(args.draft_model)
    arms = [sweep_arms.named(name, args.drafter, models) for name in args.arms]
    if unused := set(models) - {arm.name for arm in arms}:
        raise ValueError(f"--draft-model {unused.pop()}: there is no such arm")
    arms += [sweep_arms.custom(text) for text in args.arm]
    names = [arm.name for arm in arms]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"two arms are called {name!r}")
    for name in args.split_arms if args.split_datasets else ():
        if name not in names:
            raise ValueError(f"--split-arms: {name!r} is not among {', '.join(names)}")
    return {arm.name: arm for arm in arms}


def settings_of(args: argparse.Namespace, arms: dict[str, Arm]) -> dict[str, Any]:
    """What the figures depend on (not the rounds: --resume may add some)."""
    found = {key: getattr(args, key) for key in SETTINGS}
    found["prompts_sha256"] = hashlib.sha256(args.prompts.read_bytes()).hexdigest()
    found["arms"] = [arm.as_json() for arm in arms.values()]
    return found
