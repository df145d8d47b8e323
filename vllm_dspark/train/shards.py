"""One shard of a token folder: samples as flat arrays, checked in both directions.

- ``tokens``        int32 ``[n]``  prompt and response of each sample, one after another
- ``prompt_len``    int32 ``[s]``
- ``response_len``  int32 ``[s]``
- ``temperature``   float32 ``[s]``  the response's; 0 is greedy
- ``source``        int32 ``[s]``  index into the manifest's ``sources``
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load_file

from vllm_dspark.train.manifest import MANIFEST, Manifest, Shard

Arrays = dict[str, NDArray[Any]]
_PER_SAMPLE = {
    "prompt_len": np.int32,
    "response_len": np.int32,
    "temperature": np.float32,
    "source": np.int32,
}


@dataclass(frozen=True, slots=True)
class Sample:
    """A prompt and what the target answered, as emitted (end token included)."""

    prompt: Sequence[int]
    response: Sequence[int]
    temperature: float
    source: int


def pack(samples: Sequence[Sample]) -> Arrays:
    """The tensors of a shard of these samples."""
    return {
        "tokens": np.array(
            [t for s in samples for t in (*s.prompt, *s.response)], np.int32
        ),
        "prompt_len": np.array([len(s.prompt) for s in samples], np.int32),
        "response_len": np.array([len(s.response) for s in samples], np.int32),
        "temperature": np.array([s.temperature for s in samples], np.float32),
        "source": np.array([s.source for s in samples], np.int32),
    }


def read_shard(folder: Path, shard: Shard, manifest: Manifest) -> Arrays:
    """Read a shard that a manifest lists, checked against it.

    Raises:
        ValueError: missing, truncated or corrupt, unlike the manifest, or values that
            cannot be; the file is named.
    """
    file = folder / shard.file
    try:
        arrays = load_file(file)
    except (SafetensorError, OSError) as error:
        raise ValueError(
            f"{file} is missing, truncated or corrupt ({error}); restore it, or make "
            "the data again"
        ) from error
    for name, dtype in {"tokens": np.int32, **_PER_SAMPLE}.items():
        found = arrays.get(name)
        if found is None or found.dtype != dtype or found.ndim != 1:
            raise ValueError(f"{file}: {name!r} is not a {np.dtype(dtype)} vector")
        if name in _PER_SAMPLE and len(found) != shard.samples:
            raise ValueError(
                f"{file}: {name!r} has {len(found)} entries; {MANIFEST} says "
                f"{shard.samples}"
            )
    for name, said in (
        ("prompt_len", shard.prompt_tokens),
        ("response_len", shard.response_tokens),
    ):
        if (total := int(arrays[name].sum(dtype=np.int64))) != said:
            raise ValueError(f"{file}: {name!r} adds up to {total}, not {said}")
    check_values(arrays, manifest, str(file))
    return {name: arrays[name] for name in ("tokens", *_PER_SAMPLE)}


def check_values(arrays: Arrays, manifest: Manifest, file: str) -> None:
    """Refuse lengths, tokens, temperatures or source numbers that cannot be.

    Raises:
        ValueError: naming the file and what is wrong.
    """
    tokens, temperature = arrays["tokens"], arrays["temperature"]
    lengths = arrays["prompt_len"].astype(np.int64) + arrays["response_len"]
    vocab_size, sources = manifest.target.vocab_size, len(manifest.sources)
    problem = ""
    if len(tokens) != lengths.sum():
        problem = f"{len(tokens)} tokens, but its lengths add up to {lengths.sum()}"
    elif (arrays["prompt_len"] < 1).any() or (arrays["response_len"] < 1).any():
        problem = "an empty prompt or response"
    elif len(tokens) and (tokens.min() < 0 or tokens.max() >= vocab_size):
        bad = tokens[(tokens < 0) | (tokens >= vocab_size)][0]
        problem = f"token {bad}, outside the target's vocabulary of {vocab_size}"
    elif not np.isfinite(temperature).all() or (temperature < 0).any():
        problem = "a temperature that is negative or not a number"
    elif ((arrays["source"] < 0) | (arrays["source"] >= sources)).any():
        problem = f"a source number outside the manifest's {sources}"
    if problem:
        raise ValueError(f"{file}: holds {problem}")
