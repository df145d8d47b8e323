"""What serving taught about step costs is there at the next start.

In this process an engine's end is an orderly one. `vllm serve` by default kills its
engine core right after asking it to end, so the server here is also asked to wait.
"""

from __future__ import annotations

import json
import logging
import math
import time
import urllib.request
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.integration.engine import Engine, engine
from tests.integration.forks import ForkedServer
from tests.integration.recorder import drive, greedy, prompt
from tests.integration.test_adaptive import cost_table, free
from tests.integration.test_server import ARGUMENTS, ENVIRONMENT
from vllm_dspark.cli.server import speculative_arguments
from vllm_dspark.schedule import cost_file, cost_keeper
from vllm_dspark.schedule.cost_file import CostFile
from vllm_dspark.schedule.facts import StepTimes

pytestmark = pytest.mark.slow

ADAPTIVE = {"dspark": {"policy": "adaptive"}}


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, a quick profile, and few observations that are enough."""
    from vllm_dspark.integration import costs

    profile = costs.profile
    monkeypatch.setenv("VLLM_DSPARK_CACHE", str(tmp_path))
    monkeypatch.setattr(costs, "profile", lambda *a, **k: profile(*a, budget=1.0, **k))
    monkeypatch.setattr(cost_keeper, "MIN_OBSERVATIONS", 16)
    # Steps that seem to take a second beside drafts of a moment: nothing fits.
    monkeypatch.setattr(cost_keeper, "MAX_ERROR", math.inf)
    return tmp_path


def kept(cache: Path) -> CostFile:
    (path,) = (cache / cost_file.FOLDER).glob("*.json")
    return cost_file.read(path)


def said(caplog: pytest.LogCaptureFixture, words: str) -> list[str]:
    """Messages with these words; a record may be captured by two handlers."""
    records = {id(r): r for r in caplog.records if words in r.getMessage()}
    return [record.getMessage() for record in records.values()]


def serve(eng: Engine, monkeypatch: pytest.MonkeyPatch, seconds: float = 1.0) -> Any:
    """Steps that seem to take so long; what corrects the table."""
    controller = eng.scheduler.controller
    observe = type(controller).timed

    def slow(times: StepTimes) -> None:
        observe(controller, replace(times, target_seconds=seconds))

    monkeypatch.setattr(controller, "timed", slow)
    # Enough steps for the table to come near, however many drafts are made.
    drive(eng, [(0, prompt(9), greedy(80))])
    return controller.live


def test_a_warm_start_has_the_corrected_table(
    tiny_target: Path,
    tiny_drafter: Path,
    cache: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with engine(tiny_target, tiny_drafter, additional_config=ADAPTIVE) as eng:
        monkeypatch.setattr(cost_keeper.CostKeeper, "idle", lambda self: None)
        live = serve(eng, monkeypatch)
        first = kept(cache)
    second = kept(cache)
    assert "live_observations" not in first.measured
    assert second.measured["live_observations"] == live.observed > 16
    assert second.table == live.snapshot() != first.table
    assert 0.5 < float(second.table.step_seconds(1)) < 2
    with engine(tiny_target, tiny_drafter, additional_config=ADAPTIVE) as eng:
        drive(eng, [(0, prompt(9), greedy(2))])
        assert eng.scheduler.controller.live._table == second.table
    assert kept(cache) == second  # it has seen too little


def test_an_idle_engine_keeps_it_before_its_end(
    tiny_target: Path,
    tiny_drafter: Path,
    cache: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with engine(tiny_target, tiny_drafter, additional_config=ADAPTIVE) as eng:
        live = serve(eng, monkeypatch)
        assert kept(cache).measured["live_observations"] == live.observed


def test_the_users_own_file_is_never_written(
    tiny_target: Path,
    tiny_drafter: Path,
    cache: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    own = Path(cost_table(tmp_path, free))
    before = own.read_bytes()
    ours = {"dspark": {"policy": "adaptive", "cost_table": str(own)}}
    with engine(tiny_target, tiny_drafter, additional_config=ours) as eng:
        live = serve(eng, monkeypatch)
        assert live.observed > 16
    assert own.read_bytes() == before
    assert [entry.name for entry in tmp_path.iterdir()] == [own.name]


def test_a_cache_that_cannot_be_written_is_said_once(
    tiny_target: Path,
    tiny_drafter: Path,
    cache: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(logging.getLogger("vllm"), "level", logging.INFO)
    (cache / cost_file.FOLDER).write_text("a file where the folder belongs")
    with (
        caplog.at_level("WARNING", "vllm_dspark"),
        engine(tiny_target, tiny_drafter, additional_config=ADAPTIVE) as eng,
    ):
        assert serve(eng, monkeypatch).observed > 16
    assert len(said(caplog, "not kept")) == 1


def test_a_server_that_is_told_to_end(
    text_pair: tuple[Path, Path], cache: Path
) -> None:
    """SIGTERM. The first answer is kept in the pause after it, the second at the end,
    which comes less than `cost_keeper.INTERVAL` later."""
    target, drafter = text_pair
    more = ["--shutdown-timeout", "30", "--additional-config", json.dumps(ADAPTIVE)]
    more += speculative_arguments({"method": "dspark", "model": str(drafter)})
    environment = {**ENVIRONMENT, "VLLM_DSPARK_CACHE": str(cache)}
    log = cache / "server.log"
    with ForkedServer(target, ARGUMENTS + more, log, environment) as server:
        server.wait_ready(lambda *_: None)
        start = time.monotonic()
        ask(server)
        # The engine writes a moment after the answer has left it.
        for _ in range(600):
            if "live_observations" in kept(cache).measured:
                break
            time.sleep(0.1)
        idle = kept(cache).measured["live_observations"]
        ask(server)
        again = kept(cache).measured["live_observations"]
        if time.monotonic() - start < cost_keeper.INTERVAL:
            assert again == idle
        server.stop(patience=60)
    assert idle >= 256  # the default: another process does not see what tests set
    assert kept(cache).measured["live_observations"] >= idle + 256


def ask(server: ForkedServer) -> None:
    """As many steps as are enough, and the pause after them."""
    body = {"model": "tiny", "prompt": "hello", "max_tokens": 400, "ignore_eos": True}
    request = urllib.request.Request(
        f"{server.url}/v1/completions",
        json.dumps(body).encode(),
        {"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=300) as answer:
        assert answer.status == 200
