"""Our controller on vLLM's V2 runner, in Triton's interpreter.

One process runs it (`oracle.v2_control`): drafts trimmed by the scheduler (eager, steps
that wait for each other), and on the device (steps that overlap; and without a
confidence head). Here it is looked at:

- greedy text is that without speculation, whatever is trimmed, drafted or left out;
- each kind of costs has the lengths that it must have;
- a bypass leaves the query pass out, probes, and ends; drafts made after it are those
  of a drafter that never paused;
- costs that change are noticed in step times;
- the device trims as `planner.plan_within` does on the confidences it had, with a
  calibration file and online recalibration in them;
- vLLM's warm-up, which it makes on GPUs only, runs before the device trims;
- preempted requests, logprobs, LoRA on the target and a Gemma4 drafter: greedy text is
  the same as well.
"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from tests.integration.oracle.history import TOLERANCE, Oracle, relative
from tests.integration.oracle.v2_features import ADAPTERS
from tests.integration.subprocesses import run_module
from tests.integration.test_adaptive import cost_table, jagged
from tests.integration.test_oracle_v2 import VOCAB, same_key_norms
from tests.integration.test_step_log import KEYS
from tests.integration.test_structured_output import CHOICES
from tests.integration.test_v2_adapter import MAPS, write_maps
from tests.tiny import make_tiny_drafter, make_tiny_target, make_tiny_tokenizer
from tests.tiny_lora import make_tiny_lora

pytestmark = [pytest.mark.slow, pytest.mark.v2]

DRAFTERS: dict[str, dict[str, Any]] = {
    "rnn": {"head_type": "rnn"},
    "calibrated": {},
    "headless": {"confidence": False},
}
REGIMES = ("free", "dear", "jagged")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("triton", reason="vLLM's V2 runner is interpreted with Triton")
    folder = tmp_path_factory.mktemp("v2-control")
    make_tiny_target(folder / "target", vocab_size=VOCAB)
    for name, keys in DRAFTERS.items():
        drafter = make_tiny_drafter(folder / name, folder / "target", **keys)
        same_key_norms(drafter)
    write_maps(folder / "calibrated")
    for seed, name in enumerate(ADAPTERS):
        make_tiny_lora(folder / name, folder / "target", seed=seed, lm_head=seed == 1)
    text = make_tiny_target(folder / "text-target")
    make_tiny_tokenizer(text)
    same_key_norms(make_tiny_drafter(folder / "text-drafter", text))
    cost_table(folder, jagged)
    return folder


@pytest.fixture(scope="module")
def result(folder: Path) -> dict[str, Any]:
    out = folder / "out.pt"
    run_module("tests.integration.oracle.v2_control", folder, out, timeout=900)
    return torch.load(out, weights_only=False)


def test_each_engine_has_the_scheduler_for_it(result: dict[str, Any]) -> None:
    assert result["host"]["scheduler"] == "DSparkV2TrimmingScheduler"
    assert result["host"]["manager"] is None
    assert result["untrimmed"]["scheduler"] == "DSparkV2AsyncScheduler"
    assert result["headless"]["scheduler"] == "DSparkV2BudgetScheduler"
    assert result["device"]["scheduler"] == "DSparkV2AsyncBudgetScheduler"
    assert result["device"]["manager"] == "DSparkV2Verification"  # after a warm-up


def test_the_text_is_that_without_speculation(result: dict[str, Any]) -> None:
    plain = result["plain"]
    for where in ("host", "device"):
        for name in REGIMES:
            assert result[where]["regimes"][name]["texts"] == plain["arrivals"], name
        assert result[where]["bypass"]["texts"] == plain["bypass"]
    assert result["host"]["changing"]["texts"] == plain["changing"]
    turns = [t["tokens"] for t in result["host"]["turns"]["texts"]]
    assert turns == plain["arrivals"]
    assert result["device"]["first"]["texts"] == plain["arrivals"]
    assert result["device"]["trims"]["texts"] == plain["trims"]
    assert result["headless"]["texts"] == plain["arrivals"]


@pytest.mark.parametrize("where", ["host", "device"])
def test_lengths_follow_costs(result: dict[str, Any], where: str) -> None:
    found = result[where]["regimes"]
    free, dear, mixed = (found[name]["totals"] for name in REGIMES)
    assert free["trimmed"] < 0.2 * free["verified"] > 5
    assert free["bypassed_steps"] <= 3
    assert dear["bypassed_steps"] > 0.3 * dear["steps"]
    assert dear["verified"] < 0.5 * free["verified"]
    assert mixed["trimmed"] > 0.1 * mixed["verified"] > 1
    assert len(mixed["verify_lens"]) > 2
    for one in found.values():
        totals = one["totals"]
        assert one["remembered"] == 0  # ended requests are forgotten
        # vLLM counts what was verified (it goes on past the end of a text).
        assert one["draft_tokens"] <= totals["verified"]
        assert totals["verified"] - one["draft_tokens"] <= 3 * 5
        # Context K/V is written in every step, the query pass made where it drafts.
        assert one["passes"]["query"] < one["passes"]["context"] or totals is free
    passes = found["dear"]["passes"]
    assert passes["query"] < 0.8 * passes["context"]


@pytest.mark.parametrize("where", ["host", "device"])
def test_a_bypass_probes_and_ends(result: dict[str, Any], where: str) -> None:
    found = result[where]["bypass"]
    dear, free = found["each"][:25], found["each"][25:]
    assert {"cost", "acceptance"} & set(dear) and "probe" in dear
    assert found["probes"] >= 1
    assert free.index("pays") < 20  # it notices
    assert "pays" in free[-3:]


def test_step_times_that_change_are_followed(result: dict[str, Any]) -> None:
    positions = result["host"]["changing"]["positions"]
    before, later = positions[6:16], positions[30:]
    assert max(before) == 5 and len(later) > 10
    assert np.mean(later) < 0.7 * np.mean(before)


def test_drafts_after_a_bypass_have_no_holes_in_their_context(
    result: dict[str, Any], folder: Path
) -> None:
    found = result["host"]["turns"]
    oracle = Oracle(folder / "target", folder / "rnn")
    lengths: Counter[int] = Counter()
    for text in found["texts"]:
        features, _ = oracle.target_run(text["tokens"])
        mine = [
            SimpleNamespace(**b)
            for b in found["blocks"]
            if b["req_id"] == text["req_id"]
            and b["anchor_position"] < len(text["tokens"])
        ]
        for k in {len(b.drafts) for b in mine}:
            blocks = [b for b in mine if len(b.drafts) == k]
            expected = oracle.recompute(text["tokens"], blocks, features)
            drafts = oracle.greedy_drafts(expected.logits)
            assert [b.drafts for b in blocks] == drafts
            confidence = torch.stack([b.confidence for b in blocks])
            assert relative(confidence, expected.confidence) < TOLERANCE
            lengths[k] += len(blocks)
    assert set(lengths) == {1, 2, 3, 4, 5} and sum(lengths.values()) > 15


def test_the_device_trims_as_the_planner_does(result: dict[str, Any]) -> None:
    rows = result["device"]["trims"]["rows"]
    assert len(rows) >= 8
    alike = 0
    for row in rows:
        taken = [np.arange(row["survival"].shape[1]) < n for n in zip(row["device"])]
        planned = [np.arange(row["survival"].shape[1]) < n for n in zip(row["planner"])]
        # float32 may fall otherwise between two that are equal to the sixth digit.
        gained = (row["survival"] * np.stack(taken)).sum()
        assert gained == pytest.approx(
            (row["survival"] * np.stack(planned)).sum(), abs=1e-5
        )
        assert sum(row["device"]) == sum(row["planner"])
        alike += row["device"] == row["planner"]
    assert alike > 0.8 * len(rows)
    # The file's maps are in it, and what was learned since.
    raw = rows[-1]["raw"].double().numpy()
    file = np.cumprod(MAPS[0.0].apply(raw), axis=1)
    width = rows[-1]["survival"].shape[1]
    assert np.abs(file[:, :width] - rows[-1]["survival"]).max() > 1e-3
    first = np.cumprod(MAPS[0.0].apply(rows[0]["raw"].double().numpy()), axis=1)
    width = rows[0]["survival"].shape[1]
    distance = np.abs(first[:, :width] - rows[0]["survival"]).max()
    assert (
        distance
        < 0.5
        * np.abs(
            np.cumprod(rows[0]["raw"].double().numpy(), axis=1)[:, :width]
            - rows[0]["survival"]
        ).max()
    )


@pytest.mark.parametrize("where", ["host", "device"])
def test_grammars_hold(result: dict[str, Any], where: str) -> None:
    plain, ours = result["plain"]["grammars"], result[where]["grammars"]
    assert ours[:2] == plain[:2]  # greedy
    assert len(ours[2]) > 3
    start = ours[2][:4]  # sampled: another text, within the grammar as well
    assert any(choice.startswith(start) for choice in CHOICES)


@pytest.mark.parametrize("where", ["host", "device"])
def test_preempted_requests_and_logprobs(result: dict[str, Any], where: str) -> None:
    plain, ours = result["plain"]["pressed"], result[where]["pressed"]
    assert ours["preemptions"] > 0 < ours["trimmed"]
    assert ours["tokens"] == plain["tokens"]
    for mine, theirs in zip(ours["logprobs"], plain["logprobs"], strict=True):
        assert len(mine) == len(theirs) == 40
        for row, expected in zip(mine, theirs, strict=True):
            assert row == pytest.approx(expected, abs=1e-4)


def test_adapters_of_the_target(result: dict[str, Any]) -> None:
    """LoRA: the scheduler trims, as vLLM's device does not."""
    plain, ours = result["plain"]["adapted"], result["host"]["adapted"]
    base, first, second, _ = ours["tokens"]
    assert len({tuple(base), tuple(first), tuple(second)}) == 3
    assert ours["tokens"] == plain["tokens"]
    assert ours["trimmed"] > 0 < ours["verified"]


