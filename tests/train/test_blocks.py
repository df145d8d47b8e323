"""Anchors, packing, features and vocabulary: what a step is fed with."""

from __future__ import annotations

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch

from tests.tiny import load_target, make_tiny_target
from vllm_dspark.config import DrafterConfig
from vllm_dspark.model.drafter import Drafter
from vllm_dspark.train.blocks import build_blocks, choose_anchors, num_rows
from vllm_dspark.train.data import Sequence
from vllm_dspark.train.features import FeatureSource, channel_scale
from vllm_dspark.train.initial import (
    default_layer_ids,
    drafter_config,
    fresh_drafter,
    target_parts,
)
from vllm_dspark.train.options import TrainOptions
from vllm_dspark.train.packing import pack_sequences
from vllm_dspark.train.step import SequenceLoss, total_weight
from vllm_dspark.train.vocabulary import choose_mask_token, draft_vocabulary

OPTIONS = TrainOptions(layers=2, block_size=4, rank=6, draft_vocab_size=100, top=16)


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory):
    return load_target(make_tiny_target(tmp_path_factory.mktemp("target")))


@pytest.fixture(scope="module")
def text() -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(0).integers(3, 128, 30))


def make_model(target, options: TrainOptions = OPTIONS, seed: int = 1):
    parts = target_parts(target)
    config = DrafterConfig.from_dict(drafter_config(parts.config, options, 0))
    counts = np.arange(128)[::-1]
    vocabulary = draft_vocabulary(counts, options.draft_tokens(128))
    drafter = fresh_drafter(
        config, parts, vocabulary.draft_to_target, options.init, seed
    )
    source = FeatureSource(target, config.target_layer_ids, options.top, 0)
    generator = torch.Generator().manual_seed(seed)
    for weight in drafter.parameters():
        if weight.requires_grad and weight.ndim == 2:
            with torch.no_grad():  # no part may be silent
                weight += 0.05 * torch.randn(weight.shape, generator=generator)
    return drafter, source, vocabulary


def test_anchors_are_response_tokens_with_a_successor() -> None:
    rng = np.random.default_rng(0)
    assert choose_anchors(5, 12, 99, rng).tolist() == [5, 6, 7, 8, 9, 10]
    some = choose_anchors(5, 12, 3, rng)
    assert len(set(some.tolist())) == 3 and (np.diff(some) > 0).all()
    assert some.min() >= 5 and some.max() <= 10


def test_rows_of_short_ends_are_counted_and_masked(target, text) -> None:
    _, source, vocabulary = make_model(target)
    anchors = np.array([10, 27, 28])
    assert num_rows(anchors, 30, 4).tolist() == [3, 2, 1, 1]
    blocks = build_blocks(
        text, source.compute(text, 10), anchors, 4, vocabulary.target_to_draft
    )
    assert blocks.valid.sum(0).tolist() == [3, 2, 1, 1]
    assert blocks.prev_ids[0].tolist() == text[10:14].tolist()


def test_features_are_the_targets(target, text) -> None:
    source = FeatureSource(target, (0, 2), 128, 0)
    found = source.compute(text, 10)
    with torch.no_grad():
        output = target(text[None], output_hidden_states=True)
    wanted = torch.cat([output.hidden_states[1][0], output.hidden_states[3][0]], -1)
    torch.testing.assert_close(found.hidden, wanted)
    probs = output.logits[0, 10:].softmax(-1)
    order = found.top_ids.long()
    torch.testing.assert_close(found.top_probs, probs.gather(1, order))
    torch.testing.assert_close(found.top_probs.sum(-1), torch.ones(20))


def test_cache_is_bounded_and_changes_nothing(target, text) -> None:
    free = FeatureSource(target, (0, 2), 16, 0)
    size = free.compute(text, 10).num_bytes
    source = FeatureSource(target, (0, 2), 16, int(2.5 * size))
    for _ in range(2):
        for key in range(4):
            (got,) = source.get([(key, text, 10)])
            assert torch.equal(got.hidden, free.compute(text, 10).hidden)
    assert source.cached_bytes == 2 * size
    assert source.computed == 2 + 2 * 2  # two cached, two computed each time


