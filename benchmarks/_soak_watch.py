"""What a soaked server shows of itself over time: memory, acceptance, calibration."""

from __future__ import annotations

import itertools
import math
import statistics
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import _bench_common  # noqa: F401  (makes the package importable)
import numpy as np
import psutil
from _soak_counts import SPEC
from _sweep_fleet import family

from vllm_dspark.calibration.plots import figure
from vllm_dspark.cli.server import Metrics, total
from vllm_dspark.metrics import PREFIX

# The part of the soak that counts as warming up: allocators and caches still grow.
WARM_UP = 1 / 3
ALL = "all"  # of the server's processes


@dataclass(frozen=True)
class Sample:
    """One look at the server.

    Args:
        seconds: since the load began.
        rss_mib: by the name of a process: vLLM's own (`VLLM::...`), else ``server``.
        requests: answered so far.
        accepted, rounds: totals, for τ between two samples.
        calibration_error: ECE over the controller's window, by position (NaN: no data).
    """

    seconds: float
    rss_mib: dict[str, float]
    requests: int
    accepted: float
    rounds: float
    calibration_error: list[float]

    def memory(self, name: str) -> float:
        """Of a process (0 where there was none), or of ``ALL``; MiB."""
        if name == ALL:
            return round(sum(self.rss_mib.values()), 1)
        return self.rss_mib.get(name, 0.0)


def rss_mib(pid: int) -> dict[str, float]:
    """Resident memory of a process and its descendants, by `Sample`'s names."""
    sizes: Counter[str] = Counter()
    for process in family(pid):
        try:
            title = (process.cmdline() or [""])[0]
            name = title if title.startswith("VLLM::") else "server"
            sizes[name] += process.memory_info().rss
        except psutil.NoSuchProcess:  # it ended just now
            continue
    return {name: round(size / 2**20, 1) for name, size in sizes.items()}


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
                rss_mib(self._pid),
                self._requests(),
                total(metrics, SPEC + "accepted_tokens_total"),
                total(metrics, SPEC + "drafts_total"),
                [round(errors[k], 4) for k in sorted(errors)],
            )
        )
        last = self.samples[-1]
        print(
            f"{last.seconds:6.0f} s  {last.requests} requests  "
            f"RSS {last.memory(ALL):.0f} MiB  "
            f"τ {1 + last.accepted / max(last.rounds, 1):.3f}",
            flush=True,
        )


def steadiness(samples: Sequence[Sample]) -> dict[str, Any]:
    """Whether memory, τ and calibration stay, by what they were after the warm-up.

    Returns:
        ``rss_mib``: of each process and of ``all``, see `_growth`; ``tau`` in the two
        halves of what comes after the warm-up; ``calibration_error``, the mean over
        samples and the first three positions, in both halves; None where nothing was
        drafted. Empty if there are fewer than six samples after the warm-up.
    """
    late = [s for s in samples if s.seconds >= WARM_UP * samples[-1].seconds]
    if len(late) < 6:
        return {}
    middle = len(late) // 2
    halves = late[: middle + 1], late[middle:]
    names = [*samples[-1].rss_mib, ALL]
    return {
        "rss_mib": {name: _growth(samples, late, name) for name in names},
        "tau": [_known(_tau(half), 3) for half in halves],
        "calibration_error": [_known(_error(half), 4) for half in halves],
    }


def _known(value: float, digits: int) -> float | None:
    """Rounded; None for NaN, which is no JSON."""
    return round(value, digits) if math.isfinite(value) else None


def _growth(
    samples: Sequence[Sample], late: Sequence[Sample], name: str
) -> dict[str, float]:
    """Memory at the first sample, after the warm-up and at the end, and its slope.

    The slope is in MiB an hour (least squares), with its standard error.
    """
    hours = np.array([s.seconds for s in late]) / 3600
    sizes = [s.memory(name) for s in late]
    (slope, _), covariance = np.polyfit(hours, sizes, 1, cov=True)
    return {
        "first": samples[0].memory(name),
        "after_warm_up": sizes[0],
        "last": sizes[-1],
        "slope_per_hour": round(float(slope), 1),
        "slope_standard_error": round(float(covariance[0, 0]) ** 0.5, 1),
    }


def _tau(samples: Sequence[Sample]) -> float:
    first, last = samples[0], samples[-1]
    rounds = last.rounds - first.rounds
    return 1 + (last.accepted - first.accepted) / rounds if rounds else math.nan


def _error(samples: Sequence[Sample]) -> float:
    known = [e for s in samples for e in s.calibration_error[:3] if math.isfinite(e)]
    return statistics.fmean(known) if known else math.nan


def plot(samples: Sequence[Sample], path: Path) -> None:
    """Memory, τ between samples and calibration error over the minutes."""
    drawing, axes = figure(3)
    minutes = [s.seconds / 60 for s in samples]
    taus = [_tau(pair) for pair in itertools.pairwise(samples)]
    lines = axes[0]
    for name in (*samples[-1].rss_mib, ALL):
        lines[0].plot(minutes, [s.memory(name) for s in samples], label=name)
    lines[0].set(ylabel="RSS, MiB", ylim=(0, None))
    lines[0].legend()
    lines[1].plot(minutes[1:], taus)
    lines[1].set(ylabel="τ between samples")
    for k in range(max((len(s.calibration_error[:3]) for s in samples), default=0)):
        known = [
            (s.seconds / 60, s.calibration_error[k])
            for s in samples
            if len(s.calibration_error) > k
        ]
        lines[2].plot(*zip(*known, strict=True), label=f"position {k + 1}")
        lines[2].legend()
    lines[2].set(ylabel="calibration error (window)", ylim=(0, None))
    for axis in lines:
        axis.set_xlabel("minutes")
    drawing.savefig(path, dpi=110)
