"""Puts our parts in place of vLLM's, in the worker's process.

Symptom without it: only vLLM's own DSpark runs. Cause: the V2 runner builds its parts
by functions of fixed content. Remove when: vLLM has a registry for speculators.
"""

from __future__ import annotations

from typing import Any

from vllm_dspark.integration.patches import wrap_once


def install() -> None:
    """Replace what the V2 runner builds for method ``dspark`` (once)."""
    import vllm.v1.worker.gpu.model_runner as model_runner

    wrap_once(model_runner, "init_speculator", _our_speculator)
    wrap_once(
        model_runner, "maybe_create_adaptive_verification_manager", _our_verification
    )


def _our_speculator(original: Any) -> Any:
    def init_speculator(vllm_config: Any, device: Any, req_states: Any) -> Any:
        spec = vllm_config.speculative_config
        if spec is None or spec.method != "dspark":
            return original(vllm_config, device, req_states)
        from vllm_dspark.integration.v2.speculator import DSparkV2Speculator

        return DSparkV2Speculator(vllm_config, device)

    return init_speculator


def _our_verification(original: Any) -> Any:
    def create(**keys: Any) -> Any:
        theirs = original(**keys)  # vLLM's checks of backends come with it
        from vllm_dspark.integration.v2.trims import Trims, trims_of

        if theirs is None or trims_of(keys["vllm_config"]) is not Trims.DEVICE:
            return theirs
        from vllm_dspark.integration.v2.verification import DSparkV2Verification

        return DSparkV2Verification(
            keys["req_states"],
            keys["query_start_loc"],
            keys["num_bonus_tokens"],
            max_total_logits=keys["max_total_logits"],
        )

    return create
