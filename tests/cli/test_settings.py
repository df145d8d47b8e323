"""The server's environment: the user's own settings win."""

from vllm_dspark.cli import settings


def test_the_users_settings_stay(monkeypatch):
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0-3")
    monkeypatch.setenv("LD_PRELOAD", "")
    environment = settings.server_environment()
    assert not {"VLLM_CPU_OMP_THREADS_BIND", "LD_PRELOAD"} & environment.keys()
    assert environment["VLLM_USE_AOT_COMPILE"] == "0"


def test_all_cores_only_where_there_are_few(monkeypatch):
    monkeypatch.delenv("VLLM_CPU_OMP_THREADS_BIND", raising=False)
    for cores, expected in ((2, "nobind"), (16, None)):
        monkeypatch.setattr(
            settings.os, "sched_getaffinity", lambda pid, n=cores: set(range(n))
        )
        found = settings.server_environment().get("VLLM_CPU_OMP_THREADS_BIND")
        assert found == expected


def test_openmp_is_preloaded_only_if_it_is_there(monkeypatch, tmp_path):
    monkeypatch.delenv("LD_PRELOAD", raising=False)
    monkeypatch.setattr(settings.sys, "prefix", str(tmp_path))
    assert "LD_PRELOAD" not in settings.server_environment()
    (tmp_path / "lib").mkdir()
    library = tmp_path / "lib" / "libiomp5.so"
    library.touch()
    assert settings.server_environment()["LD_PRELOAD"] == str(library)
