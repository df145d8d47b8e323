"""Sampled text with drafts in flight has the target's distribution, by enumeration.

A target with 24 tokens is asked for three; the draws are compared with the exact
probabilities of all 13,824 texts (chi-square, joint and without the first token, which
no draft can have influenced). All settings run mixed in one batch, so that parameters
reach the rows of their request only. The regimes catch different bugs:

* greedy drafts (one-hot q): accepted with p(x), and the residual leaves x out;
* probabilistic drafts: q must be the distribution that the draft was drawn from;
* truncated drafts (``dspark_draft_topk``) and a reduced vocabulary: q has a support;
  the latter with block verification;
* ragged verification: requests of a batch verify different numbers of drafts;
* more requests than a step has room for: those left out verify older drafts, so that
  the distributions of a batch come from several steps.

Every setting is also held against the distribution without its feature, which must be
refuted by the same draws.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.integration import exact
from tests.integration.engine import KV_BYTES, Engine, engine
from tests.tiny import make_tiny_drafter

PROMPT = [5, 9]  # shorter than a verified block: see `blocks`
LENGTH = 3
# A right sampler fails one test in ten thousand, with other seeds than these.
ENOUGH, WRONG = 1e-4, 1e-6

# Settings, and the same without the feature.
SETTINGS: dict[str, tuple[exact.Settings, exact.Settings]] = {
    "temperature": ({"temperature": 1.3}, {"temperature": 0.95}),
    "cold": ({"temperature": 0.6}, {"temperature": 0.75}),
    "top_k": ({"temperature": 1.2, "top_k": 4}, {"temperature": 1.2, "top_k": 5}),
    "top_p": ({"temperature": 0.9, "top_p": 0.6}, {"temperature": 0.9, "top_p": 0.7}),
    "min_p": ({"temperature": 1.1, "min_p": 0.2}, {"temperature": 1.1, "min_p": 0.1}),
    "logit_bias": (
        {"temperature": 0.8, "logit_bias": {5: 2.0, 9: -3.0, 20: 1.5}},
        {"temperature": 0.8},
    ),
    "penalties": (
        {
            "temperature": 0.7,
            "repetition_penalty": 1.6,
            "presence_penalty": -0.8,
            "frequency_penalty": -0.9,
        },
        {"temperature": 0.7, "repetition_penalty": 1.6},
    ),
    "all": (
        {
            "temperature": 0.9,
            "top_k": 12,
            "top_p": 0.9,
            "min_p": 0.03,
            "logit_bias": {4: 1.0},
            "frequency_penalty": -0.8,
        },
        {"temperature": 0.9, "top_k": 12, "top_p": 0.9, "min_p": 0.03},
    ),
}
DRAFTS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "greedy": ({"draft_sample_method": "greedy"}, {}),
    "probabilistic": ({"draft_sample_method": "probabilistic"}, {}),
    "topk": ({"draft_sample_method": "probabilistic", "dspark_draft_topk": 3}, {}),
    "reduced": (
        {"draft_sample_method": "probabilistic", "rejection_sample_method": "block"},
        {"draft_vocab_size": 13, "head_type": "gated"},
    ),
}


@pytest.fixture(scope="module")
def next_logits(small_pair: tuple[Path, Path]) -> exact.NextLogits:
    return exact.next_logits(small_pair[0])


@pytest.fixture(
    scope="module",
    params=[
        "greedy",
        "probabilistic",
        pytest.param("topk", marks=pytest.mark.slow),
        "reduced",
    ],
)
def sampling(
    request: pytest.FixtureRequest,
    small_pair: tuple[Path, Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Engine]:
    spec, drafter_settings = DRAFTS[request.param]
    target, drafter = small_pair
    if drafter_settings:
        folder = tmp_path_factory.mktemp("drafter")
        drafter = make_tiny_drafter(folder, target, **drafter_settings)
    sizes = {
        "max_num_seqs": 256,
        "max_num_batched_tokens": 768,  # for about 200 of the 256
        "max_model_len": 64,
        "kv_cache_memory_bytes": 4 * KV_BYTES,
    }
    with engine(target, drafter, spec=spec, **sizes) as sampling:
        trim_drafts(sampling)
        yield sampling


@pytest.fixture
def blocks(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many drafting steps the distributions of each verification came from."""
    from vllm_dspark.integration import pending

    counts: list[int] = []
    gather = pending._gather

    def counted(pieces: list[Any], *args: Any) -> Any:
        counts.append(len(pieces))
        return gather(pieces, *args)

    monkeypatch.setattr(pending, "_gather", counted)
    return counts


