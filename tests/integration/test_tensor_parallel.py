"""Two tensor-parallel ranks on CPU: the drafter is sharded like the target.

Its own regime: separate engine and worker processes (the confidences are pickled),
sharded attention and MLP, a reduced LM head whose rows come from both ranks' shards
of the target's, and sampling that has to agree on both ranks without talking, on drafts
that are trimmed (by a threshold: how long steps take has no say in it). Greedy text
must equal one rank without speculation; sampled text must be served (ranks that
disagree stall or crash the engine).
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.integration.subprocesses import run_python

_SERVE = """
import json, sys

def main():
    from vllm import LLM, SamplingParams

    target, drafter = sys.argv[1:3]
    spec = {"method": "dspark", "model": drafter,
            "draft_sample_method": "probabilistic"}
    two = {"tensor_parallel_size": 2, "speculative_config": spec,
           "additional_config": {"dspark": {
               "policy": "threshold", "threshold": 0.5}}}
    prompts = [[5, 9, 17, 33, 2, 8], [7] * 3, list(range(3, 60)), [100, 50]]
    rows = [{"prompt_token_ids": p} for p in prompts]
    result = {}
    for name, extra in (("two", two), ("one", {})):
        llm = LLM(target, skip_tokenizer_init=True, enforce_eager=True,
                  dtype="float32", max_model_len=256, max_num_seqs=8,
                  kv_cache_memory_bytes=64 << 20, disable_log_stats=False, **extra)
        for kind, temperature in (("greedy", 0.0), ("sampled", 1.0)):
            params = SamplingParams(
                temperature=temperature, max_tokens=32, ignore_eos=True)
            outputs = llm.generate(rows, params, use_tqdm=False)
            tokens = [list(o.outputs[0].token_ids) for o in outputs]
            result[f"{name} {kind}"] = tokens
        if extra:
            found = {m.name: getattr(m, "value", None) for m in llm.get_metrics()}
            for name in ("trimmed", "verified", "accepted"):
                result[name] = found[f"vllm:dspark_{name}_tokens"]
        del llm
    print(json.dumps(result))

if __name__ == "__main__":
    main()
"""


@pytest.mark.slow
@pytest.mark.alone
@pytest.mark.parametrize("draft_vocab_size", [None, 64])
def test_two_ranks_serve_the_text_of_one_rank_without_speculation(
    tmp_path: Path, tiny_target: Path, draft_vocab_size: int | None
) -> None:
    from tests.tiny import make_tiny_drafter

    drafter = make_tiny_drafter(
        tmp_path / "drafter", tiny_target, draft_vocab_size=draft_vocab_size
    )
    script = tmp_path / "serve.py"
    script.write_text(_SERVE)  # worker processes import it again: it needs a file
    result = run_python(
        "import runpy, sys; runpy.run_path(sys.argv[3], run_name='__main__')",
        tiny_target,
        drafter,
        script,
        VLLM_ENABLE_V1_MULTIPROCESSING="1",
    )
    assert result["two greedy"] == result["one greedy"]
    assert result["trimmed"] > 0
    assert result["verified"] > result["accepted"] > 0
    assert [len(t) for t in result["two sampled"]] == [32] * 4
