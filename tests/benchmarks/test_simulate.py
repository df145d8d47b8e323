"""The simulator: what it must conserve, what can be computed by hand, and its draws."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import _sim_acceptance as acceptance
import _sim_report as report
import _sim_scenario as scenarios
import _sim_validate as validation
import numpy as np
import pytest
import simulate
from _sim_acceptance import Acceptance, Dataset, Drafter
from _sim_engine import Engine
from _sim_load import Load, Workload
from _sim_parts import Counts, Limits, Machine, arm
from _sim_run import figures, point

from vllm_dspark.calibration.reliability import auroc
from vllm_dspark.schedule.cost import CostTable
from vllm_dspark.schedule.drafting import Reason
from vllm_dspark.schedule.facts import DraftPlan

WIDTH = 7
TINY = CostTable((1, 9), (0.02, 0.04), 0.0, (1,), (0, 1), ((0.001, 0.003),))
DEMO = CostTable(
    (1, 4, 8, 16, 32, 64, 128, 512),
    (0.0226, 0.0226, 0.0243, 0.03, 0.0426, 0.072, 0.117, 0.4685),
    1e-7,
    (1, 8, 64),
    (0, 1, 7),
    ((0.0005, 0.0036, 0.0039), (0.0006, 0.0037, 0.008), (0.0018, 0.0105, 0.0433)),
)


def serve(
    name: str,
    rate: float = 0.5,
    clients: int = 4,
    count: int | None = None,
    steps: int | None = None,
    work: Workload | None = None,
    table: CostTable = DEMO,
    limits: Limits | None = None,
    seed: int = 0,
    **machine: float,
) -> Counts:
    drafter = acceptance.constant(rate, WIDTH, 0.8)
    engine = Engine(arm(name, WIDTH), drafter, Machine(table, **machine), limits, seed)
    load = Load(drafter, work or Workload(20, 30), clients, count=count, turnaround=0.0)
    engine.begin(load)
    return engine.run(load, steps)


def test_a_case_by_hand() -> None:
    # Prompt of 3 tokens: 25 ms and a draft, 3 ms. Then twice two tokens: 22.5 + 3 ms.
    work = Workload(3, 5, 0.0)
    counts = serve("fixed-1", 1.0, 1, 1, work=work, table=TINY)
    assert counts.seconds == pytest.approx(0.028 + 2 * 0.0255)
    assert counts.tpot == pytest.approx([2 * 0.0255 / 4])
    assert counts.ttft == pytest.approx([0.028])
    assert (counts.emitted, counts.firsts, counts.rounds) == (5, 1, 2)
    assert (counts.verified, counts.accepted, counts.dropped) == (2, 2, 0)
    # Of an answer of 4 tokens, one accepted draft lies past its end.
    assert serve("fixed-1", 1.0, 1, 1, work=Workload(3, 4, 0.0)).dropped == 1
    # Alone: the same prompt, then four steps of 20 ms, without any drafter.
    counts = serve("none", 1.0, 1, 1, work=work, table=TINY)
    assert counts.seconds == pytest.approx(0.025 + 4 * 0.02)
    # Overheads come on top: 3 steps, 3 of them with an answer.
    machine = {"per_step": 0.01, "per_answer": 0.001, "scale": 2.0}
    counts = serve("fixed-1", 1.0, 1, 1, work=work, table=TINY, **machine)
    assert counts.seconds == pytest.approx(2 * (0.028 + 2 * 0.0255) + 0.033)


@pytest.mark.parametrize(
    "positions, at_once, put_off",
    [
        # Steps of 20 ms; a row of context takes 1 ms, a draft 3 ms with its own row.
        # The prompt has 3 tokens, each further step has one.
        ((0, 0, 1), (0.024, 0.021, 0.023), (0.02, 0.02, 0.023 + 0.004)),
        ((0, 1, 1), (0.024, 0.023, 0.023), (0.02, 0.023 + 0.003, 0.023)),
        ((0, 0, 0), (0.024, 0.021, 0.021), (0.02, 0.02, 0.02)),
    ],
)
def test_what_bypasses_put_off_is_paid_by_the_next_draft(
    positions: tuple[int, ...],
    at_once: tuple[float, ...],
    put_off: tuple[float, ...],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    draft = ((0.001, 0.003), (0.101, 0.103))
    table = CostTable((1, 9), (0.02, 0.02), 0.0, (1, 101), (0, 1), draft)
    for expected, puts_off in ((at_once, False), (put_off, True)):
        drafter = acceptance.constant(0.0, 1, 0.8)
        engine = Engine(arm("adaptive", 1), drafter, Machine(table, puts_off=puts_off))
        plans = iter([DraftPlan(k, Reason.COST) for k in positions])
        monkeypatch.setattr(engine.controller, "draft", lambda _, p=plans: next(p))
        load = Load(drafter, Workload(3, 9, 0.0), 1, turnaround=0.0)
        engine.begin(load)
        taken = [engine.run(load, 1).seconds for _ in positions]
        assert taken == pytest.approx(expected), puts_off


@pytest.mark.parametrize("name", ["none", "fixed-3", "threshold", "adaptive"])
def test_tokens_are_conserved(name: str) -> None:
    counts = serve(name, clients=5, count=23, noise=0.05)
    texts = Load(acceptance.constant(0.5, WIDTH), Workload(20, 30))
    assert counts.emitted == sum(texts.text(i).output for i in range(23))
    from_rounds = counts.accepted + counts.rounds
    assert counts.emitted == from_rounds + counts.firsts - counts.dropped
    assert counts.firsts == len(counts.ttft) == 23
    assert counts.accepted <= counts.verified <= counts.drafted
    assert counts.seconds >= counts.busy > 0


@pytest.mark.parametrize("length", [1, 3, 7])
def test_fixed_lengths_have_the_throughput_of_the_formula(length: int) -> None:
    rate, clients = 0.6, 16
    work = Workload(2, 100_000, 0.0, prefill=False)
    table = replace(DEMO, per_context_token=0.0)
    counts = serve(f"fixed-{length}", rate, clients, None, 1200, work, table)
    tau = (1 - rate ** (length + 1)) / (1 - rate)
    seconds = table.step_seconds(clients * (1 + length))
    seconds += table.draft_seconds(clients, length)
    found = figures(counts)
    assert found["output_throughput"] == pytest.approx(
        clients * tau / seconds, rel=0.03
    )
    for key in ("verify_length", "draft_length"):
        assert found[key] == pytest.approx(length, rel=0.01)


def test_the_same_seed_gives_the_same_figures() -> None:
    one, again, other = (
        serve("adaptive", count=30, noise=0.05, seed=seed) for seed in (1, 1, 2)
    )
    assert one == again
    assert one != other


def test_limits_of_a_step_are_kept() -> None:
    # 300 prompt tokens at 100 a step, and no more than two requests at a time.
    limits = Limits(max_num_seqs=2, max_num_batched_tokens=100)
    work = Workload(300, 2, 0.0)
    counts = serve("none", clients=4, count=4, work=work, limits=limits, table=TINY)
    # Prefill fills every step; the answers' second tokens take some of the budget.
    assert counts.steps >= 4 * 3
    assert counts.seconds > 12 * float(TINY.step_seconds(99))
    drafter = acceptance.constant(0.5, WIDTH)
    engine = Engine(arm("fixed-7", WIDTH), drafter, Machine(DEMO), Limits(8, 20))
    load = Load(drafter, Workload(2, 50), 8)
    engine.begin(load)
    counts = engine.run(load, 200)
    # Eight requests of 8 tokens do not fit into 20.
    assert counts.verified + counts.rounds <= 200 * 20
    assert counts.verified < 7 * counts.rounds


def test_an_open_loop_has_the_rate_that_was_asked_for() -> None:
    drafter = acceptance.constant(0.5, WIDTH)
    engine = Engine(arm("none", WIDTH), drafter, Machine(DEMO))
    load = Load(drafter, Workload(20, 30), rate=2.0, count=400)
    engine.begin(load)
    counts = engine.run(load)
    assert 400 / counts.seconds == pytest.approx(2.0, rel=0.15)
    # Most of the time there was nothing to do, which is no overhead.
    assert counts.busy < 0.9 * counts.seconds


@pytest.mark.parametrize("rate, auc, excess", [(0.45, 0.75, 0.15), (0.8, 0.85, 0.0)])
def test_drafts_have_the_acceptance_and_confidences_asked_for(
    rate: float, auc: float, excess: float
) -> None:
    one = Dataset((rate, rate), (auc, auc), (excess, excess))
    drafter = Drafter(Acceptance("test", {"all": one}), 0)
    n = 40_000
    confidence, alive = drafter.draw(np.zeros(n, np.int64), np.zeros(n), 2)
    hit = alive >= 1
    assert hit.mean() == pytest.approx(rate, abs=0.01)
    assert (alive[hit] >= 2).mean() == pytest.approx(rate, abs=0.015)
    assert confidence[:, 0].mean() - rate == pytest.approx(excess, abs=0.01)
    assert auroc(confidence[:, 0], hit) == pytest.approx(auc, abs=0.01)
    if not excess:  # a head that is right is right at every level
        sure = confidence[:, 0] > 0.9
        assert hit[sure].mean() == pytest.approx(confidence[sure, 0].mean(), abs=0.01)
    nothing = Drafter(Acceptance("test", {"all": one}, informed=False), 0)
    confidence, _ = nothing.draw(np.zeros(9, np.int64), np.zeros(9), 2)
    assert confidence[:, 0] == pytest.approx(rate + excess, abs=1e-3)


def test_every_arm_answers_the_same_texts() -> None:
    two = {name: Dataset((0.5,), (0.5,), (0.0,), (5, 6)) for name in ("a", "b")}
    load = Load(Acceptance("test", two), Workload(20, 30))
    texts = [load.text(i) for i in range(40)]
    assert texts == [load.text(i) for i in range(40)]
    for block in range(20):
        assert {t.dataset for t in texts[2 * block : 2 * block + 2]} == {"a", "b"}
    assert {t.prompt for t in texts} == {5, 6}
    assert {15 <= t.output <= 45 for t in texts} == {True}


def test_arms_by_name() -> None:
    assert arm("dspark-fixed-3", WIDTH).width == arm("fixed-3", WIDTH).width == 3
    assert arm("threshold-0.7", WIDTH).options.threshold == 0.7
    assert not arm("no-bypass", WIDTH).options.bypass
    assert arm("none", WIDTH).width == 0
    for bad in ("fixed", "fixed-x", "threshold-2", "best", "none-1"):
        with pytest.raises(ValueError, match="no arm is called"):
            arm(bad, WIDTH)


def test_a_cost_table_from_throughput_gives_it_back() -> None:
    # Throughput of a known machine in, the machine's throughput out.
    tau, work = acceptance.constant(0.7, WIDTH).datasets["all"].tau, Workload(250, 512)
    loads = (4, 32, 256)
    context = 250 + 256

    def step(tokens: int, reqs: int) -> float:
        return 0.01 + 2e-5 * tokens + 1e-7 * context * reqs

    none = {r: r / step(r, r) for r in loads}
    draft = {r: 0.05 * step(r, r) for r in loads}
    fixed = {r: r * tau / (step(8 * r, r) + draft[r]) for r in loads}
    table = scenarios.derived_table(
        {"none": none, "fixed-7": fixed},
        tau,
        work,
        {"draft_share": 0.05, "upkeep_share": 0.005},
    )
    assert table.per_context_token == pytest.approx(1e-7, rel=0.02)
    for r in loads:
        for tokens in (r, 8 * r):
            seconds = float(table.step_seconds(tokens, context * r))
            assert seconds == pytest.approx(step(tokens, r), rel=0.02)
        assert float(table.draft_seconds(r, 7)) == pytest.approx(draft[r], rel=0.02)


def _cases(*quick: tuple[int, float]) -> list[object]:
    """All loads and rates; those that are not quick are marked slow."""
    every = [(c, r) for c in (2, 8, 64) for r in (0.3, 0.6, 0.85)]
    assert set(quick) <= set(every)
    slow = pytest.mark.slow
    return [pytest.param(*e, marks=() if e in quick else slow) for e in every]


@pytest.mark.parametrize("clients, rate", _cases((8, 0.6), (64, 0.3)))
def test_adaptive_is_not_worse_than_what_could_be_set_by_hand(
    clients: int, rate: float
) -> None:
    work = Workload(250, 512, prefill=False)
    scenario = scenarios.Scenario(
        "t",
        acceptance.constant(rate, WIDTH, 0.8),
        Machine(DEMO, noise=0.03, puts_off=True),
        work=work,
    )
    rows = {
        name: point(scenario, name, clients, steps=(300, max(400, 4000 // clients)))
        for name in ("none", "fixed-1", "fixed-3", "fixed-7", "adaptive")
    }
    speed = {name: row["output_throughput"] for name, row in rows.items()}
    assert speed["adaptive"] > (1 - 0.015) * speed["none"]
    # Chance moves arms against each other by 1 to 2% in so few rounds.
    fixed = max(v for name, v in speed.items() if name.startswith("fixed"))
    assert speed["adaptive"] > 0.96 * fixed


def test_speed_of_a_user_at_matched_throughput() -> None:
    def rows(*points: tuple[float, float]) -> dict[str, dict[str, float]]:
        keys = ("output_throughput", "tok_s_per_user")
        return {str(i): dict(zip(keys, p, strict=True)) for i, p in enumerate(points)}

    arms = {
        "adaptive": rows((100.0, 60.0), (150.0, 40.0), (300.0, 9.0)),
        # The last load serves less than the one before: nobody would choose it.
        "fixed-7": rows((50.0, 50.0), (150.0, 30.0), (120.0, 5.0)),
    }
    found = report.at_matched_throughput(arms, "adaptive", "fixed-7")
    assert found == pytest.approx({"0": 60 / 40, "1": 40 / 30})


def test_what_the_controller_believes_can_be_wrong() -> None:
    doubled = scenarios.distorted(DEMO, "steps*2")
    assert doubled.step_seconds(8) == pytest.approx(2 * DEMO.step_seconds(8))
    assert scenarios.distorted(DEMO, "flat").step_seconds(512) == DEMO.step[0]
    assert scenarios.distorted(DEMO, "drafting*3").draft_seconds(8, 7) == pytest.approx(
        3 * DEMO.draft_seconds(8, 7)
    )
    with pytest.raises(ValueError, match="distortion"):
        scenarios.distorted(DEMO, "steps+2")


def test_validation_recovers_the_overhead_it_was_made_with() -> None:
    settings = {
        "concurrency": [1, 4, 8],
        "num_prompts": {"1": 4, "4": 8, "8": 16},
        "output_tokens": 30,
        "output_spread": 0.5,
        "warmup_tokens": 8,
        "max_num_seqs": None,
    }
    drafter = acceptance.constant(0.5, WIDTH)
    true = Machine(DEMO, per_step=0.004, per_answer=0.0006)
    scenario = scenarios.Scenario("t", drafter, true, work=Workload(20, 30))
    like = validation.like(scenario, settings)
    arms: dict[str, dict[str, dict[str, object]]] = {}
    for name in ("none", "dspark-fixed-3"):
        by_load = validation.simulate_sweep(like, name, settings, 1, seed=0)
        arms[name] = {}
        for clients, counts in by_load.items():
            row = figures(counts[0])
            row |= {"runs": 1, "output_throughput_range": [0.0, 0.0]}
            arms[name][str(clients)] = row
    result = {"settings": settings, "arms": arms}
    unknown = replace(scenario, machine=Machine(DEMO))
    found = validation.validate(unknown, result, seeds=1)
    assert found["overhead"]["per_step_ms"] == pytest.approx(4, rel=0.02)
    assert found["overhead"]["per_answer_ms"] == pytest.approx(0.6, rel=0.02)
    assert found["overhead"]["scale"] == 1.0
    assert found["largest_error"] < 0.01
    # A machine twice as fast: its factor is found only where it is asked for.
    faster = replace(unknown, machine=Machine(DEMO, scale=0.5))
    assert validation.validate(faster, result, seeds=1)["largest_error"] > 0.05
    found = validation.validate(faster, result, seeds=1, fit_scale=True)
    assert found["overhead"]["scale"] == pytest.approx(1.0, rel=0.05)
    assert found["largest_error"] < 0.03


def test_acceptance_of_an_evaluation() -> None:
    benchmarks = Path(simulate.__file__).parent
    file = benchmarks / "results" / "evaluate-first.json"
    found = acceptance.read(file, 0.0)
    ours = acceptance.read(benchmarks / "data" / "smollm2-135m-dspark.json")
    assert found.width == ours.width == WIDTH
    for name, data in ours.datasets.items():
        theirs = found.datasets[name]
        assert theirs.conditional == pytest.approx(data.conditional, abs=1e-3)
        assert theirs.excess == pytest.approx(data.excess, abs=1e-3)
        # The mean of rounds is the product of the positions' conditional rates.
        rounds = json.loads(file.read_text())
        tau = rounds["datasets"][name]["tau"]
        assert data.tau == pytest.approx(tau, rel=0.01)
    with pytest.raises(ValueError, match="no rounds at temperature"):
        acceptance.read(file, 0.5)


def test_the_command(tmp_path: Path) -> None:
    out, png = tmp_path / "out.json", tmp_path / "out.png"
    file = Path(simulate.__file__).parent / "data" / "rocm-deepseek-v4.json"
    arguments = ["--scenario", str(file), "--clients", "4", "--steps", "20", "60"]
    arguments += ["--arms", "none", "fixed-7", "adaptive", "--wrong", "flat"]
    assert simulate.main([*arguments, "--json", str(out), "--png", str(png)]) == 0
    result = json.loads(out.read_text())
    assert result["arms"]["none"]["4"]["tau"] == 1.0
    assert result["winners"]["4"]["best"] in ("none", "fixed-7", "adaptive")
    assert result["sensitivity"]["exact"]["4"]["to_exact"] == 1.0
    assert result["provenance"]["git"] and png.stat().st_size > 5000
    assert simulate.main(["--clients", "4"]) == 1  # neither scenario nor cost table


def test_point_counts_what_comes_after_the_warm_up() -> None:
    scenario = scenarios.Scenario("t", acceptance.constant(0.5, WIDTH), Machine(DEMO))
    seen: list[int] = []
    row = point(scenario, "fixed-1", 2, steps=(10, 25), show=lambda: seen.append(1))
    assert row["steps"] == 25 and sum(seen) == 35
