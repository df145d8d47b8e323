"""Token folders: the text that a target wrote, as token ids, on disk and in memory.

A folder holds ``manifest.json`` (`train.manifest`) and safetensors (`train.shards`). A
shard is written first and then listed: killed between the two, a writer leaves a file
that nobody reads and that the next append replaces.
"""

from __future__ import annotations

import fcntl
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save

from vllm_dspark.model.target import TargetIdentity
from vllm_dspark.train.manifest import (
    MANIFEST,
    Manifest,
    Shard,
    read_manifest,
    refuse_differences,
    write_atomically,
    write_manifest,
)
from vllm_dspark.train.shards import Sample, check_values, pack, read_shard

__all__ = ["Sample", "TokenSet", "TokenWriter", "read_tokens"]

Ints = NDArray[np.int32]
_LOCK = ".lock"


@dataclass(frozen=True, slots=True)
class TokenSet:
    """Samples in memory.

    Args:
        target: whose text it is.
        sources: names that ``source`` numbers stand for.
        tokens: int32 ``[n]``, prompt and response of every sample, one after another.
        starts: int64 ``[s + 1]``, where each sample begins in ``tokens``, then n.
        prompt_len: int32 ``[s]``.
        response_len: int32 ``[s]``.
        temperature: float32 ``[s]``.
        source: int32 ``[s]``.
    """

    target: TargetIdentity
    sources: tuple[str, ...]
    tokens: Ints
    starts: NDArray[np.int64]
    prompt_len: Ints
    response_len: Ints
    temperature: NDArray[np.float32]
    source: Ints

    def __len__(self) -> int:
        return len(self.prompt_len)

    def sample(self, i: int) -> tuple[Ints, int]:
        """Tokens ``[prompt + response]`` of sample i (a view) and its prompt length."""
        if not 0 <= i < len(self):
            raise IndexError(f"sample {i} of {len(self)}")
        return self.tokens[self.starts[i] : self.starts[i + 1]], int(self.prompt_len[i])


class TokenWriter:
    """Appends shards to a token folder; a context manager, one at a time per folder.

    A new folder gets its manifest at once. An existing one is continued if target,
    sampling and sources are the same.

    Args:
        folder: created if missing.
        target: whose text it is.
        sampling: settings that decide which samples come out.
        sources: names for the samples' source numbers.
        provenance: recorded when the folder is begun.

    Raises:
        ValueError: the folder was made with something else (named), is being written
            by another process, holds foreign files, or cannot be written.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        target: TargetIdentity,
        sampling: Mapping[str, Any],
        sources: Sequence[str],
        provenance: Mapping[str, Any] | None = None,
    ) -> None:
        self.folder = Path(folder)
        _make_folder(self.folder)
        self._lock = (self.folder / _LOCK).open("wb")
        try:
            self.manifest = self._open(
                Manifest(
                    target,
                    dict(sampling),
                    tuple(sources),
                    provenance=dict(provenance or {}),
                )
            )
        except BaseException:
            self._lock.close()
            raise

    def _open(self, wanted: Manifest) -> Manifest:
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(
                f"another process is writing to {self.folder}; wait for it or stop it"
            ) from None
        if not (self.folder / MANIFEST).exists():
            write_manifest(self.folder, wanted)
            return wanted
        found = read_manifest(self.folder)
        for what in ("target", "sampling", "sources"):
            pair = [_entries(getattr(m, what)) for m in (wanted, found)]
            refuse_differences(pair[0], pair[1], self.folder, what)
        return found

    def append(
        self,
        samples: Sequence[Sample],
        *,
        items: tuple[int, int] | None = None,
        counts: Mapping[str, Any] | None = None,
    ) -> None:
        """Write a shard and list it; both or, seen from the manifest, neither.

        Args:
            samples: may be empty, to record that ``items`` gave nothing.
            items: numbers ``[first, last)`` of the work this shard completes.
            counts: replaces the manifest's counts.

        Raises:
            ValueError: a sample does not fit the target, or no room on the disk.
        """
        arrays = pack(samples)
        name = f"shard-{len(self.manifest.shards):05d}.safetensors"
        check_values(arrays, self.manifest, name)
        write_atomically(self.folder / name, lambda file: file.write(save(arrays)))
        prompt, response = (
            int(arrays[k].sum()) for k in ("prompt_len", "response_len")
        )
        shard = Shard(name, len(samples), prompt, response, items)
        listed = replace(
            self.manifest,
            shards=(*self.manifest.shards, shard),
            counts=dict(self.manifest.counts if counts is None else counts),
        )
        write_manifest(self.folder, listed)
        self.manifest = listed

    def close(self) -> None:
        """Let others write to the folder."""
        self._lock.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def read_tokens(folders: str | Path | Sequence[str | Path]) -> TokenSet:
    """Read all samples of one token folder or of several, checked.

    Raises:
        ValueError: no token folder, a manifest or shard that is missing, truncated or
            corrupt (named), folders of different targets, or no sample at all.
    """
    paths = [folders] if isinstance(folders, str | Path) else list(folders)
    if not paths:
        raise ValueError(
            "no token folder given; make one with `vllm-dspark synthesize`"
        )
    manifests = [read_manifest(Path(path)) for path in paths]
    target = manifests[0].target
    names = list(dict.fromkeys(name for m in manifests for name in m.sources))
    parts: list[dict[str, NDArray[Any]]] = []
    for path, manifest in zip(paths, manifests, strict=True):
        if manifest.target.hash != target.hash:
            raise ValueError(
                f"{path} holds text of {manifest.target.name} "
                f"({manifest.target.hash[:12]}), {paths[0]} of {target.name} "
                f"({target.hash[:12]}); a drafter learns from one target only"
            )
        number = np.array([names.index(name) for name in manifest.sources], np.int32)
        for shard in manifest.shards:
            arrays = read_shard(Path(path), shard, manifest)
            parts.append(arrays | {"source": number[arrays["source"]]})
    if not any(len(part["source"]) for part in parts):
        raise ValueError(f"no sample in {', '.join(map(str, paths))}")
    whole = {k: np.concatenate([p[k] for p in parts]) for k in parts[0]}
    lengths = whole["prompt_len"].astype(np.int64) + whole["response_len"]
    starts = np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths)])
    return TokenSet(target, tuple(names), starts=starts, **whole)


def _entries(value: Any) -> Mapping[str, Any]:
    if isinstance(value, TargetIdentity):
        # The same weights under another name are the same target.
        return {k: v for k, v in asdict(value).items() if k != "name"}
    return value if isinstance(value, Mapping) else {"names": value}


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        foreign = {p.name for p in folder.iterdir()} - {_LOCK}
    except OSError as error:
        raise ValueError(f"cannot use {folder}: {error.strerror}") from error
    ours = MANIFEST in foreign or all(n.endswith(".tmp") for n in foreign)
    if not ours:
        raise ValueError(
            f"{folder} is not empty and no token folder ({min(foreign)} is in it); "
            "give another one"
        )
    for leftover in folder.glob(".*.tmp"):  # of a writer that was killed
        leftover.unlink(missing_ok=True)
