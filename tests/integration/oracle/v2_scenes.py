"""What engines with our controller are put through on the V2 runner (`v2_control`).

Costs are made up, and what steps really take is not listened to unless a scene is about
that.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tests.integration.engine import Engine, engine
from tests.integration.recorder import drive, greedy, prompt
from tests.integration.test_adaptive import dear, free, jagged, table_of
from tests.integration.test_structured_output import GRAMMARS
from tests.integration.test_structured_output import SETTINGS as GRAMMAR_SETTINGS
from vllm_dspark.schedule import planner
from vllm_dspark.schedule.cost import CostTable
from vllm_dspark.schedule.drafting import Drafting, Reason
from vllm_dspark.schedule.drafting_options import DraftingOptions
from vllm_dspark.schedule.facts import DraftPlan, StepTimes
from vllm_dspark.schedule.step import VerifyStep

WIDTH = 5
SAMPLED = {"draft_sample_method": "probabilistic"}
SETTINGS = {
    "block_size": 32,
    "max_num_batched_tokens": 64,
    "max_num_seqs": 4,
    "enable_prefix_caching": True,
}
# The interpreter takes a fifth of a second for a step: everything happens soon.
QUICK = DraftingOptions(
    warmup_rounds=4,
    warmup_steps=6,
    hold=2,
    max_hold=8,
    average=2.0,
    probe_interval=4,
    max_probe_interval=16,
    probe_rounds=3,
    max_probe_steps=6,
)
ARRIVALS = [
    (0, prompt(70), greedy(16)),
    (0, prompt(3), greedy(32)),
    (2, prompt(97), greedy(20)),
    (5, prompt(33), greedy(24)),
]
Seconds = Callable[[int], float]


def regime(eng: Engine, seconds: Seconds) -> Any:
    """A fresh controller for an engine, with made-up costs."""
    scheduler = eng.scheduler
    controller = scheduler.controller = scheduler._build()
    controller.drafting = Drafting(WIDTH, QUICK)
    controller.price(table_of(seconds))
    controller.timed = lambda *args: None
    scheduler.draft_confidences, scheduler.draft_certainties = {}, {}
    return controller


def told(eng: Engine, texts: list[Any]) -> dict[str, Any]:
    """Texts, and what the controller and vLLM counted."""
    controller = eng.scheduler.controller
    totals, stats = controller.totals, eng.stats()
    return {
        "texts": [t.tokens for t in texts],
        "totals": {n: getattr(totals, n) for n in totals.__dataclass_fields__},
        "reasons": {str(r): n for r, n in controller.drafting.counts.items()},
        "probes": controller.drafting.probes,
        "remembered": len(controller.survival),
        "draft_tokens": stats.draft_tokens,
        "accepted": stats.accepted,
        "passes": eng.runner.speculator.passes,
    }


def count_passes(eng: Engine) -> None:
    """Query passes of the drafter, and steps in which it wrote context K/V."""
    speculator = eng.runner.speculator
    speculator.passes = {"query": 0, "context": 0}
    run, write = speculator._run_model, speculator._precompute_context_kv

    def run_model(*args: Any, **keys: Any) -> Any:
        speculator.passes["query"] += 1
        return run(*args, **keys)

    def write_context(*args: Any, **keys: Any) -> Any:
        speculator.passes["context"] += 1
        return write(*args, **keys)

    speculator._run_model = run_model
    speculator._precompute_context_kv = write_context


def regimes(eng: Engine) -> dict[str, Any]:
    """The same requests under each kind of costs."""
    drive(eng, [(0, prompt(9), greedy(3))])  # the engine's own costs come with it
    found = {}
    for seconds in (free, dear, jagged):
        regime(eng, seconds)
        before = eng.stats()
        eng.runner.speculator.passes = {"query": 0, "context": 0}
        result = told(eng, drive(eng, ARRIVALS))
        result["draft_tokens"] -= before.draft_tokens
        result["accepted"] -= before.accepted
        found[seconds.__name__] = result
    return found


def bypass(eng: Engine) -> dict[str, Any]:
    """A dear machine that becomes a free one under way."""
    controller = regime(eng, dear)
    reasons: list[str] = []

    def each_step(step: int) -> None:
        reasons.append(str(controller._choice.reason))
        if step == 24:
            controller.price(table_of(free))

    texts = drive(eng, [(0, prompt(5), greedy(64))], each_step=each_step)
    return {**told(eng, texts), "each": reasons}


def changing_times(eng: Engine) -> dict[str, Any]:
    """Drafting becomes twenty times as slow: seen in its times alone."""
    controller = regime(eng, free)
    upkeep, drafting = 0.005, 0.02
    rows = ((upkeep, drafting),) * 2
    controller.price(CostTable((1, 64), (0.1, 0.12), 0.0, (1, 16), (0, WIDTH), rows))
    listen = type(controller).timed
    now = {"factor": 1.0}
    positions: list[int] = []

    def timed(times: StepTimes) -> None:
        assert times.target_seconds > 0
        drafted = times.drafted
        if drafted is not None:
            requests, made, measured = drafted
            assert measured > 0
            seconds = now["factor"] * drafting if made else upkeep
            drafted = (requests, made, seconds)
        told = replace(times, target_seconds=0.1, drafted=drafted, overhead=0.0)
        listen(controller, told)

    def each_step(step: int) -> None:
        positions.append(controller._choice.positions)
        if step == 16:
            now["factor"] = 20.0

    controller.timed = timed
    texts = drive(eng, [(0, prompt(7), greedy(90))], each_step=each_step)
    return {**told(eng, texts), "positions": positions}


class Blocks:
    """Every block drafted: where, and what came out."""

    def __init__(self, speculator: Any) -> None:
        self.blocks: list[dict[str, Any]] = []
        self._propose, self._sequential = speculator.propose, None
        self._inner = speculator._sample_sequential
        speculator.propose, speculator._sample_sequential = self.propose, self.sample
        self._speculator = speculator

    def propose(self, batch: Any, *args: Any, **keys: Any) -> torch.Tensor:
        self._ids, self._sampled = batch.req_ids, args[4]
        return self._propose(batch, *args, **keys)

    def sample(self, num_reqs: int, hidden: torch.Tensor) -> None:
        self._inner(num_reqs, hidden)
        spec = self._speculator
        k, anchors = spec.num_speculative_steps, spec._anchor_idx[:num_reqs]
        for i, req_id in enumerate(self._ids):
            if int(self._sampled[i]) == 0:  # a prompt in parts: nobody reads these
                continue
            self.blocks.append(
                {
                    "req_id": req_id.rsplit("-", 1)[0],
                    "anchor_position": int(spec.input_buffers.positions[anchors[i]]),
                    "drafts": spec.draft_tokens[i, :k].tolist(),
                    "confidence": spec.draft_token_confidence_probs[i, :k].clone(),
                }
            )


def turns(eng: Engine) -> dict[str, Any]:
    """Lengths from 0 to γ in turn, whatever costs say."""
    lengths = itertools.cycle([5, 0, 0, 3, 0, 1, 5, 2, 0, 4])
    controller = regime(eng, free)
    controller.draft = lambda batch: DraftPlan(next(lengths), Reason.PAYS)
    record = Blocks(eng.runner.speculator)
    texts = drive(eng, ARRIVALS)
    return {
        "texts": [vars(t) for t in texts],
        "blocks": record.blocks,
        "drafter": str(eng.llm.llm_engine.vllm_config.speculative_config.model),
    }


def trims(eng: Engine) -> dict[str, Any]:
    """What the device chose, beside the planner's choice by the same confidences."""
    regime(eng, jagged)
    manager, scheduler = eng.runner.adaptive_verification, eng.scheduler
    choose, rows = manager._best, []

    def best(req_ids: list[str], slots: Any, num_drafts: Any, count: int) -> Any:
        lens = choose(req_ids, slots, num_drafts, count)
        budget, survival = manager._budget, scheduler.controller.survival
        drafts = num_drafts.numpy().astype(np.int64)
        known = dict(zip(budget.ids, budget.reserved.tolist(), strict=True))
        drafts *= np.array([r in known for r in req_ids])
        made = survival.apply(
            req_ids,
            [0.0] * len(req_ids),
            manager._confidence_probs[slots].numpy()[:, : drafts.max()],
        )
        reserved = np.array([known.get(r, 0) for r in req_ids])
        step = VerifyStep(
            made.survival,
            len(req_ids),
            lambda tokens: np.ones(len(tokens)),
            num_drafts=drafts,
        )
        first = int(np.minimum(reserved, drafts).sum())
        allowed = planner.Budget(reserved, count - first, planner.Stop.BUDGET)
        rows.append(
            {
                "device": lens.tolist(),
                "planner": planner.plan_within(step, allowed).verify_lens.tolist(),
                "survival": made.survival,
                "raw": manager._confidence_probs[slots].clone(),
                "reserved": reserved.tolist(),
            }
        )
        return lens

    manager._best = best
    goal = greedy(20)
    goal.extra_args = {"slo_tps": 12.0, "dspark_stats": True}
    arrivals = [*ARRIVALS, (3, prompt(20, 7), goal)]
    texts = drive(eng, arrivals)
    del manager._best
    return {**told(eng, texts), "rows": rows}


def grammars(folder: Path, **keys: Any) -> list[str]:
    """Greedy and sampled texts within grammars."""
    from vllm import SamplingParams
    from vllm.sampling_params import StructuredOutputsParams

    params = [
        SamplingParams(
            temperature=temperature,
            seed=i,
            max_tokens=14,
            structured_outputs=StructuredOutputsParams(**GRAMMARS[name][0]),
        )
        for i, (name, temperature) in enumerate(
            zip(GRAMMARS, (0.0, 0.0, 0.8), strict=True)
        )
    ]
    prompts = [prompt(5 + 3 * i, i) for i in range(3)]
    pair = [folder / "text-target"]
    if keys:
        pair.append(folder / "text-drafter")
    with engine(*pair, **keys, **SETTINGS, **GRAMMAR_SETTINGS) as eng:
        if keys:
            regime(eng, jagged)
        texts = [o.outputs[0].text for o in eng.generate(prompts, params)]
        if keys:
            assert eng.scheduler.controller.totals.trimmed > 0
    return texts
