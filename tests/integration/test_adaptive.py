"""The adaptive policy inside vLLM: lossless whatever it decides, and it does decide.

Costs come from a file, and what steps really take is not listened to, so that each
regime is the same on every machine:

* free: everything is worth verifying; dear: nothing is, drafting stops but for probes;
* jagged: a step up at every few tokens, so that lengths differ between requests;
* turns: lengths from 0 to γ in turn, whatever costs say. After a bypass drafts must be
  those of a drafter that never paused: its context K/V has no holes.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.integration import exact
from tests.integration.engine import Engine, engine
from tests.integration.oracle.history import Oracle
from tests.integration.recorder import drive, greedy, prompt, recording
from tests.tiny import make_tiny_drafter
from vllm_dspark.integration import upkeep
from vllm_dspark.integration.context import ContextWriter
from vllm_dspark.model.checkpoint import load_config
from vllm_dspark.schedule import planner
from vllm_dspark.schedule.cost import CostTable
from vllm_dspark.schedule.cost_file import CostFile, CostKey, write
from vllm_dspark.schedule.drafting import Reason
from vllm_dspark.schedule.facts import DraftPlan
from vllm_dspark.schedule.step import VerifyPlan, VerifyStep

BLOCK = 32
KEY = CostKey("t", "d", "float32", "made up", 1, "0", False, 1)


def table_of(seconds: Callable[[int], float]) -> CostTable:
    """A step of B tokens takes ``seconds(B)``; so does drafting."""
    drafting = (1e-4, 1e-4 + 0.2 * (seconds(6) - seconds(1)))
    tokens = tuple(range(1, 65))
    return CostTable(
        tokens,
        tuple(float(s) for s in map(seconds, tokens)),
        0.0,
        (1, 16),
        (0, 5),
        (drafting, drafting),
    )


def cost_table(folder: Path, seconds: Callable[[int], float]) -> str:
    """A file with such a table."""
    path = folder / "cost.json"
    write(path, CostFile(KEY, table_of(seconds), {}, {}))
    return str(path)


def free(tokens: int) -> float:
    return 0.1


def dear(tokens: int) -> float:
    return float(tokens)


def jagged(tokens: int) -> float:
    return 0.1 + 0.03 * (tokens // 5)


@contextmanager
def adaptive(pair: tuple[Path, Path], table: str, **kwargs: Any) -> Iterator[Engine]:
    ours = {"policy": "adaptive", "cost_table": table}
    with engine(*pair, additional_config={"dspark": ours}, **kwargs) as eng:
        eng.scheduler.controller.timed = lambda *args: None
        yield eng


@pytest.fixture(scope="module")
def pair(tiny_target: Path, tmp_path_factory: Any) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("pair") / "drafter"
    return tiny_target, make_tiny_drafter(folder, tiny_target, head_type="rnn")


ARRIVALS = [
    (0, prompt(150), greedy(20)),
    (0, prompt(3), greedy(60)),
    (2, prompt(97), greedy(27)),
    (5, prompt(40), greedy(33)),
    (9, prompt(64), greedy(1)),
    (12, prompt(33), greedy(50)),
]


@pytest.fixture(scope="module")
def plain(pair: tuple[Path, Path]) -> list[list[int]]:
    with engine(pair[0]) as eng:
        return [t.tokens for t in drive(eng, ARRIVALS)]


@pytest.mark.parametrize("seconds", [free, dear, jagged], ids=lambda f: f.__name__)
def test_the_text_is_that_without_speculation(
    pair: tuple[Path, Path],
    plain: list[list[int]],
    tmp_path: Path,
    seconds: Callable[[int], float],
) -> None:
    table = cost_table(tmp_path, seconds)
    settings = {
        "block_size": BLOCK,
        "num_gpu_blocks_override": 14,
        "max_num_batched_tokens": 64,
        "enable_prefix_caching": True,
    }
    with adaptive(pair, table, **settings) as eng:
        texts = [t.tokens for t in drive(eng, ARRIVALS)]
        again = [t.tokens for t in drive(eng, ARRIVALS)]
        controller = eng.scheduler.controller
    assert texts == plain and again == plain
    totals = controller.totals
    assert controller.adapts and totals.steps > 60
    if seconds is free:
        assert totals.verified > 50
        # Tried, to learn what they take; more often where loads change all the time.
        assert totals.bypassed_steps < 0.2 * totals.steps
        assert totals.trimmed < 0.2 * totals.verified
    elif seconds is dear:
        # From the start; but beside a prompt's tokens even a dear draft is cheap.
        assert totals.bypassed_steps > 0.6 * totals.steps
        assert totals.verify_lens[0] > 0.8 * sum(totals.verify_lens.values())
        assert totals.trimmed > 0
    else:
        assert totals.trimmed > 0.1 * totals.verified > 5
        assert len([n for n, count in totals.verify_lens.items() if count > 3]) > 2
    assert len(controller.survival) == 0  # ended requests are forgotten


@pytest.mark.parametrize("caching", [False, True])
@pytest.mark.parametrize("kept", [None, 48, 0])
def test_drafts_after_a_bypass_are_those_of_a_drafter_that_never_paused(
    pair: tuple[Path, Path],
    plain: list[list[int]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    kept: int | None,
    caching: bool,
) -> None:
    """Whether all, some or none of the context may wait for a draft that reads it."""
    if kept is not None:
        row_bytes = 4 * load_config(pair[1]).feature_size
        monkeypatch.setattr(upkeep, "KEPT_BYTES", kept * row_bytes)
    dropped: list[int] = []
    forget = ContextWriter._drop
    monkeypatch.setattr(
        ContextWriter,
        "_drop",
        lambda self, places: dropped.append(len(places)) or forget(self, places),
    )
    some = [5, 0, 0, 3, 0, 1, 5, 2, 0, 0, 0, 4]
    if kept == 48:  # requests end, and others come, in a long bypass
        some = [*some, 1, *[0] * 20, *some, 1, *some]
    lengths = itertools.cycle(some)
    skipped = itertools.cycle([0, 2, 0, 1])

    def turns(batch: Any) -> DraftPlan:
        skip = frozenset(batch.ids[: next(skipped)])
        return DraftPlan(next(lengths), Reason.PAYS, skip)

    table = cost_table(tmp_path, free)
    settings = {"block_size": BLOCK, "max_num_batched_tokens": 50}
    settings["enable_prefix_caching"] = caching
    with (
        adaptive(pair, table, **settings) as eng,
        recording(eng.runner) as record,
    ):
        eng.scheduler.controller.draft = turns
        texts = drive(eng, ARRIVALS)
        waiting = eng.runner.drafter.context.rows
    assert [t.tokens for t in texts] == plain
    if kept is not None:
        assert waiting <= kept
    if kept == 48 and not caching:  # what a prefix cache holds may yet be read
        assert sum(dropped) > 5
    tally = Oracle(*pair).check(record, texts, every_round=False)
    assert tally.blocks > (20 if kept == 48 else 40)
    assert {len(b.drafts) for b in record.blocks} == {1, 2, 3, 4, 5}


def test_damaged_files_change_nothing(
    pair: tuple[Path, Path],
    plain: list[list[int]],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of the cost table and the calibration; everything is verified then."""
    # Ours follows vLLM's, which `vllm-dspark check` in other tests makes silent.
    monkeypatch.setattr(logging.getLogger("vllm"), "level", logging.INFO)
    broken = tmp_path / "broken.json"
    broken.write_text('{"kind": "dspark-')
    ours = {"cost_table": str(broken), "calibration": str(broken), "policy": "adaptive"}
    with (
        caplog.at_level("WARNING", "vllm_dspark"),
        engine(*pair, additional_config={"dspark": ours}) as eng,
    ):
        texts = [t.tokens for t in drive(eng, ARRIVALS)]
        controller = eng.scheduler.controller
    assert texts == plain
    assert not controller.adapts and controller.totals.trimmed == 0
    assert controller.totals.verified > 50
    said = " ".join(r.getMessage() for r in caplog.records)
    assert "calibration is ignored" in said and "no step costs" in said


