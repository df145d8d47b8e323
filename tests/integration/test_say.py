"""The line in the log: what it says is of the last interval."""

from __future__ import annotations

import logging

import pytest

from tests.schedule.simulated import DEMO, WIDTH, Engine
from vllm_dspark.integration.say import INTERVAL, Sayer
from vllm_dspark.schedule.controller import Controller


def test_an_interval_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    now = 0.0
    controller = Controller(WIDTH)
    controller.price(DEMO)
    engine = Engine(controller)
    sayer = Sayer(controller, lambda: now)
    with caplog.at_level(logging.INFO, "vllm_dspark"):
        engine.run(4, 30)
        sayer.say()
        assert not caplog.records
        now = INTERVAL
        sayer.say()
        sayer.say()
        controller.totals.planner_seconds += 0.04
        engine.run(4, 20)
        now = 2 * INTERVAL
        sayer.say()
        now = 3 * INTERVAL
        sayer.say()  # nothing has been done
    first, second = (r.getMessage() for r in caplog.records)
    assert first.startswith("DSpark: 30 steps; ")
    assert second.startswith("DSpark: 20 steps; ")
    assert "planned in 2.00 ms a step" in second
    for line in (first, second):
        assert "tokens per round" in line and "promised by confidences" in line
        assert "calibration error 0." in line and "step times within" in line