def gradients_of(drafter: Drafter) -> dict[str, torch.Tensor]:
    return {
        n: p.grad.clone()
        for n, p in drafter.named_parameters()
        if p.requires_grad and p.grad is not None
    }


@pytest.mark.parametrize("head", ["vanilla", "gated", "rnn", "none"])
def test_packed_anchors_equal_anchors_alone(target, text, head: str) -> None:
    """Loss and gradient of many anchors in one pass = the sum over single anchors."""
    rank = 0 if head == "none" else 6
    options = TrainOptions(
        layers=2, block_size=4, rank=rank, head=head, draft_vocab_size=100, top=16
    )
    drafter, source, vocabulary = make_model(target, options)
    features = source.compute(text, 10)
    scale = channel_scale([features])
    model = SequenceLoss(drafter, options, scale, torch.float32)
    anchors = np.array([10, 11, 15, 22, 27, 28])

    def gradients(groups: list[np.ndarray]) -> dict[str, torch.Tensor]:
        drafter.zero_grad()
        for group in groups:
            blocks = build_blocks(text, features, group, 4, vocabulary.target_to_draft)
            model.backward(features.hidden, blocks, 0.3, 10.0)
        return gradients_of(drafter)

    packed = gradients([anchors])
    single = gradients([anchors[i : i + 1] for i in range(len(anchors))])
    assert packed.keys() == single.keys() and len(packed) > 20
    for name, gradient in packed.items():
        torch.testing.assert_close(gradient, single[name], rtol=1e-3, atol=1e-6)
        assert float(gradient.abs().max()) > 0, name


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("head", ["vanilla", "rnn"])
def test_packed_sequences_equal_sequences_alone(target, head: str, device: str) -> None:
    """Loss, sums and gradient of texts of different lengths, together and alone."""
    options = replace(OPTIONS, head=head)
    drafter, source, vocabulary = make_model(target, options)
    rng = np.random.default_rng(3)
    sequences = []
    for key, (length, prompt_len, most) in enumerate(
        [(30, 10, 6), (19, 3, 99), (9, 7, 9)]
    ):
        tokens = torch.from_numpy(rng.integers(3, 128, length))
        anchors = choose_anchors(prompt_len, length, most, rng)
        sequences.append(Sequence(key, tokens, prompt_len, anchors))
    features = [source.compute(s.tokens, s.prompt_len) for s in sequences]
    scale = channel_scale(features)
    to_draft = vocabulary.target_to_draft
    model = SequenceLoss(drafter, options, scale, torch.float32)
    alone = None
    for s, known in zip(sequences, features, strict=True):
        blocks = build_blocks(s.tokens, known, s.anchors, 4, to_draft)
        sums = model.backward(known.hidden, blocks, 0.3, 10.0)
        alone = sums if alone is None else alone + sums
    wanted = gradients_of(drafter)

    drafter.zero_grad()
    drafter.to(device)
    there = FeatureSource(copy.deepcopy(target).to(device), source.layer_ids, 16, 0)
    texts = [(s.key, s.tokens, s.prompt_len) for s in sequences]
    model = SequenceLoss(drafter, options, scale.to(device), torch.float32)
    packed = pack_sequences(sequences, there.get(texts), 4, to_draft.to(device))
    together = model.backward(*packed, 0.3, 10.0)
    assert alone.rows.tolist() == together.rows.tolist() and alone.rows[0] == 22
    for name in ("cross_entropy", "distance", "confidence_loss"):
        np.testing.assert_allclose(
            getattr(together, name), getattr(alone, name), rtol=1e-4
        )
    found = gradients_of(drafter)
    assert found.keys() == wanted.keys() and len(found) > 20
    for name, gradient in found.items():
        gradient, there_alone = gradient.cpu(), wanted[name]
        torch.testing.assert_close(gradient, there_alone, rtol=1e-3, atol=1e-6)


