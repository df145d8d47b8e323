"""Sampled text under a grammar has the target's distribution, by enumeration.

Where sampled drafts leave the grammar, vLLM cuts the block.
Whether a draft is verified then depends on what it is: the tokens of the round after a
cut are drawn from p where (p - q)+ is right. ``tests/schedule/test_grammar.py`` has
the exact numbers.
"""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from tests.integration import exact
from tests.integration.engine import KV_BYTES, engine
from tests.tiny import make_tiny_drafter, make_tiny_target, make_tiny_tokenizer

PROMPT, LENGTH, DRAWS = [5, 9], 3, 6000
REGEX = r"[!-1]{8}"
ALLOWED = list(range(3, 20))  # the ids of these characters, 17 of 24
SETTINGS = {
    "skip_tokenizer_init": False,
    "max_num_seqs": 256,
    "max_num_batched_tokens": 512,
    "max_model_len": 64,
    "kv_cache_memory_bytes": 4 * KV_BYTES,
    "structured_outputs_config": {"backend": "xgrammar"},
}


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("grammar-pair")
    target = make_tiny_target(folder / "target", vocab_size=24, sharpness=1.0)
    make_tiny_tokenizer(target, 24)
    return target, make_tiny_drafter(folder / "drafter", target)


@pytest.mark.parametrize("method", ["probabilistic", "greedy"])
def test_sampled_text(
    method: str, pair: tuple[Path, Path], caplog: pytest.LogCaptureFixture
) -> None:
    import torch
    from vllm import SamplingParams
    from vllm.sampling_params import StructuredOutputsParams

    right, wrong = (
        exact.enumerate_texts(
            exact.next_logits(pair[0]),
            PROMPT,
            LENGTH,
            {"temperature": t, "allowed_token_ids": ALLOWED},
        )
        for t in (1.0, 1.15)
    )
    params = SamplingParams(
        max_tokens=LENGTH + 2,
        structured_outputs=StructuredOutputsParams(regex=REGEX),
    )
    spec = {"draft_sample_method": method}
    with engine(*pair, spec=spec, **SETTINGS) as eng:
        logging.getLogger("vllm").addHandler(caplog.handler)
        torch.manual_seed(5)
        texts = eng.tokens([PROMPT] * DRAWS, params)
        stats = eng.stats()
        logging.getLogger("vllm").removeHandler(caplog.handler)
    draws = [tuple(text[:LENGTH]) for text in texts]
    assert stats.accepted > 0.05 * stats.draft_tokens > 100
    assert exact.p_value(draws, right) > 1e-4
    later = [text[1:] for text in draws]
    assert exact.p_value(later, exact.marginal(right, 1)) > 1e-4
    assert exact.p_value(later, exact.marginal(wrong, 1)) < 1e-4
    # A draft outside of the grammar is no error, which vLLM would call it each time.
    assert not [r for r in caplog.records if r.levelno >= logging.ERROR]
