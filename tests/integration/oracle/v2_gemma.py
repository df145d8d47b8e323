"""A Gemma4 pair on vLLM's V2 runner, for `v2_control`: its drafter class is vLLM's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from tests.integration.engine import Engine, engine
from tests.integration.oracle.v2_scenes import SETTINGS, regime, told
from tests.integration.recorder import drive, greedy, prompt
from tests.integration.test_adaptive import jagged
from tests.tiny_gemma import make_tiny_gemma, make_tiny_gemma_drafter

ARRIVALS = [
    (0, prompt(70), greedy(16)),
    (0, prompt(3), greedy(24)),
    (2, prompt(40), greedy(12)),
]


def name_layers_apart() -> None:
    """The target's layers as in the multimodal model that contains it: under the same
    name as the drafter's, which vLLM gives no prefix, vLLM refuses them."""
    from vllm.model_executor.models import ModelRegistry
    from vllm.model_executor.models.gemma4 import Gemma4ForCausalLM

    class Named(Gemma4ForCausalLM):
        def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
            super().__init__(vllm_config=vllm_config, prefix="language_model")

    ModelRegistry.register_model("Gemma4ForCausalLM", Named)


def survivals(eng: Engine) -> list[tuple[np.ndarray, np.ndarray]]:
    """Raw confidences and what the controller made of them, as steps go by."""
    controller, found = eng.scheduler.controller, []
    verify = controller.verify

    def watched(batch: Any, positions: int) -> Any:
        plan, made = verify(batch, positions)
        if batch.num_drafts.any():
            found.append((batch.confidence.copy(), made.survival.copy()))
        return plan, made

    controller.verify = watched
    return found


def gemma(folder: Path, calibrate: Any) -> dict[str, Any]:
    """Texts without speculation and with the controller, and what it saw.

    Args:
        calibrate: writes a calibration file into a drafter's folder.
    """
    name_layers_apart()
    target = make_tiny_gemma(folder / "gemma")
    with engine(target, **SETTINGS) as eng:
        plain = drive(eng, ARRIVALS)
    drafter = make_tiny_gemma_drafter(
        folder / "gemma-drafter", [t.tokens for t in plain]
    )
    calibrate(drafter)
    ours = {"policy": "adaptive", "cost_table": str(folder / "cost.json")}
    with engine(target, drafter, additional_config={"dspark": ours}, **SETTINGS) as eng:
        eng.runner.speculator.passes = {}
        regime(eng, jagged)
        seen = survivals(eng)
        result = told(eng, drive(eng, ARRIVALS))
        model = type(eng.runner.speculator.model)
    return {
        **result,
        "plain": [t.tokens for t in plain],
        "survivals": seen,
        "drafter": f"{model.__module__}:{model.__name__}",
    }
