"""vLLM's own sampled verification is wrong on CPU, and ours is right.

vLLM's CPU build expands temperature, top-k and top-p of speculated rows into memory
that is never written (``expand_batch_to_tokens``; vllm#55005). The same drafts, logits
and parameters go through vLLM's rejection sampler and through ours, and the first
emitted token is compared with the exact distribution of each request:

* vLLM's is far off: what is tested here is real (should this test fail, vLLM has
  repaired the function: delete it);
* ours fits, also when that function is made to raise, or to return nonsense: it fails
  as soon as our path goes through it;
* the whole engine, with the function raising, samples the right distribution.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.integration import exact
from tests.integration.engine import engine

VOCAB, DRAFTS, REQUESTS = 24, 2, 4000
# Requests alternate between these. (With top_k vLLM's sampler may not even finish: it
# gathers at indices from unwritten memory.)
SETTINGS: list[exact.Settings] = [
    {"temperature": 0.5},
    {"temperature": 1.7},
    {"temperature": 0.9, "top_p": 0.7},
]


@pytest.fixture(scope="module", autouse=True)
def cpu_kernels() -> None:
    """What vLLM's CPU worker does at start."""
    from vllm.platforms import current_platform

    current_platform.import_kernels()
    current_platform.register_triton_kernel_overrides()


class Inputs:
    """One verification step: every request at the same place of the text."""

    def __init__(self) -> None:
        rng = np.random.default_rng(0)
        self.rows = rng.normal(size=(DRAFTS + 1, VOCAB)) * 2.0
        self.draft = np.exp(self.rows[:DRAFTS] + rng.normal(size=(DRAFTS, VOCAB)))
        self.draft /= self.draft.sum(axis=1, keepdims=True)
        picks = [rng.choice(VOCAB, size=REQUESTS, p=q) for q in self.draft]
        self.drafts = np.stack(picks, axis=1)

    def arguments(self) -> dict[str, Any]:
        """Fresh tensors: vLLM's sampler works in place."""
        from vllm.v1.spec_decode.metadata import SpecDecodeMetadata

        device = torch.device("cpu")
        metadata = SpecDecodeMetadata.make_dummy(self.drafts.tolist(), device)
        rows = torch.arange(REQUESTS * (DRAFTS + 1)).view(REQUESTS, DRAFTS + 1)
        metadata.target_logits_indices = rows[:, :-1].flatten().int()
        metadata.bonus_logits_indices = rows[:, -1].int()
        return {
            "metadata": metadata,
            "draft_probs": torch.tensor(self.draft).float().repeat(REQUESTS, 1),
            "logits": torch.tensor(self.rows).float().repeat(REQUESTS, 1),
            "sampling_metadata": sampling_metadata(),
        }

    def p_values(self, sampler: Any) -> list[float]:
        """Of the first emitted tokens, per setting."""
        torch.manual_seed(0)
        emitted = sampler(**self.arguments()).sampled_token_ids[:, 0]
        values = []
        for i, settings in enumerate(SETTINGS):
            p = exact.probabilities(self.rows[0], [], [], settings)
            right = {(t,): p[t] for t in np.nonzero(p)[0].tolist()}
            draws = [(t,) for t in emitted[i :: len(SETTINGS)].tolist()]
            values.append(exact.p_value(draws, right))
        return values


def sampling_metadata() -> Any:
    from vllm.v1.sample.logits_processor import LogitsProcessors
    from vllm.v1.sample.metadata import SamplingMetadata

    def column(name: str, default: float) -> torch.Tensor:
        values = [s.get(name, default) for s in SETTINGS]
        return torch.tensor(values).repeat(REQUESTS)[:REQUESTS]

    zeros = torch.zeros(REQUESTS)
    return SamplingMetadata(
        temperature=column("temperature", 1.0),
        all_greedy=False,
        all_random=True,
        top_p=column("top_p", 1.0),
        top_k=None,
        generators={},
        max_num_logprobs=None,
        no_penalties=True,
        prompt_token_ids=None,
        frequency_penalties=zeros,
        presence_penalties=zeros,
        repetition_penalties=torch.ones(REQUESTS),
        output_token_ids=[],
        allowed_token_ids_mask=None,
        bad_words_token_ids={},
        logitsprocs=LogitsProcessors(),
        spec_token_ids=[[] for _ in range(REQUESTS)],
    )


