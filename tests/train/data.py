"""Token folders of a tiny target's own text, for tests of the trainer."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from tests.tiny import load_target
from vllm_dspark.model.target import identify_target
from vllm_dspark.train.shards import Sample
from vllm_dspark.train.tokens import TokenWriter


def greedy_samples(target_path: Path, count: int, length: int = 24) -> list[Sample]:
    """What the target answers to random prompts, greedily."""
    target, rng = load_target(target_path), np.random.default_rng(5)
    samples = []
    for _ in range(count):
        prompt = rng.integers(3, 120, size=int(rng.integers(3, 9))).tolist()
        with torch.no_grad():
            text = target.generate(
                torch.tensor([prompt]),
                max_new_tokens=length,
                do_sample=False,
                eos_token_id=None,
                pad_token_id=0,
            )
        samples.append(Sample(prompt, text[0, len(prompt) :].tolist(), 0.0, 0))
    return samples


def write_tokens(folder: Path, target_path: Path, samples: list[Sample]) -> Path:
    """A token folder with these samples."""
    identity = identify_target(target_path)
    with TokenWriter(
        folder, target=identity, sampling={}, sources=["prompts"]
    ) as writer:
        writer.append(samples)
    return folder
