"""Recorded decoding rounds as arrays: what every figure of acceptance starts from."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from vllm_dspark.types import StepRecord

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


@dataclass(frozen=True)
class PromptRounds:
    """One prompt's decoding with speculation.

    Args:
        prompt: the prompt's number within its run.
        dataset: where it comes from.
        prompt_len: its tokens; generated position d has position ``prompt_len + d``.
        token_ids: the tokens generated.
        steps: the rounds, in order.
    """

    prompt: int
    dataset: str
    prompt_len: int
    token_ids: tuple[int, ...]
    steps: tuple[StepRecord, ...]


@dataclass(frozen=True)
class Rounds:
    """N rounds of up to K verified drafts each.

    Shape: confidence ``[N, K]``, NaN where a round had fewer drafts (or there is no
    confidence head); num_drafts, accepted, prompt, depth ``[N]``; dataset ``[N]``
    strings. ``depth`` is the generated position of the anchor, 0 for the first token.
    certainty ``[N, K]`` as confidence, None where no round has any.
    """

    confidence: Floats
    num_drafts: Ints
    accepted: Ints
    prompt: Ints
    depth: Ints
    dataset: NDArray[np.str_]
    certainty: Floats | None = None

    def __len__(self) -> int:
        return len(self.accepted)

    @property
    def width(self) -> int:
        """K, the longest block."""
        return int(self.confidence.shape[1])

    @property
    def has_confidence(self) -> bool:
        """Whether there is anything to calibrate."""
        return bool(np.isfinite(self.confidence).any())

    def select(self, rows: NDArray[np.bool_] | Ints) -> Rounds:
        """The rounds at ``rows`` (a mask or indices)."""
        return Rounds(
            self.confidence[rows],
            self.num_drafts[rows],
            self.accepted[rows],
            self.prompt[rows],
            self.depth[rows],
            self.dataset[rows],
            None if self.certainty is None else self.certainty[rows],
        )

    def of(self, dataset: str) -> Rounds:
        """The rounds of one dataset."""
        return self.select(self.dataset == dataset)

    def datasets(self) -> list[str]:
        """Names, in the order in which they first appear."""
        return list(dict.fromkeys(self.dataset.tolist()))


def survival(confidence: Floats) -> Floats:
    """a_k, the product of c_1..c_k, per round ``[N, K]`` (NaN from the first NaN)."""
    product: Floats = np.cumprod(confidence, axis=1, dtype=np.float64)
    return product


def collect(prompts: Iterable[PromptRounds], width: int) -> Rounds:
    """Put the rounds of several prompts into arrays.

    Args:
        prompts: may be empty.
        width: K, at least the drafts of any round.

    Raises:
        ValueError: a round has more than ``width`` drafts.
    """
    rows = [(text, step) for text in prompts for step in text.steps]
    confidence, certainty = np.full((2, len(rows), width), np.nan)
    for i, (_, step) in enumerate(rows):
        if len(step.draft_ids) > width:
            raise ValueError(
                f"a round has {len(step.draft_ids)} drafts, more than {width}"
            )
        confidence[i, : len(step.confidence)] = step.confidence
        certainty[i, : len(step.certainty)] = step.certainty
    return Rounds(
        confidence,
        _ints([len(step.draft_ids) for _, step in rows]),
        _ints([step.num_accepted for _, step in rows]),
        _ints([text.prompt for text, _ in rows]),
        _ints([step.anchor_position - text.prompt_len for text, step in rows]),
        np.array([text.dataset for text, _ in rows], dtype=np.str_),
        certainty if np.isfinite(certainty).any() else None,
    )


def _ints(values: Sequence[int]) -> Ints:
    return np.array(values, dtype=np.int64)
