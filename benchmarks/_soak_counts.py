"""Counts of a soaked server that must agree."""

from __future__ import annotations

import math
from typing import Any

import _bench_common  # noqa: F401  (makes the package importable)

from vllm_dspark.cli.server import Metrics, total
from vllm_dspark.metrics import PREFIX

SPEC = "vllm:spec_decode_num_"


def balance(before: Metrics, after: Metrics, width: int) -> list[dict[str, Any]]:
    """What must agree among the counts of an idle server, before and after the load.

    A request's first token comes with its prompt; every decoding step of it after that
    (vLLM counts their latencies) emits its accepted drafts and one token more. A
    request that ends in a step may not emit all of it: up to γ tokens are cut.

    Args:
        before, after: ``/metrics``, no request running.
        width: γ.

    Returns:
        Rows ``what``, ``left``, ``right`` and ``slack``: by how much left may be less.
    """

    def grown(name: str) -> float:
        return total(after, name) - total(before, name)

    def ours(name: str) -> float:
        return grown(f"{PREFIX}{name}")

    accepted, verified = ours("accepted_tokens_total"), ours("verified_tokens_total")
    ended = grown("vllm:request_success_total")
    steps = grown("vllm:inter_token_latency_seconds_count")
    first = grown("vllm:time_to_first_token_seconds_count")
    rows: list[tuple[str, float, float, float]] = [
        ("accepted = vLLM's", accepted, grown(SPEC + "accepted_tokens_total"), 0),
        (
            "accepted = sum over positions",
            accepted,
            grown(SPEC + "accepted_tokens_per_pos_total"),
            0,
        ),
        (
            "verified = vLLM's draft tokens",
            verified,
            grown(SPEC + "draft_tokens_total"),
            0,
        ),
        ("accepted <= verified", accepted, verified, math.inf),
        (
            "verified + trimmed <= drafted",
            verified + ours("trimmed_tokens_total"),
            ours("drafted_tokens_total"),
            math.inf,
        ),
        (
            "steps by reason <= steps",
            ours("steps_by_reason_total"),
            ours("steps_total"),
            math.inf,
        ),
        ("rounds <= decoding steps", ours("rounds_total"), steps, math.inf),
        (
            "emitted = first tokens + decoding steps + accepted",
            grown("vllm:generation_tokens_total"),
            first + steps + accepted,
            width * ended,
        ),
    ]
    return [
        {
            "what": what,
            "left": left,
            "right": right,
            "slack": slack if math.isfinite(slack) else None,
            "holds": right - slack <= left <= right,
        }
        for what, left, right, slack in rows
    ]
