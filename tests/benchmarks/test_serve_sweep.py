"""The whole load sweep with vLLM's client against servers that only pretend."""

from __future__ import annotations

import json
import subprocess
import sys
import time
import urllib.request
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm")

import _sweep_fleet
import psutil
import serve_sweep
from _sweep_arms import Arm
from _sweep_client import Client
from _sweep_measure import Sweep

from tests.tiny import make_tiny_tokenizer
from vllm_dspark.cli import server as server_module
from vllm_dspark.cli.server import free_port

pytestmark = pytest.mark.slow  # vLLM's client takes long to import

DRAW = serve_sweep.sweep_plots.draw
FAKE = Path(__file__).parent / "fake_server.py"
# How the arms' servers are faked: drafts, and the request at which one dies.
FAKES = {
    "none": ["0"],
    "dspark-adaptive": ["3"],
    "dead": ["0", "-1"],
    "dying": ["0", "16"],
}


@pytest.fixture
def sweep(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Runs a small sweep in its folder; returns exit status and result.json."""
    tokenizer = make_tiny_tokenizer(tmp_path / "target")
    rows = [
        {"dataset": name, "messages": [{"role": "user", "content": f"{name} {i}"}]}
        for i in range(6)
        for name in ("math", "code")
    ]
    file = tmp_path / "prompts.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def server(self: _sweep_fleet.Fleet, arm: Arm) -> _sweep_fleet.OwnServer:
        found = _sweep_fleet.OwnServer(self.target, [], self.logs / f"{arm.name}.log")
        found.command = [sys.executable, str(FAKE), str(found.port), *FAKES[arm.name]]
        ports[arm.name] = found.port
        return found

    ports: dict[str, int] = {}
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(_sweep_fleet.Fleet, "server", server)
    # Each of these saves seconds: fakes are idle, their counters right at once, and one
    # test looks at the figures.
    monkeypatch.setattr(_sweep_fleet, "idle_load", lambda servers: {})
    monkeypatch.setattr(server_module, "SETTLE", 0.0)
    monkeypatch.setattr(serve_sweep.sweep_plots, "draw", lambda *_: [])

    def run(
        *more: str, concurrency: Sequence[str] = ("1", "4")
    ) -> tuple[int, dict[str, Any]]:
        argv = ["serve_sweep.py", "--target", str(tokenizer), "--drafter", "D"]
        argv += ["--prompts", str(file), "--out", "out", "--output-tokens", "9"]
        argv += ["--output-spread", "0"]  # so that these are told from warm-ups
        argv += ["--warmup-tokens", "3", "--rounds-per-client", "2"]
        argv += ["--min-prompts", "4", "--seconds-per-point", "2"]
        argv += ["--concurrency", *concurrency] if concurrency else []
        argv += ["--kv-gib", "1", "--check-texts", "1", *more]
        monkeypatch.setattr(sys, "argv", argv)
        status = serve_sweep.main()
        result = Path("out", "result.json")
        return status, json.loads(result.read_text()) if result.exists() else {}

    run.ports = ports  # type: ignore[attr-defined]
    return run


def sent(port: int) -> list[dict[str, Any]]:
    """Requests that a server got and that were no warm-up."""
    lines = Path(f"{port}.requests").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    return [row for row in rows if row.get("max_completion_tokens") == 9]


BOTH = ("--arms", "none", "dspark-adaptive")


def test_arms_do_equal_work_and_the_figures_are_the_servers(sweep, monkeypatch):
    point, halted = Client.point, []

    def watched(self: Client, server: Any, prompts: Any, load: Any, tokens: int) -> Any:
        if tokens == 9:
            halted.append(number_halted())
        return point(self, server, prompts, load, tokens)

    monkeypatch.setattr(Client, "point", watched)
    monkeypatch.setattr(serve_sweep.sweep_plots, "draw", DRAW)
    more = ("--rounds", "2", "--split-datasets", "4", "--suspend")
    status, result = sweep(*BOTH, *more)
    assert set(halted) == {1}  # of two servers, and only while one is measured
    assert status == 0 and result["left_out"] == {}
    plain, adaptive = (
        [row["messages"] for row in sent(sweep.ports[arm])] for arm in BOTH[1:]
    )
    # 4 + 8 prompts in both rounds; the split's 2 x 2 x 8 are the adaptive arm's alone.
    assert len(plain) == 24 and len(adaptive) == 24 + 32
    count = lambda rows: Counter(row[0]["content"] for row in rows)  # noqa: E731
    assert count(plain) <= count(adaptive)
    assert all(row["ignore_eos"] for row in sent(sweep.ports["none"]))
    assert all(row["temperature"] == 0 for row in sent(sweep.ports["none"]))
    row = result["arms"]["dspark-adaptive"]["4"]
    # Nine tokens: the first, then two steps of four with three drafts each.
    assert row["tau"] == 4.0 and row["verify_length"] == 3.0
    assert row["draft_length"] == 6.0 and row["runs"] == 2
    assert result["arms"]["none"]["4"]["tau"] == 1.0
    assert result["arms"]["none"]["4"]["verify_length"] == 0.0
    assert set(result["by_dataset"]["dspark-adaptive"]) == {"math", "code"}
    assert len(row["ratio_to_none"]["runs"]) == 2
    # What each request was told of itself, the domains served together.
    told = result["domains"]["dspark-adaptive"]["4"]
    assert set(told) == {"math", "code"} and "none" not in result["domains"]
    expected = {"verify_length": 3.0, "draft_length": 6.0, "tau": 4.0}
    assert told["math"] == told["code"] == expected
    record = json.loads(
        Path(
            "out/mixed/SERVE--arm=none-BENCH--max_concurrency=4/run=1.json"
        ).read_text()
    )
    assert record["completed"] == 8 and record["total_output_tokens"] == 72
    assert record["by_dataset"]["math"]["requests"] == 4
    assert "generated_texts" not in record
    for name in ("pareto", "throughput", "lengths", "slo", "domains"):
        assert Path("out", f"{name}.png").exists()
    entry = result["texts"]["arms"]["dspark-adaptive"]
    assert (entry["passed"], entry["equal"], entry["total"]) == (True, 1, 1)
    page = Path("out", "report.html").read_text()
    assert page.count("data:image/png;base64,") >= 5 and "<link" not in page
    assert "1 of 1 equal" in page and 'src="http' not in page
    assert str(Path.cwd()) not in page and str(Path.home()) not in page


def number_halted() -> int:
    """Halted children; a signal takes a moment to arrive."""
    for _ in range(50):
        states = Counter(p.status() for p in psutil.Process().children())
        if found := states[psutil.STATUS_STOPPED]:
            return found
        time.sleep(0.02)
    return 0


def test_a_resumed_sweep_measures_only_what_is_missing(sweep, capsys):
    assert sweep(*BOTH, "--rounds", "1")[0] == 0
    first = {f: f.stat().st_mtime_ns for f in Path("out").rglob("run=*.json")}
    lost = Path("out/mixed/SERVE--arm=none-BENCH--max_concurrency=4/run=0.json")
    lost.unlink()
    assert sweep(*BOTH, "--rounds", "1")[0] == 1  # not without being told
    assert "--resume" in capsys.readouterr().err
    assert sweep(*BOTH, "--rounds", "1", "--resume")[0] == 0
    again = {f: f.stat().st_mtime_ns for f in Path("out").rglob("run=*.json")}
    assert set(again) == set(first)
    assert {f for f in first if again[f] != first[f]} == {lost}
    # The server of the other arm, which lacks nothing, was not even started.
    assert len(sent(sweep.ports["none"])) == 8


def test_arms_that_do_not_start_or_die_are_left_out(sweep):
    arms = ["--arms", "none", "--arm", "dead={}", "--arm", "dying={}"]
    status, result = sweep(*arms, "--rounds", "1")
    assert status == 0
    assert "bad drafter" in result["left_out"]["dead"]
    assert "ended with status 3" in result["left_out"]["dying"]
    assert set(result["arms"]["none"]) == {"1", "4"}
    assert set(result["arms"]["dying"]) == {"1"}  # what it did before counts
    assert list(Path("out").rglob("*.failure.json"))


def test_a_running_server_in_an_open_loop(sweep, tmp_path):
    port = free_port()
    command = [sys.executable, str(FAKE), str(port), "3"]
    with subprocess.Popen(command, cwd=tmp_path) as server:
        wait_until_it_answers(port)
        more = ["--url", f"theirs=http://127.0.0.1:{port}/v1", "--request-rate", "20"]
        status, result = sweep(
            *more, "--rounds", "1", "--goodput", "e2el:60000", concurrency=()
        )
        assert server.poll() is None  # it is not ours to stop
        server.terminate()
    assert status == 0 and result["left_out"] == {} and result["arms"] == {}
    row = result["open_loop"]["theirs"]["20/s"]
    assert row["num_prompts"] == 40 and row["verify_length"] == 3.0
    # Forty requests at twenty a second, all of them good.
    assert row["request_goodput"] == row["request_throughput"] > 0
    assert sent(port)[0]["model"] == "m"
    folder = "open-loop/SERVE--arm=theirs-BENCH--request_rate=20.0"
    record = json.loads(Path("out", folder, "run=0.json").read_text())
    assert record["request_rate"] == 20.0 and record["duration"] > 1.5
    assert "1 round at each load" in Path("out/report.html").read_text()


def wait_until_it_answers(port: int) -> None:
    for _ in range(100):
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{port}/health").close()
            return
        except OSError:
            time.sleep(0.1)
    raise AssertionError("the fake server does not answer")


def test_one_at_a_time(sweep):
    status, result = sweep(*BOTH, "--rounds", "2", "--one-at-a-time")
    assert status == 0
    found = {
        arm: {c: r["runs"] for c, r in a.items()} for arm, a in result["arms"].items()
    }
    assert found == {arm: {"1": 2, "4": 2} for arm in ("none", "dspark-adaptive")}


def test_an_interrupted_sweep_reports_what_it_has(sweep, monkeypatch, capsys):
    measure = Sweep._measure

    def stop_after_two(self: Sweep, point: Any) -> None:
        if len(self.results.records("mixed")) == 2:
            raise KeyboardInterrupt
        measure(self, point)

    monkeypatch.setattr(Sweep, "_measure", stop_after_two)
    status, result = sweep(*BOTH, "--rounds", "1")
    assert status == 0 and "--resume continues" in capsys.readouterr().out
    assert {arm: list(a) for arm, a in result["arms"].items()} == {
        "none": ["1"],
        "dspark-adaptive": ["1"],
    }
