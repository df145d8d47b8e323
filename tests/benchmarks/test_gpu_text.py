"""The static decoder that writes training text on a GPU, here on the CPU."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch
from _gpu_decode import Decoder, Request

from tests.tiny import EOS, load_target, make_tiny_target


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory):
    return load_target(make_tiny_target(tmp_path_factory.mktemp("target")))


def test_greedy_text_is_that_of_generate(target) -> None:
    """More requests than slots, so that slots are used again."""
    rng = np.random.default_rng(0)
    requests = [
        Request(tuple(rng.integers(3, 120, n).tolist()), limit, 0.0)
        for n, limit in [(3, 9), (7, 1), (5, 20), (12, 6), (4, 30)]
    ]
    decoder = Decoder(target, 2, 40, [EOS])
    found = {r: tokens for r, tokens, _ in decoder.run(iter(requests))}
    assert found.keys() == set(requests)
    for request, tokens in found.items():
        wanted = target.generate(
            torch.tensor([request.prompt]),
            max_new_tokens=request.limit,
            do_sample=False,
            eos_token_id=EOS,
            pad_token_id=0,
        )[0, len(request.prompt) :]
        assert tokens == wanted.tolist()


def test_sampled_tokens_follow_the_targets_distribution(target) -> None:
    prompt = (5, 9, 12)
    with torch.no_grad():
        logits = target(torch.tensor([prompt])).logits[0, -1]
    wanted = (logits / 0.7).softmax(-1)
    decoder, n = Decoder(target, 256, 8, [EOS]), 2000
    torch.manual_seed(0)
    drawn = decoder.run(Request(prompt, 1, 0.7) for _ in range(n))
    counts = Counter(tokens[0] for _, tokens, _ in drawn)
    share = torch.zeros_like(wanted)
    for token, count in counts.items():
        share[token] = count / n
    assert 0.5 * float((share - wanted).abs().sum()) < 0.1
    assert len(counts) > 5


def test_a_stop_token_ends_a_turn(target) -> None:
    greedy = Request((5, 9, 12), 20, 0.0)
    (_, tokens, ended), *_ = Decoder(target, 1, 40, [EOS]).run(iter([greedy]))
    assert not ended and len(tokens) == 20
    stop = Request((5, 9, 12), 20, 0.0, tokens[4])
    ((_, cut, ended),) = Decoder(target, 1, 40, [EOS]).run(iter([stop]))
    assert ended and cut == tokens[: tokens.index(tokens[4]) + 1]
