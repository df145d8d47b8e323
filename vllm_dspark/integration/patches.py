"""The functions of vLLM that the plugin replaces: few, idempotent, each with a reason.

Every wrapper calls vLLM's own function and returns its result unchanged unless the
speculative method is ``dspark``; all but one are about the V1 runner only.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import Any

logger = logging.getLogger("vllm_dspark")

_MARK = "__vllm_dspark_original__"


def wrap_once(owner: Any, name: str, make: Callable[[Any], Any]) -> bool:
    """Replace ``owner.name`` by ``make(original)``; False when that is done already.

    ``functools.wraps`` keeps name and docstring, so vLLM's logs and tracebacks read
    as before; the original stays reachable for tests and for :func:`uninstall`.
    """
    original = getattr(owner, name)
    if hasattr(original, _MARK):
        return False
    wrapper = functools.wraps(original)(make(original))
    setattr(wrapper, _MARK, original)
    setattr(owner, name, wrapper)
    return True


def unwrap(owner: Any, name: str) -> bool:
    """Undo :func:`wrap_once`; False when there is nothing to undo."""
    original = getattr(getattr(owner, name), _MARK, None)
    if original is None:
        return False
    setattr(owner, name, original)
    return True


def _allow_dspark_on_v1(original: Any) -> Any:
    """``VllmConfig._get_v1_model_runner_unsupported_features``.

    Symptom: "Model Runner V1 does not support: dspark speculative decoding".
    Cause: vLLM's DSpark exists for its V2 runner only. This is also the one place
    that vLLM reaches exactly when it has decided on the V1 runner, so the plugin
    validates and configures itself here, before an engine starts.
    Remove when: vLLM gives plugins a hook for speculative methods on V1.
    """

    def unsupported_features(self: Any) -> list[str]:
        unsupported: list[str] = original(self)
        spec = self.speculative_config
        if spec is None or spec.method != "dspark":
            return unsupported
        from vllm_dspark.integration import config

        config.activate(self)
        # Ours adapts without CUDA graphs, too.
        served = ("dspark speculative decoding", "adaptive draft verification")
        return [f for f in unsupported if f not in served]

    return unsupported_features


def _extend_dspark_on_v2(original: Any) -> Any:
    """``VllmConfig._validate_v2_model_runner``.

    Symptom: on the V2 runner only vLLM's own DSpark runs. Cause: its workers name
    their parts. This is the one place that vLLM reaches exactly when it has decided
    on the V2 runner. Remove when: vLLM has a registry for speculators.
    """

    def validate(self: Any) -> None:
        original(self)
        spec = self.speculative_config
        if spec is not None and spec.method == "dspark":
            from vllm_dspark.integration.v2 import config

            config.activate(self)

    return validate


def _allow_min_p_and_logit_bias(original: Any) -> Any:
    """``SamplingParams._validate_spec_decode``.

    Symptom: requests with min_p or logit_bias get an error with speculation on.
    Cause: vLLM's V1 rejection sampler ignores both. Ours applies them to every
    verified row, so nothing has to be refused but what is wrong about our own keys.
    Remove when: vLLM's V1 rejection sampler applies min_p and logit_bias.
    """

    def validate(self: Any, speculative_config: Any) -> None:
        from vllm_dspark.integration import config

        if speculative_config is not None and speculative_config.method == "dspark":
            config.check_request(self.extra_args)  # on either runner
        if not config.is_ours(speculative_config):
            original(self, speculative_config)

    return validate


def _read_drafter_first(original: Any) -> Any:
    """``SpeculativeConfig.__post_init__``.

    Symptom: a drafter with block size 0 is refused with "Expected
    num_speculative_tokens to be greater than zero", one with an odd rope type with a
    KeyError from transformers.
    Cause: vLLM parses the drafter's config.json, and takes the block size for the
    number of tokens, before anything of ours has seen it.
    Remove when: vLLM checks block_size itself.
    """

    def post_init(self: Any, *args: Any, **kwargs: Any) -> None:
        if self.method == "dspark":
            from vllm_dspark.integration import config

            config.check_drafter_config(self.model)
        original(self, *args, **kwargs)

    return post_init


def _register_metrics(original: Any) -> Any:
    """``PrometheusStatLogger.__init__``.

    Symptom: none; ``/metrics`` has no place for what an engine of ours reports.
    Cause: vLLM drops every metric named ``vllm:`` when it makes its own, so ours have
    to be made after; its stat logger plugins are made before (see ``stats``).
    Remove when: vLLM lets a scheduler class add metrics.
    """

    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        from vllm_dspark.integration import config, stats

        ours = config.has_controller(self.vllm_config)
        self.dspark_prom = stats.DSparkProm(self) if ours else None

    return init


def _record_news(original: Any) -> Any:
    """``PrometheusStatLogger.record``: what came with an engine's statistics, too.

    See ``_register_metrics``.
    """

    def record(
        self: Any,
        scheduler_stats: Any,
        iteration_stats: Any,
        mm_cache_stats: Any = None,
        engine_idx: int = 0,
    ) -> None:
        original(self, scheduler_stats, iteration_stats, mm_cache_stats, engine_idx)
        from vllm_dspark.integration import stats

        # None also for a logger that is older than the patch.
        prom = getattr(self, "dspark_prom", None)
        news = stats.take_news(scheduler_stats) if prom is not None else None
        if news is not None:
            prom.observe(news, engine_idx)

    return record


def _tell_counts(original: Any) -> Any:
    """``RequestSpecDecodeMetrics.to_dict``, from which an answer is made.

    Symptom: an answer lacks what a request asked for with ``dspark_stats``.
    Cause: vLLM names the fields one by one.
    Remove when: vLLM counts drafts before trimming.
    """

    def to_dict(self: Any) -> dict[str, Any]:
        from vllm_dspark.integration import stats

        return stats.with_counts(self, original(self))

    return to_dict


Patch = tuple[Any, str, Callable[[Any], Any]]


def _at_start() -> list[Patch]:
    from vllm.config import SpeculativeConfig, VllmConfig

    name = "_get_v1_model_runner_unsupported_features"
    return [
        (VllmConfig, name, _allow_dspark_on_v1),
        (VllmConfig, "_validate_v2_model_runner", _extend_dspark_on_v2),
        (SpeculativeConfig, "__post_init__", _read_drafter_first),
    ]


def _on_activation() -> list[Patch]:
    from vllm.sampling_params import SamplingParams
    from vllm.v1.metrics.loggers import PrometheusStatLogger
    from vllm.v1.metrics.stats import RequestSpecDecodeMetrics

    return [
        (SamplingParams, "_validate_spec_decode", _allow_min_p_and_logit_bias),
        (PrometheusStatLogger, "__init__", _register_metrics),
        (PrometheusStatLogger, "record", _record_news),
        (RequestSpecDecodeMetrics, "to_dict", _tell_counts),
    ]


def install() -> None:
    """Install the patches that notice a configuration with DSpark.

    Nothing is refused here: whether this vLLM is one the plugin supports is judged
    by ``compat.require`` when a configuration asks for it.
    """
    for owner, name, make in _at_start():
        if hasattr(owner, name):
            wrap_once(owner, name, make)
        else:
            logger.warning(
                "vllm-dspark stays inactive: this vLLM has no %s.%s "
                "(`vllm-dspark check` lists what is missing)",
                owner.__name__,
                name,
            )


def activate() -> None:
    """Install what only requests to our worker need.

    Not at start: it would import ``vllm.sampling_params`` (seconds) into processes
    that have no use for it.
    """
    from vllm_dspark.integration import stats

    stats.add_fields()
    for owner, name, make in _on_activation():
        wrap_once(owner, name, make)


def uninstall() -> None:
    """Put vLLM's own functions back (for tests)."""
    for owner, name, _ in [*_at_start(), *_on_activation()]:
        unwrap(owner, name)
