"""Where the V2 adapter stays away, vLLM's own DSpark serves and the log says why."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from vllm_dspark.integration import compat
from vllm_dspark.integration.v2 import config as v2_config

STOCK = "vllm.v1.worker.gpu_worker.Worker"


def configuration(
    worker: str, method: str = "standard", watermark: Any = None, **ours: Any
) -> SimpleNamespace:
    return SimpleNamespace(
        additional_config={"dspark": ours},
        speculative_config=SimpleNamespace(rejection_sample_method=method),
        watermark_config=watermark,
        parallel_config=SimpleNamespace(worker_cls=worker),
    )


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    v2_config._say_once.cache_clear()
    monkeypatch.setattr(compat, "v2_trouble", lambda: None)


def test_a_stock_worker_becomes_ours_once() -> None:
    config = configuration(STOCK)
    for _ in range(2):
        v2_config.activate(config)
        assert config.parallel_config.worker_cls.endswith(".DSparkV2GPUWorker")


@pytest.mark.parametrize("worker", [STOCK, "some.other.Worker"])
def test_what_does_not_fit_is_left_alone(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, worker: str
) -> None:
    if worker == STOCK:
        monkeypatch.setattr(compat, "v2_trouble", lambda: "vLLM lacks some.other.Thing")
    config = configuration(worker)
    v2_config.activate(config)
    v2_config.activate(config)
    assert config.parallel_config.worker_cls == worker
    assert len(caplog.records) == 1
    assert "some.other" in caplog.text


def test_bad_options_are_refused_before_the_engine_starts() -> None:
    with pytest.raises(ValueError, match="unknown dspark option 'calibratoin'"):
        v2_config.activate(configuration(STOCK, calibratoin="x"))
    with pytest.raises(ValueError, match="there is no such file"):
        v2_config.activate(configuration(STOCK, calibration="nowhere.json"))


@pytest.mark.parametrize("method", ["standard", "block"])
@pytest.mark.parametrize("kernel", ["auto", "vllm", "dspark"])
def test_a_rejection_kernel_can_be_chosen(
    caplog: pytest.LogCaptureFixture, kernel: str, method: str
) -> None:
    config = configuration(STOCK, method, rejection_kernel=kernel)
    for _ in range(2):
        v2_config.activate(config)
        assert config.parallel_config.worker_cls.endswith(".DSparkV2GPUWorker")
    assert caplog.text == ""


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"worker": "some.other.Worker"}, "worker class 'some.other.Worker'"),
        ({"method": "synthetic"}, "no rejection_sample_method 'synthetic'"),
        ({"watermark": object()}, "watermarked"),
    ],
)
def test_our_kernel_is_refused_where_it_cannot_run(
    change: dict[str, Any], message: str
) -> None:
    arguments = {"worker": STOCK, **change}
    with pytest.raises(ValueError, match=f"'rejection_kernel' is 'dspark'.*{message}"):
        v2_config.activate(configuration(**arguments, rejection_kernel="dspark"))
    v2_config.activate(configuration(**arguments))  # vLLM's own serves


def test_our_kernel_is_refused_where_the_adapter_does_not_fit(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(compat, "v2_trouble", lambda: "vLLM lacks some.other.Thing")
    with pytest.raises(ValueError, match=r"lacks some\.other\.Thing"):
        v2_config.activate(configuration(STOCK, rejection_kernel="dspark"))


def test_options_without_effect_are_named(caplog: pytest.LogCaptureFixture) -> None:
    v2_config.activate(configuration(STOCK, calibration=__file__))
    assert caplog.text == ""
    v2_config.activate(configuration(STOCK, bypass=False, policy="fixed"))
    assert "without effect on the V2 runner so far: bypass, policy" in caplog.text


def test_another_version_does_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    monkeypatch.setattr(compat, "vllm_version", lambda: ("vllm", "0.34.1"))
    trouble = compat.v2_trouble()
    assert trouble is not None and "0.34.1" in trouble
