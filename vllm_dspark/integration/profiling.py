"""Steps of a wanted size through the V1 runner, for the table of costs.

They run on made-up batches, with attention over made-up context. Nothing of it stays:
K/V goes to block 0, which vLLM hands to no request.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from vllm_dspark.integration.proposer import StepTokens

_EMITTED = 2  # context rows that a request's round adds, typically


class StepTimer:
    """Runs steps of a wanted size and says how long they took.

    Args:
        runner: ready to serve, with no request in it.
    """

    def __init__(self, runner: Any) -> None:
        self._runner = runner
        self._proposer = runner.drafter

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
        return self._time(batch_tokens, context_tokens, batch_tokens)

    def time_prompt(self, tokens: int) -> float:
        """Seconds of a step with so many tokens of a prompt, the last with logits."""
        return self._time(tokens, 0, 1)

    def _time(self, batch_tokens: int, context_tokens: int, with_logits: int) -> float:
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
        runner.model.compute_logits(hidden[:with_logits])
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
