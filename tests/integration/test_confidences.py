"""Confidences travel with the drafts to the scheduler's process, per request.

* after every step the scheduler holds, for exactly the requests with drafts in flight,
  the confidences of those drafts (a row of a neighbour, or of the step before, would
  pass a test of shapes);
* they are the drafter's, row by row, while the batch changes and prompts are chunked;
* a drafter without a confidence head sends none;
* certainties travel likewise, and a calibration that mixes them in gets both;
* with vLLM's multiprocessing, where they are pickled, the engine drafts all the same.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.integration.engine import Engine, engine
from tests.integration.subprocesses import run_python
from tests.tiny import make_tiny_drafter
from vllm_dspark.calibration import file as calibration_file
from vllm_dspark.calibration.scaling import Mixing, Scaling, sigmoid
from vllm_dspark.model.checkpoint import weights_hash

PROMPTS = [[5, 9, 17, 33, 8], [7] * 3, list(range(3, 40)), [100, 50], [60, 61, 62]]


def requests(length: int = 30) -> list[Any]:
    """Greedy and random ones, of different lengths, so that the batch changes."""
    from vllm import SamplingParams

    return [
        SamplingParams(
            temperature=0.8 * (i % 2), max_tokens=length - 5 * i, ignore_eos=True
        )
        for i in range(len(PROMPTS))
    ]


class Watch:
    """Compares both ends of the way in every step."""

    def __init__(self, engine: Engine) -> None:
        self.steps = 0
        self.confidences: list[float] = []
        runner, scheduler = engine.runner, engine.scheduler
        update = scheduler.update_draft_token_ids

        def checked(drafts: Any) -> None:
            update(drafts)
            self.steps += 1
            sent = expected(runner)
            in_flight = {
                r for r, request in scheduler.requests.items() if request.spec_token_ids
            }
            assert set(scheduler.draft_confidences) == in_flight
            assert set(scheduler.draft_certainties) == in_flight
            for request_id, row in scheduler.draft_confidences.items():
                tokens, confidences, certainties = sent[request_id]
                assert scheduler.requests[request_id].spec_token_ids == tokens
                assert row.dtype == np.float32
                assert row.tolist() == confidences
                assert scheduler.draft_certainties[request_id].tolist() == certainties
                self.confidences += row.tolist()

        scheduler.update_draft_token_ids = checked


def expected(runner: Any) -> dict[str, tuple[list[int], list[float], list[float]]]:
    """Request → its drafts, confidences and certainties, as the proposer made them."""
    drafted = runner._drafted
    if drafted is None:
        return {}
    names = [runner._drafted_req_ids[row] for row in drafted.rows.tolist()]
    tokens = drafted.block.token_ids.tolist()
    signals = drafted.block.confidence.tolist(), drafted.block.certainty.tolist()
    return dict(zip(names, zip(tokens, *signals, strict=True), strict=True))


@pytest.fixture(scope="module")
def dspark(tiny_target: Path, tiny_drafter: Path) -> Iterator[Engine]:
    spec = {"draft_sample_method": "probabilistic"}
    sizes = {"max_num_seqs": 3, "max_num_batched_tokens": 32}
    with engine(tiny_target, tiny_drafter, spec=spec, **sizes) as dspark:
        yield dspark


def test_every_request_has_its_own(dspark: Engine) -> None:
    watch = Watch(dspark)
    dspark.tokens(PROMPTS, requests())
    assert watch.steps > 10
    found = np.array(watch.confidences)
    assert len(found) > 100
    assert ((found > 0) & (found < 1)).all()
    assert found.std() > 0.01
    assert dspark.scheduler.draft_confidences == {}


def test_a_drafter_without_a_confidence_head(tmp_path: Path, tiny_target: Path) -> None:
    drafter = make_tiny_drafter(tmp_path, tiny_target, confidence=False)
    with engine(tiny_target, drafter) as silent:
        silent.tokens(PROMPTS[:2], requests()[:2])
        assert silent.stats().draft_tokens > 0
        assert silent.scheduler.draft_confidences == {}


def test_certainties_reach_the_calibration(
    tiny_target: Path, tiny_drafter: Path, tmp_path: Path
) -> None:
    """Survivals are what the file's maps make of both, in every step."""
    mixing = Mixing((0.5, 1.0, 1.5), (0.7, -0.4, 0.2), (0.1, 0.2, -0.3))
    scaling = Scaling((1.0, 2.0, 1.0), (0.0, 0.0, 0.5), mixing)
    path = tmp_path / calibration_file.NAME
    row: dict[str, Any] = {"request_temperature": 0.0, "temperature": [1.0, 2.0, 1.0]}
    row |= {"bias": [0.0, 0.0, 0.5], "with_certainty": asdict(mixing)}
    hashed = weights_hash(tiny_drafter)
    calibration_file.write(path, hashed, [row], {}, {})
    spec = {"num_speculative_tokens": 3}
    named = {"dspark": {"calibration": str(path)}}
    with engine(tiny_target, tiny_drafter, spec=spec, additional_config=named) as eng:
        survival, seen = eng.scheduler.controller.survival, []
        apply = survival._start_maps.logits

        def spied(confidence: Any, settings: Any, certainty: Any) -> Any:
            found = apply(confidence, settings, certainty)
            seen.append((confidence, certainty, found))
            return found

        survival._start_maps.logits = spied
        eng.tokens(PROMPTS[:2], requests()[:2])
    assert len(seen) > 10
    for confidence, certainty, found in seen:
        assert certainty is not None and np.isfinite(certainty).all()
        expected = scaling.apply(confidence.astype(np.float64), certainty)
        assert sigmoid(found) == pytest.approx(expected, abs=1e-5)


# A script with a main guard: vLLM's workers may be spawned, and import it again.
MULTIPROCESSING = """
import json, os, sys
from pathlib import Path

if __name__ == "__main__":
    from vllm import LLM, SamplingParams

    llm = LLM(
        model=sys.argv[1], skip_tokenizer_init=True, enforce_eager=True,
        dtype="float32", max_model_len=256, max_num_seqs=4, disable_log_stats=False,
        kv_cache_memory_bytes=64 << 20,
        speculative_config={"method": "dspark", "model": sys.argv[2]},
    )
    params = SamplingParams(temperature=0.0, max_tokens=20, ignore_eos=True)
    outputs = llm.generate(
        [{"prompt_token_ids": [5, 9, 17, 33, 8]}, {"prompt_token_ids": [7, 7]}],
        params, use_tqdm=False,
    )
    drafts = [m.value for m in llm.get_metrics() if m.name.endswith("num_draft_tokens")]
    print(json.dumps({
        "texts": [list(o.outputs[0].token_ids) for o in outputs],
        "drafts": drafts[0],
        "core": type(llm.llm_engine.engine_core).__name__,
    }))
"""


@pytest.mark.slow
def test_multiprocessing(tiny_target: Path, tiny_drafter: Path, tmp_path: Path) -> None:
    from vllm import SamplingParams

    script = tmp_path / "script.py"
    script.write_text(MULTIPROCESSING)
    result = run_python(
        f"import runpy; runpy.run_path({str(script)!r}, run_name='__main__')",
        tiny_target,
        tiny_drafter,
        VLLM_ENABLE_V1_MULTIPROCESSING="1",
    )
    assert result["core"] == "SyncMPClient"
    assert result["drafts"] > 0
    params = SamplingParams(temperature=0.0, max_tokens=20, ignore_eos=True)
    with engine(tiny_target) as plain:
        assert result["texts"] == plain.tokens([PROMPTS[0], [7, 7]], params)
