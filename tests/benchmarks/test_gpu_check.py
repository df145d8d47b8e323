"""`make gpu-check`: what it says without a GPU, and what it would do with one."""

from __future__ import annotations

import json
import sys
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import _gpu_arms as arms
import _gpu_kernels as kernels
import gpu_check
import pytest
import torch
from _full_head import with_lm_head
from bench_sequential import random_head
from safetensors.torch import load_file

from tests.tiny import make_tiny_drafter, make_tiny_target
from vllm_dspark.model.checkpoint import LM_HEAD, load_state
from vllm_dspark.model.vocab_maps import draft_to_target_ids


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "report.json"
    monkeypatch.setattr("sys.argv", ["gpu_check.py", "--json", str(path)])
    return path


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so_and_writes_nothing(
    file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert gpu_check.main() == 3
    said = capsys.readouterr().out
    assert "No NVIDIA GPU can be used here" in said and "nothing was checked" in said
    assert not file.exists()


def parts(**results: Any) -> dict[str, Any]:
    def part(value: Any) -> Any:
        def run(*_: Any) -> Any:
            if isinstance(value, Exception):
                raise value
            return value

        return run

    return {name: part(value) for name, value in results.items()}


@pytest.mark.parametrize(
    ("bad", "status"),
    [({"passed": True}, 0), ({"passed": False}, 1), (RuntimeError("no room"), 1)],
)
def test_a_part_that_fails_is_in_the_report_and_the_others_run(
    file: Path, monkeypatch: pytest.MonkeyPatch, bad: Any, status: int
) -> None:
    monkeypatch.setattr(gpu_check, "trouble", lambda: None)
    monkeypatch.setattr(gpu_check, "device", lambda: {"name": "made up"})
    monkeypatch.setattr(gpu_check, "gpu_tests", lambda: {"passed": True})
    monkeypatch.setattr(kernels, "PARTS", parts(first=bad, second=[{"us": 3.0}]))
    monkeypatch.setattr(arms, "measure", lambda arguments: {"none": {"tok_s": 1.0}})
    assert gpu_check.main() == status
    report = json.loads(file.read_text())
    assert report["kernels"]["second"] == [{"us": 3.0}]
    assert report["servers"]["none"] == {"tok_s": 1.0}
    assert report["device"]["name"] == "made up" and "git" in report["provenance"]
    if isinstance(bad, Exception):
        assert report["kernels"]["first"] == {"error": "RuntimeError: no room"}


def test_parts_can_be_chosen_and_each_is_written_at_once(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def servers(arguments: Any) -> Any:
        assert json.loads(file.read_text())["kernels"] == {"first": {"us": 3.0}}
        assert arguments.arms == ["none", "vllm fixed"]
        assert arguments.serve_args == ["--dtype", "half"]
        raise KeyboardInterrupt

    def tests() -> Any:
        raise AssertionError("not asked for")

    monkeypatch.setattr(gpu_check, "trouble", lambda: None)
    monkeypatch.setattr(gpu_check, "device", lambda: {"name": "made up"})
    monkeypatch.setattr(gpu_check, "gpu_tests", tests)
    monkeypatch.setattr(kernels, "PARTS", parts(first={"us": 3.0}))
    monkeypatch.setattr(arms, "measure", servers)
    chosen = ["--parts", "kernels", "servers", "--arms", "none", "vllm fixed"]
    sys.argv += [*chosen, "--serve-args", "--dtype half"]
    with pytest.raises(KeyboardInterrupt):
        gpu_check.main()


def test_an_arm_that_is_not_there_is_refused(
    file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sys.argv += ["--arms", "none", "vllm fixd"]
    with pytest.raises(SystemExit):
        gpu_check.parse()
    assert "'vllm fixd'" in (said := capsys.readouterr().err) and "vllm fixed" in said


def test_arms_differ_in_what_they_are_about() -> None:
    found = arms.arms_of("DRAFTER", 3)
    assert found["none"] == {}
    alone = [name for name, arm in found.items() if "environment" in arm]
    assert alone == ["vllm fixed", "vllm adaptive"]  # the plugin is not loaded there
    line = arms.arguments_of(found["dspark adaptive"], 16)
    spec = json.loads(line[line.index("--speculative-config") + 1])
    assert spec == {
        "method": "dspark",
        "model": "DRAFTER",
        "num_speculative_tokens": 3,
        "enable_adaptive_verification": True,
    }
    ours = json.loads(line[line.index("--additional-config") + 1])
    assert ours == {"dspark": {"policy": "adaptive"}}
    assert line[line.index("--max-num-seqs") + 1] == "16"
    assert len(arms.questions()) == 12


def test_an_attention_backend_is_that_of_every_drafter() -> None:
    found = arms.arms_of("DRAFTER", None, "TRITON_ATTN")
    specs = [arm["spec"] for name, arm in found.items() if name != "none"]
    assert {spec["attention_backend"] for spec in specs} == {"TRITON_ATTN"}


def test_a_drafter_for_vllm_alone_has_the_targets_rows(tmp_path: Path) -> None:
    target = make_tiny_target(tmp_path / "target", dtype=torch.bfloat16)
    drafter = make_tiny_drafter(
        tmp_path / "drafter", target, draft_vocab_size=64, dtype=torch.bfloat16
    )
    state = load_state(drafter)
    assert LM_HEAD not in state
    whole = with_lm_head(drafter, target, tmp_path / "whole")
    assert with_lm_head(whole, target, tmp_path / "unused") == whole
    assert not (tmp_path / "unused").exists()
    found = load_state(whole)
    ids = draft_to_target_ids(state["d2t"]).long()
    head = load_file(target / "model.safetensors")[LM_HEAD]
    assert torch.equal(found.pop(LM_HEAD), head[ids])
    assert found.keys() == state.keys()


def settings(tmp_path: Path, **changes: Any) -> Any:
    values = {
        "target": "T",
        "drafter": "D",
        "drafter_attention": None,
        "num_speculative_tokens": None,
        "arms": list(arms.arms_of("", None)),
        "logs": tmp_path,
        "streams": [1],
        "max_tokens": 8,
        "serve_args": [],
        "arm_seconds": 60.0,
        "at_once": False,
        "rounds": 2,
    }
    return SimpleNamespace(**{**values, **changes})


@pytest.fixture(autouse=True)
def no_files(monkeypatch: pytest.MonkeyPatch) -> None:
    """The target and drafter of `settings` are names only."""
    monkeypatch.setattr(arms, "with_lm_head", lambda drafter, target, out: drafter)


class FakeServer:
    """Is ready at once, unless its log says that it is the one that dies."""

    order: ClassVar[list[str]] = []

    def __init__(self, target: str, options: list[str], log: Path, _: Any) -> None:
        self.name = log.stem

    def __enter__(self) -> FakeServer:
        self.order.append(f"start {self.name}")
        return self

    def __exit__(self, *_: object) -> None:
        self.order.append(f"stop {self.name}")

    def wait_ready(self, *_: Any) -> float:
        if self.name == "vllm-adaptive":
            raise ValueError("vllm serve ended with status 1")
        self.order.append(f"ready {self.name}")
        return 1.0


@pytest.mark.parametrize("at_once", [False, True])
def test_a_server_that_dies_leaves_its_log_and_does_not_end_the_others(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, at_once: bool
) -> None:
    def one_round(server: Any, _: Any) -> Any:
        FakeServer.order.append(f"ask {server.name}")
        return {"one_stream_tok_s": 1.0}, [[1, 2], [3]]

    FakeServer.order.clear()
    monkeypatch.setattr(arms, "Server", FakeServer)
    monkeypatch.setattr(arms, "warm_up", lambda server: None)
    monkeypatch.setattr(arms, "one_round", one_round)
    lines = [f"line {i}" for i in range(500)]
    (tmp_path / "vllm-adaptive.log").write_text("\n".join(lines))
    found = arms.measure(settings(tmp_path, at_once=at_once))
    assert "status 1" in found["vllm adaptive"]["error"]
    assert found["vllm adaptive"]["log"] == lines[-arms.LOG_LINES :]
    assert found["dspark adaptive"]["texts_equal"] == 2
    assert found["dspark adaptive"]["one_stream_tok_s"] == 1.0
    assert gpu_check.failed(found)
    order = FakeServer.order
    if not at_once:
        assert order[:4] == ["start none", "ready none", "ask none", "stop none"]
        return
    assert order.count("ask none") == 2
    # An arm that measures its costs at start has no other starting beside it.
    at = order.index("start dspark-adaptive")
    assert order[at + 1] == "ready dspark-adaptive" and "ready none" in order[:at]
    first = order.index("ask none")
    assert all(not o.startswith(("start", "ready")) for o in order[first:])


def test_arguments_for_every_server_come_last(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Last, so that they win over an arm's own."""
    seen = []

    def server(target: str, options: list[str], log: Path, environment: Any) -> Any:
        seen.append((target, options, log))
        raise ValueError("no server here")

    monkeypatch.setattr(arms, "Server", server)
    more = ["--max-num-seqs", "3"]
    chosen = settings(tmp_path, serve_args=more, arms=["none", "dspark fixed"])
    found = arms.measure(chosen)
    assert [options[-2:] for _, options, _ in seen] == [more, more]
    assert seen[1][2] == tmp_path / "dspark-fixed.log"
    assert list(found) == chosen.arms and found["none"]["log"] == []


def test_only_vllm_alone_gets_the_drafter_with_a_head(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Ours is served as it is, with its calibration."""
    models = {}

    def server(target: str, options: list[str], log: Path, environment: Any) -> Any:
        spec = json.loads(options[options.index("--speculative-config") + 1])
        models[log.stem] = spec["model"]
        raise ValueError("no server here")

    monkeypatch.setattr(arms, "Server", server)
    monkeypatch.setattr(arms, "with_lm_head", lambda drafter, target, out: "WHOLE")
    arms.measure(settings(tmp_path, arms=["vllm adaptive", "dspark adaptive"]))
    assert models == {"vllm-adaptive": "WHOLE", "dspark-adaptive": "D"}


class Stoppable:
    """A server that can only be stopped."""

    def __init__(self) -> None:
        self.stopped = threading.Event()

    def stop(self) -> None:
        self.stopped.set()


def test_an_arm_that_takes_too_long_is_stopped() -> None:
    server: Any = Stoppable()
    with (
        pytest.raises(TimeoutError, match=r"over 0\.01 s"),
        arms.stopped_after(server, 0.01),
    ):
        assert server.stopped.wait(60)
        raise ConnectionError("the server went away")


def test_an_error_in_time_is_its_own() -> None:
    server: Any = Stoppable()
    with pytest.raises(ConnectionError), arms.stopped_after(server, 60):
        raise ConnectionError("the server went away")
    assert not server.stopped.is_set()


def test_dataclasses_of_tensors_move() -> None:
    head = kernels.moved(random_head()[0], "meta")
    assert head.markov_w1.is_meta and head.draft_to_target.is_meta
    assert head.head_type == "vanilla" and head.joint_weight is None
