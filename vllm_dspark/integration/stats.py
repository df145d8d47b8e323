"""How news of the controller reach ``/metrics``, and a request's numbers its answer.

The controller lives in the engine core's process, Prometheus in the API server's.
vLLM sends a ``SchedulerStats`` with each step's outputs, decoded by its declared
fields: so it (and ``RequestSpecDecodeMetrics``, sent with a request's last output) gets
one field more, `FIELD`, in every process that has a configuration of ours. It goes
wherever they go: engines in this process, in another, of several data-parallel ranks
(each with its number), and one message to one of several API servers, whose counts
Prometheus' multiprocess mode adds up. An end that lacks the field passes it over.

What else was looked at:

* vLLM's entry points for stat loggers: reach servers only (not ``LLM``), and turn the
  statistics of every server on, whatever its method and ``--disable-log-stats``; and
  what they are given has come through the same message.
* free dictionaries among the statistics (``kv_connector_stats``): belong to connectors;
  a front-end without our patches would die of it.
* a call into the engine core per scrape: a Prometheus collector cannot wait for it,
  and of several API servers each would count everything.
* a file shared between the processes: not across machines, and cleaning up to do.
"""

from __future__ import annotations

import dataclasses
import logging
from typing import Any

from vllm.v1.metrics.stats import RequestSpecDecodeMetrics, SchedulerStats

from vllm_dspark.metrics import METRICS, Kind, Metric, News, labels_of

logger = logging.getLogger("vllm_dspark")

FIELD = "dspark"
ASK = "dspark_stats"  # key of a request's extra arguments


@dataclasses.dataclass
class _Field:
    dspark: dict[str, Any] | None = None


def add_fields() -> None:
    """Give vLLM's statistics our field, once; called before messages are decoded."""
    for owner in (SchedulerStats, RequestSpecDecodeMetrics):
        if FIELD in owner.__dataclass_fields__:
            continue
        if "__msgspec_cache__" in vars(owner):
            # How to read it is fixed when an engine's first reader is made.
            logger.warning(
                "DSpark: an engine without DSpark ran in this process before, so "
                "%s of engines in other processes will lack what DSpark adds",
                owner.__name__,
            )
        owner.__annotations__[FIELD] = dict[str, Any] | None
        owner.__dataclass_fields__[FIELD] = _Field.__dataclass_fields__[FIELD]
        setattr(owner, FIELD, None)


def take_news(stats: SchedulerStats) -> News | None:
    """The news that came with an engine's statistics, if any did."""
    news: News | None = getattr(stats, FIELD, None)
    return news


class DSparkProm:
    """The Prometheus metrics of a front-end; counts stand at 0 from the start.

    Args:
        owner: vLLM's Prometheus logger, whose labels and classes of metrics are used.
    """

    def __init__(self, owner: Any) -> None:
        width = owner.vllm_config.speculative_config.num_speculative_tokens
        self._engines: dict[int, list[Any]] = owner.per_engine_labelvalues
        self._metrics = {m.name: (m, _made(m, owner, width)) for m in METRICS}
        for metric, made in self._metrics.values():
            if metric.kind is Kind.GAUGE:
                continue  # nothing is known yet
            values = [(v,) for v in labels_of(metric, width)] if metric.label else [()]
            for engine in self._engines.values():
                for value in values:
                    made.labels(*engine, *value)

    def observe(self, news: News, engine_idx: int) -> None:
        """Take in what an engine reported."""
        engine = self._engines[engine_idx]
        for name, value in news.items():
            metric, made = self._metrics[name]
            if metric.kind is Kind.HISTOGRAM:
                histogram = made.labels(*engine)
                for length, count in value.items():
                    for _ in range(count):
                        histogram.observe(length)
                continue
            for label, number in value.items() if metric.label else (("", value),):
                one = made.labels(*engine, *((label,) if metric.label else ()))
                if metric.kind is Kind.COUNTER:
                    one.inc(number)
                else:
                    one.set(number)


def _made(metric: Metric, owner: Any, width: int) -> Any:
    names = ["model_name", "engine", *([metric.label] if metric.label else [])]
    common = {
        "name": metric.exposed.removesuffix("_total"),
        "documentation": metric.text,
        "labelnames": names,
    }
    if metric.kind is Kind.COUNTER:
        return owner._counter_cls(**common)
    if metric.kind is Kind.GAUGE:
        return owner._gauge_cls(**common, multiprocess_mode="mostrecent")
    return owner._histogram_cls(**common, buckets=list(range(width + 1)))


# ---- one request's numbers ----


def count_if_asked(request: Any, num_spec_tokens: int) -> None:
    """Start counting for a request that has ``dspark_stats`` in its extra arguments.

    vLLM sends what is counted with the request's last output and puts it into the
    answer's ``metrics.speculative_decoding`` (or the completion's
    ``spec_decode_metrics``), as with ``--per-request-spec-decode-metrics summary``.
    """
    extra = getattr(request.sampling_params, "extra_args", None) or {}
    if extra.get(ASK) not in (True, "true"):
        return
    if request.spec_decode_metrics is None:
        new = RequestSpecDecodeMetrics.new(num_spec_tokens)
        request.spec_decode_metrics = new
    counts = {"rounds": 0, "drafted": 0, "verified": 0, "accepted": 0}
    setattr(request.spec_decode_metrics, FIELD, counts)


def count_round(request: Any, drafted: int, verified: int, accepted: int) -> None:
    """Count a round of a request that had drafts, if it asked for that."""
    counts = getattr(request.spec_decode_metrics, FIELD, None)
    if counts is not None and drafted:
        counts["rounds"] += 1
        counts["drafted"] += drafted
        counts["verified"] += verified
        counts["accepted"] += accepted


def with_counts(metrics: Any, told: dict[str, Any]) -> dict[str, Any]:
    """What an answer tells of its speculation, with our counts if they were asked."""
    counts = getattr(metrics, FIELD, None)
    if counts is None:
        return told
    mean = counts["verified"] / max(counts["rounds"], 1)
    return {**told, FIELD: {**counts, "mean_verify_length": mean}}
