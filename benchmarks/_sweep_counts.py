"""What a server and its requests counted while a point was measured."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import _bench_common  # noqa: F401  (makes the package importable)
from _sweep_prompts import Prompt
from _sweep_requests import Counts

from vllm_dspark.cli.arms import speculation_between
from vllm_dspark.cli.server import Metrics

_MONOTONE = ("_total", "_sum", "_count", "_bucket")
_REQUEST_STEPS = "vllm:inter_token_latency_seconds_count"
_STEPS = "vllm:iteration_tokens_total_count"
_PREEMPTIONS = "vllm:num_preemptions_total"
# Tokens drafted, as the plugin counts them (where it does).
_DRAFTED = "vllm:dspark_drafted_tokens_total"


def request_id(prompt: Prompt, place: int) -> str:
    """In the server's log, in the plugin's trace, and of the request's own numbers."""
    return f"{prompt.dataset}-{place}"


def by_dataset(
    prompts: Sequence[Prompt],
    result: dict[str, Any],
    counts: Mapping[str, Counts] | None = None,
) -> dict[str, Any]:
    """What each dataset's requests had: time per output token, and their drafts.

    Args:
        counts: the plugin's numbers by request id, of those that have them.

    Returns:
        By dataset: ``requests``, ``median_tpot_ms`` and, where all were counted,
        ``steps`` (decoding steps of the requests), ``drafted``, ``verified`` and
        ``accepted`` drafts in them.
    """
    found: dict[str, Any] = {}
    columns = (result[key] for key in ("latencies", "ttfts", "output_lens"))
    for i, (prompt, latency, first, length) in enumerate(
        zip(prompts, *columns, strict=True)
    ):
        if length < 2:
            continue
        entry = found.setdefault(prompt.dataset, {"times": [], "counted": []})
        entry["times"].append(1000 * (latency - first) / (length - 1))
        if own := (counts or {}).get(request_id(prompt, i)):
            # A step emits its accepted drafts and one token more.
            entry["counted"].append({"steps": length - 1 - own["accepted"], **own})
    return {
        name: {
            "requests": len(entry["times"]),
            "median_tpot_ms": statistics.median(entry["times"]),
            **_summed(entry["counted"], len(entry["times"])),
        }
        for name, entry in sorted(found.items())
    }


def _summed(rows: Sequence[Counts], expected: int) -> Counts:
    """Sums of the requests' numbers; nothing where a request lacks them."""
    if len(rows) < expected:
        return {}
    keys = ("steps", "drafted", "verified", "accepted")
    return {key: sum(row[key] for row in rows) for key in keys}


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
