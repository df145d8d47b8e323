"""Runs engines with our controller on vLLM's V2 runner and writes down what they did.

``python -m tests.integration.oracle.v2_control FOLDER OUT.pt``: a process of its own,
as `v2_run`. Engines are few (they start slowly) and go through several scenes.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

from tests.integration.oracle import v2_patches

v2_patches.install()

import numpy as np  # noqa: E402
import torch  # noqa: E402

from tests.integration.engine import Engine, engine  # noqa: E402
from tests.integration.oracle.v2_features import LORA, adapted, pressed, warm_up  # noqa: E402
from tests.integration.oracle.v2_gemma import gemma  # noqa: E402
from tests.integration.oracle.v2_scenes import (  # noqa: E402
    ARRIVALS,
    SAMPLED,
    SETTINGS,
    bypass,
    changing_times,
    count_passes,
    grammars,
    regime,
    regimes,
    told,
    trims,
    turns,
)
from tests.integration.recorder import drive, greedy, prompt  # noqa: E402
from tests.integration.test_adaptive import dear, jagged  # noqa: E402
from tests.integration.test_v2_adapter import write_maps  # noqa: E402
from vllm_dspark.integration import costs  # noqa: E402


def metrics(eng: Engine) -> dict[str, float]:
    """Our counters and gauges without labels, as vLLM tells them."""
    found = {}
    for metric in eng.llm.get_metrics():
        if metric.name.startswith("vllm:dspark_") and hasattr(metric, "value"):
            found[metric.name] = metric.value
    return found


def on_host(folder: Path) -> dict[str, Any]:
    pair = (folder / "target", folder / "rnn")
    ours = {"policy": "adaptive", "cost_table": str(folder / "cost.json")}
    with engine(*pair, additional_config={"dspark": ours}, **SETTINGS, **LORA) as eng:
        count_passes(eng)
        found = {
            "scheduler": type(eng.scheduler).__name__,
            "manager": eng.runner.adaptive_verification,
            "regimes": regimes(eng),
            "bypass": bypass(eng),
            "changing": changing_times(eng),
            "turns": turns(eng),
        }
        found["pressed"], found["adapted"] = pressed(eng), adapted(eng, folder)
    found["grammars"] = grammars(
        folder, spec=SAMPLED, additional_config={"dspark": ours}
    )
    return found


def on_device(folder: Path) -> dict[str, Any]:
    """With a calibration file, and steps that overlap."""
    pair = (folder / "target", folder / "calibrated")
    log = folder / "steps.jsonl"
    ours = {"policy": "adaptive", "cost_table": str(folder / "cost.json")}
    config = {"dspark": {**ours, "step_log": str(log)}}
    keys = {**SETTINGS, "additional_config": config, "async_scheduling": True}
    spec = {"enable_adaptive_verification": True}
    with engine(*pair, spec=spec, **keys) as eng:
        manager = warm_up(eng)
        count_passes(eng)
        # The first run is the engine's own controller: what it tells is looked at.
        eng.scheduler.controller.timed = lambda *args: None
        first = told(eng, drive(eng, ARRIVALS))
        first["metrics"], first["log"] = metrics(eng), log.read_text()
        first["words"] = eng.scheduler._sayer._words(
            eng.scheduler.controller.totals, type(eng.scheduler.controller.totals)()
        )
        return {
            "scheduler": type(eng.scheduler).__name__,
            "manager": manager,
            "first": first,
            "regimes": regimes(eng),
            "bypass": bypass(eng),
            "trims": trims(eng),
            "pressed": pressed(eng),
        }


def without_head(folder: Path) -> dict[str, Any]:
    """vLLM's estimator stands in for the confidence head; steps do not overlap."""
    pair = (folder / "target", folder / "headless")
    ours = {"policy": "adaptive", "cost_table": str(folder / "cost.json")}
    config = {"dspark": ours}
    spec = {"enable_adaptive_verification": True}
    with engine(*pair, spec=spec, additional_config=config, **SETTINGS) as eng:
        count_passes(eng)
        regime(eng, jagged)
        heard: list[np.ndarray] = []
        hear = eng.scheduler._hear

        def listen(report: Any) -> None:
            if report is not None and report.confidences is not None:
                heard.append(report.confidences.values)
            hear(report)

        eng.scheduler._hear = listen
        result = told(eng, drive(eng, ARRIVALS))
        estimator = type(eng.runner.speculator.acceptance_estimator).__name__
        name = type(eng.scheduler).__name__
    return {**result, "heard": heard, "estimator": estimator, "scheduler": name}


def untrimmed(folder: Path) -> dict[str, Any]:
    """All drafts are verified, steps overlap; costs are measured, and listened to."""
    measure = costs.profile
    costs.profile = lambda *args, **keys: measure(*args, budget=2.0, **keys)
    os.environ["VLLM_DSPARK_CACHE"] = str(folder / "cache")
    keys = {"additional_config": {"dspark": {"policy": "adaptive"}}, **SETTINGS}
    pair = (folder / "target", folder / "rnn")
    with engine(*pair, async_scheduling=True, **keys) as eng:
        count_passes(eng)
        measured = told(eng, drive(eng, ARRIVALS))
        controller = eng.scheduler.controller
        table = controller.live.snapshot()
        measured["tokens"], measured["positions"] = table.tokens, table.positions
        measured["error"] = controller.live.error()
        measured["observed"] = controller.live.observed
        measured["overhead"] = controller.overhead
        regime(eng, dear)
        result = told(eng, drive(eng, ARRIVALS))
        name = type(eng.scheduler).__name__
    return {**result, "measured": measured, "scheduler": name}


def plain(folder: Path) -> dict[str, Any]:
    """Without speculation."""
    with engine(folder / "target", **SETTINGS, **LORA) as eng:
        texts: dict[str, Any] = {"arrivals": [t.tokens for t in drive(eng, ARRIVALS)]}
        for name, length, many in (("bypass", 5, 64), ("changing", 7, 90)):
            one = drive(eng, [(0, prompt(length), greedy(many))])
            texts[name] = [t.tokens for t in one]
        goal = drive(eng, [*ARRIVALS, (3, prompt(20, 7), greedy(20))])
        texts["trims"] = [t.tokens for t in goal]
        texts["pressed"], texts["adapted"] = pressed(eng), adapted(eng, folder)
    texts["grammars"] = grammars(folder)
    return texts


def main() -> None:
    folder, out = map(Path, sys.argv[1:])
    v2_patches.top_k_top_p_in_torch()
    result = {"plain": plain(folder), "host": on_host(folder)}
    result["gemma"] = gemma(folder, write_maps)
    v2_patches.trim_on_device()
    result["headless"] = without_head(folder)
    v2_patches.overlap_steps()
    result["device"] = on_device(folder)
    result["untrimmed"] = untrimmed(folder)
    ours = {"policy": "adaptive", "cost_table": str(folder / "cost.json")}
    result["device"]["grammars"] = grammars(
        folder,
        spec={"enable_adaptive_verification": True, **SAMPLED},
        additional_config={"dspark": ours},
        async_scheduling=True,
    )
    torch.save(result, out)


if __name__ == "__main__":
    main()