def test_costs_are_measured_once_and_kept(
    pair: tuple[Path, Path],
    plain: list[list[int]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from vllm_dspark.integration import costs

    monkeypatch.setenv("VLLM_DSPARK_CACHE", str(tmp_path))
    profile, measured = costs.profile, []

    def quickly(*args: Any, **kwargs: Any) -> Any:
        measured.append(profile(*args, budget=1.0, **kwargs))
        return measured[-1]

    monkeypatch.setattr(costs, "profile", quickly)
    ours = {"dspark": {"policy": "adaptive"}}
    for _ in range(2):
        with engine(*pair, additional_config=ours) as eng:
            assert [t.tokens for t in drive(eng, ARRIVALS)] == plain
            controller = eng.scheduler.controller
            assert controller.adapts
            assert 0 < controller.live.error() < 10
            assert controller.overhead > 0
    assert len(measured) == 1
    table = measured[0].table
    assert table.tokens[-1] > 8 and table.positions[-1] == 5
    assert len(list((tmp_path / "cost").glob("*.json"))) == 1


# ---- sampled ----


def steps_up(tokens: np.ndarray) -> np.ndarray:
    """Seconds that jump at the first draft; the next ones cost little.

    This drafter's first drafts survive with 0.3 to 0.5: some are worth it.
    """
    return 1.0 + 0.38 * (tokens >= 2) + 0.01 * (tokens - 1)


def each_alone(
    choose: Callable[[np.ndarray], np.ndarray],
) -> Callable[[VerifyStep], VerifyPlan]:
    """A plan that decides about every request as if it were the only one."""

    def plan(step: VerifyStep) -> VerifyPlan:
        assert step.num_drafts is not None
        lens = [
            int(choose(step.survival[r : r + 1, :n])[0]) if n else 0
            for r, n in enumerate(step.num_drafts.tolist())
        ]
        found = np.array(lens, dtype=np.int64)
        return VerifyPlan(found, 1.0, 1.0, planner.Stop.DROP, 0)

    return plan


def early_stop(survival: np.ndarray) -> np.ndarray:
    return planner.plan(VerifyStep(survival, 1, steps_up)).verify_lens


@pytest.fixture(scope="module")
def knowing(small_pair: tuple[Path, Path], tmp_path_factory: Any) -> tuple[Path, Path]:
    """A drafter whose confidence tells its tokens apart."""
    from safetensors.torch import load_file, save_file

    target, _ = small_pair
    folder = make_tiny_drafter(tmp_path_factory.mktemp("knowing") / "d", target)
    file = folder / "model.safetensors"
    state = load_file(file)
    for name in state:
        if name.startswith("confidence_head") and name.endswith("weight"):
            state[name] = state[name] * 40
    save_file(state, file, metadata={"format": "pt"})
    return target, folder


def test_sampled_text_on_a_jagged_curve(
    knowing: tuple[Path, Path], tmp_path: Path
) -> None:
    """Lengths that hang on confidences which know the token leave no trace in the text.

    What a search that looks further does to a distribution is computed exactly in
    ``tests/schedule/test_lossless.py``.
    """
    import torch
    from vllm import SamplingParams

    prompt_ids, length = [5, 9], 3
    right = exact.enumerate_texts(
        exact.next_logits(knowing[0]), prompt_ids, length, {"temperature": 1.0}
    )
    sizes = {"max_num_seqs": 256, "max_num_batched_tokens": 1024, "max_model_len": 64}
    spec = {"draft_sample_method": "probabilistic"}
    with adaptive(knowing, cost_table(tmp_path, jagged), spec=spec, **sizes) as eng:
        controller = eng.scheduler.controller
        controller.draft = lambda batch: DraftPlan(5, Reason.PAYS)
        warm = iter(range(30))  # steps that verify everything, to learn from
        alone = each_alone(early_stop)

        def plan(step: VerifyStep) -> VerifyPlan:
            return alone(step) if next(warm, None) is None else planner.fixed(step)

        controller._plan = plan
        torch.manual_seed(3)
        params = SamplingParams(max_tokens=length + 1, ignore_eos=True)
        texts = eng.tokens([prompt_ids] * 20000, params)
        verified = controller.totals.verify_lens
    draws = [tuple(text[:length]) for text in texts]
    assert len([n for n, count in verified.items() if count > 1000]) >= 2
    assert exact.p_value(draws, right) > 1e-4
    assert exact.p_value([d[1:] for d in draws], exact.marginal(right, 1)) > 1e-4
