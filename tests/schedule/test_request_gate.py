"""Requests that drafting never pays for, refused by their own history."""

from __future__ import annotations

import numpy as np

from vllm_dspark.schedule.drafting_options import DraftingOptions
from vllm_dspark.schedule.request_gate import RequestGate

OPTIONS = DraftingOptions()


def run(
    gate: RequestGate, rates: dict[str, float], steps: int, seed: int = 0
) -> np.ndarray:
    """[steps, R] who was drafted for; one draft each, accepted at these rates."""
    random = np.random.default_rng(seed)
    names = list(rates)
    admitted = []
    for _ in range(steps):
        mask = gate.admit(names)
        hits = random.random(len(names)) < np.array(list(rates.values()))
        gate.observe(names, mask.astype(np.int64), (mask & hits).astype(np.int64))
        admitted.append(mask)
    return np.array(admitted)


def test_refuses_the_hopeless_and_no_others() -> None:
    for seed in range(10):
        admitted = run(
            RequestGate(), {"none": 0.0, "few": 0.25, "most": 0.8}, 1500, seed
        )
        assert not admitted[OPTIONS.request_rounds :, 0].mean() > 0.05
        assert admitted[: OPTIONS.request_rounds, 0].all()
        assert admitted[:, 1].mean() > 0.9 and admitted[:, 2].all()


def test_probes_go_on_and_end_the_refusal() -> None:
    gate = RequestGate()
    bad = run(gate, {"a": 0.0}, 6000)[:, 0]
    assert gate.probes > 5
    starts = np.nonzero(~bad[:-1] & bad[1:])[0]
    gaps = np.diff(starts)
    assert (np.diff(gaps) >= 0).all()
    assert gaps.max() <= OPTIONS.max_probe_interval + OPTIONS.request_probe_rounds
    good = run(gate, {"a": 0.8}, 2000)[:, 0]
    first = int(np.argmax(good))
    assert first <= OPTIONS.max_probe_interval
    assert good[first:].all()


def test_cut_drafts_say_nothing() -> None:
    gate = RequestGate()
    for _ in range(200):
        assert gate.admit(["a"]).all()
        gate.observe(["a"], np.zeros(1, dtype=np.int64), np.zeros(1, dtype=np.int64))


def test_memory_is_bounded() -> None:
    gate = RequestGate()
    for i in range(3000):
        names = [f"{i}-{j}" for j in range(4)]
        gate.admit(names)
        gate.observe(names, np.ones(4, dtype=np.int64), np.zeros(4, dtype=np.int64))
        gate.forget([*names, "unknown"])
        # The outcome of a step that ended it may come in late.
        gate.observe(names, np.ones(4, dtype=np.int64), np.zeros(4, dtype=np.int64))
    assert len(gate) == 0
