"""Sampled drafts outside of a grammar: verified, and the text has its distribution.

vLLM cuts a block before the first draft that the grammar forbids; whether a draft is
verified then depends on what it is. ``tests/schedule/test_grammar.py`` has the bias of
that, exactly: here each block must be what that test finds right, and the draws are
held against the target's masked distribution by enumeration.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.integration import exact
from tests.integration.engine import KV_BYTES, Engine, engine
from tests.tiny import make_tiny_drafter, make_tiny_target, make_tiny_tokenizer

PROMPT, LENGTH, DRAWS = [5, 9], 3, 2000
REGEX = r"[!-1]{20}"
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


Blocks = list[tuple[list[int], list[int]]]


@contextmanager
def watched(eng: Engine) -> Iterator[Blocks]:
    """Each block of sampled drafts, and what the scheduler leaves of it."""
    scheduler, blocks = eng.scheduler, []
    update = scheduler.update_draft_token_ids

    def watch(drafts: object) -> None:
        update(drafts)
        pairs = zip(drafts.req_ids, drafts.draft_token_ids, strict=True)
        for req_id, block in pairs:
            request = scheduler.requests.get(req_id)
            if request is not None and not request.is_finished():
                blocks.append((list(block), list(request.spec_token_ids)))

    scheduler.update_draft_token_ids = watch
    yield blocks


@pytest.mark.slow
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
        for t in (1.0, 1.5)
    )
    params = SamplingParams(
        max_tokens=LENGTH + 2,
        structured_outputs=StructuredOutputsParams(regex=REGEX),
    )
    spec = {"draft_sample_method": method}
    with (
        engine(*pair, spec=spec, **SETTINGS) as eng,
        watched(eng) as blocks,
    ):
        logging.getLogger("vllm").addHandler(caplog.handler)
        torch.manual_seed(5)
        texts = eng.tokens([PROMPT] * DRAWS, params)
        stats = eng.stats()
        logging.getLogger("vllm").removeHandler(caplog.handler)
    draws = [tuple(text[:LENGTH]) for text in texts]
    kept = 0
    for block, left in blocks:
        bad = [k for k, token in enumerate(block) if token not in ALLOWED]
        end = bad[0] + (method == "probabilistic") if bad else len(block)
        assert left == block[:end]
        kept += bool(bad)
    assert 0.1 * len(blocks) < kept < len(blocks)
    assert stats.accepted > 0.05 * stats.draft_tokens > 100
    assert exact.p_value(draws, right) > 1e-4
    later = [text[1:] for text in draws]
    assert exact.p_value(later, exact.marginal(right, 1)) > 1e-4
    assert exact.p_value(later, exact.marginal(wrong, 1)) < 1e-4
    # A draft outside of the grammar is no error, which vLLM would call it each time.
    assert not [r for r in caplog.records if r.levelno >= logging.ERROR]
