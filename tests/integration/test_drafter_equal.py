"""The drafter inside vLLM equals the plain-torch drafter on the same token history.

Every draft step of real engines is recorded and recomputed from the text alone (see
``oracle.history``): features, hidden states, base logits and confidences to 1e-4
relative in float32 (about 1e-6 is seen), drafts and texts token for token.

Regimes, and what each would catch that the others would not:

- head types, vocabularies and taps (``CASES``): weights under the wrong name or of the
  wrong layer (off by one in ``target_layer_ids``), draft ids taken for target ids, an
  LM head row for another token, a mask in the anchor's place, causal against
  bidirectional attention inside a block;
- K below the block size: masks or slots laid out for the block size;
- sampled drafts: probabilities of another temperature, column order or support.

``test_drafter_schedules.py`` does the same under everything a scheduler can do.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.integration.engine import engine
from tests.integration.oracle.history import TOLERANCE, Oracle, relative
from tests.integration.recorder import Text, greedy, prompt, recording, text_of
from tests.tiny import make_tiny_drafter, make_tiny_target

VOCAB = 128  # of `recorder.prompt`
BLOCK = 32  # tokens per K/V page; vLLM's default on CPU is 128


@dataclass(frozen=True)
class Case:
    """One kind of drafter."""

    name: str
    arch: str = "llama"
    drafter: dict[str, Any] = field(default_factory=dict)
    k: int | None = None


CASES = [
    Case("vanilla"),
    Case(
        "vanilla-3-of-5-window-16",
        drafter={"sliding_window": 16},
        k=3,
    ),
    Case(
        "gated-qwen3-own-embeddings-and-head",
        "qwen3",
        {"head_type": "gated", "own_embeddings": True, "target_layer_ids": (0, 2)},
    ),
    Case(
        "rnn-reduced-vocab-without-lm-head",
        drafter={"head_type": "rnn", "draft_vocab_size": 90},
    ),
    Case(
        "rank-0-qwen3-bias-three-layers",
        "qwen3",
        {"markov_rank": 0, "num_layers": 3, "overrides": {"attention_bias": True}},
    ),
    Case(
        "gated-reduced-vocab-own-lm-head-no-markov-in-confidence",
        drafter={
            "head_type": "gated",
            "draft_vocab_size": 100,
            "with_lm_head": True,
            "confidence_with_markov": False,
        },
    ),
    Case(
        "rnn-no-confidence-one-tap",
        drafter={
            "head_type": "rnn",
            "confidence": False,
            "target_layer_ids": (-1,),
        },
        k=1,
    ),
]


@pytest.fixture(scope="module")
def targets(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("targets")
    return {
        arch: make_tiny_target(folder / arch, arch=arch, vocab_size=VOCAB)
        for arch in ("llama", "qwen3")
    }


@pytest.fixture(scope="module")
def pair(targets: dict[str, Path], tmp_path_factory: Any) -> tuple[Path, Path]:
    """A stateful head, two layers, three taps."""
    folder = tmp_path_factory.mktemp("pair") / "drafter"
    drafter = make_tiny_drafter(folder, targets["llama"], head_type="rnn")
    return targets["llama"], drafter


@pytest.fixture(scope="module")
def oracle(pair: tuple[Path, Path]) -> Oracle:
    return Oracle(*pair)


def run(eng: Any, lengths: list[int], max_tokens: int) -> list[Text]:
    prompts = [prompt(n) for n in lengths]
    return [text_of(o) for o in eng.generate(prompts, greedy(max_tokens))]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_equal_for_every_kind_of_drafter(
    case: Case, targets: dict[str, Path], tmp_path: Path
) -> None:
    target = targets[case.arch]
    drafter = make_tiny_drafter(tmp_path / "drafter", target, **case.drafter)
    oracle = Oracle(target, drafter)
    spec = {} if case.k is None else {"num_speculative_tokens": case.k}
    with (
        engine(target, drafter, spec=spec, block_size=BLOCK) as eng,
        recording(eng.runner) as record,
    ):
        texts = run(eng, [1, 30, 64, 101], 32)
    tally = oracle.check(record, texts)
    assert all(len(b.drafts) == (case.k or 5) for b in record.blocks)
    # Not all or nothing: rejected rows must leave no context, accepted ones must.
    assert 1.05 < tally.tau < 1 + (case.k or 5) - 0.05, tally
    assert record.rejected_rows > 0
    if case.name == "vanilla":
        _assert_bugs_would_be_noticed(oracle, record, texts)


def _assert_bugs_would_be_noticed(
    oracle: Oracle, record: Any, texts: list[Text]
) -> None:
    """What the tolerance is held against: each mistake is 100 times as large."""
    for text in texts:
        blocks = record.of(text)
        hidden = torch.stack([b.hidden for b in blocks])
        right, _ = oracle.target_run(text.tokens)
        later, _ = oracle.target_run(text.tokens, shift=1)
        for mistake in (
            oracle.recompute(text.tokens, blocks, later),
            oracle.recompute(text.tokens, blocks, right, position=1),
            oracle.recompute(text.tokens, blocks, right, forget=0),
        ):
            assert relative(hidden, mistake.hidden) > 100 * TOLERANCE


def test_every_layer_has_its_own_key_norm(
    pair: tuple[Path, Path], oracle: Oracle, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without our ``_normalize_context_k`` the second layer's context keys get the
    first one's norm weights on CPU, and drafts come out of a broken context. (Should
    this fail because both agree, vLLM is mended and our override can go.)"""
    from vllm.model_executor.models.qwen3_dflash import DFlashQwen3Model

    from vllm_dspark.integration.model import DSparkBackbone

    with engine(*pair, block_size=BLOCK) as eng, recording(eng.runner) as record:
        model = eng.runner.drafter.model.model
        keys = torch.randn(2, 7, 2, 32)
        ours = model._normalize_context_k(keys)
        theirs = DFlashQwen3Model._normalize_context_k(model, keys)
        for layer, weight in enumerate(model._k_norm_weights):
            rms = keys[layer].square().mean(-1, keepdim=True).add(1e-6).sqrt()
            assert relative(ours[layer], keys[layer] / rms * weight) < TOLERANCE
        assert relative(ours[0], theirs[0]) < TOLERANCE
        assert relative(ours[1], theirs[1]) > 1e-2
        monkeypatch.setattr(
            DSparkBackbone,
            "_normalize_context_k",
            DFlashQwen3Model._normalize_context_k,
        )
        (text,) = run(eng, [60], 16)
    blocks = record.of(text)
    features, _ = oracle.target_run(text.tokens)
    expected = oracle.recompute(text.tokens, blocks, features)
    broken = relative(torch.stack([b.hidden for b in blocks]), expected.hidden)
    assert broken > 10 * TOLERANCE


