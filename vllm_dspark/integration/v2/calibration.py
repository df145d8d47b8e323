"""A calibration file's maps (paper, 3.2.1) on the device, for a batch of any settings.

`calibration.scaling` in tensors: nothing here waits for the device.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch

from vllm_dspark.calibration.file import Calibration
from vllm_dspark.integration.build import load_calibration
from vllm_dspark.integration.config import drafter_folder, options

logger = logging.getLogger("vllm_dspark")

_EDGE = 1e-7  # confidences nearer to 0 or 1 are taken for it, as in `scaling`
_OTHER_KIND = 1e6  # farther than any temperature is


class DeviceMaps:
    """Maps of S settings and K positions.

    Args:
        calibration: the file's content.
        width: K.
        device: where confidences are.

    Raises:
        ValueError: the calibration covers fewer positions.
    """

    def __init__(
        self, calibration: Calibration, width: int, device: torch.device
    ) -> None:
        scalings = list(calibration.settings.values())
        if scalings[0].width < width:
            raise ValueError(
                f"it covers {scalings[0].width} positions, fewer than the {width} "
                f"drafted: calibrate again with --num-speculative-tokens {width}"
            )

        def tensor(values: Any) -> torch.Tensor:
            return torch.tensor(values, dtype=torch.float32, device=device)

        self._at = tensor(list(calibration.settings))
        self._temperature = tensor([s.temperature[:width] for s in scalings])
        self._bias = tensor([s.bias[:width] for s in scalings])

    def setting(self, temperatures: torch.Tensor) -> torch.Tensor:
        """Row of each request's setting, as `Calibration.scaling` chooses. Shape [R]"""
        at, wanted = self._at[None], temperatures[:, None]
        other = (at == 0) != (wanted == 0)
        return ((at - wanted).abs() + other * _OTHER_KIND).argmin(dim=1)

    def apply(
        self, confidence: torch.Tensor, temperatures: torch.Tensor
    ) -> torch.Tensor:
        """Calibrated confidences of requests; NaN stays NaN.

        Shape: confidence [R, K] float32, temperatures [R] → [R, K].
        """
        row = self.setting(temperatures)
        inner = confidence.clamp(_EDGE, 1 - _EDGE)
        logit = inner.log() - torch.log1p(-inner)
        return torch.sigmoid(logit / self._temperature[row] + self._bias[row])


def load_maps(vllm_config: Any, device: torch.device) -> DeviceMaps | None:
    """The maps of a configuration; None without a file, or (said in the log) a bad one.

    A server does not die of it: confidences are then used as they are.
    """
    spec = vllm_config.speculative_config
    named = options(vllm_config).calibration
    try:
        folder = Path(drafter_folder(spec))
        calibration = load_calibration(folder, named)
        if calibration is None:
            return None
        return DeviceMaps(calibration, spec.num_speculative_tokens, device)
    except ValueError as error:
        logger.warning("DSpark: the calibration is ignored: %s", error)
        return None
