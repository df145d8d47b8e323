"""Rounds drawn from known probabilities, with confidences that are known to be off."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from vllm_dspark.calibration.rounds import Rounds


def make_rounds(
    count: int,
    temperature: Sequence[float],
    bias: Sequence[float] | None = None,
    *,
    seed: int = 0,
    prompts: int = 60,
) -> Rounds:
    """Confidences whose right scaling is ``temperature`` and ``bias`` by position."""
    random = np.random.default_rng(seed)
    width = len(temperature)
    truth = random.normal(0.5, 1.2, (count, width))
    survives = random.random((count, width)) < 1 / (1 + np.exp(-truth))
    offset = np.zeros(width) if bias is None else np.array(bias)
    raw = 1 / (1 + np.exp(-(truth - offset) * np.array(temperature)))
    prompt = np.arange(count) % prompts
    return Rounds(
        confidence=raw,
        num_drafts=np.full(count, width),
        accepted=np.cumprod(survives, axis=1).sum(axis=1),
        prompt=prompt,
        depth=np.arange(count) // prompts,
        dataset=np.array(["even", "odd"])[prompt % 2],
    )


def rounds_of(
    confidence: Sequence[Sequence[float]],
    accepted: Sequence[int],
    num_drafts: Sequence[int] | None = None,
    dataset: str = "d",
) -> Rounds:
    """A few rounds written by hand, each of a prompt of its own."""
    table = np.array(confidence, dtype=np.float64)
    count, width = table.shape
    return Rounds(
        confidence=table,
        num_drafts=np.array(num_drafts or [width] * count),
        accepted=np.array(accepted),
        prompt=np.arange(count),
        depth=np.arange(count),
        dataset=np.array([dataset] * count),
    )
