"""What a tiny target samples, by enumeration, and how well draws agree with it.

The sampling rules are written here a second time, in numpy and for one row, so that
the engine is not compared with the code it runs.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np

Settings = dict[str, Any]
NextLogits = Callable[[list[list[int]]], np.ndarray]


def next_logits(target: Path) -> NextLogits:
    """[n] prompts of one length → [n, V] float64 logits of their next token."""
    import torch

    from tests.tiny import load_target

    model = load_target(target).double()

    def logits(prompts: list[list[int]]) -> np.ndarray:
        with torch.inference_mode():
            return model(torch.tensor(prompts)).logits[:, -1].numpy()

    return logits


def probabilities(
    logits: np.ndarray, prompt: list[int], output: list[int], settings: Settings
) -> np.ndarray:
    """Distribution of the next token under a request's sampling parameters.

    Shape: logits [V] → [V]; penalties look at ``prompt`` and ``output``.
    """
    z = logits.astype(np.float64).copy()
    allowed = settings.get("allowed_token_ids")
    if allowed:
        z[np.setdiff1d(np.arange(len(z)), allowed)] = -np.inf
    for token, bias in settings.get("logit_bias", {}).items():
        z[token] += bias
    seen = np.zeros(len(z), dtype=bool)
    seen[[*prompt, *output]] = True
    factor = settings.get("repetition_penalty", 1.0)
    z = np.where(seen, np.where(z > 0, z / factor, z * factor), z)
    count = np.bincount(np.asarray(output, dtype=int), minlength=len(z))
    z -= settings.get("frequency_penalty", 0.0) * count
    z -= settings.get("presence_penalty", 0.0) * (count > 0)
    z /= settings["temperature"]
    p = np.exp(z - z.max())
    p[p < settings.get("min_p", 0.0) * p.max()] = 0.0
    by_size = np.argsort(-p, kind="stable")
    # Like vLLM, keep what ties with the k-th token.
    p[p < p[by_size[settings.get("top_k", len(p)) - 1]]] = 0.0
    p /= p.sum()
    before = np.cumsum(p[by_size]) - p[by_size]
    p[by_size[before >= settings.get("top_p", 1.0)]] = 0.0
    return p / p.sum()


def enumerate_texts(
    next_logits: NextLogits, prompt: list[int], length: int, settings: Settings
) -> dict[tuple[int, ...], float]:
    """Probability of every continuation of so many tokens that can occur."""
    texts: dict[tuple[int, ...], float] = {(): 1.0}
    for _ in range(length):
        rows = next_logits([[*prompt, *text] for text in texts])
        longer = {}
        for (text, probability), row in zip(texts.items(), rows, strict=True):
            p = probabilities(row, prompt, list(text), settings)
            for token in np.nonzero(p)[0].tolist():
                longer[*text, token] = probability * p[token]
        texts = longer
    return texts


def p_value(
    draws: Iterable[tuple[int, ...]], exact: dict[tuple[int, ...], float]
) -> float:
    """Chi-square p-value of draws under exact probabilities.

    Continuations that are expected fewer than 8 times are counted together.
    """
    from scipy.stats import chisquare

    counts = Counter(draws)
    total = sum(counts.values())
    if set(counts) - set(exact):
        return 0.0
    common = [text for text, p in exact.items() if p * total >= 8]
    observed = [counts[text] for text in common]
    expected = [exact[text] * total for text in common]
    rest = total - sum(expected)
    if rest >= 8:
        observed.append(total - sum(observed))
        expected.append(rest)
    else:  # too little for a cell of its own: into the largest
        largest = int(np.argmax(expected))
        observed[largest] += total - sum(observed)
        expected[largest] += rest
    if len(expected) == 1:
        return 1.0
    return float(chisquare(observed, expected).pvalue)


def marginal(
    exact: dict[tuple[int, ...], float], first: int
) -> dict[tuple[int, ...], float]:
    """The same with the first tokens summed over."""
    sums: dict[tuple[int, ...], float] = {}
    for text, p in exact.items():
        sums[text[first:]] = sums.get(text[first:], 0.0) + p
    return sums


def synthetic_draws(
    exact: dict[tuple[int, ...], float], n: int, seed: int
) -> list[tuple[int, ...]]:
    """Independent draws from exact probabilities."""
    texts = list(exact)
    p = np.array([exact[text] for text in texts])
    picks = np.random.default_rng(seed).choice(len(texts), size=n, p=p / p.sum())
    return [texts[i] for i in picks]