def trim_drafts(engine: Engine) -> None:
    """Let every request verify a random number of its drafts, from none to all."""
    update = engine.scheduler.update_draft_token_ids
    rng = np.random.default_rng(0)

    def trimmed(drafts: Any) -> None:
        drafts.draft_token_ids = [
            row[: rng.integers(0, len(row) + 1)] for row in drafts.draft_token_ids
        ]
        update(drafts)

    engine.scheduler.update_draft_token_ids = trimmed


def draw(
    engine: Engine, settings: list[exact.Settings], n: int, seed: int
) -> list[list[tuple[int, ...]]]:
    """``n`` draws per setting, all in one batch, neighbours from different settings."""
    import torch
    from vllm import SamplingParams

    params = [
        SamplingParams(max_tokens=LENGTH + 1, ignore_eos=True, **s) for s in settings
    ]
    torch.manual_seed(seed)
    texts = engine.tokens([PROMPT] * (n * len(params)), params * n)
    draws = [tuple(text[:LENGTH]) for text in texts]
    return [draws[i :: len(params)] for i in range(len(params))]


def check(
    draws: list[tuple[int, ...]],
    right: dict[tuple[int, ...], float],
    wrong: dict[tuple[int, ...], float],
) -> None:
    later = [text[1:] for text in draws]
    assert exact.p_value(draws, right) > ENOUGH
    assert exact.p_value(later, exact.marginal(right, 1)) > ENOUGH
    assert exact.p_value(later, exact.marginal(wrong, 1)) < WRONG


def test_every_setting_in_one_batch(
    sampling: Engine, next_logits: exact.NextLogits, blocks: list[int]
) -> None:
    before = sampling.stats()
    draws = draw(sampling, [right for right, _ in SETTINGS.values()], 1000, seed=1)
    after = sampling.stats()
    accepted = after.accepted - before.accepted
    drafted = after.draft_tokens - before.draft_tokens
    assert 0.05 < accepted / drafted < 0.9
    if sampling.runner.drafter.probabilistic:
        assert max(blocks) > 1
    sampler = sampling.runner.rejection_sampler
    assert sampler.last_backend == "native"
    chosen = sampling.runner.speculative_config.rejection_sample_method
    assert sampler.method == chosen
    for name, mine in zip(SETTINGS, draws, strict=True):
        right, wrong = (
            exact.enumerate_texts(next_logits, PROMPT, LENGTH, s)
            for s in SETTINGS[name]
        )
        try:
            check(mine, right, wrong)
        except AssertionError as error:
            raise AssertionError(f"{name}: {error}") from error


@pytest.mark.slow
def test_many_draws(
    sampling: Engine, next_logits: exact.NextLogits, request: pytest.FixtureRequest
) -> None:
    """A bias of one percent in a common token shows in twenty thousand.

    Where q has a support, half of them: the kernels' own test
    (``ops.test_rejection_distribution``) takes forty thousand.
    """
    supported = request.node.callspec.params["sampling"] in ("topk", "reduced")
    settings: exact.Settings = {"temperature": 1.0}
    right, wrong = (
        exact.enumerate_texts(next_logits, PROMPT, LENGTH, {"temperature": t})
        for t in (1.0, 1.1)
    )
    [draws] = draw(sampling, [settings], 10_000 if supported else 20_000, seed=2)
    check(draws, right, wrong)


def test_the_yardstick(next_logits: exact.NextLogits) -> None:
    """Right draws pass it, and draws of a slightly other target do not."""
    right, wrong = (
        exact.enumerate_texts(next_logits, PROMPT, LENGTH, {"temperature": t})
        for t in (1.0, 1.1)
    )
    check(exact.synthetic_draws(right, 20_000, seed=3), right, wrong)
    assert sum(right.values()) == pytest.approx(1.0)
    assert len(right) == 24**LENGTH
