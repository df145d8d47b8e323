"""Simulated serving: requests of several kinds whose confidences are off by kind.

Whether a draft is accepted depends on how hard the kind, the request, the round and
the position are; the confidence sees most of that through a scale and an offset that
differ by kind (heads are overconfident on what they were not trained on), and through
noise that the positions of a round share in part. So confidences of a round and of a
request are correlated, as real ones are.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
WIDTH = 7


@dataclass(frozen=True)
class Kind:
    """A kind of text.

    Args:
        ease: mean logit of a draft's conditional acceptance.
        scale, offset: the confidence's logit is scale·truth + offset + noise.
        decline: how much harder each further position is, in logits.
    """

    ease: float
    scale: float
    offset: float
    decline: float = 0.0


MATH = Kind(ease=2.1, scale=1.25, offset=0.15, decline=0.05)
CODE = Kind(ease=1.6, scale=1.1, offset=0.3, decline=0.05)
CHAT = Kind(ease=0.4, scale=0.8, offset=0.9, decline=0.08)


class Load:
    """R requests decoding; each ends with a chance of 1/length, another follows.

    Args:
        kinds: drawn from for new requests; may be assigned to under way.
    """

    def __init__(
        self, count: int, kinds: list[Kind], seed: int, length: float = 40
    ) -> None:
        self.random = np.random.default_rng(seed)
        self.kinds = kinds
        self._length = length
        self._names = 0
        self._slots = [self._request() for _ in range(count)]

    def _request(self) -> tuple[str, Kind, float]:
        self._names += 1
        kind = self.kinds[self.random.integers(len(self.kinds))]
        return f"r{self._names}", kind, float(self.random.normal(0, 0.5))

    @property
    def ids(self) -> list[str]:
        return [name for name, _, _ in self._slots]

    @property
    def current(self) -> list[Kind]:
        return [kind for _, kind, _ in self._slots]

    def replace_all(self, kinds: list[Kind]) -> list[str]:
        """Every request ends; those that follow are of ``kinds``."""
        gone, self.kinds = self.ids, kinds
        self._slots = [self._request() for _ in self._slots]
        return gone

    def turn_over(self) -> list[str]:
        """Let requests end; returns those that did."""
        gone = []
        for i, slot in enumerate(self._slots):
            if self.random.random() < 1 / self._length:
                gone.append(slot[0])
                self._slots[i] = self._request()
        return gone

    def round(self) -> tuple[Floats, Ints]:
        """Confidences ``[R, K]`` and how many drafts would be accepted ``[R]``."""
        count, random = len(self._slots), self.random
        column = [
            np.array([value(kind) for kind in self.current])[:, None]
            for value in (
                lambda kind: kind.ease,
                lambda kind: kind.scale,
                lambda kind: kind.offset,
                lambda kind: kind.decline,
            )
        ]
        own = np.array([ease for _, _, ease in self._slots])[:, None]
        common = random.normal(0, 0.7, (count, 1))
        truth = column[0] + own + common - column[3] * np.arange(WIDTH)
        truth = truth + random.normal(0, 1.0, (count, WIDTH))
        noise = random.normal(0, 0.35, (count, 1)) + random.normal(
            0, 0.35, (count, WIDTH)
        )
        seen = column[1] * truth + column[2] + noise
        survives = random.random((count, WIDTH)) < _sigmoid(truth)
        return _sigmoid(seen), np.cumprod(survives, axis=1).sum(axis=1)


def _sigmoid(x: Floats) -> Floats:
    return 1 / (1 + np.exp(-x))
