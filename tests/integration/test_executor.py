"""Messages between engine and worker: one a step, two where a grammar comes between.

The drafts then travel with the output instead of being asked for; text, also of
structured output, must be that of vLLM without speculation.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.integration.subprocesses import run_python
from tests.tiny import make_tiny_drafter, make_tiny_tokenizer

_SERVE = """
import collections, json, sys

def main():
    from vllm import LLM, SamplingParams
    from vllm.sampling_params import StructuredOutputsParams

    target, drafter = sys.argv[1:3]
    spec = {"method": "dspark", "model": drafter}
    # All drafts are verified: what the policy finds worth it hangs on step times.
    ours = {"speculative_config": spec, "distributed_executor_backend": "mp",
            "additional_config": {"dspark": {"policy": "fixed"}}}
    rows = [{"prompt_token_ids": p} for p in ([5, 9, 17, 33], list(range(3, 60)))]
    kinds = {
        "plain": {},
        "grammar": {"structured_outputs": StructuredOutputsParams(regex="[a-f]{12}")},
    }
    result = {}
    for name, extra in (("ours", ours), ("alone", {})):
        llm = LLM(target, enforce_eager=True, dtype="float32", max_model_len=256,
                  max_num_seqs=8, kv_cache_memory_bytes=64 << 20,
                  disable_log_stats=False, **extra)
        executor = llm.llm_engine.engine_core.engine_core.model_executor
        result[name + " executor"] = type(executor).__name__
        asked = collections.Counter()
        if extra:
            send = executor.collective_rpc
            def counted(method, *args, **kwargs):
                asked[str(method)] += 1
                return send(method, *args, **kwargs)
            executor.collective_rpc = counted
        for kind, more in kinds.items():
            asked.clear()
            params = SamplingParams(temperature=0, max_tokens=24, **more)
            outputs = llm.generate(rows, params, use_tqdm=False)
            result[f"{name} {kind}"] = [list(o.outputs[0].token_ids) for o in outputs]
            result[f"{name} {kind} asked"] = dict(asked)
        if extra:
            result["accepted"] = next(
                m.value for m in llm.get_metrics()
                if m.name == "vllm:spec_decode_num_accepted_tokens")
        del llm
    print(json.dumps(result))

if __name__ == "__main__":
    main()
"""


@pytest.mark.slow
def test_drafts_travel_with_the_output(tmp_path: Path, tiny_target: Path) -> None:
    target = make_tiny_tokenizer(tiny_target)
    drafter = make_tiny_drafter(tmp_path / "drafter", target)
    script = tmp_path / "serve.py"
    script.write_text(_SERVE)  # the worker process imports it again: it needs a file
    result = run_python(
        "import runpy, sys; runpy.run_path(sys.argv[3], run_name='__main__')",
        target,
        drafter,
        script,
        VLLM_ENABLE_V1_MULTIPROCESSING="0",
    )
    assert result["ours executor"] == "DSparkMultiprocExecutor"
    assert result["alone executor"] == "UniProcExecutor"
    assert result["ours plain"] == result["alone plain"]
    assert result["ours grammar"] == result["alone grammar"]
    assert result["accepted"] > 0
    assert set(result["ours plain asked"]) == {"execute_model"}
    assert set(result["ours grammar asked"]) == {"execute_model", "sample_tokens"}
