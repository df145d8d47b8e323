"""The options of the load sweep: defaults, checks, and what is kept of them."""

from __future__ import annotations

import argparse
import hashlib
from typing import Any

import _sweep_arms as sweep_arms
from _sweep_arms import Arm
from _sweep_flags import add_flags

# Defaults of what --quick makes shorter.
FULL: dict[str, Any] = {
    "arms": list(sweep_arms.DEFAULT),
    "concurrency": [1, 2, 4, 8, 16, 32, 64],
    "rounds": 3,
    "seconds_per_point": 40.0,
    "min_prompts": 8,
    "check_texts": 6,
}
QUICK: dict[str, Any] = {
    "arms": ["none", "dspark-fixed-3", "dspark-fixed-7", "dspark-adaptive"],
    "concurrency": [1, 8, 32],
    "rounds": 1,
    "seconds_per_point": 15.0,
    "min_prompts": 4,
    "check_texts": 3,
}
# Sequences of a server in the open loop, where nothing else bounds them.
OPEN_LOOP_SEQUENCES = 64
# What the figures depend on, besides arms and prompts.
SETTINGS = (
    "target",
    "drafter",
    "concurrency",
    "request_rate",
    "burstiness",
    "goodput",
    "vllm_dataset",
    "mix",
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
    "dtype",
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
    add_flags(parser)
    args = parser.parse_args(argv)
    _fill_in(args)
    args.concurrency = sorted(set(args.concurrency))
    args.request_rate = sorted(set(args.request_rate))
    args.goodput = _goodput(args.goodput)
    args.mix = _counts(args.mix, "--mix")
    args.split_arms = [sweep_arms.full_name(name) for name in args.split_arms]
    _check(args)
    return args


def _fill_in(args: argparse.Namespace) -> None:
    """Defaults that depend on what else was typed."""
    if args.url and args.arms is None:
        args.arms = []
    if args.request_rate and args.concurrency is None:
        args.concurrency = []
    for key, value in (QUICK if args.quick else FULL).items():
        if getattr(args, key) is None:
            setattr(args, key, value)
    if args.max_num_seqs is None:
        waiting = [OPEN_LOOP_SEQUENCES] if args.request_rate else []
        loads = [*args.concurrency, *args.split_datasets, *waiting]
        args.max_num_seqs = max(loads, default=1)


def _goodput(typed: list[str]) -> dict[str, float]:
    found = {}
    for text in typed:
        name, _, value = text.partition(":")
        try:
            found[name] = float(value)
        except ValueError:
            found[name] = -1.0
        if name not in ("ttft", "tpot", "e2el") or not found[name] > 0:
            raise ValueError(
                f"--goodput is {text!r}; it must be ttft:MS, tpot:MS or e2el:MS"
            )
    return found


def _counts(typed: list[str], option: str = "--draft-tokens") -> dict[str, int]:
    """NAME=NUMBER of an option that is given several."""
    found = {}
    for text in typed:
        name, _, count = text.partition("=")
        if not name or not count.isdigit() or not int(count):
            raise ValueError(f"{option} is {text!r}; it must be NAME=N, N at least 1")
        found[name] = int(count)
    return found


def _check(args: argparse.Namespace) -> None:
    if args.prompts is not None and not args.prompts.is_file():
        raise ValueError(f"--prompts: {args.prompts} is no file")
    if args.prompts is None and not args.vllm_dataset:
        raise ValueError("give --prompts FILE or --vllm-dataset")
    if args.check_texts < 0:
        raise ValueError(f"--check-texts is {args.check_texts}; 0 or more")
    least_one = ("rounds", "min_prompts", "max_prompt_tokens")
    for key in least_one:
        if getattr(args, key) < 1:
            raise ValueError(f"{_option(key)} is {getattr(args, key)}; at least 1")
    for key in ("output_tokens", "warmup_tokens"):
        if getattr(args, key) < 2:  # of one token there is no time per token
            raise ValueError(f"{_option(key)} is {getattr(args, key)}; at least 2")
    loads = [*args.concurrency, *args.split_datasets]
    if min(loads, default=1) < 1:
        raise ValueError(f"a concurrency is {min(loads)}; at least 1")
    if args.request_rate and args.request_rate[0] <= 0:
        raise ValueError(f"--request-rate {args.request_rate[0]}; it must be above 0")
    if args.max_num_seqs < max(loads, default=1):
        raise ValueError(
            f"--max-num-seqs is {args.max_num_seqs}, less than the largest "
            f"concurrency, {max(loads)}: requests would wait in the server"
        )
    for key in ("seconds_per_point", "rounds_per_client", "kv_gib", "burstiness"):
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
    models, tokens = _draft_models(args.draft_model), _counts(args.draft_tokens)
    arms = [sweep_arms.named(name, args.drafter, models, tokens) for name in args.arms]
    if unused := (set(models) | set(tokens)) - {arm.name for arm in arms}:
        name = unused.pop()
        raise ValueError(
            f"--draft-model or --draft-tokens {name}: there is no such arm"
        )
    arms += [sweep_arms.custom(text) for text in args.arm]
    arms += [sweep_arms.running(text) for text in args.url]
    names = [arm.name for arm in arms]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"two arms are called {name!r}")
    for name in args.split_arms if args.split_datasets else ():
        if name not in names:
            raise ValueError(f"--split-arms: {name!r} is not among {', '.join(names)}")
    return {arm.name: arm for arm in arms}


def reference_of(args: argparse.Namespace, arms: dict[str, Arm]) -> str:
    """The arm whose texts are right.

    Raises:
        ValueError: the one that was typed is not there.
    """
    if args.reference is None:
        return "none" if "none" in arms else next(iter(arms))
    if (name := sweep_arms.full_name(args.reference)) not in arms:
        raise ValueError(f"--reference: {name!r} is not among {', '.join(arms)}")
    return name


def settings_of(args: argparse.Namespace, arms: dict[str, Arm]) -> dict[str, Any]:
    """What the figures depend on (not the rounds: --resume may add some)."""
    found = {key: getattr(args, key) for key in SETTINGS}
    if args.prompts is not None:
        content = args.prompts.read_bytes()
        found["prompts_sha256"] = hashlib.sha256(content).hexdigest()
    found["arms"] = [arm.as_json() for arm in arms.values()]
    return found
