"""News of a controller: each thing once, and windows that move."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest

from tests.schedule.simulated import DEMO, WIDTH, Engine
from vllm_dspark.metrics import (
    METRICS,
    Kind,
    Reporter,
    calibration_error,
    labels_of,
)
from vllm_dspark.schedule.controller import Controller

DASHBOARD = Path(__file__).parent.parent / "docs" / "grafana-dashboard.json"


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def engine() -> Engine:
    controller = Controller(WIDTH)
    controller.price(DEMO)
    return Engine(controller)


def added(news: list[dict[str, Any]]) -> dict[str, Any]:
    """What a front-end's counters stand at after these."""
    kinds = {m.name: m.kind for m in METRICS}
    sums: dict[str, Any] = {}
    for one in news:
        for name, value in one.items():
            if kinds[name] is Kind.GAUGE:
                continue
            if isinstance(value, dict):
                into = sums.setdefault(name, {})
                for key, count in value.items():
                    into[key] = into.get(key, 0) + count
            else:
                sums[name] = sums.get(name, 0) + value
    return sums


def test_news_add_up_to_the_totals(engine: Engine) -> None:
    clock, totals = Clock(), engine.controller.totals
    reporter = Reporter(engine.controller, clock)
    news = []
    for load in (1, 8, 64, 3):
        engine.run(load, 40)
        reporter.planned(0.25)
        clock.now += 1.0
        news.append(reporter.take())
    assert all(n is not None for n in news)
    sums = added(news)
    assert sums["steps"] == totals.steps == 160
    assert (
        sums["verified_tokens"]
        == totals.verified
        == sum(length * count for length, count in sums["verify_length"].items())
    )
    assert sums["accepted_tokens"] == totals.accepted > 100
    assert sums["expected_accepted_tokens"] == pytest.approx(totals.expected)
    assert sums["planner_seconds"] == 1.0
    assert sums["steps_by_stop"] == dict(totals.stops)
    assert sums["steps_by_reason"] == dict(engine.controller.drafting.counts)
    assert sums["draft_length"] == dict(totals.draft_lens)


def test_every_metric_has_news_of_its_kind(engine: Engine) -> None:
    engine.run(4, 50)
    news = Reporter(engine.controller).take()
    assert news is not None and set(news) == {m.name for m in METRICS}
    for metric in METRICS:
        value = news[metric.name]
        assert isinstance(value, dict) == bool(
            metric.label or metric.kind is Kind.HISTOGRAM
        ), metric
        if metric.label:
            assert set(value) <= set(labels_of(metric, WIDTH)), metric
    json.dumps(news)  # plain numbers: numpy's do not travel


def test_once_an_interval_unless_at_once(engine: Engine) -> None:
    clock = Clock()
    reporter = Reporter(engine.controller, clock)
    assert reporter.take() is not None
    engine.run(4, 10)
    clock.now = 0.9
    assert reporter.take() is None
    found = reporter.take(at_once=True)
    assert found is not None and found["steps"] == 10
    clock.now = 1.1
    found = reporter.take()
    assert found is not None and found["steps"] == 0


def test_accepted_length_is_of_the_last_reports(engine: Engine) -> None:
    clock = Clock()
    reporter = Reporter(engine.controller, clock)
    empty = reporter.take()
    assert empty is not None and math.isnan(empty["accepted_length"])

    def after(accept: float) -> dict[str, Any]:
        engine.accept = accept
        for _ in range(12):
            engine.run(4, 30)
            clock.now += 1.0
            news = reporter.take()
        assert news is not None
        return news

    good, poor = after(0.9), after(0.3)
    assert good["accepted_length"] > 3 > 2 > poor["accepted_length"]
    for news in (good, poor):  # the drafter's confidences are honest
        predicted = news["predicted_accepted_length"]
        assert predicted == pytest.approx(news["accepted_length"], rel=0.15)


def test_the_longest_choice_is_of_the_last_report(engine: Engine) -> None:
    reporter = Reporter(engine.controller)
    reporter.planned(0.2)
    reporter.planned(0.1)
    first, second = (reporter.take(at_once=True) for _ in range(2))
    assert first is not None and first["planner_max_seconds"] == 0.2
    assert second is not None and second["planner_max_seconds"] == 0.0


def test_a_clock_that_goes_back_lowers_no_counter(engine: Engine) -> None:
    reporter = Reporter(engine.controller)
    before = engine.controller.totals.planner_seconds
    reporter.planned(-3600.0)
    assert engine.controller.totals.planner_seconds == before


def test_calibration_error_of_all_positions(engine: Engine) -> None:
    assert math.isnan(calibration_error(engine.controller))
    engine.run(8, 100)
    assert 0 < calibration_error(engine.controller) < 0.2


# ---- the dashboard ----


def expressions(dashboard: dict[str, Any]) -> list[str]:
    return [t["expr"] for p in dashboard["panels"] for t in p.get("targets", ())]


def suffixes(kind: Kind) -> tuple[str, ...]:
    return ("_bucket", "_sum", "_count") if kind is Kind.HISTOGRAM else ("",)


def test_the_dashboard_names_what_there_is() -> None:
    dashboard = json.loads(DASHBOARD.read_text())
    named = set(re.findall(r"vllm:dspark_\w+", " ".join(expressions(dashboard))))
    there = {m.exposed + s for m in METRICS for s in suffixes(m.kind)}
    assert named <= there
    shown = {
        m.name for m in METRICS for s in suffixes(m.kind) if m.exposed + s in named
    }
    assert shown == {m.name for m in METRICS}


def test_the_dashboard_can_be_imported() -> None:
    dashboard = json.loads(DASHBOARD.read_text())
    variables = {v["name"]: v["type"] for v in dashboard["templating"]["list"]}
    assert variables["datasource"] == "datasource"
    assert dashboard["id"] is None and dashboard["uid"] and dashboard["title"]
    assert dashboard["schemaVersion"] > 0
    panels = dashboard["panels"]
    assert len({p["id"] for p in panels}) == len(panels)
    cells: set[tuple[int, int]] = set()
    for panel in panels:
        at = panel["gridPos"]
        assert at["x"] + at["w"] <= 24
        own = {
            (x, y)
            for x in range(at["x"], at["x"] + at["w"])
            for y in range(at["y"], at["y"] + at["h"])
        }
        assert not own & cells, panel["title"]
        cells |= own
        if panel["type"] != "row":
            assert panel["datasource"]["uid"] == "${datasource}"
            assert panel["targets"] and panel["title"]
    used = set(re.findall(r"\$(\w+)", " ".join(expressions(dashboard))))
    assert used - {"__rate_interval"} <= set(variables)
