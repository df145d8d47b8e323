"""The server process: ready, dead with its cause named, stopped with its children."""

import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.cli.conftest import FAKE
from vllm_dspark.cli.server import Server, free_port, speculative_arguments


def ignore(elapsed: float, line: str) -> None:
    pass


def test_ready_metrics_and_stop(fake_server):
    with fake_server("speculate") as server:
        assert server.wait_ready(ignore) < 30
        assert "getting ready" in server.last_line()
        assert not server.last_line().startswith("(")  # vLLM's prefix is cut
        assert any(name.endswith("drafts_total") for name, _ in server.metrics())
        process = server._process
    assert process.poll() is not None
    free_port(server.port)  # and the port is free again


def test_death_names_the_first_own_cause_and_the_log(fake_server):
    with (
        fake_server("die") as server,
        pytest.raises(ValueError, match="ended with status 3") as caught,
    ):
        server.wait_ready(ignore)
    message = str(caught.value)
    # The cause is the engine's own error, not the second-hand one after it.
    assert "cause: ValueError: bad drafter" in message
    assert str(server.log) in message and "getting ready" in message


def test_a_server_that_never_answers_is_an_error(tmp_path: Path):
    server = Server("model", [], tmp_path / "log")
    server.command = [sys.executable, "-c", "import time; time.sleep(60)"]
    with server, pytest.raises(ValueError, match="not ready after"):
        server.wait_ready(ignore, timeout=0.6)


def test_stop_reaches_children_that_outlive_their_parent(tmp_path: Path):
    """vLLM's workers hold the port and the memory; none may be left."""
    child = "import time; time.sleep(60)"
    parent = (
        "import subprocess, sys, time; "
        f"p = subprocess.Popen([sys.executable, '-c', {child!r}]); "
        "print(p.pid, flush=True); time.sleep(60)"
    )
    server = Server("model", [], tmp_path / "log")
    server.command = [sys.executable, "-c", parent]
    with server:
        deadline = time.monotonic() + 20
        while not server.last_line().isdigit() and time.monotonic() < deadline:
            time.sleep(0.05)
        pid = int(server.last_line())
    assert is_gone(pid)


def test_a_killed_parent_leaves_no_server(tmp_path: Path):
    """SIGKILL gives the parent no time to stop anything."""
    server = (
        "import sys; from pathlib import Path;"
        "from vllm_dspark.cli.server import Server;"
        f"server = Server('model', [], Path({str(tmp_path / 'log')!r}));"
        f"server.command = [sys.executable, {str(FAKE)!r}, str(server.port), 'plain'];"
        "server.__enter__(); server.wait_ready(lambda *_: None);"
        "print(server._process.pid, flush=True); server.wait()"
    )
    command = [sys.executable, "-c", server]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as parent:
        pid = int(parent.stdout.readline())
        assert Path(f"/proc/{pid}").exists()
        parent.kill()
    assert is_gone(pid)


def is_gone(pid: int) -> bool:
    """Whether a process ends within ten seconds."""
    deadline = time.monotonic() + 10
    stat = Path(f"/proc/{pid}/stat")
    while time.monotonic() < deadline:
        # Z: killed, and nobody in this container reaps orphans.
        if not stat.exists() or stat.read_text().split()[2] == "Z":
            return True
        time.sleep(0.05)
    return False


def test_a_taken_port_is_refused_by_number():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ValueError, match=f"port {port}"):
            free_port(port)


def test_arguments_of_an_arm_without_speculation_are_empty():
    assert speculative_arguments(None) == []
    assert speculative_arguments({"method": "dspark"}) == [
        "--speculative-config",
        '{"method": "dspark"}',
    ]
