"""What a load sweep keeps and makes of it: files, medians, ratios, figures."""

from __future__ import annotations

import json
from pathlib import Path

import _sweep_counts as counts
import _sweep_grid as grid
import _sweep_plots as plots
import _sweep_prompts as sweep_prompts
import _sweep_report as report
import _sweep_slo as slo
import _sweep_summary as summary
import pytest

from tests.tiny import make_tiny_tokenizer

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
    for rate in (0.5, 2.0):
        results.add(grid.Point("x", 0, 0, rate=rate), RECORD)
    for top, variable, columns in (
        (grid.GRID, "max_concurrency", 2),
        (grid.OPEN, "request_rate", 2),
    ):
        folder = tmp_path / top
        plot.plot(
            folder,
            tmp_path / "figures",
            [],
            ["arm"],
            [variable],
            [],
            var_x=variable,
            var_y="output_throughput",
            filter_by=plot.PlotFilters(),
            bin_by=plot.PlotBinners(),
            scale_x=None,
            scale_y=None,
            dry_run=True,  # drawing needs seaborn
        )
        arms = 2 if top == grid.GRID else 1
        assert f"Grid: {arms} rows x {columns} cols" in capsys.readouterr().out
        plot_pareto.plot_pareto(folder, variable, None, ["arm"], dry_run=True)
        told = capsys.readouterr().out
        assert "BEGIN FIGURE" in told and "Skipped" not in told
    records = [
        record
        for file in (tmp_path / grid.GRID).rglob("summary.json")
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


def test_prompts_of_vllms_own_datasets(tmp_path: Path):
    pytest.importorskip("vllm")
    from vllm.tokenizers import get_tokenizer

    tokenizer = get_tokenizer(str(make_tiny_tokenizer(tmp_path)))
    options = {"dataset_name": "random", "random_input_len": 6, "num_prompts": 3}
    text = f"noise={json.dumps(options)}"
    found = sweep_prompts.vllm_prompts(text, tokenizer, 1000, seed=0)
    assert len(found) == 3 and {p.dataset for p in found} == {"noise"}
    assert found == sweep_prompts.vllm_prompts(text, tokenizer, 1000, seed=0)
    assert all(p.messages[0]["content"] and p.tokens >= 6 for p in found)
    with pytest.raises(ValueError, match="at most 2 tokens"):
        sweep_prompts.vllm_prompts(text, tokenizer, 2, seed=0)
    for wrong in ('{"dataset_name": "nothing"}', '{"no_such_option": 1}', "[]", "{"):
        with pytest.raises(ValueError, match="--vllm-dataset"):
            sweep_prompts.vllm_prompts(f"x={wrong}", tokenizer, 1000, seed=0)


# ---- figures ----


def test_ratios_are_of_the_same_run_and_the_best_other_is_chosen_by_load(
    tmp_path: Path,
):
    adaptive = "dspark-adaptive"
    speeds = {("none", 1, run): s for run, s in enumerate((10.0, 20.0, 40.0))}
    speeds |= {(adaptive, 1, run): s for run, s in enumerate((20.0, 20.0, 60.0))}
    speeds |= {("fixed", 1, 0): 15.0, ("fixed", 8, 0): 90.0}
    speeds |= {("none", 8, 0): 100.0, (adaptive, 8, 0): 99.0}
    found = summary.summarise(
        {grid.GRID: fabricate(tmp_path, speeds).records(grid.GRID)}
    )
    row = found["arms"][adaptive]["1"]
    # The ratio of the medians would be 1.0.
    assert row["ratio_to_none"] == {"median": 1.5, "runs": [2.0, 1.0, 1.5]}
    assert row["output_throughput"] == 20.0 and row["tok_s_per_user"] == 20.0
    assert row["output_throughput_range"] == [20.0, 60.0]
    ratios = found["ratios"]
    assert ratios["best other"]["8"] == {"arm": "none", "median": 0.99, "runs": [0.99]}
    assert ratios["fixed"]["8"] == {"median": 1.1, "runs": [1.1]}
    # At one client "none" has the higher median; the pairs are its own.
    assert ratios["best other"]["1"] == {"arm": "none", **ratios["none"]["1"]}
    assert ratios["none"]["1"]["runs"] == [2.0, 1.0, 1.5]
    assert found["arms"]["fixed"]["1"]["ratio_to_none"]["runs"] == [1.5]


def test_a_round_measured_in_two_sessions_gives_no_ratio(tmp_path: Path):
    results = fabricate(tmp_path, {("none", 1, 1): 10.0, ("x", 1, 1): 30.0})
    for arm, session in (("none", "before"), ("x", "after")):
        results.add(grid.Point(arm, 1, 0), {**RECORD, "session": session})
    found = summary.summarise({grid.GRID: results.records(grid.GRID)})
    found = found["arms"]["x"]["1"]
    assert found["ratio_to_none"]["runs"] == [3.0] and found["runs"] == 2


def test_tables_and_figures_bear_arms_with_gaps(tmp_path: Path, capsys):
    pytest.importorskip("matplotlib")
    results = fabricate(tmp_path, {("a", 1, 0): 3.0, ("b", 8, 0): 4.0})
    results.add(grid.Point("a", 8, 0, "math"), RECORD)
    results.add(grid.Point("a", 0, 0, rate=2.0), RECORD)
    found = summary.summarise({top: results.records(top) for top in grid.TOPS})
    report.show(found)
    told = capsys.readouterr().out
    assert "math" in told and "2/s" in told
    files = plots.draw(found, tmp_path)
    assert {"pareto.png", "open_loop.png"} <= {file.name for file in files}
    assert all(file.stat().st_size > 1000 for file in files)


def sample(name: str, value: float, **labels: str) -> tuple[object, float]:
    return (name, tuple(sorted(labels.items()))), value


def test_lengths_are_per_request_step_with_steps_that_had_no_drafts():
    name = "vllm:spec_decode_num_{}_total".format
    before = dict([sample(counts._REQUEST_STEPS, 100, engine="0")])
    after = dict(
        [
            sample(counts._REQUEST_STEPS, 150, engine="0"),
            sample(counts._STEPS, 10),
            sample(name("drafts"), 20),
            sample(name("draft_tokens"), 60),
            sample(name("accepted_tokens"), 30),
            sample(name("accepted_tokens_per_pos"), 20, position="0"),
            sample("vllm:dspark_drafted_tokens_total", 100, engine="0"),
            sample("vllm:dspark_length_bucket", 4, engine="0", le="1.0"),
            sample("vllm:dspark_length_created", 1e9),
        ]
    )
    found = counts.counted(before, after, emitted=80)
    assert found["tau"] == 1.6 and found["verify_length"] == 1.2
    assert found["draft_length"] == 2.0
    assert found["accepted_length_drafted"] == 2.5  # of the 20 steps with drafts
    assert found["dspark_metrics"] == {
        "vllm:dspark_drafted_tokens_total": 100,
        "vllm:dspark_length_bucket{le=1.0}": 4,
    }


def test_without_counters_lengths_are_unknown_not_zero():
    found = counts.counted({}, {}, emitted=80)
    assert found["tau"] is None and found["draft_length"] is None


# ---- service levels ----


def curve(*places: tuple[float, float]) -> dict[str, dict[str, float]]:
    """An arm's loads 1, 2, ...: throughput, and tok/s per user."""
    return {
        str(i + 1): {"output_throughput": t, "tok_s_per_user": s, "ttft_p99_ms": 10 * t}
        for i, (t, s) in enumerate(places)
    }


def test_capacity_at_a_service_level_is_read_off_the_curve():
    places = slo.places(curve((10, 10), (30, 8), (40, 4)), "tok_s_per_user")
    assert slo.capacity(places, 10, at_least=True) == 10
    assert slo.capacity(places, 9, at_least=True) == 20  # half way
    assert slo.capacity(places, 1, at_least=True) == 40
    assert slo.capacity(places, 11, at_least=True) is None
    # Throughput that falls with more load is not what is carried.
    folded = slo.places(curve((10, 10), (30, 8), (20, 4)), "tok_s_per_user")
    assert slo.capacity(folded, 4, at_least=True) == 30
    waits = slo.places(curve((10, 10), (30, 8)), "ttft_p99_ms")
    assert slo.capacity(waits, 200, at_least=False) == 20


def test_speed_at_matched_throughput():
    arms = {"none": curve((10, 10), (30, 5)), "x": curve((20, 20), (25, 10))}
    found = slo.matched(arms)
    assert found["none"] == {"10": 1.0, "30": 1.0}
    assert found["x"] == {"10": 2.0}  # 30 it does not carry
    assert slo.at_anchors(arms, {"tok_s_per_user": [8]}) == {
        "tok_s_per_user": {"8": {"none": 18.0, "x": 25}}
    }
