"""The trace of real rounds is what `decode.py` does on the same text."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.integration.engine import engine
from tests.integration.recorder import user_id
from tests.tiny import load_target
from vllm_dspark.decode import Generation, SamplingOptions, generate
from vllm_dspark.model.checkpoint import load_drafter
from vllm_dspark.types import StepRecord

pytestmark = pytest.mark.slow

PROMPTS = [[5, 9, 17, 33, 8], [7, 7], list(range(20, 60)), [99, 4, 61]]
NEW = 24


def rows(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def by_request(file: Path) -> dict[str, list[dict[str, Any]]]:
    found: dict[str, list[dict[str, Any]]] = {}
    for row in rows(file):
        found.setdefault(user_id(row["request"]), []).append(row)
    return found


def record(row: dict[str, Any]) -> StepRecord:
    return StepRecord(
        row["position"],
        row["anchor"],
        tuple(row["drafts"]),
        row["accepted"],
        tuple(row["confidences"]),
        tuple(row["certainties"]),
    )


def reference(target: Path, drafter: Path) -> list[Generation]:
    model = load_target(target)
    loaded = load_drafter(
        drafter,
        target_embeddings=model.get_input_embeddings().weight,
        target_lm_head=model.get_output_embeddings().weight,
        dtype=torch.float32,
    )
    return generate(model, loaded, PROMPTS, SamplingOptions(NEW))


def params(**settings: Any) -> Any:
    from vllm import SamplingParams

    defaults = {"temperature": 0.0, "max_tokens": NEW, "ignore_eos": True}
    return SamplingParams(**{**defaults, **settings})


def traced(file: Path) -> dict[str, Any]:
    return {"additional_config": {"dspark": {"trace": str(file)}}}


def test_equals_the_records_of_the_vllm_free_loop(
    tiny_target: Path, tiny_drafter: Path, tmp_path: Path
) -> None:
    file = tmp_path / "trace.jsonl"
    with engine(tiny_target, tiny_drafter, **traced(file)) as dspark:
        texts = dspark.tokens(PROMPTS, params())
        stats = dspark.stats()
    found = by_request(file)
    wanted = reference(tiny_target, tiny_drafter)
    assert [list(text.token_ids) for text in wanted] == texts
    for i, text in enumerate(wanted):
        mine = found[str(i)]
        assert {row["temperature"] for row in mine} == {0.0}
        for row, step in zip(mine, text.steps, strict=True):
            got = record(row)
            assert got.confidence == pytest.approx(step.confidence, abs=1e-5)
            assert len(got.certainty) == len(got.draft_ids)
            assert got.certainty == pytest.approx(step.certainty, abs=2e-3)
            assert (got.anchor_position, got.anchor_id, got.draft_ids) == (
                step.anchor_position,
                step.anchor_id,
                step.draft_ids,
            )
            assert got.num_accepted == step.num_accepted
    everything = [row for mine in found.values() for row in mine]
    assert sum(len(row["drafts"]) for row in everything) == stats.draft_tokens
    assert sum(row["accepted"] for row in everything) == stats.accepted


def test_rounds_cut_by_a_schema_and_by_an_abort(
    text_pair: tuple[Path, Path], tmp_path: Path
) -> None:
    from vllm.sampling_params import StructuredOutputsParams

    file = tmp_path / "trace.jsonl"
    settings = {"skip_tokenizer_init": False, "max_num_batched_tokens": 32}
    with engine(*text_pair, **settings, **traced(file)) as dspark:
        core = dspark.llm.llm_engine
        regex = StructuredOutputsParams(regex="[a-m]{30}")
        core.add_request(
            "cut", {"prompt_token_ids": PROMPTS[0]}, params(structured_outputs=regex)
        )
        hot = params(temperature=1.0, max_tokens=200)
        core.add_request("gone", {"prompt_token_ids": PROMPTS[2]}, hot)
        for _ in range(6):
            core.step()
        core.abort_request(["gone"])
        while core.has_unfinished_requests():
            core.step()
        core.step()
        stats = dspark.stats()
    found = by_request(file)
    assert {row["temperature"] for row in found["gone"]} == {1.0}
    assert 0 < len(found["gone"]) <= 6
    lengths = [len(row["drafts"]) for row in found["cut"]]
    assert min(lengths) < 5, "the schema never cut a draft"
    for row in found["cut"] + found["gone"]:
        assert len(row["confidences"]) == len(row["drafts"])
        assert len(row["certainties"]) == len(row["drafts"])
        assert 0 <= row["accepted"] <= len(row["drafts"])
    everything = found["cut"] + found["gone"]
    assert sum(len(row["drafts"]) for row in everything) == stats.draft_tokens
    # Positions go on where the last round ended.
    for mine in found.values():
        for before, after in itertools.pairwise(mine):
            assert after["position"] == before["position"] + before["accepted"] + 1


def test_broken_drafts_are_rounds_without_drafts(
    tiny_target: Path, tiny_drafter: Path, tmp_path: Path
) -> None:
    file = tmp_path / "trace.jsonl"
    with engine(tiny_target, tiny_drafter, **traced(file)) as dspark:
        with torch.no_grad():
            dspark.runner.drafter.model.head.markov_w2.fill_(torch.nan)
        dspark.tokens(PROMPTS[:1], params())
    for row in rows(file):
        assert (row["drafts"], row["accepted"], row["confidences"]) == ([], 0, [])
    assert len(rows(file)) == NEW - 1


def test_no_folder_for_the_trace(tiny_target: Path, tiny_drafter: Path) -> None:
    file = Path("/nowhere/trace.jsonl")
    with (
        pytest.raises(ValueError, match="there is no folder /nowhere"),
        engine(tiny_target, tiny_drafter, **traced(file)),
    ):
        pass
