"""The manifest of a token folder: what is in it, for which target, made how.

``manifest.json`` is the folder's one truth: a shard that it does not list does not
exist. Every change replaces the file at once, so a reader sees the old or the new one.
It knows nothing of tensors.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from vllm_dspark.model.target import TargetIdentity

MANIFEST = "manifest.json"
KIND = "dspark-tokens"
SCHEMA = 1
_SHARD_KEYS = ("samples", "prompt_tokens", "response_tokens")


@dataclass(frozen=True, slots=True)
class Shard:
    """One file of samples.

    Args:
        file: its name within the folder.
        samples: number of samples in it.
        prompt_tokens: of all its samples.
        response_tokens: likewise.
        items: numbers ``[first, last)`` of the work that the shard completes, dropped
            answers included; None if the writer does not count.
    """

    file: str
    samples: int
    prompt_tokens: int
    response_tokens: int
    items: tuple[int, int] | None = None


@dataclass(frozen=True, slots=True)
class Manifest:
    """Everything of ``manifest.json``.

    Args:
        target: whose text it is.
        sampling: settings that decide which samples come out; free in form.
        sources: names that samples' source numbers stand for.
        shards: in order.
        counts: what was done and dropped; free in form.
        provenance: of the run that began the folder.
    """

    target: TargetIdentity
    sampling: dict[str, Any]
    sources: tuple[str, ...]
    shards: tuple[Shard, ...] = ()
    counts: dict[str, Any] = field(default_factory=dict)
    provenance: dict[str, Any] = field(default_factory=dict)


def read_manifest(folder: Path) -> Manifest:
    """Read and check a token folder's manifest.

    Raises:
        ValueError: no manifest, not JSON, of another kind or schema, or an entry is
            missing or malformed; the file and the entry are named.
    """
    file = folder / MANIFEST
    try:
        raw = json.loads(file.read_bytes())
    except FileNotFoundError:
        raise ValueError(
            f"{folder} is no token folder: it has no {MANIFEST}; make one with "
            "`vllm-dspark synthesize`"
        ) from None
    except (ValueError, OSError) as error:
        raise ValueError(f"{file} is not readable JSON: {error}") from error
    if not isinstance(raw, dict) or raw.get("kind") != KIND:
        raise ValueError(f"{file} is no manifest of token shards (kind {KIND!r})")
    if raw.get("schema") != SCHEMA:
        raise ValueError(
            f"{file}: schema {raw.get('schema')!r}; this version reads {SCHEMA}"
        )
    return _parse(raw, file)


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Replace a folder's manifest at once."""
    raw = {"schema": SCHEMA, "kind": KIND, **asdict(manifest)}
    for shard in raw["shards"]:
        if shard["items"] is None:
            del shard["items"]
    text = json.dumps(raw, indent=1) + "\n"
    write_atomically(folder / MANIFEST, lambda file: file.write(text.encode()))


def write_atomically(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Write a file so that, whenever this is killed, it is all there or unchanged.

    Raises:
        ValueError: the file system has no room or refuses; nothing is left behind.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with temporary.open("wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise ValueError(
            f"cannot write {path}: {error.strerror or error}; what is listed in "
            f"{MANIFEST} is safe: make room and run the same command again"
        ) from error


def refuse_differences(
    wanted: Mapping[str, Any], found: Mapping[str, Any], folder: Path, what: str
) -> None:
    """Raise a ValueError that names the first entry in which two mappings differ.

    Args:
        wanted: what this run was told.
        found: what the folder was made with.
        folder: named in the message.
        what: the entries' common name, such as ``sampling``.
    """
    # Through JSON: tuples and lists are the same once they are on disk.
    left, right = (json.loads(json.dumps(dict(m))) for m in (wanted, found))
    for key in [*left, *(k for k in right if k not in left)]:
        if left.get(key) != right.get(key):
            raise ValueError(
                f"{folder} was made with {what} {key} = {right.get(key)!r}, this run "
                f"has {left.get(key)!r}; use the former, or another folder"
            )


def _parse(raw: Mapping[str, Any], file: Path) -> Manifest:
    def take(where: Mapping[str, Any], key: str, kind: type, name: str) -> Any:
        value = where.get(key)
        if not isinstance(value, kind) or isinstance(value, bool):
            raise ValueError(
                f"{file}: {name} is {value!r}; expected {kind.__name__}. The file was "
                "changed or cut by something else: restore it, or make the data again"
            )
        return value

    def take_shard(entry: Any, name: str) -> Shard:
        whole = take({"": entry}, "", dict, name)
        shard = take(whole, "file", str, f"{name}.file")
        if Path(shard).name != shard:  # a manifest must not lead out of its folder
            raise ValueError(f"{file}: {name}.file is {shard!r}; expected a plain name")
        samples, prompt, response = (
            take(whole, key, int, f"{name}.{key}") for key in _SHARD_KEYS
        )
        items = whole.get("items")
        if items is not None:
            pair = take({"": items}, "", list, f"{name}.items")
            first, last = [*pair, None, None][:2]
            items = (
                take({"": first}, "", int, f"{name}.items[0]"),
                take({"": last}, "", int, f"{name}.items[1]"),
            )
        return Shard(shard, samples, prompt, response, items)

    target = take(raw, "target", dict, "target")
    identity = TargetIdentity(
        take(target, "name", str, "target.name"),
        take(target, "hash", str, "target.hash"),
        take(target, "vocab_size", int, "target.vocab_size"),
    )
    shards = take(raw, "shards", list, "shards")
    sources = take(raw, "sources", list, "sources")
    return Manifest(
        target=identity,
        sampling=take(raw, "sampling", dict, "sampling"),
        sources=tuple(take({"": s}, "", str, "sources") for s in sources),
        shards=tuple(take_shard(s, f"shards[{i}]") for i, s in enumerate(shards)),
        counts=take(raw, "counts", dict, "counts"),
        provenance=take(raw, "provenance", dict, "provenance"),
    )
