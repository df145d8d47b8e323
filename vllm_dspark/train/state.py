"""Checkpoints of a run: everything the next step depends on, bit for bit.

A run's folder holds the drafter itself (the best so far) and ``training/``::

    training/state.safetensors   weights, momenta, channel scale
    training/state.json          step, best, settings, a hash of the tensors' file
    training/train.jsonl         one line a step or validation

A checkpoint is written beside the old one and renamed; the JSON comes last and names
the tensors' file, so that a kill at any moment leaves one that is whole.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

FOLDER = "training"
STATE = "state.json"
SCHEMA = 1


@dataclass(frozen=True, slots=True)
class Progress:
    """Where a run is.

    Args:
        step: steps done.
        seconds: time they took, over all starts of the run.
        blocks: blocks trained on.
        best: highest validation τ so far.
        since_best: validations since then.
    """

    step: int = 0
    seconds: float = 0.0
    blocks: int = 0
    best: float = 0.0
    since_best: int = 0


def save(
    out: Path, progress: Progress, settings: dict[str, Any], tensors: dict[str, Tensor]
) -> None:
    """Write a checkpoint and remove the one before.

    Raises:
        OSError: no space, for example; the checkpoint before is still whole.
    """
    folder = out / FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    name = f"state-{progress.step:07d}.safetensors"
    temporary = folder / f"{name}.tmp"
    try:
        save_file(tensors, temporary)
        os.replace(temporary, folder / name)
    except SafetensorError as error:
        raise OSError(f"{folder / name} cannot be written: {error}") from None
    finally:
        temporary.unlink(missing_ok=True)
    note = {
        "schema": SCHEMA,
        "tensors": name,
        "progress": asdict(progress),
        "settings": settings,
    }
    written = folder / f"{STATE}.tmp"
    written.write_text(json.dumps(note, indent=1) + "\n")
    os.replace(written, folder / STATE)
    for old in folder.glob("state-*.safetensors"):
        if old.name != name:
            old.unlink()


def load(
    out: Path, settings: dict[str, Any]
) -> tuple[Progress, dict[str, Tensor]] | None:
    """The checkpoint a run goes on from, or None for a new run.

    Args:
        out: the drafter's folder.
        settings: of the command; they must be those of the run.

    Raises:
        ValueError: settings differ (names the first), or the checkpoint is unreadable.
    """
    file = out / FOLDER / STATE
    if not file.is_file():
        return None
    try:
        note = json.loads(file.read_text())
        if note["schema"] != SCHEMA:
            raise KeyError(f"schema {note['schema']}")
        progress = Progress(**note["progress"])
        before = dict(note["settings"])
        tensors = load_file(file.parent / note["tensors"])
    except (KeyError, TypeError, ValueError, OSError, SafetensorError) as error:
        raise ValueError(
            f"{file} is no checkpoint this version can go on from ({error}); remove "
            f"{file.parent} to start the run again"
        ) from None
    for name, value in json.loads(json.dumps(settings)).items():
        if before.get(name) != value:
            raise ValueError(
                f"{out} holds a run with {name} {before.get(name)!r}, and {value!r} is "
                "asked for now: use the same settings to go on, or another --out"
            )
    return progress, tensors
