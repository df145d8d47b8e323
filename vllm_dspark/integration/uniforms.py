"""Uniform numbers for drafting and verification, reproducible per request.

A seeded request gets its numbers from a counter: a hash of (seed, position, purpose).
They do not depend on the batch, on how its prefill was chunked, or on how many drafts
were tried before, and nothing has to be rewound when a sample is thrown away. (vLLM's
V1 runner rewinds a ``torch.Generator`` instead, which CPU generators refuse.)
Requests without a seed draw from torch's global generator, which vLLM seeds alike on
every tensor-parallel rank.
"""

from __future__ import annotations

import numpy as np
import torch

# Purposes: streams that must be independent of each other at one position.
DRAFT, ACCEPT, SAMPLE = 1, 2, 3

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MIX1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX2 = np.uint64(0x94D049BB133111EB)


def _mix(x: np.ndarray) -> np.ndarray:
    """The splitmix64 finaliser, a bijection on 64 bits."""
    with np.errstate(over="ignore"):
        x = (x ^ (x >> np.uint64(30))) * _MIX1
        x = (x ^ (x >> np.uint64(27))) * _MIX2
    return x ^ (x >> np.uint64(31))


def seeded(seeds: np.ndarray, positions: np.ndarray, purpose: int) -> np.ndarray:
    """Uniforms in [0, 1) with 53 bits.

    Shape: seeds, positions (broadcastable) int64 → the broadcast shape, float64.
    """
    seeds, positions = np.broadcast_arrays(seeds, positions)
    with np.errstate(over="ignore"):
        key = _mix(seeds.astype(np.uint64) + _GOLDEN)
        key = _mix(
            key ^ (positions.astype(np.uint64) * np.uint64(4) + np.uint64(purpose))
        )
    return (key >> np.uint64(11)).astype(np.float64) * (1.0 / (1 << 53))


def fill(
    uniforms: np.ndarray,
    seeds: list[int | None],
    rows: np.ndarray,
    positions: np.ndarray,
    purpose: int,
) -> None:
    """Overwrite the entries that belong to seeded requests, in place.

    Args:
        uniforms: [n] float64, already filled with unseeded numbers.
        seeds: per request, its seed or None.
        rows: [n] request of each entry.
        positions: [n] position of the token each number decides about.
    """
    seeded_requests = [r for r, seed in enumerate(seeds) if seed is not None]
    if not seeded_requests:
        return
    table = np.array([seed or 0 for seed in seeds], dtype=np.int64)
    mine = np.isin(rows, seeded_requests)
    uniforms[mine] = seeded(table[rows[mine]], positions[mine], purpose)


def unseeded(n: int) -> np.ndarray:
    """[n] float64 in [0, 1) from torch's global generator."""
    return torch.rand(n, dtype=torch.float64).numpy()