def samplers() -> tuple[Any, Any]:
    """vLLM's rejection sampler and ours."""
    from vllm.v1.sample.rejection_sampler import RejectionSampler
    from vllm.v1.sample.sampler import Sampler

    from vllm_dspark.integration.sampler import DSparkRejectionSampler

    return RejectionSampler(Sampler()), DSparkRejectionSampler(Sampler())


def break_expand(monkeypatch: pytest.MonkeyPatch, how: str) -> list[str]:
    """Spoil vLLM's function; returns the list of calls that were made."""
    import vllm.v1.sample.rejection_sampler as module

    calls: list[str] = []

    def raising(*args: Any, **kwargs: Any) -> Any:
        calls.append("called")
        raise RuntimeError("expand_batch_to_tokens was called")

    def nonsense(x: torch.Tensor, cu: Any, num_tokens: int, **kwargs: Any) -> Any:
        calls.append("called")
        return torch.full((num_tokens,), 3, dtype=x.dtype)

    broken = {"raises": raising, "nonsense": nonsense}[how]
    monkeypatch.setattr(module, "expand_batch_to_tokens", broken)
    return calls


def test_vllm_expands_into_unwritten_memory() -> None:
    from vllm.v1.sample.rejection_sampler import expand_batch_to_tokens

    temperatures = torch.tensor([0.7, 1.5])
    ends = torch.tensor([2, 5], dtype=torch.int32)
    expanded = expand_batch_to_tokens(temperatures, ends, 5)
    assert expanded.tolist() != torch.tensor([0.7, 0.7, 1.5, 1.5, 1.5]).tolist()


def test_vllm_samples_another_distribution() -> None:
    vllm, _ = samplers()
    assert max(Inputs().p_values(vllm)) < 1e-6


def test_ours_samples_the_right_one() -> None:
    _, ours = samplers()
    assert min(Inputs().p_values(ours)) > 1e-3
    assert ours.last_backend == "native"


@pytest.mark.parametrize("how", ["raises", "nonsense"])
def test_ours_does_not_use_it(monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    calls = break_expand(monkeypatch, how)
    vllm, ours = samplers()
    assert min(Inputs().p_values(ours)) > 1e-3
    assert calls == []
    # The trap is set where vLLM's sampler steps into it.
    if how == "raises":
        with pytest.raises(RuntimeError, match="was called"):
            vllm(**Inputs().arguments())
    else:
        assert max(Inputs().p_values(vllm)) < 1e-6


def test_the_engine_does_not_use_it(
    monkeypatch: pytest.MonkeyPatch, small_pair: tuple[Path, Path]
) -> None:
    from vllm import SamplingParams

    calls = break_expand(monkeypatch, "raises")
    prompt, settings = [5, 9, 17, 8], {"temperature": 0.6, "top_k": 7}
    params = SamplingParams(max_tokens=3, ignore_eos=True, **settings)
    sizes = {"max_num_seqs": 256, "max_model_len": 64}
    spec = {"draft_sample_method": "probabilistic"}
    with engine(*small_pair, spec=spec, **sizes) as dspark:
        texts = dspark.tokens([prompt] * 2000, params)
        stats = dspark.stats()
    assert calls == []
    assert 0 < stats.accepted < stats.draft_tokens
    logits = exact.next_logits(small_pair[0])
    right = exact.enumerate_texts(logits, prompt, 3, settings)
    assert exact.p_value([tuple(t) for t in texts], right) > 1e-3
