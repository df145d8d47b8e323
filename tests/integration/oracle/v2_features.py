"""Scenes of `v2_control` that are the same for an engine without speculation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests.integration.engine import Engine
from tests.integration.oracle.v2_scenes import regime
from tests.integration.recorder import greedy, prompt
from tests.integration.test_adaptive import jagged

LORA = {"enable_lora": True, "max_loras": 2, "max_lora_rank": 8}
ADAPTERS = ("lora-a", "lora-b")
ROOM = 8  # K/V blocks of 32 tokens; the scene needs 12


def _trimming(eng: Engine) -> Any:
    """A fresh controller on jagged costs, where there is one."""
    if eng.llm.llm_engine.vllm_config.speculative_config is None:
        return None
    return regime(eng, jagged)


def _preemptions(eng: Engine) -> int:
    found = {m.name: m for m in eng.llm.get_metrics()}
    return int(found["vllm:num_preemptions"].value)  # type: ignore[attr-defined]


def pressed(eng: Engine) -> dict[str, Any]:
    """Logprobs of requests that have not room enough and are preempted."""
    from vllm import SamplingParams

    controller = _trimming(eng)
    params = SamplingParams(
        temperature=0, max_tokens=40, ignore_eos=True, detokenize=False, logprobs=2
    )
    pool = eng.scheduler.kv_cache_manager.block_pool
    held = pool.get_new_blocks(pool.get_num_free_blocks() - ROOM)
    before = _preemptions(eng)
    prompts = [prompt(n, seed=n) for n in (40, 33, 60, 20)]
    outputs = [o.outputs[0] for o in eng.generate(prompts, params)]
    pool.free_blocks(held)
    return {
        "tokens": [list(o.token_ids) for o in outputs],
        "logprobs": [
            [
                {token: found.logprob for token, found in row.items()}
                for row in o.logprobs
            ]
            for o in outputs
        ],
        "preemptions": _preemptions(eng) - before,
        "trimmed": controller and controller.totals.trimmed,
    }


def adapted(eng: Engine, folder: Path) -> dict[str, Any]:
    """Texts without an adapter and with two in one batch, the same prompt for three."""
    from vllm.lora.request import LoRARequest

    controller = _trimming(eng)
    a, b = (
        LoRARequest(name, i + 1, str(folder / name)) for i, name in enumerate(ADAPTERS)
    )
    rows = [{"prompt_token_ids": prompt(n)} for n in (40, 40, 40, 7)]
    outputs = eng.llm.generate(
        rows, greedy(16), use_tqdm=False, lora_request=[None, a, b, a]
    )
    return {
        "tokens": [list(o.outputs[0].token_ids) for o in outputs],
        "trimmed": controller and controller.totals.trimmed,
        "verified": controller and controller.totals.verified,
    }


def warm_up(eng: Engine) -> str:
    """vLLM's warm-up, which GPUs have; it takes our verification away for a while.

    Greedy: the interpreter lacks what its kernels of penalties use.

    Returns:
        The class of the verification that is there afterwards.
    """
    from unittest.mock import patch

    from vllm import SamplingParams
    from vllm.v1.worker.gpu.warmup import warmup_kernels

    worker = eng.worker
    params = SamplingParams(temperature=0, max_tokens=50)
    with patch.object(SamplingParams, "for_sampler_warmup", lambda: params):
        warmup_kernels(eng.runner, worker.execute_model, worker.sample_tokens)
    return type(eng.runner.adaptive_verification).__name__
