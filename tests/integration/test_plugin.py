"""The plugin itself: found, cheap, installed once, and inert where it is not asked for.

* the entry point exists and registering twice changes nothing more;
* registering takes under 50 ms (the specification's bound, not a benchmark: the best of
  several, in a fresh process) and imports nothing but the plugin;
* without speculation, and with another method, vLLM's configuration, outputs and log
  lines are those of a process without the plugin;
* where vLLM uses its V2 runner, its own DSpark runs in a worker of ours.
"""

from __future__ import annotations

import json
import re
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import pytest

from tests.integration.subprocesses import run_python, run_python_with_output


def test_entry_point() -> None:
    found = entry_points(group="vllm.general_plugins", name="dspark")
    assert [e.value for e in found] == ["vllm_dspark.plugin:register"]
    assert callable(next(iter(found)).load())


def test_registering_twice_patches_once() -> None:
    from vllm_dspark.integration import patches
    from vllm_dspark.plugin import register

    patches.uninstall()
    targets = [*patches._at_start(), *patches._on_activation()]

    def functions() -> list[Any]:
        return [getattr(owner, name) for owner, name, _ in targets]

    originals = functions()
    register()
    patches.activate()
    once = functions()
    register()
    patches.activate()
    assert all(a is b for a, b in zip(once, functions(), strict=True))
    for original, wrapper in zip(originals, once, strict=True):
        assert wrapper is not original
        assert wrapper.__name__ == original.__name__
        assert not hasattr(original, patches._MARK)
    patches.uninstall()
    assert functions() == originals
    register()


REGISTER = """
import json, sys, time
import vllm.config

before, seconds, imported = set(sys.modules), [], []
for _ in range(5):
    for name in [m for m in sys.modules if m.split(".")[0] == "vllm_dspark"]:
        del sys.modules[name]
    start = time.perf_counter()
    from vllm_dspark.plugin import register
    register()
    seconds.append(time.perf_counter() - start)
    imported = imported or sorted(set(sys.modules) - before)
    from vllm_dspark.integration import patches
    patches.uninstall()
print(json.dumps({"seconds": seconds, "imported": imported}))
"""


def test_registering_is_cheap() -> None:
    result = run_python(REGISTER, start="fresh")
    assert min(result["seconds"]) < 0.050
    foreign = [m for m in result["imported"] if m.split(".")[0] != "vllm_dspark"]
    assert foreign == []


# One process runs both engines; everything that could differ goes to the last line.
INERT = """
import json, re, sys
from vllm import LLM, SamplingParams

result = {}
llm = LLM(
    model=sys.argv[1], runner="pooling", enforce_eager=True, dtype="float32",
    max_model_len=256, max_num_seqs=4, kv_cache_memory_bytes=64 << 20, seed=0,
)
outputs = llm.embed([{"prompt_token_ids": [5, 9, 17]}, "tea at ten"], use_tqdm=False)
worker = llm.llm_engine.engine_core.engine_core.model_executor.driver_worker
result["pooling"] = {
    "embeddings": [output.outputs.embedding for output in outputs],
    "runner": type(worker.worker.model_runner).__name__,
    "refusal": "",
}
llm.llm_engine.engine_core.shutdown()
del llm, worker
# Last: vLLM starts no engine in a process that has loaded numba for it.
ngram = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 2}
for name, spec in (("none", None), ("ngram", ngram)):
    llm = LLM(
        model=sys.argv[1], skip_tokenizer_init=True, enforce_eager=True,
        dtype="float32", max_model_len=256, max_num_seqs=4, speculative_config=spec,
        kv_cache_memory_bytes=64 << 20, disable_log_stats=False, seed=0,
    )
    params = [
        SamplingParams(temperature=0.0, max_tokens=24, ignore_eos=True),
        # vLLM's sampled speculation reads garbage (test_vllm_expand_bug).
        SamplingParams(temperature=0.0 if spec else 0.9, max_tokens=24, seed=5),
    ]
    prompts = [{"prompt_token_ids": [5, 9, 5, 9, 5, 9]}] * 2
    outputs = llm.generate(prompts, params, use_tqdm=False)
    config = llm.llm_engine.vllm_config
    worker = llm.llm_engine.engine_core.engine_core.model_executor.driver_worker
    refusal = ""
    try:
        min_p = SamplingParams(min_p=0.5, max_tokens=2)
        llm.generate(prompts[:1], min_p, use_tqdm=False)
    except Exception as error:
        refusal = str(error)
    result[name] = {
        "texts": [list(o.outputs[0].token_ids) for o in outputs],
        "config": re.sub(r"0x[0-9a-f]+|instance_id='[^']*'", "#", str(config)),
        "worker_cls": config.parallel_config.worker_cls,
        "scheduler_cls": str(config.scheduler_config.scheduler_cls),
        "scheduler": type(llm.llm_engine.engine_core.engine_core.scheduler).__name__,
        "runner": type(worker.worker.model_runner).__name__,
        "sampler": type(worker.worker.model_runner.rejection_sampler).__module__
        if spec else "",
        "refusal": refusal,
    }
    llm.llm_engine.engine_core.shutdown()
    del llm, worker
result["loaded"] = "vllm_dspark.integration.patches" in sys.modules
result["heavy"] = "vllm_dspark.integration.runner" in sys.modules
print(json.dumps(result))
"""


