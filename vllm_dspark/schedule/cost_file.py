"""The cost table's file in the user's cache: reading with every check, and writing.

One file per key, so that several models, machines and versions share a cache. A file
that cannot be trusted is never used: `load` says so once and the engine profiles anew;
a server does not die of a cache.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from vllm_dspark.calibration.json_file import read_object, write_object
from vllm_dspark.schedule.cost import CostTable
from vllm_dspark.schedule.profile_points import Limits

KIND = "dspark-cost"
SCHEMA = 1
FOLDER = "cost"  # under the cache's root
AXES = ("batch_tokens", "requests", "positions")  # of a table

logger = logging.getLogger("vllm_dspark")


@dataclass(frozen=True)
class CostKey:
    """What a measured time depends on; a table holds for one such key.

    Args:
        target: hash of the target (its config and weights' names will do).
        drafter: `model.checkpoint.weights_hash` of the drafter.
        dtype: such as ``bfloat16``.
        device: the machine's name for what computes: the CPU's model, the GPU's name.
        threads: CPU threads of a worker; 0 where they do not matter.
        vllm_version: its kernels decide.
        compiled: False with ``enforce_eager``.
        tensor_parallel: ranks.
    """

    target: str
    drafter: str
    dtype: str
    device: str
    threads: int
    vllm_version: str
    compiled: bool
    tensor_parallel: int

    @property
    def digest(self) -> str:
        """A short name for it, the same everywhere."""
        text = json.dumps(asdict(self), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


@dataclass(frozen=True)
class CostFile:
    """A file's content.

    Args:
        key: what it holds for.
        table: the table.
        measured: how it was measured, for people (`profiler.Profile.measured`).
        provenance: of `provenance.collect`.
    """

    key: CostKey
    table: CostTable
    measured: Mapping[str, Any]
    provenance: Mapping[str, Any]


def path_of(root: Path, key: CostKey) -> Path:
    """Where the table of a key lies under the cache's root."""
    return root / FOLDER / f"{key.digest}.json"


def load(
    root: Path, key: CostKey, limits: Limits | None = None
) -> tuple[CostFile | None, str]:
    """The cached file, or None and why there is none: profile then.

    A file that exists and cannot be used is reported with one warning; one that was
    measured for a smaller engine than ``limits`` is none.
    """
    path = path_of(root, key)
    if not os.path.lexists(path):
        return None, f"no cost table yet ({path})"
    try:
        found = read(path, key)
    except ValueError as error:
        logger.warning("dspark: the cost table is ignored, profiling anew: %s", error)
        return None, str(error)
    lacking = "" if limits is None else _lacking(found, limits)
    return (None if lacking else found), lacking


def reach(found: CostFile, name: str) -> int:
    """How far a table goes along one of `AXES`.

    What counts is how far its profiling meant to go: where time ran out before, it
    would run out again.
    """
    table = found.table
    axes = {
        "batch_tokens": table.tokens,
        "requests": table.requests,
        "positions": table.positions,
    }
    meant = found.measured.get(name)
    if isinstance(meant, list) and meant and isinstance(meant[0], int):
        return max(meant[0], axes[name][-1])
    return axes[name][-1]


def _lacking(found: CostFile, limits: Limits) -> str:
    """Why a table does not reach as far as an engine needs, or nothing."""
    for name in AXES:
        end, wanted = reach(found, name), getattr(limits, name)
        if end < wanted:
            return f"the cost table ends at {name} {end}, this engine's at {wanted}"
    return ""


def save(root: Path, content: CostFile) -> Path | None:
    """Put a table into the cache; None with one warning where that cannot be done."""
    path = path_of(root, content.key)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(path, content)
    except (OSError, ValueError) as error:
        logger.warning("dspark: the cost table is not kept, %s: %s", path, error)
        return None
    return path


def read(path: Path, key: CostKey | None = None) -> CostFile:
    """Read and check a cost table.

    Args:
        path: the file.
        key: what it is to be used for, if that is to be compared.

    Raises:
        ValueError: it cannot be read, is damaged, of another schema, or was measured
            for something else.
    """
    # Reading a pipe would wait for ever.
    if not os.path.isfile(path):
        raise ValueError(f"{path} is no file")
    raw = read_object(path, "cost table")
    if raw.get("kind") != KIND:
        raise ValueError(f"{path}: 'kind' is {raw.get('kind')!r:.60}, not {KIND!r}")
    if raw.get("schema") != SCHEMA:
        raise ValueError(
            f"{path}: 'schema' is {raw.get('schema')!r:.60}; this version reads "
            f"{SCHEMA}: profile again with it"
        )
    found = _key(raw.get("key"), path)
    for part in fields(CostKey) if key is not None else ():
        mine, theirs = getattr(key, part.name), getattr(found, part.name)
        if mine != theirs:
            raise ValueError(
                f"{path} was measured for {part.name} {theirs!r:.80}, but here it is "
                f"{mine!r:.80}: profile again"
            )
    notes = [_object(raw, name, path) for name in ("measured", "provenance")]
    return CostFile(found, _table(raw, path), *notes)


def _key(raw: Any, path: Path) -> CostKey:
    names = {part.name: part.type for part in fields(CostKey)}
    if not isinstance(raw, dict) or set(raw) != set(names):
        raise ValueError(f"{path}: 'key' must have {', '.join(names)}")
    for name, kind in names.items():
        if type(raw[name]).__name__ != kind:
            raise ValueError(f"{path}: key {name} is {raw[name]!r:.60}, not {kind}")
    return CostKey(**raw)


def _object(raw: Mapping[str, Any], name: str, path: Path) -> dict[str, Any]:
    found = raw.get(name)
    if not isinstance(found, dict):
        raise ValueError(f"{path}: {name!r} is {found!r:.60}; expected an object")
    return found


def _table(raw: Mapping[str, Any], path: Path) -> CostTable:
    step, draft = _object(raw, "step", path), _object(raw, "draft", path)
    axes = [step.get("tokens"), draft.get("requests"), draft.get("positions")]
    seconds, grid = step.get("seconds"), draft.get("seconds")
    for values in [*axes, seconds, grid, *(grid if isinstance(grid, list) else ())]:
        if not isinstance(values, list):
            raise ValueError(f"{path}: {values!r:.60} stands where a list belongs")
    tokens, requests, positions = (tuple(axis or ()) for axis in axes)
    slope: Any = step.get("seconds_per_context_token")
    share: Any = step.get("prompt_share", CostTable.prompt_share)  # older: not measured
    rows = tuple(tuple(row) for row in grid or ())
    try:
        return CostTable(
            tokens, tuple(seconds or ()), slope, requests, positions, rows, share
        )
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def write(path: Path, content: CostFile) -> None:
    """Write a cost table as a whole or not at all, and read it back.

    Raises:
        ValueError: it would not be readable.
        OSError: the folder cannot be written.
    """
    table = content.table
    raw = {
        "schema": SCHEMA,
        "kind": KIND,
        "key": asdict(content.key),
        "step": {
            "tokens": table.tokens,
            "seconds": table.step,
            "seconds_per_context_token": table.per_context_token,
            "prompt_share": table.prompt_share,
        },
        "draft": {
            "requests": table.requests,
            "positions": table.positions,
            "seconds": table.draft,
        },
        "measured": dict(content.measured),
        "provenance": dict(content.provenance),
    }
    write_object(path, raw, lambda file: read(file, content.key))
