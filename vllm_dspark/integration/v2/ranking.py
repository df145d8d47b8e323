"""The drafts that survive best, chosen on the device (paper, 5.2).

`schedule.planner.plan_within` in tensors: a budget from earlier rounds goes to the best
current survivals. Nothing here waits for the device.

Lossless by the planner's rule 2: survivals fall along a request, and equals go by row
and position; an unstable sort would let later survivals decide between them.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from vllm_dspark.calibration.online import SurvivalMaps

_FIRST = 2.0  # above every survival
_NEVER = -1.0  # below


def maps_for(
    maps: SurvivalMaps, ids: Sequence[str], batch: Sequence[str]
) -> np.ndarray:
    """A batch's maps, its requests in its own order.

    Args:
        maps: of the requests ``ids``.
        ids: in the order of the maps.
        batch: R requests; those without a map keep their confidences.

    Returns:
        ``[4, R, K]`` float32: first, second, slope and bias of `SurvivalMaps`.
    """
    rows = {req_id: row for row, req_id in enumerate(ids)}
    at = np.array([rows.get(req_id, -1) for req_id in batch], dtype=np.int64)
    known, width = at >= 0, len(maps.slope)
    packed = np.zeros((4, len(at), width), dtype=np.float32)
    packed[::2] = 1.0
    for i, values in ((0, maps.first), (1, maps.second), (3, maps.bias)):
        packed[i, known] = values[at[known]]
    packed[2, known] = maps.slope
    return packed


def survivals(
    confidence: torch.Tensor, maps: torch.Tensor | None, limit: float
) -> torch.Tensor:
    """Products of calibrated confidences; 0 from the first that is no probability.

    Shape: confidence ``[R, K]`` raw float32, maps ``[4, R, K]`` → ``[R, K]``.
    """
    usable = (confidence >= 0) & (confidence <= 1)
    if maps is not None:
        edge = 1 / (1 + float(np.exp(limit)))
        c = confidence.clamp(edge, 1 - edge)
        logit = c.log() - torch.log1p(-c)
        first, second, slope, bias = maps
        inner = (logit * first + second).clamp(-limit, limit)
        confidence = torch.sigmoid(inner * slope + bias)
    return torch.where(usable, confidence, 0.0).cumprod(dim=1)


def best(
    survival: torch.Tensor,
    num_drafts: torch.Tensor,
    reserved: torch.Tensor,
    count: int,
) -> torch.Tensor:
    """How many drafts of each request are among the best ``count``.

    Args:
        survival: ``[R, K]``, never rising along a row.
        num_drafts: ``[R]`` drafts there are.
        reserved: ``[R]`` of them that come first.
        count: at most as many as there are.

    Returns:
        ``[R]`` int64.
    """
    position = torch.arange(survival.shape[1], device=survival.device)
    worth = torch.where(position < reserved[:, None], _FIRST, survival)
    worth = torch.where(position < num_drafts[:, None], worth, _NEVER)
    order = worth.flatten().argsort(descending=True, stable=True)[:count]
    taken = torch.zeros_like(worth, dtype=torch.int64).flatten()
    return taken.index_fill_(0, order, 1).view_as(worth).sum(dim=1)
