"""One point of the load sweep: vLLM's own benchmark client against one server.

The client is `vllm bench serve`'s coroutine, imported, because a process per point
would spend ten seconds of a busy machine on imports. What it measures keeps vLLM's
keys; what the server counted meanwhile is added under its own.
"""

from __future__ import annotations

import asyncio
import contextlib
import statistics
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import _bench_common  # noqa: F401  (makes the package importable)
from _sweep_prompts import Prompt

from vllm_dspark.cli.arms import speculation_between
from vllm_dspark.cli.server import Metrics, Server

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
_MONOTONE = ("_total", "_sum", "_count", "_bucket")
_REQUEST_STEPS = "vllm:inter_token_latency_seconds_count"
_STEPS = "vllm:iteration_tokens_total_count"
_PREEMPTIONS = "vllm:num_preemptions_total"
_GOLDEN = 0.6180339887  # its multiples fill [0, 1) evenly
# Tokens drafted, as the plugin counts them (where it does).
_DRAFTED = "vllm:dspark_drafted_tokens_total"


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
        target: model folder, also the name it is served under.
        ignore_eos: whether every answer has exactly the tokens asked for.
        log: file to which the client's own report is appended.
        spread: answers have from 1 - spread to 1 + spread of the tokens asked for.
    """

    def __init__(
        self, target: str, ignore_eos: bool, log: Path, spread: float = 0.0
    ) -> None:
        from vllm.tokenizers import get_tokenizer

        self.target, self.ignore_eos, self.log = target, ignore_eos, log
        self.spread = spread
        self.tokenizer = get_tokenizer(target)

    def point(
        self, server: Server, prompts: Sequence[Prompt], concurrency: int, tokens: int
    ) -> dict[str, Any]:
        """Keep ``concurrency`` requests going until all prompts are answered.

        Args:
            server: ready and idle.
            prompts: in the order they are sent.
            concurrency: clients that each send their next request at once.
            tokens: output tokens of a request.

        Returns:
            vLLM's result keys, and those of `counted` and `by_dataset`.

        Raises:
            ValueError: a request failed, or the server has ended.
        """
        before = server.metrics()
        with self.log.open("a") as log, contextlib.redirect_stdout(log):
            result = asyncio.run(
                self._benchmark(server.url, prompts, concurrency, tokens)
            )
        server.check_alive()
        if result["failed"]:
            first = next(error for error in result["errors"] if error)
            raise ValueError(
                f"{result['failed']} of {len(prompts)} requests failed; the first: "
                f"{first.strip().splitlines()[-1]}"
            )
        after = server.metrics()
        kept = {k: v for k, v in result.items() if k not in _DETAILS}
        kept["by_dataset"] = by_dataset(prompts, result)
        emitted = result["total_output_tokens"] - len(prompts)
        return {**kept, **counted(before, after, emitted)}

    async def _benchmark(
        self, url: str, prompts: Sequence[Prompt], concurrency: int, tokens: int
    ) -> dict[str, Any]:
        from vllm.benchmarks.datasets import SampleRequest
        from vllm.benchmarks.serve import TaskType, benchmark

        requests = [
            SampleRequest(
                prompt="",
                prompt_len=prompt.tokens,
                expected_output_len=answer_tokens(tokens, self.spread, i),
                chat_messages=prompt.messages,
                # In the server's log and in the plugin's trace.
                request_id=f"{prompt.dataset}-{i}",
            )
            for i, prompt in enumerate(prompts)
        ]
        result: dict[str, Any] = await benchmark(
            task_type=TaskType.GENERATION,
            endpoint_type="openai-chat",
            api_url=f"{url}/v1/chat/completions",
            base_url=url,
            model_id=self.target,
            model_name=self.target,
            tokenizer=self.tokenizer,
            input_requests=requests,
            logprobs=None,
            request_rate=float("inf"),
            burstiness=1.0,
            disable_tqdm=True,
            num_warmups=0,
            profile=False,
            selected_percentile_metrics=["ttft", "tpot", "itl", "e2el"],
            selected_percentiles=[50.0, 90.0, 99.0],
            ignore_eos=self.ignore_eos,
            goodput_config_dict={},
            max_concurrency=concurrency,
            lora_modules=None,
            extra_headers=None,
            extra_body={"temperature": 0.0},
            ready_check_timeout_sec=0,
        )
        return result


def by_dataset(prompts: Sequence[Prompt], result: dict[str, Any]) -> dict[str, Any]:
    """Median time per output token of each dataset's requests, in ms."""
    times: dict[str, list[float]] = defaultdict(list)
    columns = (result[key] for key in ("latencies", "ttfts", "output_lens"))
    for prompt, latency, first, length in zip(prompts, *columns, strict=True):
        if length > 1:
            times[prompt.dataset].append(1000 * (latency - first) / (length - 1))
    return {
        name: {"requests": len(found), "median_tpot_ms": statistics.median(found)}
        for name, found in sorted(times.items())
    }


def counted(before: Metrics, after: Metrics, emitted: int) -> dict[str, Any]:
    """What the server counted between two readings of ``/metrics``.

    A *request step* is one decoding step of one request, drafts or none: vLLM counts
    their latencies. So bypassed steps count into the means, unlike in vLLM's own
    acceptance length, which knows only steps with drafts.

    Args:
        emitted: tokens that were not the first of their answer.

    Returns:
        ``tau`` tokens per request step, ``verify_length`` and ``draft_length`` drafts
        verified and made per request step (None where nobody counts them), and every
        ``vllm:dspark_*`` counter's difference under ``dspark_metrics``.
    """

    def difference(name: str) -> float | None:
        values = [after[key] - before.get(key, 0) for key in after if key[0] == name]
        return sum(values) if values else None

    speculation = speculation_between(before, after)
    request_steps = difference(_REQUEST_STEPS)
    verified = speculation.draft_tokens if speculation else 0
    drafted = difference(_DRAFTED)

    def per_step(total: float | None) -> float | None:
        return total / request_steps if request_steps and total is not None else None

    return {
        "request_steps": request_steps,
        "engine_steps": difference(_STEPS),
        "preemptions": difference(_PREEMPTIONS),
        "tau": per_step(emitted),
        "verify_length": per_step(verified),
        "draft_length": per_step(drafted),
        "accepted_length_drafted": speculation.accepted_length if speculation else None,
        "dspark_metrics": {
            _label(key): after[key] - before.get(key, 0)
            for key in sorted(after)
            if key[0].startswith("vllm:dspark_") and key[0].endswith(_MONOTONE)
        },
    }


def _label(key: tuple[str, tuple[tuple[str, str], ...]]) -> str:
    """A sample's name with the labels that tell it from its sisters."""
    name, labels = key
    told = [f"{k}={v}" for k, v in labels if k not in ("engine", "model_name")]
    return f"{name}{{{','.join(told)}}}" if told else name
