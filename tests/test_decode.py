"""The decode loop: speculation changes how a text is made, never the text.

Greedy texts must equal the target's own token for token (float32). For sampling, the
joint distribution of three tokens is compared with exact enumeration over a tiny
vocabulary, with drafts of different lengths in one batch.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from scipy.stats import chisquare
from torch import Tensor
from transformers import PreTrainedModel

from tests.tiny import load_target, make_tiny_drafter, make_tiny_target
from vllm_dspark.decode import (
    Generation,
    SamplingOptions,
    accepted_length,
    generate,
)
from vllm_dspark.model.checkpoint import load_drafter
from vllm_dspark.model.drafter import Drafter
from vllm_dspark.proposer import DraftOptions, Proposer
from vllm_dspark.types import StepRecord
from vllm_dspark.verifier import verify

PROMPTS = [[5, 6, 7], [60], [13, 77, 25, 9, 33]]
NEW = 40
VARIANTS: list[dict[str, Any]] = [
    {},
    {"head_type": "gated"},
    {"head_type": "rnn", "confidence": False},
    {"markov_rank": 0, "confidence": False},
    {"draft_vocab_size": 64},
    {"sliding_window": 8},
    {"own_embeddings": True},
]


@pytest.fixture(scope="module")
def target(tiny_target: Path) -> PreTrainedModel:
    return load_target(tiny_target)


def drafter_of(target: PreTrainedModel, folder: Path) -> Drafter:
    return load_drafter(
        folder,
        target_embeddings=target.get_input_embeddings().weight,
        target_lm_head=target.get_output_embeddings().weight,
    )


@pytest.fixture(scope="module")
def drafter(target: PreTrainedModel, tiny_drafter: Path) -> Drafter:
    return drafter_of(target, tiny_drafter)


def own_text(
    target: PreTrainedModel, prompt: list[int], length: int = NEW
) -> list[int]:
    """What the target writes greedily without speculation."""
    ids = torch.tensor([prompt])
    out = target.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=length,
        do_sample=False,
        eos_token_id=None,
    )
    new: list[int] = out[0, len(prompt) :].tolist()
    return new


def check_texts(target: PreTrainedModel, drafter: Drafter, **draft: Any) -> None:
    texts = generate(
        target, drafter, PROMPTS, SamplingOptions(NEW), DraftOptions(**draft)
    )
    for prompt, text in zip(PROMPTS, texts, strict=True):
        assert list(text.token_ids) == own_text(target, prompt)
        assert len(set(text.token_ids)) >= 8  # not one token over and over
    # Neither end would notice a wrong rollback or a wrong position.
    limit = draft.get("num_speculative_tokens", drafter.config.block_size)
    assert 1.15 < accepted_length(texts) < limit + 0.9


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_greedy_text_is_the_target_s(
    variant: dict[str, Any], target: PreTrainedModel, tiny_target: Path, tmp_path: Path
) -> None:
    folder = make_tiny_drafter(tmp_path, tiny_target, **variant)
    check_texts(target, drafter_of(target, folder))


def test_greedy_text_of_a_qwen3_target(tmp_path: Path) -> None:
    path = make_tiny_target(tmp_path / "target", arch="qwen3")
    folder = make_tiny_drafter(tmp_path / "drafter", path)
    target = load_target(path)
    check_texts(target, drafter_of(target, folder))


@pytest.mark.parametrize("num_drafts", [1, 3])
def test_fewer_drafts(
    num_drafts: int, target: PreTrainedModel, drafter: Drafter
) -> None:
    check_texts(target, drafter, num_speculative_tokens=num_drafts)


def test_records_tell_how_the_text_was_made(
    target: PreTrainedModel, drafter: Drafter
) -> None:
    prompt = PROMPTS[0]
    (text,) = generate(target, drafter, [prompt], SamplingOptions(NEW))
    sequence = [*prompt, *text.token_ids]
    position = len(prompt)
    for step in text.steps:
        assert (step.anchor_position, step.anchor_id) == (position, sequence[position])
        assert len(step.draft_ids) == len(step.confidence) == 5
        follows = sequence[position + 1 : position + 1 + step.num_accepted]
        assert follows == list(step.draft_ids[: len(follows)])
        rejected = step.draft_ids[step.num_accepted : step.num_accepted + 1]
        assert sequence[position + 1 + step.num_accepted :][:1] != list(rejected)
        position += step.num_accepted + 1
    assert position >= len(sequence) - 1


def test_length_and_stop_tokens_end_a_text(
    target: PreTrainedModel, drafter: Drafter
) -> None:
    whole = own_text(target, PROMPTS[0])
    for length in (1, 2, 7):
        (text,) = generate(target, drafter, PROMPTS[:1], SamplingOptions(length))
        assert list(text.token_ids) == whole[:length]
    stop = whole[20]
    sampling = SamplingOptions(NEW, stop_ids=frozenset({stop}))
    (text,) = generate(target, drafter, PROMPTS[:1], sampling)
    assert list(text.token_ids) == whole[: whole.index(stop) + 1]


def test_broken_drafts_leave_the_text_alone(
    target: PreTrainedModel, tiny_drafter: Path
) -> None:
    broken = drafter_of(target, tiny_drafter)
    broken.norm.weight = torch.nn.Parameter(
        torch.full_like(broken.norm.weight, float("nan")), requires_grad=False
    )
    (text,) = generate(target, broken, PROMPTS[:1], SamplingOptions(10))
    assert list(text.token_ids) == own_text(target, PROMPTS[0], 10)
    assert {step.draft_ids for step in text.steps} == {()}


def test_sampling_follows_its_generator(
    target: PreTrainedModel, drafter: Drafter
) -> None:
    def run(seed: int, temperature: float) -> tuple[int, ...]:
        (text,) = generate(
            target,
            drafter,
            PROMPTS[:1],
            SamplingOptions(NEW, temperature),
            DraftOptions(draft_sample_method="probabilistic"),
            torch.Generator().manual_seed(seed),
        )
        return text.token_ids

    assert run(1, 1.0) == run(1, 1.0)
    assert run(1, 1.0) != run(2, 1.0)
    # Nearly cold sampling is greedy: the temperature reaches drafter and target.
    assert list(run(1, 1e-3)) == own_text(target, PROMPTS[0])


def test_bad_calls_are_refused(target: PreTrainedModel, drafter: Drafter) -> None:
    with pytest.raises(ValueError, match=r"temperature is 0.7: pass a torch.Generator"):
        generate(target, drafter, PROMPTS, SamplingOptions(temperature=0.7))
    with pytest.raises(ValueError, match="prompt 1 is empty"):
        generate(target, drafter, [[5], []], SamplingOptions(1))
    with pytest.raises(ValueError, match="no decoding round was run"):
        accepted_length([Generation((5,), ())])


def test_accepted_length_counts_the_bonus_token() -> None:
    steps = tuple(StepRecord(9, 1, (4, 5), n, ()) for n in (0, 2, 1))
    assert accepted_length([Generation((), steps), Generation((), steps)]) == 2.0


VOCAB, DRAWS = 16, 20_000


@dataclass(frozen=True)
class TinyWorld:
    """A target of 16 tokens whose next-token logits after a prompt are all known.

    Args:
        tables: logits ``[16]``, ``[16, 16]`` and ``[16, 16, 16]`` after the prompt and
            zero, one and two more tokens.
    """

    target: PreTrainedModel
    drafter: Drafter
    prompt: list[int]
    tables: tuple[Tensor, Tensor, Tensor]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> TinyWorld:
    path = make_tiny_target(tmp_path_factory.mktemp("t16"), vocab_size=VOCAB)
    folder = make_tiny_drafter(tmp_path_factory.mktemp("d16"), path)
    target, prompt = load_target(path), [5, 9, 12]
    pairs = torch.cartesian_prod(torch.arange(VOCAB), torch.arange(VOCAB))
    start = torch.tensor(prompt).expand(len(pairs), -1)
    with torch.no_grad():
        logits = target(torch.cat([start, pairs], dim=1)).logits
    size = (VOCAB, VOCAB, VOCAB)
    tables = (logits[0, 2], logits[:, 3].view(size)[:, 0], logits[:, 4].view(size))
    return TinyWorld(target, drafter_of(target, folder), prompt, tables)


def draw_three(world: TinyWorld, *, wrong_draft_probs: bool) -> Tensor:
    """First three new tokens of many requests in one batch: ``[DRAWS, 3]``.

    The prompt's last token serves as the anchor, so the first draft is the first new
    token. Requests verify 0, 1 or 2 of their drafts; what a round does not emit is
    drawn from the target itself.
    """
    generator = torch.Generator().manual_seed(11)

    def rand(*shape: int) -> Tensor:
        return torch.rand(shape, dtype=torch.float64, generator=generator)

    ids = torch.tensor([world.prompt])
    with torch.no_grad():
        hidden = world.target(ids, output_hidden_states=True).hidden_states
    layers = world.drafter.config.target_layer_ids
    features = torch.cat([hidden[i + 1][:, :-1] for i in layers], dim=-1)
    options = DraftOptions(2, draft_sample_method="probabilistic")
    temperature = torch.ones(DRAWS)
    block = Proposer(world.drafter, options).propose(
        torch.full((DRAWS,), world.prompt[-1]),
        torch.full((DRAWS,), len(world.prompt) - 1),
        world.drafter.context_kv(features, torch.arange(features.shape[1])[None]),
        temperature,
        rand(DRAWS, 2),
    )
    if wrong_draft_probs:
        uniform = torch.full((DRAWS, 2, VOCAB), 1 / VOCAB)
        block = dataclasses.replace(block, draft_probs=uniform)
    num = torch.arange(DRAWS) % 3
    first, second = block.token_ids.unbind(1)
    none, one, two = world.tables
    rows = torch.stack([none.expand(DRAWS, -1), one[first], two[first, second]], 1)
    logits = rows[torch.arange(3) <= num[:, None]]
    result = verify(
        logits,
        block,
        num,
        temperature=temperature,
        accept_uniforms=rand(int(num.sum())),
        sample_uniforms=rand(DRAWS),
    )
    tokens = result.token_ids
    for length in (1, 2):
        short = result.num_emitted <= length
        a, b = tokens[short, 0], tokens[short, 1]
        probs = (one[a] if length == 1 else two[a, b]).softmax(-1)
        tokens[short, length] = torch.multinomial(probs, 1, generator=generator)[:, 0]
    return tokens


def p_value(world: TinyWorld, tokens: Tensor) -> float:
    """Chi-square of three tokens against enumeration, rare cells put together."""
    none, one, two = (table.double().softmax(-1) for table in world.tables)
    exact = (none[:, None, None] * one[:, :, None] * two).flatten() * DRAWS
    cell = (tokens[:, 0] * VOCAB + tokens[:, 1]) * VOCAB + tokens[:, 2]
    seen = torch.bincount(cell, minlength=VOCAB**3).double()
    often = exact >= 5
    expected = torch.cat([exact[often], exact[~often].sum()[None]])
    observed = torch.cat([seen[often], seen[~often].sum()[None]])
    assert len(expected) > 150
    return float(chisquare(observed.numpy(), expected.numpy()).pvalue)


def test_sampled_tokens_follow_the_target(world: TinyWorld) -> None:
    assert p_value(world, draw_three(world, wrong_draft_probs=False)) > 0.01


def test_the_chi_square_notices_a_wrong_acceptance(world: TinyWorld) -> None:
    """Drafts verified against a distribution they were not drawn from."""
    assert p_value(world, draw_three(world, wrong_draft_probs=True)) < 1e-6