def test_a_drafter_of_another_class(result: dict[str, Any]) -> None:
    """Gemma4's is vLLM's own: calibrated and controlled like any other."""
    found = result["gemma"]
    assert found["drafter"].endswith("gemma4_dspark:Gemma4DSparkForCausalLM")
    assert found["texts"] == found["plain"]
    totals = found["totals"]
    assert totals["trimmed"] > 5 < totals["verified"] and totals["accepted"] > 0
    raw, survival = found["survivals"][0]  # nothing has been learned yet
    expected = np.cumprod(MAPS[0.0].apply(raw), axis=1)
    np.testing.assert_allclose(survival, expected, atol=1e-6)
    assert np.abs(np.cumprod(raw, axis=1) - survival).max() > 0.05


def test_goals_reach_the_device(result: dict[str, Any]) -> None:
    found = result["device"]["trims"]
    assert any(sum(row["reserved"]) for row in found["rows"])
    assert {"goal", "goal_missed"} & set(found["totals"]["stops"])


def test_vllms_estimator_stands_in_for_a_head(result: dict[str, Any]) -> None:
    found = result["headless"]
    assert found["estimator"] == "OnlineAcceptanceEstimator"
    values = np.concatenate([rows.ravel() for rows in found["heard"]])
    assert len(values) > 50 and ((values > 0) & (values < 1)).all()
    assert len(set(values.round(4).tolist())) > 20
    assert found["totals"]["trimmed"] > 0 < found["totals"]["verified"]