def test_features_of_texts_together_are_those_of_each_alone(target) -> None:
    rng = np.random.default_rng(4)
    texts = [
        (key, torch.from_numpy(rng.integers(3, 128, length)), prompt_len)
        for key, length, prompt_len in [(0, 30, 10), (1, 12, 2), (2, 20, 19)]
    ]
    source = FeatureSource(target, (0, 2), 16, 1 << 30)
    source.get([texts[1]])
    for (_, *text), found in zip(texts, source.get(texts), strict=True):
        alone = source.compute(*text)
        torch.testing.assert_close(found.hidden, alone.hidden)
        torch.testing.assert_close(found.top_probs, alone.top_probs)
    assert source.computed == 3 + 3  # each once, then alone


def test_total_weight_is_that_of_the_valid_rows() -> None:
    rows = [num_rows(np.array([5, 6]), 8, 3), num_rows(np.array([1]), 99, 3)]
    w = np.exp(-np.arange(3) / 3)
    assert total_weight(rows, 3) == pytest.approx(w[0] * 3 + w[1] * 2 + w[2])


def test_vocabulary_keeps_the_most_frequent() -> None:
    counts = np.array([5, 0, 7, 7, 1, 0])
    chosen = draft_vocabulary(counts, 3)
    assert chosen.draft_to_target is not None and chosen.target_to_draft is not None
    assert chosen.draft_to_target.tolist() == [0, 2, 3]
    assert chosen.target_to_draft.tolist() == [0, -1, 1, 2, -1, -1]
    assert chosen.coverage == pytest.approx(19 / 20)
    assert chosen.offsets is not None and chosen.offsets.tolist() == [0, 1, 1]
    assert draft_vocabulary(counts, 6).draft_to_target is None


def test_mask_token_is_one_the_text_never_uses() -> None:
    counts = np.array([5, 0, 7, 0])
    assert choose_mask_token(counts, [0, 3]) == 3
    assert choose_mask_token(counts, [0]) == 3
    assert choose_mask_token(np.array([4, 2, 3]), [0]) == 1


def test_default_layers() -> None:
    assert default_layer_ids(30) == (1, 8, 14, 21, 28)
    assert default_layer_ids(3) == (1,)
    assert default_layer_ids(2) == (0,)
    with pytest.raises(ValueError, match="the target has 1 layer"):
        default_layer_ids(1)


def test_initialisation_copies_target_layers(target) -> None:
    drafter, *_ = make_model(target, seed=1)
    fresh = fresh_drafter(
        drafter.config, target_parts(target), drafter.draft_to_target, "target", 0
    )
    last = target.model.layers[-1].mlp.up_proj.weight
    assert torch.equal(fresh.layers[1].mlp.up_proj.weight, last)
    random = fresh_drafter(
        drafter.config, target_parts(target), drafter.draft_to_target, "random", 0
    )
    assert not torch.equal(random.layers[1].mlp.up_proj.weight, last)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"draft_vocab_size": 500}, "draft_vocab_size is 500.*vocabulary, 128"),
        ({"target_layer_ids": (1, 3)}, "target layer 3 cannot be tapped"),
    ],
)
def test_options_that_do_not_fit_the_target(target, change, message) -> None:
    config = target_parts(target).config
    with pytest.raises(ValueError, match=message):
        drafter_config(config, TrainOptions(**change), 0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layers": 0}, "layers is 0; it must be at least 1"),
        ({"head": "mlp"}, "head is 'mlp'"),
        ({"rank": 0}, "rank is 0; it must be 0 exactly when head is 'none'"),
        ({"lr": 0.0}, "lr is 0.0"),
        ({"short_share": 1.5}, "short_share is 1.5"),
        ({"cache_gb": -1.0}, "cache_gb is -1.0"),
        ({"ce_weight": 0.0, "tv_weight": 0.0}, "tv_weight"),
    ],
)
def test_options_that_cannot_be(change, message) -> None:
    with pytest.raises(ValueError, match=message):
        TrainOptions(**change)