@pytest.mark.parametrize(
    ("drafter_keys", "topk"),
    [({}, None), ({"head_type": "gated", "draft_vocab_size": 90}, None), ({}, 16)],
    ids=["full-vocab", "reduced-vocab", "top-16"],
)
def test_sampled_drafts_have_the_probabilities_they_say(
    drafter_keys: dict[str, Any],
    topk: int | None,
    targets: dict[str, Path],
    tmp_path: Path,
) -> None:
    """Greedy and sampled requests of several temperatures in one batch."""
    from vllm import SamplingParams

    target = targets["llama"]
    drafter = make_tiny_drafter(tmp_path / "drafter", target, **drafter_keys)
    oracle = Oracle(target, drafter)
    spec: dict[str, Any] = {"draft_sample_method": "probabilistic"}
    if topk is not None:
        spec["dspark_draft_topk"] = topk
    temperatures = [0.0, 0.5, 1.0, 1.7]
    params = [
        SamplingParams(temperature=t, max_tokens=24, ignore_eos=True, seed=i)
        for i, t in enumerate(temperatures)
    ]
    with (
        engine(target, drafter, spec=spec, block_size=BLOCK) as eng,
        recording(eng.runner) as record,
    ):
        prompts = [prompt(n) for n in (5, 40, 9, 70)]
        texts = [text_of(o) for o in eng.generate(prompts, params)]
    oracle.check(record, texts, greedy=False)
    for text, temperature in zip(texts, temperatures, strict=True):
        blocks = record.of(text)
        features, _ = oracle.target_run(text.tokens)
        expected = oracle.recompute(text.tokens, blocks, features)
        logits = expected.logits
        if topk is not None:
            kept = expected.base.topk(topk, dim=-1).indices
            outside = torch.ones_like(logits).scatter(-1, kept, 0.0).bool()
            logits = logits.masked_fill(outside, float("-inf"))
        if temperature == 0:
            assert [b.drafts for b in blocks] == oracle.greedy_drafts(logits)
            continue
        probs = _over_target_vocab((logits / temperature).softmax(-1), oracle)
        for block, row in zip(blocks, probs, strict=True):
            actual = block.probs
            if block.support is not None:
                support = block.support.long()
                actual = torch.zeros_like(row).scatter(-1, support, actual)
            assert float((actual - row).abs().max()) < TOLERANCE
            drawn = actual.gather(-1, torch.tensor(block.drafts)[:, None])
            assert bool((drawn > 0).all())
        unlikely = sum(
            int(b.drafts != d)
            for b, d in zip(blocks, oracle.greedy_drafts(logits), strict=True)
        )
        assert unlikely > 0, "sampled drafts were all the likeliest"


def _over_target_vocab(probs: torch.Tensor, oracle: Oracle) -> torch.Tensor:
    mapping = oracle.drafter.draft_to_target
    if mapping is None:
        return probs
    wide = probs.new_zeros(*probs.shape[:-1], VOCAB)
    wide[..., mapping] = probs
    return wide
