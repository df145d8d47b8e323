"""What a soaked server shows of itself: memory, acceptance, counts that must agree."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import _bench_common  # noqa: F401  (makes the package importable)
import numpy as np
import psutil
from _sweep_fleet import family

from vllm_dspark.calibration.plots import figure
from vllm_dspark.cli.server import Metrics, total
from vllm_dspark.metrics import PREFIX

SPEC = "vllm:spec_decode_num_"
# The part of the soak that counts as warming up: allocators and caches still grow.
WARM_UP = 1 / 3


@dataclass(frozen=True)
class Sample:
    """One look at the server.

    Args:
        seconds: since the load began.
        rss_mib: of the server and all of its processes.
        requests: answered so far.
        accepted, rounds: totals, for τ between two samples.
        calibration_error: ECE over the controller's window, by position (NaN: no data).
    """

    seconds: float
    rss_mib: float
    requests: int
    accepted: float
    rounds: float
    calibration_error: list[float]


def rss_mib(pid: int) -> float:
    """Resident memory of a process and its descendants."""
    size = 0
    for process in family(pid):
        try:
            size += process.memory_info().rss
        except psutil.NoSuchProcess:  # it ended just now
            continue
    return size / 2**20


class Watch:
    """Samples every so many seconds.

    Args:
        read: the server's ``/metrics``.
        pid: of the server.
        requests: answered so far.
        every: seconds.
    """

    def __init__(
        self,
        read: Callable[[], Metrics],
        pid: int,
        requests: Callable[[], int],
        every: float = 30.0,
    ) -> None:
        self._read, self._pid, self._requests = read, pid, requests
        self._every, self._next = every, 0.0
        self.samples: list[Sample] = []

    def __call__(self, seconds: float) -> None:
        """Take a sample if it is time."""
        if seconds < self._next:
            return
        self._next = seconds + self._every
        metrics = self._read()
        errors = {
            int(dict(labels)["position"]): value
            for (name, labels), value in metrics.items()
            if name == PREFIX + "calibration_error"
        }
        self.samples.append(
            Sample(
                round(seconds, 1),
                round(rss_mib(self._pid), 1),
                self._requests(),
                total(metrics, SPEC + "accepted_tokens_total"),
                total(metrics, SPEC + "drafts_total"),
                [round(errors[k], 4) for k in sorted(errors)],
            )
        )
        last = self.samples[-1]
        print(
            f"{last.seconds:6.0f} s  {last.requests} requests  RSS {last.rss_mib:.0f} "
            f"MiB  τ {1 + last.accepted / max(last.rounds, 1):.3f}",
            flush=True,
        )


def steadiness(samples: Sequence[Sample]) -> dict[str, Any]:
    """Whether memory, τ and calibration stay, by what they were after the warm-up.

    Returns:
        ``rss_mib``: at the first sample, after the warm-up and at the end, and
        ``slope_per_hour`` (MiB, least squares) with its standard error; ``tau`` in the
        two halves of what comes after the warm-up; ``calibration_error``, the mean over
        samples and the first three positions, in both halves. Empty if there are fewer
        than six samples after the warm-up.
    """
    late = [s for s in samples if s.seconds >= WARM_UP * samples[-1].seconds]
    if len(late) < 6:
        return {}
    hours = np.array([s.seconds for s in late]) / 3600
    rss = np.array([s.rss_mib for s in late])
    (slope, _), covariance = np.polyfit(hours, rss, 1, cov=True)
    middle = len(late) // 2
    halves = late[: middle + 1], late[middle:]
    return {
        "rss_mib": {
            "first": samples[0].rss_mib,
            "after_warm_up": late[0].rss_mib,
            "last": late[-1].rss_mib,
            "slope_per_hour": round(float(slope), 1),
            "slope_standard_error": round(float(covariance[0, 0]) ** 0.5, 1),
        },
        "tau": [round(_tau(half), 3) for half in halves],
        "calibration_error": [round(_error(half), 4) for half in halves],
    }


def _tau(samples: Sequence[Sample]) -> float:
    first, last = samples[0], samples[-1]
    rounds = last.rounds - first.rounds
    return 1 + (last.accepted - first.accepted) / rounds if rounds else math.nan


def _error(samples: Sequence[Sample]) -> float:
    known = [e for s in samples for e in s.calibration_error[:3] if math.isfinite(e)]
    return statistics.fmean(known) if known else math.nan


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


def plot(samples: Sequence[Sample], path: Path) -> None:
    """RSS, τ between samples and calibration error over the minutes."""
    drawing, axes = figure(3)
    minutes = [s.seconds / 60 for s in samples]
    taus = [_tau(pair) for pair in itertools.pairwise(samples)]
    lines = axes[0]
    lines[0].plot(minutes, [s.rss_mib for s in samples])
    lines[0].set(ylabel="RSS of all processes, MiB", ylim=(0, None))
    lines[1].plot(minutes[1:], taus)
    lines[1].set(ylabel="τ between samples")
    for k in range(3):
        known = [
            (s.seconds / 60, s.calibration_error[k])
            for s in samples
            if len(s.calibration_error) > k
        ]
        lines[2].plot(*zip(*known, strict=True), label=f"position {k + 1}")
    lines[2].set(ylabel="calibration error (window)", ylim=(0, None))
    lines[2].legend()
    for axis in lines:
        axis.set_xlabel("minutes")
    drawing.savefig(path, dpi=110)
