"""What may wait of the drafter's context K/V in this engine, and who reads it."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import torch

from vllm_dspark.integration.context import ROWS_AT_ONCE, ContextWriter

# Features that may wait to become context K/V, in bytes of the host's memory.
KEPT_BYTES = 256 << 20


def context_writer(proposer: Any, runner: Any, num_blocks: int) -> ContextWriter:
    """The proposer's, which keeps what fits.

    Args:
        proposer: a `DSparkProposer` whose K/V cache is laid out.
        runner: whose requests it drafts for.
        num_blocks: of the K/V cache: no more rows can wait than it has slots.
    """
    config = proposer.vllm_config
    capacity = KEPT_BYTES // (proposer.drafter.feature_size * proposer.dtype.itemsize)
    capacity = min(capacity, num_blocks * proposer.block_size)
    if proposer.device.type != "cpu":
        capacity = ROWS_AT_ONCE  # vLLM has given out the device's memory
    if config.kv_transfer_config is not None:
        capacity = 0  # others read the K/V cache, whenever they like

    def held(slots: np.ndarray) -> np.ndarray:
        states = runner.requests.values()
        blocks = [state.block_ids[proposer.kv_cache_gid] for state in states]
        numbers = np.fromiter(itertools.chain(*blocks), dtype=np.int64)
        return np.isin(slots // proposer.block_size, numbers)

    return ContextWriter(
        lambda *rows: proposer.model.write_context(*rows),
        capacity,
        proposer.block_size,
        # A cached prefix may be read by requests that are not there yet.
        None if config.cache_config.enable_prefix_caching else held,
    )


def blocks_read(
    table: torch.Tensor, rows: np.ndarray, lengths: np.ndarray, block_size: int
) -> np.ndarray:
    """Blocks with the context of some requests, in any order.

    Shape: table [R, blocks]; rows [n] of it; lengths [n] tokens of their contexts.
    """
    numbers = table.cpu().numpy()[rows]
    used = -(-lengths // block_size)
    inside: np.ndarray = np.arange(numbers.shape[1]) < used[:, None]
    return numbers[inside]
