"""Puts our speculator in place of vLLM's, in the worker's process.

Symptom without it: only vLLM's own DSpark runs. Cause: the V2 runner builds it by a
function of fixed content. Remove when: vLLM has a registry for speculators.
"""

from __future__ import annotations

from typing import Any

from vllm_dspark.integration.patches import wrap_once


def install() -> None:
    """Replace what the V2 runner builds for method ``dspark`` (once)."""
    import vllm.v1.worker.gpu.model_runner as model_runner

    wrap_once(model_runner, "init_speculator", _our_speculator)


def _our_speculator(original: Any) -> Any:
    def init_speculator(vllm_config: Any, device: Any, req_states: Any) -> Any:
        spec = vllm_config.speculative_config
        if spec is None or spec.method != "dspark":
            return original(vllm_config, device, req_states)
        from vllm_dspark.integration.v2.speculator import DSparkV2Speculator

        return DSparkV2Speculator(vllm_config, device)

    return init_speculator
