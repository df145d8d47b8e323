"""What steps cost on this machine: measured when the engine starts, kept in the cache.

Steps run on made-up batches of the size in question, with attention over made-up
context, through the model as it will serve. Nothing of it stays: K/V goes to block 0,
which vLLM hands to no request.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from vllm.distributed.parallel_state import get_tp_group

from vllm_dspark import provenance
from vllm_dspark.cache import cache_root
from vllm_dspark.integration import compat
from vllm_dspark.integration.config import drafter_folder, options
from vllm_dspark.integration.device import device_name
from vllm_dspark.integration.proposer import StepTokens
from vllm_dspark.integration.report import CostReport
from vllm_dspark.model.checkpoint import weights_hash
from vllm_dspark.model.target import identify_target
from vllm_dspark.schedule import cost_file
from vllm_dspark.schedule.cost_file import CostFile, CostKey
from vllm_dspark.schedule.profile_points import Limits
from vllm_dspark.schedule.profiler import profile

logger = logging.getLogger("vllm_dspark")

_EMITTED = 2  # context rows that a request's round adds, typically


def cost_of(runner: Any) -> CostReport | None:
    """The cost table of this engine: from the cache, or measured now and put there.

    The user's own file, if one is named, comes before both.

    None, with a warning, if it cannot be measured: then everything is verified.
    """
    config, root = runner.vllm_config, cache_root()
    named = options(config).cost_table
    try:
        if named is not None:
            return CostReport(cost_file.read(Path(named)), None)
        key = _key(config)
    except ValueError as error:
        logger.warning("DSpark: no step costs, everything is verified: %s", error)
        return None
    timer = StepTimer(runner)
    found, why = cost_file.load(root, key, timer.limits())
    if _agreed(float(found is not None)):
        logger.info("DSpark: step costs from %s", cost_file.path_of(root, key))
        return None if found is None else CostReport(found, root)
    logger.info("DSpark: measuring what steps cost (%s)", why)
    try:
        with timer.running():
            measured = profile(
                lambda *size: _agreed(timer.time_step(*size)),
                lambda *size: _agreed(timer.time_draft(*size)),
                timer.limits(),
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
    return CostKey(
        target=identify_target(model.model).hash,
        drafter=weights_hash(drafter_folder(spec)),
        dtype=str(model.dtype).removeprefix("torch."),
        device=device_name(),
        threads=torch.get_num_threads(),
        vllm_version=compat.vllm_version()[1],
        compiled=not model.enforce_eager,
        tensor_parallel=config.parallel_config.tensor_parallel_size,
    )


class StepTimer:
    """Runs steps of a wanted size and says how long they took.

    Args:
        runner: ready to serve, with no request in it.
    """

    def __init__(self, runner: Any) -> None:
        self._runner = runner
        self._proposer = runner.drafter

    def limits(self) -> Limits:
        """How far this engine's steps can go."""
        scheduler = self._runner.scheduler_config
        spec = self._runner.speculative_config
        most = scheduler.max_num_seqs * (1 + spec.num_speculative_tokens)
        return Limits(
            batch_tokens=min(self._runner.max_num_tokens, max(most, 2)),
            context_tokens=self._runner.max_model_len * scheduler.max_num_seqs,
            requests=scheduler.max_num_seqs,
            positions=spec.num_speculative_tokens,
        )

    @contextmanager
    def running(self) -> Iterator[None]:
        """vLLM's dummy steps without the drafter, which is timed apart."""
        proposer = self._proposer
        proposer.muted = True
        try:
            with torch.inference_mode():
                yield
        finally:
            proposer.muted = False

    def time_step(self, batch_tokens: int, context_tokens: int) -> float:
        """Seconds of a target step of B tokens that reads so much context."""
        runner = self._runner
        requests = min(batch_tokens, runner.scheduler_config.max_num_seqs)
        each = -(-batch_tokens // requests)
        length = min(each + context_tokens // requests, runner.max_model_len)
        start = time.perf_counter()
        hidden, _ = runner._dummy_run(
            batch_tokens,
            force_attention=True,
            profile_seq_lens=max(length, batch_tokens - each * (requests - 1)),
        )
        runner.model.compute_logits(hidden[:batch_tokens])
        self._wait()
        return time.perf_counter() - start

    def time_draft(self, num_reqs: int, positions: int) -> float:
        """Seconds of drafting for so many requests; 0 positions: context K/V alone."""
        proposer = self._proposer
        rows = num_reqs * _EMITTED
        device = self._runner.device
        at = torch.arange(_EMITTED, device=device).repeat(num_reqs)
        blocks = self._runner.input_batch.block_table[0].max_num_blocks_per_req
        attention = SimpleNamespace(
            slot_mapping=torch.full((rows,), -1, dtype=torch.int64, device=device),
            block_table_tensor=torch.zeros(
                (num_reqs, blocks), dtype=torch.int32, device=device
            ),
        )
        width = proposer.drafter.feature_size // len(proposer.drafter.target_layer_ids)
        feature = torch.zeros((rows, width), dtype=proposer.dtype, device=device)
        tokens = StepTokens(
            query_start=np.arange(num_reqs + 1) * _EMITTED,
            num_valid=np.full(num_reqs, _EMITTED),
            anchors=np.zeros(num_reqs, dtype=np.int64),
            drafting=np.ones(num_reqs, dtype=bool),
        )
        features = [feature] * len(proposer.drafter.target_layer_ids)
        start = time.perf_counter()
        proposer.step(tokens, features, at, attention, None, None, positions)
        self._wait()
        return time.perf_counter() - start

    def _wait(self) -> None:
        if self._runner.device.type == "cuda":
            torch.cuda.synchronize()
