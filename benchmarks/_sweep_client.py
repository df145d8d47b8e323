"""One point of the load sweep: vLLM's own benchmark client against one server.

The client is `vllm bench serve`'s coroutine, imported, because a process per point
would spend ten seconds of a busy machine on imports. What it measures keeps vLLM's
keys; what the server counted meanwhile is added under its own.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import _bench_common  # noqa: F401  (makes the package importable)
from _sweep_counts import by_dataset, counted, request_id
from _sweep_fleet import Endpoint
from _sweep_grid import Load
from _sweep_prompts import Prompt
from _sweep_requests import ASK, BACKEND, RequestCounts

# Per request, and with texts too large to keep for every point.
_DETAILS = (
    "input_lens",
    "output_lens",
    "ttfts",
    "itls",
    "latencies",
    "start_times",
    "queue_times",
    "generated_texts",
    "errors",
)
_GOLDEN = 0.6180339887  # its multiples fill [0, 1) evenly


def answer_tokens(tokens: int, spread: float, place: int) -> int:
    """Tokens of an answer: evenly spread over the range, in an order without pattern.

    Were all alike, the requests of an arm that emits one token a step would begin and
    end together, and their prompts share steps: no real traffic does that.
    """
    share = (place * _GOLDEN + 0.5) % 1.0
    return max(2, round(tokens * (1 + spread * (2 * share - 1))))


class Client:
    """Sends load with vLLM's benchmark client.

    Args:
        target: model folder, for its tokenizer.
        ignore_eos: whether every answer has exactly the tokens asked for.
        log: file to which the client's own report is appended.
        spread: answers have from 1 - spread to 1 + spread of the tokens asked for.
        goodput: milliseconds by "ttft", "tpot" or "e2el" that a good request keeps.
    """

    def __init__(
        self,
        target: str,
        ignore_eos: bool,
        log: Path,
        spread: float = 0.0,
        goodput: Mapping[str, float] | None = None,
    ) -> None:
        from vllm.tokenizers import get_tokenizer

        self.ignore_eos, self.log, self.spread = ignore_eos, log, spread
        self.goodput = dict(goodput or {})
        self.tokenizer = get_tokenizer(target)
        self._counts = RequestCounts()
        self._counts.register()

    def point(
        self,
        server: Endpoint,
        prompts: Sequence[Prompt],
        load: Load,
        tokens: int,
    ) -> dict[str, Any]:
        """Send all prompts as a load says and wait for their answers.

        Args:
            server: ready and idle.
            prompts: in the order they are sent.
            load: how many at a time, or how often.
            tokens: output tokens of a request.

        Returns:
            vLLM's result keys, and those of `counted` and `by_dataset`.

        Raises:
            ValueError: a request failed, or the server has ended.
        """
        before = server.metrics()
        # Only a DSpark server knows what is asked here.
        is_dspark = any(name.startswith("vllm:dspark_") for name, _ in before)
        body = {"temperature": 0.0, **(ASK if is_dspark else {})}
        requests = self._requests(prompts, tokens)
        with self.log.open("a") as log, contextlib.redirect_stdout(log):
            result = asyncio.run(self._benchmark(server, requests, load, body))
        counts = self._counts.take()
        server.check_alive()
        if result["failed"]:
            first = next(error for error in result["errors"] if error)
            raise ValueError(
                f"{result['failed']} of {len(prompts)} requests failed; the first: "
                f"{first.strip().splitlines()[-1]}"
            )
        after = server.metrics()
        kept = {k: v for k, v in result.items() if k not in _DETAILS}
        kept["by_dataset"] = by_dataset(prompts, result, counts)
        emitted = result["total_output_tokens"] - len(prompts)
        return {**kept, **counted(before, after, emitted)}

    def _requests(self, prompts: Sequence[Prompt], tokens: int) -> list[Any]:
        from vllm.benchmarks.datasets import SampleRequest

        return [
            SampleRequest(
                prompt="",
                prompt_len=prompt.tokens,
                expected_output_len=answer_tokens(tokens, self.spread, i),
                chat_messages=prompt.messages,
                request_id=request_id(prompt, i),
            )
            for i, prompt in enumerate(prompts)
        ]

    async def _benchmark(
        self,
        server: Endpoint,
        requests: list[Any],
        load: Load,
        body: dict[str, Any],
    ) -> dict[str, Any]:
        import numpy as np
        from vllm.benchmarks.serve import TaskType, benchmark

        # vLLM draws arrivals from here: the same for every arm.
        np.random.seed(load.seed)
        result: dict[str, Any] = await benchmark(
            task_type=TaskType.GENERATION,
            endpoint_type=BACKEND,
            api_url=f"{server.url}/v1/chat/completions",
            base_url=server.url,
            model_id=server.model,
            model_name=server.model,
            tokenizer=self.tokenizer,
            input_requests=requests,
            logprobs=None,
            request_rate=float("inf") if load.rate is None else load.rate,
            burstiness=load.burstiness,
            disable_tqdm=True,
            num_warmups=0,
            profile=False,
            selected_percentile_metrics=["ttft", "tpot", "itl", "e2el"],
            selected_percentiles=[50.0, 90.0, 99.0],
            ignore_eos=self.ignore_eos,
            goodput_config_dict=self.goodput,
            max_concurrency=load.clients,
            lora_modules=None,
            extra_headers=None,
            extra_body=body,
            ready_check_timeout_sec=0,
        )
        return result
