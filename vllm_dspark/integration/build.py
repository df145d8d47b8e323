"""The controller that a configuration asks for."""

from __future__ import annotations

import logging
from functools import partial
from pathlib import Path
from typing import Any

from vllm_dspark.calibration import file as calibration_file
from vllm_dspark.calibration.file import Calibration
from vllm_dspark.integration.config import drafter_folder, options
from vllm_dspark.integration.say import log_like_vllm
from vllm_dspark.model.checkpoint import weights_hash
from vllm_dspark.schedule.budgeting import BudgetController
from vllm_dspark.schedule.controller import Controller
from vllm_dspark.schedule.draft_length import Lengths

logger = logging.getLogger("vllm_dspark")


def build_controller(
    vllm_config: Any, width: int, lengths: Lengths = Lengths.PLANNED
) -> Any:
    """For an engine that drafts ``width`` tokens at most.

    Args:
        vllm_config: vLLM's.
        width: γ.
        lengths: how verify lengths will come about.

    Returns:
        A `Controller`; a `BudgetController` if lengths are budgeted.
    """
    log_like_vllm()  # the scheduler's process may be another than the worker's
    chosen = options(vllm_config)
    folder = Path(drafter_folder(vllm_config.speculative_config))
    calibration = load_calibration(folder, chosen.calibration)
    kind = BudgetController if lengths is Lengths.BUDGETED else Controller
    make = partial(kind, width, chosen, lengths=lengths)
    try:
        return make(calibration)
    except ValueError as error:  # it covers fewer positions
        logger.warning("DSpark: the calibration is ignored: %s", error)
        return make()


def load_calibration(folder: Path, named: str | None) -> Calibration | None:
    """The calibration that is named, or the drafter's own; a bad one is left out.

    A server does not die of it: confidences are then corrected from outcomes alone.
    """
    path = Path(named) if named else folder / calibration_file.NAME
    if not path.is_file() and not named:
        return None
    try:
        return calibration_file.read(path, weights_hash(folder))
    except ValueError as error:
        logger.warning("DSpark: the calibration is ignored: %s", error)
        return None