@pytest.fixture(scope="module")
def without_and_with(text_pair: tuple[Path, Path]) -> tuple[dict, dict]:
    """What a process without the plugin reports, and one with it."""
    results = []
    for plugins in ("", None):
        result, output = run_python_with_output(
            INERT, text_pair[0], VLLM_PLUGINS=plugins
        )
        results.append({**result, "log": log_lines(output)})
    return results[0], results[1]


_VARYING = re.compile(r"vllm_dist_\S+|0x[0-9a-f]+|[0-9.]+")


def log_lines(output: str) -> list[str]:
    """vLLM's log lines without times, sizes and temporary names."""
    found = re.findall(r"(INFO|WARNING|ERROR) \S+ \S+ (\[.*)", output)
    return [f"{level} {_VARYING.sub('#', text)}" for level, text in found]


@pytest.mark.slow
@pytest.mark.parametrize("method", ["none", "ngram", "pooling"])
def test_inert(method: str, without_and_with: tuple[dict, dict]) -> None:
    without, with_plugin = without_and_with
    assert with_plugin["loaded"] and not without["loaded"]
    assert not with_plugin["heavy"]
    assert with_plugin[method] == without[method]
    # ngram still refuses what vLLM refuses.
    assert ("min_p" in without[method]["refusal"]) == (method == "ngram")


@pytest.mark.slow
def test_log_lines_are_the_same(without_and_with: tuple[dict, dict]) -> None:
    without, with_plugin = without_and_with
    assert with_plugin["log"] == without["log"]
    assert len(without["log"]) > 10


# CPU wheels have no Triton; its interpreter keeps vLLM from refusing V2 for them.
V2 = """
import json, os, sys

if os.environ["VLLM_USE_V2_MODEL_RUNNER"] == "1":
    from tests.integration.oracle import v2_patches

    v2_patches.install()
from vllm.engine.arg_utils import EngineArgs

spec = {"method": "dspark", "model": sys.argv[2], "num_speculative_tokens": 4}
try:
    config = EngineArgs(
        model=sys.argv[1], skip_tokenizer_init=True, enforce_eager=True,
        dtype="float32", max_model_len=256, speculative_config=spec,
    ).create_engine_config()
except Exception as error:
    print(json.dumps({"error": f"{type(error).__name__}: {error}"}))
else:
    print(json.dumps({
        "worker_cls": config.parallel_config.worker_cls,
        "scheduler_cls": str(config.scheduler_config.scheduler_cls),
        "v2": config.use_v2_model_runner,
    }))
"""


@pytest.mark.slow
def test_the_v2_runner_is_extended(tiny_target: Path, tiny_drafter: Path) -> None:
    """Worker and scheduler are ours, everything else of the configuration vLLM's."""
    pytest.importorskip("triton", reason="vLLM's V2 runner is interpreted with Triton")
    arguments = (V2, tiny_target, tiny_drafter)
    v2 = {"start": "v2", "VLLM_USE_V2_MODEL_RUNNER": "1"}
    theirs = run_python(*arguments, VLLM_PLUGINS="", **v2)
    extended = run_python(*arguments, VLLM_PLUGINS=None, **v2)
    assert theirs["v2"] is True
    assert theirs["worker_cls"] == "vllm.v1.worker.cpu_worker.CPUWorker"
    ours = {
        "worker_cls": "vllm_dspark.integration.v2.cpu_worker.DSparkV2CPUWorker",
        "scheduler_cls": (
            "vllm_dspark.integration.v2.scheduler.DSparkV2TrimmingScheduler"
        ),
    }
    assert extended == {**theirs, **ours}
    on_v1 = run_python(*arguments, VLLM_PLUGINS=None, VLLM_USE_V2_MODEL_RUNNER="0")
    assert on_v1["v2"] is False
    assert on_v1["worker_cls"].startswith("vllm_dspark.")
    assert on_v1["scheduler_cls"].startswith("vllm_dspark.")


VLLM = "import sys; from vllm.entrypoints.cli.main import main; main()"


@pytest.mark.slow
def test_vllm_bench(tmp_path: Path) -> None:
    """``vllm bench`` builds the configuration its own way: the plugin is there too."""
    from tests.tiny import make_tiny_drafter, make_tiny_target

    # Its random prompts have token ids up to 10,000.
    target = make_tiny_target(tmp_path / "target", vocab_size=10_048)
    drafter = make_tiny_drafter(tmp_path / "drafter", target)
    spec = json.dumps({"method": "dspark", "model": str(drafter)})
    result = tmp_path / "latency.json"
    command = ["bench", "latency", "--model", target, "--speculative-config", spec]
    command += ["--skip-tokenizer-init", "--enforce-eager", "--dtype", "float32"]
    command += ["--max-model-len", 256, "--kv-cache-memory-bytes", 64 << 20]
    command += ["--input-len", 8, "--output-len", 16, "--batch-size", 2]
    command += ["--num-iters", 1, "--num-iters-warmup", 0, "--output-json", result]
    # Ends in a line of JSON, which is what run_python_with_output looks for.
    code = f"{VLLM}; print('[]')"
    _, output = run_python_with_output(code, *command)
    assert json.loads(result.read_text())["avg_latency"] > 0
    # And it says, once, what the kernels run with.
    assert output.count("native kernels: ") == 1
