"""What steps cost on this machine: from the user's file, the cache, or measured anew.

Measured when the engine starts, by a timer that runs steps of a wanted size through the
model as it will serve (`profiling`, `v2.profiling`), and kept in the cache.
"""

from __future__ import annotations

import logging
import time
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Protocol

import torch
from vllm.distributed.parallel_state import get_tp_group

from vllm_dspark import provenance
from vllm_dspark.cache import cache_root
from vllm_dspark.integration import compat
from vllm_dspark.integration.config import drafter_folder, options
from vllm_dspark.integration.device import device_name
from vllm_dspark.integration.report import CostReport
from vllm_dspark.model.checkpoint import weights_hash
from vllm_dspark.model.target import identify_target
from vllm_dspark.schedule import cost_file
from vllm_dspark.schedule.cost_file import CostFile, CostKey
from vllm_dspark.schedule.profile_points import Limits
from vllm_dspark.schedule.profiler import profile

logger = logging.getLogger("vllm_dspark")


class Timer(Protocol):
    """Runs steps of a wanted size and says how long they took, in seconds."""

    def running(self) -> AbstractContextManager[None]:
        """Around all calls below."""

    def time_step(self, batch_tokens: int, context_tokens: int) -> float:
        """A target step of B tokens that reads so much context."""

    def time_prompt(self, tokens: int) -> float:
        """A target step with so many tokens of one prompt."""

    def time_draft(self, num_reqs: int, positions: int) -> float:
        """Drafting for so many requests; 0 positions: context K/V alone."""


def limits_of(vllm_config: Any) -> Limits:
    """How far an engine's steps can go."""
    scheduler, spec = vllm_config.scheduler_config, vllm_config.speculative_config
    most = scheduler.max_num_seqs * (1 + spec.num_speculative_tokens)
    return Limits(
        batch_tokens=min(scheduler.max_num_batched_tokens, max(most, 2)),
        context_tokens=vllm_config.model_config.max_model_len * scheduler.max_num_seqs,
        requests=scheduler.max_num_seqs,
        positions=spec.num_speculative_tokens,
    )


def cost_of(config: Any, timer: Timer) -> CostReport | None:
    """The cost table of this engine: from the cache, or measured now and put there.

    The user's own file, if one is named, comes before both.

    Args:
        config: vLLM's.
        timer: of an engine that is ready to serve, with no request in it.

    Returns:
        None, with a warning, if it cannot be measured: then everything is verified.
    """
    root, limits = cache_root(), limits_of(config)
    named = options(config).cost_table
    try:
        if named is not None:
            return CostReport(cost_file.read(Path(named)), None)
        key = _key(config)
    except ValueError as error:
        logger.warning("DSpark: no step costs, everything is verified: %s", error)
        return None
    found, why = cost_file.load(root, key, limits)
    if _agreed(float(found is not None)):
        logger.info("DSpark: step costs from %s", cost_file.path_of(root, key))
        return None if found is None else CostReport(found, root)
    logger.info("DSpark: measuring what steps cost (%s)", why)
    try:
        with timer.running():
            measured = profile(
                lambda *size: _agreed(timer.time_step(*size)),
                lambda tokens: _agreed(timer.time_prompt(tokens)),
                lambda *size: _agreed(timer.time_draft(*size)),
                limits,
                clock=lambda: _agreed(time.perf_counter()),
            )
    except (RuntimeError, ValueError, AssertionError) as error:
        logger.warning("DSpark: step costs could not be measured: %s", error)
        return None
    logger.info("DSpark: step costs measured in %.1f s", measured.measured["seconds"])
    found = CostFile(key, measured.table, measured.measured, provenance.collect())
    kept = cost_file.save(root, found)
    return CostReport(found, None if kept is None else root)


def _agreed(value: float) -> float:
    """The first rank's value: all ranks must run the same steps, or wait for ever."""
    group = get_tp_group()
    if group.world_size == 1:
        return value
    shared = torch.tensor([value], dtype=torch.float64)
    torch.distributed.broadcast(shared, group.ranks[0], group=group.cpu_group)
    return float(shared)


def _key(config: Any) -> CostKey:
    spec, model = config.speculative_config, config.model_config
    version = compat.vllm_version()[1]
    if config.use_v2_model_runner:
        # Other code and other graphs: other times.
        graphs = config.compilation_config.cudagraph_mode.name
        version += f", V2 runner, graphs {graphs}"
    return CostKey(
        target=identify_target(model.model).hash,
        drafter=weights_hash(drafter_folder(spec)),
        dtype=str(model.dtype).removeprefix("torch."),
        device=device_name(),
        threads=torch.get_num_threads(),
        vllm_version=version,
        compiled=not model.enforce_eager,
        tensor_parallel=config.parallel_config.tensor_parallel_size,
    )
