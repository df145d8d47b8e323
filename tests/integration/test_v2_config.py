"""Where the V2 adapter stays away, vLLM's own DSpark serves and the log says why."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from vllm_dspark.integration import compat
from vllm_dspark.integration.v2 import config as v2_config
from vllm_dspark.integration.v2 import trims

STOCK = "vllm.v1.worker.gpu_worker.Worker"


def configuration(
    worker: str = STOCK,
    method: str = "standard",
    watermark: Any = None,
    adaptive: bool = False,
    graphs: bool = True,
    overlap: bool = True,
    lora: Any = None,
    scheduler: str | None = None,
    pipeline: int = 1,
    data: int = 1,
    dynamic: Any = None,
    **ours: Any,
) -> SimpleNamespace:
    return SimpleNamespace(
        additional_config={"dspark": ours},
        speculative_config=SimpleNamespace(
            rejection_sample_method=method,
            enable_adaptive_verification=adaptive,
            num_speculative_tokens_per_batch_size=dynamic,
        ),
        scheduler_config=SimpleNamespace(
            scheduler_cls=scheduler, async_scheduling=overlap
        ),
        compilation_config=SimpleNamespace(
            cudagraph_mode=SimpleNamespace(has_full_cudagraphs=lambda: graphs)
        ),
        lora_config=lora,
        watermark_config=watermark,
        parallel_config=SimpleNamespace(
            worker_cls=worker, pipeline_parallel_size=pipeline, data_parallel_size=data
        ),
    )


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    v2_config._say_once.cache_clear()
    monkeypatch.setattr(compat, "v2_trouble", lambda: None)
    monkeypatch.setattr(v2_config.patches, "activate", lambda: None)


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
    assert config.scheduler_config.scheduler_cls is None
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
    config = configuration(STOCK, method, rejection_kernel=kernel, policy="fixed")
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


# enable_adaptive_verification, full graphs, overlapping steps, LoRA → who trims.
CASES = [
    ({}, "DSparkV2AsyncScheduler"),
    ({"overlap": False}, "DSparkV2Scheduler"),
    ({"adaptive": True}, "DSparkV2AsyncBudgetScheduler"),
    ({"adaptive": True, "overlap": False}, "DSparkV2BudgetScheduler"),
    ({"graphs": False}, "DSparkV2AsyncScheduler"),
    ({"graphs": False, "overlap": False}, "DSparkV2TrimmingScheduler"),
    (
        {"graphs": False, "overlap": False, "adaptive": True},
        "DSparkV2TrimmingScheduler",
    ),
    ({"lora": 1, "overlap": False, "adaptive": True}, "DSparkV2TrimmingScheduler"),
    ({"policy": "fixed"}, "DSparkV2AsyncScheduler"),
    ({"policy": "fixed", "graphs": False, "overlap": False}, "DSparkV2Scheduler"),
    ({"policy": "threshold", "overlap": False}, "DSparkV2TrimmingScheduler"),
    ({"policy": "adaptive", "adaptive": True}, "DSparkV2AsyncBudgetScheduler"),
]


@pytest.mark.parametrize(("given", "scheduler"), CASES)
def test_who_trims(given: dict[str, Any], scheduler: str) -> None:
    config = configuration(**given)
    for _ in range(2):
        v2_config.activate(config)
        assert config.scheduler_config.scheduler_cls.endswith("." + scheduler)
    # vLLM's own check, which comes after, must have nothing to refuse.
    on_device = config.speculative_config.enable_adaptive_verification
    assert on_device == ("Budget" in scheduler)
    assert (trims.trims_of(config) is trims.Trims.DEVICE) == on_device


def test_every_scheduler_is_there() -> None:
    from vllm.v1.core.sched.async_scheduler import AsyncScheduler

    from vllm_dspark.integration.steering import Steering
    from vllm_dspark.integration.v2 import scheduler

    for (_, overlap), name in trims.SCHEDULERS.items():
        found = getattr(scheduler, name.rsplit(".", 1)[1])
        assert issubclass(found, Steering)
        assert issubclass(found, AsyncScheduler) == overlap


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"adaptive": True, "policy": "fixed"}, "leave one of them out"),
        ({"adaptive": True, "graphs": False}, "full CUDA graphs only.*no-async"),
        ({"adaptive": True, "lora": 1}, "without LoRA only.*no-async"),
        ({"policy": "threshold"}, "'threshold'.*set enable_adaptive_verification"),
        ({"step_log": "/nowhere/steps.jsonl"}, "there is no folder /nowhere"),
    ],
)
def test_what_cannot_be_had_is_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        v2_config.activate(configuration(**given))


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ({"scheduler": "some.Scheduler"}, "some.Scheduler"),
        ({"pipeline": 2}, "pipeline_parallel_size is 2"),
        ({"data": 4}, "data_parallel_size is 4"),
        ({"dynamic": [(1, 2, 3)]}, "num_speculative_tokens_per_batch_size"),
    ],
)
def test_where_the_controller_stays_away(
    caplog: pytest.LogCaptureFixture, given: dict[str, Any], reason: str
) -> None:
    config = configuration(**given, adaptive=True, slo_tps=3.0, calibration=__file__)
    v2_config.activate(config)
    assert config.scheduler_config.scheduler_cls == given.get("scheduler")
    assert config.speculative_config.enable_adaptive_verification
    assert config.parallel_config.worker_cls.endswith(".DSparkV2GPUWorker")
    said = " ".join(record.getMessage() for record in caplog.records)
    assert reason in said and "without effect on this V2 runner: slo_tps" in said
    assert trims.trims_of(config) is trims.Trims.NOT_OURS


def test_options_without_effect_are_named(caplog: pytest.LogCaptureFixture) -> None:
    served = {"calibration": __file__, "bypass": False, "slo_tps": 1.0}
    v2_config.activate(configuration(adaptive=True, **served))
    assert caplog.text == ""
    v2_config.activate(configuration(adaptive=True, trace="x", backend="native"))
    assert "without effect on this V2 runner: backend, trace" in caplog.text


def test_it_is_said_where_nothing_is_trimmed(caplog: pytest.LogCaptureFixture) -> None:
    v2_config.activate(configuration())
    v2_config.activate(configuration(graphs=False))
    first, second = (record.getMessage() for record in caplog.records)
    assert "they are trimmed with enable_adaptive_verification" in first
    assert "they are trimmed with --no-async-scheduling" in second


def test_another_version_does_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    monkeypatch.setattr(compat, "vllm_version", lambda: ("vllm", "0.34.1"))
    trouble = compat.v2_trouble()
    assert trouble is not None and "0.34.1" in trouble
