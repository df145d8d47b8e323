"""What `vllm-dspark train` does once its options are known to make sense."""

import argparse
import math
import os
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from vllm_dspark import provenance
from vllm_dspark.model.target import find_target, identify_target
from vllm_dspark.train import state
from vllm_dspark.train.continued import fitting_options, read_start
from vllm_dspark.train.data import TrainingData
from vllm_dspark.train.options import TrainOptions
from vllm_dspark.train.tokens import read_tokens
from vllm_dspark.train.trainer import Outcome, Report, Trainer


def run(arguments: argparse.Namespace, options: TrainOptions, console: Console) -> int:
    """Train; the exit status is 1 when the loss was not a number, 130 after Ctrl-C."""
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    trainer = prepare(arguments, options, console)
    done = trainer.progress.step
    start = f"going on from step {done}" if done else "starting"
    console.print(
        f"{start}: {trainer.total_steps} steps, "
        f"{trainer.data.num_response_tokens:,} response tokens, draft vocabulary "
        f"covers {trainer.vocabulary.coverage:.1%}"
    )
    try:
        outcome = _watched(trainer, console)
    except KeyboardInterrupt:
        trainer.checkpoint()
        console.print(
            f"stopped after step {trainer.progress.step}; the same command goes on"
        )
        return 130
    except OSError as error:
        raise ValueError(
            f"{arguments.out} cannot be written: {error}. The checkpoint before is "
            "whole: make room, and the same command goes on"
        ) from None
    return _finish(outcome, arguments, console)


def prepare(
    arguments: argparse.Namespace, options: TrainOptions, console: Console
) -> Trainer:
    """Read target and data.

    Raises:
        ValueError: one of them cannot be used, or they do not belong together.
    """
    identity = identify_target(arguments.target)
    tokens = read_tokens(arguments.data)
    if tokens.target.hash != identity.hash:
        raise ValueError(
            f"the data in {arguments.data[0]} was written by {tokens.target.name} "
            f"({tokens.target.hash[:12]}), not by {identity.name} "
            f"({identity.hash[:12]}): make data with this target (vllm-dspark "
            "synthesize)"
        )
    folder = find_target(arguments.target)
    with console.status("loading the target"):
        target, special = load_target(folder, arguments.dtype, arguments.device)
    start = read_start(arguments.start_from) if arguments.start_from else None
    if start is not None:
        options = fitting_options(options, start)
    data = TrainingData(tokens, options)
    origin = {
        "target": {"name": identity.name, "hash": identity.hash},
        "data": {"samples": len(tokens), "tokens": len(tokens.tokens)},
        "start_from": start.weights_hash if start else None,
        "dtype": str(next(target.parameters()).dtype).removeprefix("torch."),
        "device": _device_name(target.device),
    }
    with console.status("running the target over the held-out texts"):
        return Trainer(target, special, data, options, arguments.out, origin, start)


def load_target(folder: Path, dtype: str, device: str) -> tuple[Any, list[int]]:
    """The Hugging Face target and the ids of its special tokens.

    Raises:
        ValueError: transformers cannot load it (with its own words), or there is no
            GPU and one was asked for.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    place = _device(device)
    kind = _dtype(dtype, place)
    try:
        target = AutoModelForCausalLM.from_pretrained(
            folder, dtype=kind, local_files_only=True, use_safetensors=True
        )
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise ValueError(f"the target in {folder} does not load: {error}") from None
    try:
        special = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        ids = list(special.all_special_ids) + list(special.added_tokens_decoder)
    except (OSError, ValueError, TypeError):
        ids = []  # a target without a tokenizer: the rarest token stands in
    return target.eval().requires_grad_(False).to(place), ids


def _device(name: str) -> torch.device:
    if name == "cpu" or (name == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise ValueError(
            f"--device is {name!r}, and torch {torch.__version__} sees no GPU here; "
            "leave it out to train on the CPU"
        )
    # One GPU a process under torchrun.
    place = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    torch.cuda.set_device(place)
    return place


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return device.type


def _dtype(name: str, device: torch.device) -> torch.dtype:
    if name != "auto":
        return torch.bfloat16 if name == "bfloat16" else torch.float32
    if device.type == "cuda":
        fast = torch.cuda.is_bf16_supported()
    else:
        fast = torch.cpu.get_capabilities().get("avx512_bf16", False)
    return torch.bfloat16 if fast else torch.float32


def _watched(trainer: Trainer, console: Console) -> Outcome:
    columns = (
        TextColumn("step {task.completed:.0f}/{task.total:.0f}"),
        BarColumn(),
        TextColumn("{task.fields[figures]}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as bar:
        task = bar.add_task(
            "train",
            total=trainer.total_steps,
            completed=trainer.progress.step,
            figures="",
        )
        head = "    step  minutes  blocks/s     τ   accepted by position     ECE"
        bar.console.print(head)

        def watch(report: Report) -> None:
            progress = report.progress
            if report.sums is not None:
                rows = max(report.sums.rows[0], 1)
                first = 1 - 0.5 * report.sums.distance[0] / rows
                speed = progress.blocks / max(progress.seconds, 1e-9)
                bar.update(
                    task,
                    completed=progress.step,
                    figures=f"p(accept 1) {first:.3f}  {speed:.0f} blocks/s",
                )
            if report.validation is not None:
                bar.console.print(table_row(report), markup=False, highlight=False)

        return trainer.run(watch)


def table_row(report: Report) -> str:
    """One validation as a line of the live table."""
    progress, result = report.progress, report.validation
    assert result is not None
    speed = progress.blocks / max(progress.seconds, 1e-9)
    accepted = " ".join(f"{a:.2f}" for a in result.acceptance)
    errors = " ".join("-" if math.isnan(e) else f"{e:.3f}" for e in result.ece)
    return (
        f"{progress.step:8d} {progress.seconds / 60:8.1f} {speed:9.0f} "
        f"{result.accepted_length:6.3f}   {accepted}   {errors}"
    )


def _finish(outcome: Outcome, arguments: argparse.Namespace, console: Console) -> int:
    progress = outcome.progress
    if arguments.json:
        result = {
            "reason": outcome.reason,
            "steps": progress.step,
            "blocks": progress.blocks,
            "seconds": progress.seconds,
            "tau": progress.best,
            "coverage": outcome.coverage,
            "drafter": str(arguments.out),
        }
        provenance.write_json(arguments.json, result)
    if outcome.reason == "diverged":
        kept = arguments.out / state.FOLDER
        console.print(
            f"the loss was not a number at step {progress.step + 1}; {kept} holds the "
            "last good checkpoint and the drafter is the best so far. Go on with a "
            "smaller --lr and --matrix-lr into another --out"
        )
        return 1
    console.print(
        f"{outcome.reason}: {progress.step} steps, {progress.seconds / 60:.1f} "
        f"minutes, best held-out τ {progress.best:.3f}; the drafter is {arguments.out}"
    )
    return 0
