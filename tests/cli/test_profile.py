"""`vllm-dspark profile`: what it finds, what it measures, what it refuses."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from tests.integration.forks import serve_in_forks
from tests.schedule.test_cost_file import CONTENT
from vllm_dspark.cli import main, profile
from vllm_dspark.schedule import cost_file

Run = Callable[..., int]


class MeasuringServer:
    """Stands in for a server that has started; its table is CONTENT's."""

    started: list[tuple[list[str], Mapping[str, str]]] = []  # noqa: RUF012
    measures = True

    def __init__(
        self, model: Any, arguments: Any, log: Path, environment: Any, port: Any
    ) -> None:
        self.log = log
        self.cache = Path(environment["VLLM_DSPARK_CACHE"])
        self.started.append((list(arguments), environment))

    def __enter__(self) -> MeasuringServer:
        assert not list(self.cache.iterdir())
        if self.measures:
            cost_file.save(self.cache, CONTENT)
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def wait_ready(self, progress: Callable[[float, str], None]) -> float:
        return 1.0

    def why(self) -> str:
        return "last lines: could not be measured"


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """`vllm-dspark profile` with a pair that the made-up table is of."""
    monkeypatch.setenv("VLLM_DSPARK_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(profile, "Server", MeasuringServer)
    monkeypatch.setattr(MeasuringServer, "started", [])
    names = ("target", "drafter", "device", "vllm_version", "compiled")
    monkeypatch.setattr(
        profile,
        "_wanted",
        lambda arguments: {name: asdict(CONTENT.key)[name] for name in names},
    )
    drafter = tmp_path / "drafter"
    drafter.mkdir()
    (drafter / "config.json").write_text("{}")
    pair = ["--target", "some-target", "--drafter", str(drafter)]
    return lambda *more: main(["profile", *pair, *more])


def test_measured_once_and_shown_again(
    run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out.json"
    assert run("--max-num-seqs", "1", "--json", str(out)) == 0
    [(arguments, _)] = MeasuringServer.started
    assert arguments[arguments.index("--max-num-seqs") + 1] == "1"
    assert "--enforce-eager" in arguments
    first = capsys.readouterr().out
    assert "308.00" in first and str(cost_file.path_of(Path(), CONTENT.key)) in first
    assert json.loads(out.read_text())["step"][0]["ms"] == pytest.approx(25.4)
    assert run("--max-num-seqs", "1") == 0
    assert len(MeasuringServer.started) == 1
    assert "measured before" in capsys.readouterr().out
    assert run("--max-num-seqs", "1", "--fresh", "--compiled") == 0
    assert "--enforce-eager" not in MeasuringServer.started[1][0]


def test_a_table_that_does_not_fit_is_passed_over(run: Run, tmp_path: Path) -> None:
    other = replace(CONTENT, key=replace(CONTENT.key, drafter="another"))
    cost_file.save(tmp_path / "cache", other)
    (tmp_path / "cache" / "cost" / "bad.json").write_text("{")
    assert run("--max-num-seqs", "1") == 0
    assert len(MeasuringServer.started) == 1
    assert run("--max-num-seqs", "4000") == 0  # the table does not reach so far
    assert len(MeasuringServer.started) == 2


def test_a_server_that_measures_nothing(
    run: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(MeasuringServer, "measures", False)
    assert run() == 2
    said = capsys.readouterr().err
    assert "measured no step costs" in said and "could not be measured" in said


def test_a_file_is_shown_without_a_server(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "cost.json"
    cost_file.write(path, CONTENT)
    assert main(["profile", str(path)]) == 0
    assert "308.00" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give --target and --drafter, or a FILE"),
        (["--target", "t"], "give --target and --drafter, or a FILE"),
        (["missing.json"], "missing.json is no file"),
        (["a.json", "--target", "t"], "not both"),
        (["a.json", "--plot", "/nowhere/a.png"], "--plot: there is no folder /nowhere"),
        (["--target", "t", "--drafter", "/nowhere"], "/nowhere is no drafter folder"),
        (["a.json", "--max-num-seqs", "0"], "--max-num-seqs is 0"),
    ],
)
def test_mistakes(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["profile", *arguments]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.slow
def test_a_real_server(
    text_pair: tuple[Path, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    serve_in_forks(monkeypatch, profile)
    monkeypatch.setenv("VLLM_DSPARK_CACHE", str(tmp_path))
    target, drafter = map(str, text_pair)
    command = ["profile", "--target", target, "--drafter", drafter]
    assert main([*command, "--max-num-seqs", "2"]) == 0
    assert len(list((tmp_path / "cost").glob("*.json"))) == 1
    assert "target step" in capsys.readouterr().out
    assert main([*command, "--max-num-seqs", "2"]) == 0
    assert "measured before" in capsys.readouterr().out
