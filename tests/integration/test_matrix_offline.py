"""What an operator may combine with DSpark, offline: text equal to that without it.

Everything runs with the adaptive policy on a jagged cost curve, so that drafts are
trimmed, and in float32 or, where numbers are rounded on purpose, in one and the same
precision. Each case has an effect on the text or the order of the answers, and drafts
are verified meanwhile. What HTTP adds is in ``test_matrix_server``.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.integration.engine import Engine, engine
from tests.integration.recorder import drive, prompt
from tests.integration.test_adaptive import adaptive, cost_table, dear, free, jagged
from tests.tiny import make_tiny_drafter, make_tiny_target
from tests.tiny_lora import make_tiny_lora
from tests.tiny_quantized import quantize_target
from vllm_dspark.config import DSparkOptions
from vllm_dspark.schedule.controller import Controller
from vllm_dspark.schedule.facts import Totals

PROMPTS = [[5, 9, 17, 33, 2, 8], [7] * 3, list(range(3, 60)), [100, 50]]


def greedy(**settings: Any) -> Any:
    from vllm import SamplingParams

    return SamplingParams(temperature=0, max_tokens=30, ignore_eos=True, **settings)


@pytest.fixture(scope="module")
def pair(tiny_target: Path, tiny_drafter: Path) -> tuple[Path, Path]:
    return tiny_target, tiny_drafter


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> str:
    return cost_table(tmp_path_factory.mktemp("costs"), jagged)


# ---- adapters on the target ----


@pytest.fixture(scope="module")
def adapters(tiny_target: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    """Two adapters, the second of which changes the LM head as well."""
    from vllm.lora.request import LoRARequest

    folder = tmp_path_factory.mktemp("adapters")
    a = make_tiny_lora(folder / "a", tiny_target, seed=1)
    b = make_tiny_lora(folder / "b", tiny_target, seed=2, lm_head=True)
    return [LoRARequest("a", 1, str(a)), LoRARequest("b", 2, str(b))]


LORA = {"enable_lora": True, "max_loras": 2, "max_lora_rank": 8}


def with_adapters(eng: Engine, adapters: list[Any]) -> list[list[list[int]]]:
    """Texts by adapter, the last ones without any.

    Those are a batch of their own: on CPU vLLM 0.32 gives rows without an adapter,
    beside rows that have one, the last adapter (its index of -1 is Python's).
    """
    rows = [{"prompt_token_ids": p} for p in PROMPTS for _ in adapters]
    chosen = adapters * len(PROMPTS)
    outputs = eng.llm.generate(rows, greedy(), use_tqdm=False, lora_request=chosen)
    texts = [list(o.outputs[0].token_ids) for o in outputs]
    n = len(adapters)
    return [texts[i::n] for i in range(n)] + [eng.tokens(PROMPTS, greedy())]


@pytest.fixture(scope="module")
def adapted(tiny_target: Path, adapters: list[Any]) -> list[list[list[int]]]:
    with engine(tiny_target, **LORA) as plain:
        return with_adapters(plain, adapters)


@pytest.mark.parametrize("draft_vocab_size", [None, 64])
def test_lora(
    tiny_target: Path,
    tmp_path: Path,
    table: str,
    adapters: list[Any],
    adapted: list[list[list[int]]],
    draft_vocab_size: int | None,
) -> None:
    """Embeddings and LM head that the drafter shares are the target's without them."""
    drafter = make_tiny_drafter(
        tmp_path / "d", tiny_target, draft_vocab_size=draft_vocab_size
    )
    with adaptive((tiny_target, drafter), table, **LORA) as eng:
        assert with_adapters(eng, adapters) == adapted
        assert eng.stats().accepted > 3
        assert eng.scheduler.controller.totals.trimmed > 10
        # The drafter drafts for the target as it was trained on: adapters may change
        # how much is accepted, not what is drafted from the same hidden states.
        model = eng.runner.drafter.model
        layers = (model.lm_head, model.model.embed_tokens)
        assert not any("LoRA" in type(layer).__name__ for layer in layers)
    assert len(set(map(str, adapted))) == 3, "an adapter has no effect"


# ---- priorities ----

PRIORITIES = [5, 1, 3, 0, 2, 9, 4, 4, 7, 1, 6, 8]


def by_priority(eng: Engine) -> tuple[list[list[int]], list[int], int]:
    """Texts, the priorities in the order in which requests end, and preemptions."""
    llm_engine = eng.llm.llm_engine
    for i, priority in enumerate(PRIORITIES):
        row = {"prompt_token_ids": PROMPTS[i % 4]}
        llm_engine.add_request(str(i), row, greedy(), priority=priority)
    texts: dict[int, list[int]] = {}
    while llm_engine.has_unfinished_requests():
        for output in llm_engine.step():
            if output.finished:
                texts[int(output.request_id)] = list(output.outputs[0].token_ids)
    preempted = next(
        m.value for m in eng.llm.get_metrics() if m.name == "vllm:num_preemptions"
    )
    order = [PRIORITIES[i] for i in texts]
    return [texts[i] for i in range(len(PRIORITIES))], order, preempted


@pytest.mark.parametrize("seconds", [dear, jagged], ids=lambda f: f.__name__)
def test_priorities(pair: tuple[Path, Path], tmp_path: Path, seconds: Any) -> None:
    """Three places, and K/V blocks for the longest prompt and one other."""
    few = {
        "scheduling_policy": "priority",
        "max_num_seqs": 3,
        "max_model_len": 128,
        "block_size": 32,
        "num_gpu_blocks_override": 6,
    }
    with engine(pair[0], **few) as plain:
        expected, _, _ = by_priority(plain)
    with adaptive(pair, cost_table(tmp_path, seconds), **few) as eng:
        texts, order, preempted = by_priority(eng)
        totals = eng.scheduler.controller.totals
    assert texts == expected
    assert set(order[:3]) <= {0, 1, 2} and set(order[-3:]) <= {6, 7, 8, 9}
    assert preempted > 0 and totals.trimmed > 10 and totals.verified > 5


# ---- goals of requests ----


def served_with(eng: Engine, table: str, everyone: float, own: list[Any]) -> Totals:
    """What a fresh controller did for requests with goals of their own, or None."""
    from vllm_dspark.schedule import cost_file

    controller = Controller(5, DSparkOptions(slo_tps=everyone))
    controller.price(cost_file.read(Path(table)).table)
    controller.timed = lambda *args: None
    controller._exploring.budget = lambda step: None  # verifies more, whoever asks
    eng.scheduler.controller = controller
    extra = [None if goal is None else {"slo_tps": goal} for goal in own]
    eng.tokens(PROMPTS * 2, [greedy(extra_args=args) for args in extra])
    return controller.totals


def test_a_requests_own_goal(pair: tuple[Path, Path], tmp_path: Path) -> None:
    """Where a step of B tokens takes B seconds throughput alone verifies nothing, and
    eight requests get 0.125 tokens/s each; one of them shall get 0.16."""
    table = cost_table(tmp_path, dear)
    with adaptive(pair, table) as eng:
        nobody = served_with(eng, table, 0.0, [None] * 8)
        one = served_with(eng, table, 0.0, [0.16] + [None] * 7)
        others_waive = served_with(eng, table, 0.16, [None] + [0.0] * 7)
    assert one.verified > nobody.verified + 5
    assert one.verify_lens == others_waive.verify_lens


@pytest.mark.parametrize("goal", ["fast", -1, float("nan"), True, [5]])
def test_a_goal_that_is_none_is_refused(goal: Any) -> None:
    """By the front-end, so that only this request fails."""
    from vllm.config import SpeculativeConfig
    from vllm.exceptions import VLLMValidationError

    from vllm_dspark.integration import config, patches

    patches.activate()
    spec = SpeculativeConfig.__new__(SpeculativeConfig)
    spec.method = "dspark"
    spec.target_parallel_config = type("P", (), {"worker_cls": config.WORKER_CLS})()
    with pytest.raises(VLLMValidationError, match=r"slo_tps.*0 to 1e\+06"):
        greedy(extra_args={"slo_tps": goal})._validate_spec_decode(spec)
    greedy(extra_args={"slo_tps": 12, "of another": "plugin"})._validate_spec_decode(
        spec
    )


# ---- prompts of one token ----


@pytest.mark.parametrize("policy", ["fixed", "adaptive"])
def test_one_token(pair: tuple[Path, Path], table: str, policy: str) -> None:
    """One that joins a running batch: vLLM pads such a request with drafts of -1."""
    arrivals = [
        (0, prompt(10), greedy()),
        (3, [5], greedy()),
        (8, [77], greedy()),
    ]
    with engine(pair[0]) as plain:
        expected = [text.tokens for text in drive(plain, arrivals)]
    ours = {"dspark": {"policy": policy, "cost_table": table}}
    with engine(*pair, additional_config=ours) as eng:
        assert [text.tokens for text in drive(eng, arrivals)] == expected
        assert eng.stats().accepted > 3


# ---- numbers of less precision ----


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_quantised_target(tmp_path: Path, dtype: str) -> None:
    """Eight-bit weights and activations; the drafter stays as it is.

    In bfloat16 the texts are equal as well: a row's result hangs on no other row.
    """
    full = make_tiny_target(tmp_path / "full", hidden=128)
    drafter = make_tiny_drafter(tmp_path / "drafter", full)
    target = quantize_target(full, tmp_path / "target")
    with engine(target, dtype=dtype) as plain:
        expected = plain.tokens(PROMPTS, greedy())
        layer = plain.runner.model.model.layers[0].self_attn.qkv_proj
        assert type(layer.scheme).__name__ == "CompressedTensorsW8A8Int8"
    with adaptive((target, drafter), cost_table(tmp_path, free), dtype=dtype) as eng:
        assert eng.tokens(PROMPTS, greedy()) == expected
        assert eng.stats().accepted > 3


@pytest.fixture(scope="module")
def small_cache(
    text_pair: tuple[Path, Path], table: str
) -> Iterator[tuple[list[Any], list[Any]]]:
    """Answers to prompts and to questions, without and with speculation, K/V in fp8."""
    extra = {"kv_cache_dtype": "fp8", "skip_tokenizer_init": False}
    with engine(text_pair[0], **extra) as plain:
        expected = said(plain)
    with adaptive(text_pair, table, **extra) as eng:
        caches = eng.runner.kv_caches
        assert len(caches) == 4 + 2  # of target and drafter
        assert {cache.element_size() for cache in caches} == {1}
        yield expected, said(eng)
        assert eng.stats().accepted > 3


def said(eng: Engine) -> list[Any]:
    chats = [[{"role": "user", "content": text}] for text in ("tea at ten", "rain")]
    outputs = eng.generate(PROMPTS, greedy())
    outputs += eng.llm.chat(chats, greedy(), use_tqdm=False)
    return [(o.outputs[0].text, list(o.outputs[0].token_ids)) for o in outputs]


def test_fp8_kv_cache(small_cache: tuple[list[Any], list[Any]]) -> None:
    expected, found = small_cache
    assert found[: len(PROMPTS)] == expected[: len(PROMPTS)]


def test_chat(small_cache: tuple[list[Any], list[Any]]) -> None:
    expected, found = small_cache
    assert found[len(PROMPTS) :] == expected[len(PROMPTS) :]
    assert found[-1][0] != found[-2][0]


# ---- what vLLM does not serve here, in its own words ----


def test_sleep_mode_is_not_there(pair: tuple[Path, Path]) -> None:
    """With DSpark or without: once vLLM's CPU platform sleeps, this fails."""
    from vllm.engine.arg_utils import EngineArgs

    settings = {"skip_tokenizer_init": True, "max_model_len": 256}
    args = EngineArgs(str(pair[0]), enable_sleep_mode=True, **settings)
    with pytest.raises(ValueError, match="Sleep mode is not supported on current"):
        args.create_engine_config()
