"""`vllm-dspark train`: a drafter for your model, from the text that it wrote.

Interrupt it at any time; the same command goes on where it was.
"""

import argparse
import contextlib
import os
import signal
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

from rich.console import Console

from vllm_dspark.cli.signals import interrupt
from vllm_dspark.train.options import HEADS, INITS, PRESETS, TrainOptions

_EXAMPLE = """example:
  vllm-dspark train --target TARGET --data DATA --out DRAFTER --preset tiny
                                                          a minute on a laptop
  torchrun --nproc-per-node 2 -m vllm_dspark.cli train --target TARGET \\
      --data DATA MORE --out DRAFTER                      one process a core or GPU

DATA is what `vllm-dspark synthesize` wrote. DRAFTER/training holds the run's figures
(train.jsonl, curves.png) and the checkpoint it goes on from after a kill.
"""
_CHOICES = {"head": HEADS, "init": INITS}
DTYPES = ("auto", "bfloat16", "float32")
DEVICES = ("auto", "cpu", "cuda")


def add_parser(subparsers: Any) -> None:
    """Add the ``train`` subcommand."""
    parser = subparsers.add_parser(
        "train",
        help="train a drafter on a target's own text",
        description="Train a drafter.",
        epilog=_EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--target", required=True, metavar="MODEL", help="folder of the target")
    add("--data", type=Path, nargs="+", required=True, metavar="DATA")
    add("--out", type=Path, required=True, metavar="DRAFTER")
    add("--start-from", type=Path, metavar="DRAFTER",
        help="train this drafter further, in its own shape")  # fmt: skip
    add("--preset", choices=sorted(PRESETS), default="small",
        help="shape and length to start from; options below override it")  # fmt: skip
    add("--device", choices=DEVICES, default="auto",
        help="auto: the GPU if there is one")  # fmt: skip
    add("--dtype", choices=DTYPES, default="auto",
        help="of products; auto: bfloat16 where the hardware has it")  # fmt: skip
    add("--threads", type=int, metavar="N", help="of this process (default: torch's)")
    add("--json", type=Path, metavar="FILE", help="write the outcome to FILE")
    group = parser.add_argument_group("training options")
    for spec in fields(TrainOptions):
        _add_option(group, spec.name, spec.default)
    parser.set_defaults(run=run)


def _add_option(group: Any, name: str, default: Any) -> None:
    flag = "--" + name.replace("_", "-")
    if name == "target_layer_ids":
        group.add_argument(flag, type=int, nargs="+", metavar="I",
            help="tapped layers (default: five, evenly spaced)")  # fmt: skip
        return
    kind: Any = type(default) if default is not None else int
    shown = "" if default is None else f"(default: {default})"
    group.add_argument(
        flag, type=kind, choices=_CHOICES.get(name), help=shown or None,
        metavar=None if name in _CHOICES else "X",
    )  # fmt: skip


def run(arguments: argparse.Namespace) -> int:
    """Run the subcommand."""
    signal.signal(signal.SIGTERM, interrupt)
    options = chosen_options(arguments)
    with _process_group() as rank:
        # torch and transformers take seconds to import: mistakes above come first.
        from vllm_dspark.cli import train_run

        console = Console(quiet=rank > 0)
        return train_run.run(arguments, options, console)


def chosen_options(arguments: argparse.Namespace) -> TrainOptions:
    """The preset with what was typed on top.

    Raises:
        ValueError: a value that cannot be.
    """
    values = dict(PRESETS[arguments.preset])
    for spec in fields(TrainOptions):
        typed = getattr(arguments, spec.name)
        if typed is not None:
            values[spec.name] = tuple(typed) if isinstance(typed, list) else typed
    if values.get("head") == "none":
        values["rank"] = 0 if arguments.rank is None else values["rank"]
    return TrainOptions(**values)


@contextlib.contextmanager
def _process_group() -> Iterator[int]:
    """Join the processes that torchrun started; the rank, 0 when alone."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield 0
        return
    import torch
    import torch.distributed as dist

    # CPU tensors through gloo, those of GPUs through nccl.
    both = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(both)
    try:
        yield dist.get_rank()
    finally:
        dist.destroy_process_group()
