"""The load sweep's parts without a server: arms, prompts, order, files, ratios."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import _sweep_arms as arms
import _sweep_client as client
import _sweep_grid as grid
import _sweep_options as options
import _sweep_report as report
import pytest
from _sweep_prompts import Prompt, Prompts


def prompts(**sizes: int) -> Prompts:
    rows = [Prompt(name, i, [], 5) for name, n in sizes.items() for i in range(n)]
    return Prompts(rows, seed=0)


# ---- arms ----


def test_the_adaptive_arm_has_no_number_of_drafts():
    arm = arms.named("dspark-adaptive", "D")
    assert arm.speculative_config == {"method": "dspark", "model": "D"}
    flag, value = arm.arguments[2:]
    assert flag == "--additional-config"
    assert json.loads(value) == {"dspark": {"policy": "adaptive"}}
    assert arms.named("none", "D").arguments == []
    fixed = arms.named("dspark-fixed-3", "D")
    assert fixed.speculative_config["num_speculative_tokens"] == 3


def test_the_plugin_knows_the_options_of_every_named_arm():
    from vllm_dspark.config import DSparkOptions

    for _, named in arms.DSPARK.values():
        DSparkOptions.from_dict(named)


def test_an_arm_of_ones_own():
    arm = arms.custom('mine={"additional_config": {"dspark": {"policy": "fixed"}}}')
    assert arm == arms.Arm("mine", None, {"dspark": {"policy": "fixed"}})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("mine", "NAME="),
        ("a/b={}", "NAME="),
        ("mine={", "damaged"),
        ("mine=[]", "objects"),
        ('mine={"speculative_config": 3}', "objects"),
        ('mine={"spec": {}}', "unknown key 'spec'"),
    ],
)
def test_bad_arms_are_refused(text: str, message: str):
    with pytest.raises(ValueError, match=message):
        arms.custom(text)


def test_servers_that_do_not_fit_are_not_started():
    arms.check_memory(2.0, available=8.0, more=4)
    with pytest.raises(ValueError, match=r"5 more servers of about 2\.0 GiB"):
        arms.check_memory(2.0, available=8.0, more=5)


# ---- prompts ----


def test_every_window_is_balanced_and_the_order_is_not_a_cycle():
    taken = prompts(math=9, code=5, chat=7).take(3, 30)
    assert Counter(p.dataset for p in taken) == {"math": 10, "code": 10, "chat": 10}
    blocks = {tuple(p.dataset for p in taken[i : i + 3]) for i in range(0, 30, 3)}
    assert len(blocks) > 1


def test_windows_join_and_do_not_depend_on_who_asks():
    one, other = prompts(a=6, b=4), prompts(a=6, b=4)
    assert one.take(0, 10) == other.take(0, 4) + other.take(4, 6)


def test_one_dataset_alone_is_used_up_before_it_starts_again():
    taken = prompts(a=6, b=4).take(0, 8, "b")
    assert {p.dataset for p in taken} == {"b"}
    assert sorted(p.number for p in taken[:4]) == [0, 1, 2, 3]
    assert taken[4:] == taken[:4]


def test_an_unknown_dataset_is_refused():
    with pytest.raises(ValueError, match="no prompt is of dataset 'c'"):
        prompts(a=1).take(0, 1, "c")


# ---- order ----


def test_arms_take_turns_at_each_load_and_in_being_first():
    found = grid.points(["a", "b", "c"], [1, 8], 2)
    order = [(p.run, p.concurrency, p.arm) for p in found]
    assert [arm for run, c, arm in order if (run, c) == (0, 1)] == ["a", "b", "c"]
    assert [arm for run, c, arm in order if (run, c) == (0, 8)] == ["b", "c", "a"]
    assert [arm for run, c, arm in order if (run, c) == (1, 1)] == ["b", "c", "a"]
    assert [c for run, c, _ in order if run == 0] == [1, 1, 1, 8, 8, 8]


def test_one_at_a_time_has_the_same_points_arm_by_arm():
    split = [("a", "math", 4)]
    found = grid.points(["a", "b"], [1, 8], 2, split, one_at_a_time=True)
    assert set(found) == set(grid.points(["a", "b"], [1, 8], 2, split))
    assert [p.arm for p in found] == ["a"] * 3 + ["b"] * 4 + ["a"] * 3


def test_points_have_whole_waves_of_clients():
    assert grid.num_prompts(8, 3.2, 8) == 24
    assert grid.num_prompts(64, 0.4, 8) == 128  # two waves at least
    assert grid.num_prompts(3, 0.4, 8) == 9
    assert grid.estimated_counts({1: 0.5, 8: 2.0}, 40.0, 8) == {1: 20, 8: 80}


# ---- files ----

RECORD = {
    "output_throughput": 10.0,
    "median_tpot_ms": 50.0,
    "median_ttft_ms": 20.0,
    "p99_ttft_ms": 30.0,
    "num_prompts": 8,
    "tau": 1.0,
    "verify_length": 0.0,
    "draft_length": None,
    "accepted_length_drafted": None,
    "preemptions": 0,
}


def fabricate(folder: Path, speeds: dict[tuple[str, int, int], float]) -> grid.Results:
    results = grid.Results(folder)
    for (arm, load, run), speed in speeds.items():
        record = {**RECORD, "output_throughput": speed}
        results.add(grid.Point(arm, load, run), record)
    return results


def test_vllms_own_sweep_would_use_the_same_files(tmp_path: Path):
    pytest.importorskip("vllm")
    from vllm.benchmarks.sweep import serve
    from vllm.benchmarks.sweep.param_sweep import ParameterSweepItem

    arm = ParameterSweepItem.from_record({"arm": "dspark-adaptive"})
    load = ParameterSweepItem.from_record({"max_concurrency": 8})
    base = serve._get_comb_base_path(tmp_path / "mixed", arm, load)
    file = grid.Results(tmp_path).file(grid.Point("dspark-adaptive", 8, 2))
    assert file == serve._get_comb_run_path(base, 2)


def test_vllms_plot_commands_read_the_results(tmp_path: Path, capsys):
    pytest.importorskip("vllm")
    from vllm.benchmarks.sweep import plot, plot_pareto

    speeds = {
        (a, c, r): 10.0 * c for a in ("none", "x") for c in (1, 8) for r in (0, 1)
    }
    results = fabricate(tmp_path, speeds)
    results.add(grid.Point("x", 8, 0, "math"), RECORD)
    folder = tmp_path / grid.GRID
    plot.plot(
        folder,
        tmp_path / "figures",
        [],
        ["arm"],
        ["max_concurrency"],
        [],
        var_x="max_concurrency",
        var_y="output_throughput",
        filter_by=plot.PlotFilters(),
        bin_by=plot.PlotBinners(),
        scale_x=None,
        scale_y=None,
        dry_run=True,  # drawing needs seaborn
    )
    assert "Grid: 2 rows x 2 cols" in capsys.readouterr().out
    records = [
        record
        for file in folder.rglob("summary.json")
        for record in plot._json_load_bytes(file)
    ]
    prepared, skipped = plot_pareto._prepare_records(
        records, user_count_var="max_concurrency", gpu_count_var=None
    )
    assert (len(prepared), skipped) == (8, 0)
    assert all(row["tokens_per_user"] == 10.0 for row in prepared)


def test_a_resumed_sweep_must_be_the_same_and_keeps_its_counts(tmp_path: Path):
    results = grid.Results(tmp_path)
    with pytest.raises(ValueError, match="holds no sweep"):
        results.settings({"seed": 0}, resume=True)
    results.settings({"seed": 1}, resume=False)
    kept = results.settings({"seed": 0}, resume=False)  # nothing was measured
    results.keep_counts({**kept, "num_prompts": {"1": 8}})
    results.add(grid.Point("a", 1, 0), RECORD)
    with pytest.raises(ValueError, match="--resume"):
        results.settings({"seed": 0}, resume=False)
    with pytest.raises(ValueError, match=r"seed is 1, but .* with 0"):
        results.settings({"seed": 1}, resume=True)
    kept = results.settings({"seed": 0}, resume=True)
    assert kept == {"seed": 0, "num_prompts": {"1": 8}}


def test_a_failed_point_is_no_result_and_is_tried_again(tmp_path: Path):
    results, point = grid.Results(tmp_path), grid.Point("a", 1, 0)
    results.add_failure(point, "why")
    results.add(grid.Point("a", 1, 1), RECORD)
    assert not results.has(point)
    assert [r["run_number"] for r in results.records(grid.GRID)] == [1]
    results.add(point, RECORD)
    assert results.has(point)
    assert not list(tmp_path.rglob("*.failure.json"))


# ---- figures ----


def test_ratios_are_of_the_same_run_and_the_best_other_is_chosen_by_load(
    tmp_path: Path,
):
    adaptive = "dspark-adaptive"
    speeds = {("none", 1, run): s for run, s in enumerate((10.0, 20.0, 40.0))}
    speeds |= {(adaptive, 1, run): s for run, s in enumerate((20.0, 20.0, 60.0))}
    speeds |= {("fixed", 1, 0): 15.0, ("fixed", 8, 0): 90.0}
    speeds |= {("none", 8, 0): 100.0, (adaptive, 8, 0): 99.0}
    found = report.summarise(fabricate(tmp_path, speeds).records(grid.GRID), [])
    row = found["arms"][adaptive]["1"]
    # The ratio of the medians would be 1.0.
    assert row["ratio_to_none"] == {"median": 1.5, "runs": [2.0, 1.0, 1.5]}
    assert row["output_throughput"] == 20.0 and row["tok_s_per_user"] == 20.0
    assert row["output_throughput_range"] == [20.0, 60.0]
    best = found["adaptive_to_best_other"]
    assert best["8"] == {
        "best_other": "none",
        "ratio": {"median": 0.99, "runs": [0.99]},
    }
    assert found["arms"]["fixed"]["1"]["ratio_to_none"]["runs"] == [1.5]


def test_a_round_measured_in_two_sessions_gives_no_ratio(tmp_path: Path):
    results = fabricate(tmp_path, {("none", 1, 1): 10.0, ("x", 1, 1): 30.0})
    for arm, session in (("none", "before"), ("x", "after")):
        results.add(grid.Point(arm, 1, 0), {**RECORD, "session": session})
    found = report.summarise(results.records(grid.GRID), [])["arms"]["x"]["1"]
    assert found["ratio_to_none"]["runs"] == [3.0] and found["runs"] == 2


def test_tables_and_figures_bear_arms_with_gaps(tmp_path: Path, capsys):
    pytest.importorskip("matplotlib")
    results = fabricate(tmp_path, {("a", 1, 0): 3.0, ("b", 8, 0): 4.0})
    results.add(grid.Point("a", 8, 0, "math"), RECORD)
    found = report.summarise(results.records(grid.GRID), results.records(grid.SPLIT))
    report.show(found)
    assert "math" in capsys.readouterr().out
    for file in report.draw(found, tmp_path):
        assert file.stat().st_size > 1000


def sample(name: str, value: float, **labels: str) -> tuple[object, float]:
    return (name, tuple(sorted(labels.items()))), value


def test_lengths_are_per_request_step_with_steps_that_had_no_drafts():
    name = "vllm:spec_decode_num_{}_total".format
    before = dict([sample(client._REQUEST_STEPS, 100, engine="0")])
    after = dict(
        [
            sample(client._REQUEST_STEPS, 150, engine="0"),
            sample(client._STEPS, 10),
            sample(name("drafts"), 20),
            sample(name("draft_tokens"), 60),
            sample(name("accepted_tokens"), 30),
            sample(name("accepted_tokens_per_pos"), 20, position="0"),
            sample("vllm:dspark_drafted_tokens_total", 100, engine="0"),
            sample("vllm:dspark_length_bucket", 4, engine="0", le="1.0"),
            sample("vllm:dspark_length_created", 1e9),
        ]
    )
    found = client.counted(before, after, emitted=80)
    assert found["tau"] == 1.6 and found["verify_length"] == 1.2
    assert found["draft_length"] == 2.0
    assert found["accepted_length_drafted"] == 2.5  # of the 20 steps with drafts
    assert found["dspark_metrics"] == {
        "vllm:dspark_drafted_tokens_total": 100,
        "vllm:dspark_length_bucket{le=1.0}": 4,
    }


def test_without_counters_lengths_are_unknown_not_zero():
    found = client.counted({}, {}, emitted=80)
    assert found["tau"] is None and found["draft_length"] is None


# ---- options ----


def arguments(tmp_path: Path, *more: str) -> list[str]:
    file = tmp_path / "prompts.jsonl"
    file.touch()
    found = ["--target", "T", "--drafter", "D", "--prompts", str(file)]
    return [*found, "--out", str(tmp_path / "out"), *more]


def test_quick_changes_only_what_was_not_typed(tmp_path: Path):
    args = options.parse("", arguments(tmp_path, "--quick", "--rounds", "2"))
    assert args.rounds == 2 and args.concurrency == options.QUICK["concurrency"]
    assert options.parse("", arguments(tmp_path)).rounds == options.FULL["rounds"]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--max-num-seqs", "8"], "would wait in the server"),
        (["--max-prompt-tokens", "900"], "do not fit"),
        (["--concurrency", "0"], "a concurrency is 0"),
        (["--rounds", "0"], "--rounds is 0"),
        (["--output-tokens", "1"], "--output-tokens is 1"),
        (["--seconds-per-point", "0"], "above 0"),
    ],
)
def test_options_that_do_not_go_together(tmp_path: Path, more: list[str], message: str):
    with pytest.raises(ValueError, match=message):
        options.parse("", arguments(tmp_path, *more))


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--arms", "dspark-fixed-9"], "no arm is called 'dspark-fixed-9'"),
        (["--arm", "none={}"], "two arms are called 'none'"),
        (["--arms", "none", "--split-datasets", "4"], "--split-arms"),
    ],
)
def test_arms_that_cannot_be(tmp_path: Path, more: list[str], message: str):
    with pytest.raises(ValueError, match=message):
        options.chosen_arms(options.parse("", arguments(tmp_path, *more)))


def test_answers_differ_in_length_but_not_on_average() -> None:
    lengths = [client.answer_tokens(128, 0.5, i) for i in range(64)]
    assert min(lengths) < 72 and max(lengths) > 184 and min(lengths) >= 64
    assert sum(lengths) / 64 == pytest.approx(128, rel=0.02)
    assert len(set(lengths[:8])) == 8
    assert {client.answer_tokens(128, 0.0, i) for i in range(64)} == {128}