def test_draft_lengths_alone(result: dict[str, Any], folder: Path) -> None:
    """Without trimming: costs are measured through the V2 runner, and followed."""
    found, plain = result["untrimmed"], result["plain"]["arrivals"]
    assert found["texts"] == found["measured"]["texts"] == plain
    assert found["totals"]["trimmed"] == 0 < found["totals"]["verified"]
    assert found["totals"]["bypassed_steps"] > 0.3 * found["totals"]["steps"]
    measured = found["measured"]
    # Little is measured in the interpreter's time, but of both parts.
    assert len(measured["tokens"]) >= 2 and measured["positions"][-1] == 5
    assert 0 < measured["error"] < 10 and measured["observed"] > 10
    assert measured["overhead"] >= 0
    (file,) = (folder / "cache" / "cost").glob("*.json")
    key = json.loads(file.read_text())["key"]
    assert "V2 runner" in key["vllm_version"]  # V1's times are others


def test_what_is_told(result: dict[str, Any]) -> None:
    """Metrics, log line and step log have the V1 runner's names and agree."""
    first = result["device"]["first"]
    totals = first["totals"]
    told = first["metrics"]
    for name in ("verified_tokens", "accepted_tokens", "drafted_tokens", "rounds"):
        short = name.removesuffix("_tokens")
        assert told[f"vllm:dspark_{name}"] == totals[short], name
    assert totals["drafted"] >= totals["verified"] > 0
    for word in ("tokens per round", "promised by confidences", "drafts verified each"):
        assert word in first["words"]
    rows = [json.loads(line) for line in first["log"].splitlines()]
    assert all(set(row) == KEYS for row in rows)
    assert [row["step"] for row in rows] == list(range(len(rows)))
    assert sum(row["verified"] for row in rows) >= first["draft_tokens"]
    assert sum(row["drafts"] for row in rows) >= sum(row["verified"] for row in rows)
    assert rows[-1]["draft_seconds"] is None  # nobody will say
    assert all(row["draft_seconds"] >= 0 for row in rows[:-1])
    assert all(row["target_seconds"] > 0 for row in rows)
    assert all(row["predicted_seconds"] > 0 for row in rows[1:])
