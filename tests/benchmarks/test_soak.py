"""The soak, whole, on a tiny model for seconds; what it says of samples and counts."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
import soak
from _soak_counts import SPEC, balance
from _soak_load import KINDS, Load
from _soak_watch import WARM_UP, Sample, Watch, rss_mib, steadiness

from tests.integration.forks import serve_in_forks
from vllm_dspark.cli.server import Metrics
from vllm_dspark.metrics import PREFIX


@pytest.mark.slow
@pytest.mark.parametrize("arm", ["dspark", "none"])
def test_a_soak(
    arm: str,
    text_pair: tuple[Path, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    target, drafter = text_pair
    monkeypatch.setenv("VLLM_DSPARK_CACHE", str(tmp_path / "cache"))
    serve_in_forks(monkeypatch, soak, "Server")
    out = tmp_path / "out"
    argv = ["soak.py", "--target", str(target), "--drafter", str(drafter)]
    argv += ["--minutes", "0.4", "--sample-seconds", "1", "--probe-tokens", "12"]
    argv += ["--arm", arm]
    monkeypatch.setattr("sys.argv", [*argv, "--out", str(out)])
    assert soak.main() == 0
    found = json.loads((out / "soak.json").read_text())
    assert found["texts_equal"] and not found["failures"]
    assert set(found["requests"]) <= set(soak.kinds(arm))
    assert len(found["requests"]) >= 4
    assert found["totals"]["vllm:generation_tokens_total"] > 100
    emitted = found["balance"][-1]
    assert emitted["holds"] and emitted["left"] > 0
    assert len(found["samples"]) >= 3
    assert min(found["samples"][-1]["rss_mib"].values()) > 10
    assert all(row["holds"] for row in found["balance"])
    assert (found["samples"][-1]["rounds"] > 0) == (arm == "dspark")
    assert (out / "soak.png").stat().st_size > 10_000
    assert found["provenance"]["command"]


def samples(leak: float, n: int = 60) -> list[Sample]:
    """Half-minutes: memory that grows by so many MiB an hour after a steep start."""
    return [
        Sample(
            seconds=30.0 * i,
            rss_mib={
                "server": 1000.0,
                "VLLM::Worker": 5 * min(i, n // 4) + leak * 30 * i / 3600,
            },
            requests=10 * i,
            accepted=150.0 * i,
            rounds=100.0 * i,
            calibration_error=[] if i == 0 else [0.02, 0.03, 0.04, 0.5],
        )
        for i in range(n)
    ]


@pytest.mark.parametrize("leak", [0.0, 120.0])
def test_a_leak_is_told_from_warming_up(leak: float) -> None:
    found = steadiness(samples(leak))
    slopes = {name: of["slope_per_hour"] for name, of in found["rss_mib"].items()}
    assert slopes == {
        "server": pytest.approx(0, abs=0.1),
        "VLLM::Worker": pytest.approx(leak, abs=0.2),
        "all": pytest.approx(leak, abs=0.2),
    }
    assert found["rss_mib"]["all"]["first"] == 1000
    assert found["tau"] == [2.5, 2.5]
    assert found["calibration_error"] == [0.03, 0.03]
    assert steadiness(samples(leak, n=8)) == {}  # too few after the warm-up
    assert 0 < WARM_UP < 1


def test_without_drafts_there_is_no_tau() -> None:
    found = steadiness(
        [replace(s, accepted=0, rounds=0, calibration_error=[]) for s in samples(0.0)]
    )
    assert found["tau"] == found["calibration_error"] == [None, None]


def metrics(**changed: float) -> Metrics:
    """Of 10 requests: 100 rounds of 102 steps, 60 of 90 verified drafts accepted."""
    values = {
        PREFIX + "accepted_tokens_total": 60,
        SPEC + "accepted_tokens_total": 60,
        SPEC + "accepted_tokens_per_pos_total": 60,
        PREFIX + "verified_tokens_total": 90,
        SPEC + "draft_tokens_total": 90,
        PREFIX + "trimmed_tokens_total": 20,
        PREFIX + "drafted_tokens_total": 120,
        PREFIX + "steps_by_reason_total": 40,
        PREFIX + "steps_total": 45,
        PREFIX + "rounds_total": 100,
        "vllm:request_success_total": 10,
        "vllm:inter_token_latency_seconds_count": 102,
        "vllm:time_to_first_token_seconds_count": 10,
        "vllm:generation_tokens_total": 170,
    }
    assert set(changed) <= set(values)
    return {(name, ()): value for name, value in {**values, **changed}.items()}


def test_counts_that_agree() -> None:
    rows = balance(metrics(), metrics(), width=7)
    assert all(row["holds"] and row["left"] == 0 for row in rows)
    rows = balance({}, metrics(), width=7)
    assert all(row["holds"] for row in rows), rows
    assert rows[-1]["right"] == 10 + 102 + 60


@pytest.mark.parametrize(
    ("name", "value", "what"),
    [
        (SPEC + "accepted_tokens_total", 61, "accepted = vLLM's"),
        (SPEC + "accepted_tokens_per_pos_total", 59, "accepted = sum over positions"),
        (SPEC + "draft_tokens_total", 91, "verified = vLLM's draft tokens"),
        (PREFIX + "drafted_tokens_total", 109, "verified + trimmed <= drafted"),
        (PREFIX + "steps_total", 39, "steps by reason <= steps"),
        (PREFIX + "rounds_total", 103, "rounds <= decoding steps"),
        ("vllm:generation_tokens_total", 173, "emitted = first"),
        ("vllm:generation_tokens_total", 101, "emitted = first"),
    ],
)
def test_counts_that_do_not(name: str, value: float, what: str) -> None:
    rows = balance({}, metrics(**{name: value}), width=7)
    wrong = [row["what"] for row in rows if not row["holds"]]
    assert len(wrong) == 1 and wrong[0].startswith(what)


def test_samples_are_taken_when_due() -> None:
    read: Metrics = {
        (PREFIX + "calibration_error", (("position", str(k)),)): 0.1 * k
        for k in (1, 0, 2)
    }
    watch = Watch(lambda: read, os.getpid(), lambda: 3, every=30)
    for seconds in (0.0, 10.0, 29.0, 31.0, 60.0, 62.0):
        watch(seconds)
    assert [s.seconds for s in watch.samples] == [0.0, 31.0, 62.0]
    assert watch.samples[0].calibration_error == [0.0, 0.1, 0.2]
    assert 10 < watch.samples[0].rss_mib["server"] < 100_000
    assert rss_mib(os.getpid())["server"] > 10


def test_what_vllm_alone_cannot_serve_is_left_out() -> None:
    assert soak.kinds("dspark") == list(KINDS)
    assert soak.kinds("none") == [kind for kind in KINDS if kind != "seeded"]


def test_the_first_failure_ends_the_load(monkeypatch: pytest.MonkeyPatch) -> None:
    class Refusing:
        url = "http://127.0.0.1:9"  # nobody listens

    load = Load(Refusing(), [[{"role": "user", "content": "x"}]], seed=0)  # type: ignore[arg-type]
    monkeypatch.setattr("_soak_load._PAUSE", 0.01)
    monkeypatch.setattr("time.sleep", lambda _: None)
    load.run(2, 60.0, lambda _: None)
    assert load.failures and "APIConnectionError" in load.failures[0]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--minutes", "0"], "--minutes 0.0: give more than 0"),
        (["--clients", "-1"], "--clients -1: give more than 0"),
        (["--prompts", "nowhere.jsonl"], "is no file"),
    ],
)
def test_options_that_cannot_be(more: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        soak.parse(["--target", "T", "--drafter", "D", "--out", "O", *more])


def test_counts_are_read_at_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not while a dropped stream still runs, nor before the last count is told."""
    readings = [(1, 10, 5), (0, 11, 5), (0, 11, 6), (0, 11, 6), (0, 99, 99)]

    class Ending:
        def metrics(self) -> Metrics:
            running, tokens, steps = readings.pop(0)
            names = (soak.RUNNING, *soak.MOVING)
            return {
                (name, ()): float(value)
                for name, value in zip(names, (running, tokens, steps), strict=True)
            }

    monkeypatch.setattr("time.sleep", lambda _: None)
    found = soak.at_rest(Ending())  # type: ignore[arg-type]
    assert found[(soak.MOVING[1], ())] == 6 and len(readings) == 1
    readings[:] = [(1, 0, 0)] * soak.PATIENCE
    with pytest.raises(ValueError, match="still run"):
        soak.at_rest(Ending())  # type: ignore[arg-type]
