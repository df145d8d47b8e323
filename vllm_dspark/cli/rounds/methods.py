"""From an engine's rounds, or its counters only, to evaluations."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.console import Console

from vllm_dspark.calibration import file
from vllm_dspark.calibration.file import Calibration
from vllm_dspark.calibration.rounds import PromptRounds, collect
from vllm_dspark.calibration.summary import Summary, macro
from vllm_dspark.cli.arms import Speculation, speculation_between
from vllm_dspark.cli.rounds import engine_vllm
from vllm_dspark.cli.rounds.evaluation import Evaluation, figures
from vllm_dspark.cli.rounds.prompts import Prompt
from vllm_dspark.cli.rounds.settings import Decoding, Drafting


def from_rounds(
    name: str, drafting: Drafting, texts: Mapping[float, Sequence[PromptRounds]]
) -> list[Evaluation]:
    """Evaluations of one drafter from its recorded rounds, by temperature.

    Raises:
        ValueError: its calibration is damaged, or another drafter's.
    """
    found = []
    calibration = find_calibration(drafting)
    for temperature, mine in texts.items():
        rounds = collect(mine, drafting.num_speculative_tokens)
        calibrated = None
        if calibration is not None:
            calibrated = calibration.scaling(temperature).apply(
                rounds.confidence, rounds.certainty
            )
        found.append(
            Evaluation(
                name,
                drafting.model,
                drafting.method,
                temperature,
                drafting.num_speculative_tokens,
                **figures(rounds, calibrated),
            )
        )
    return found


def find_calibration(drafting: Drafting) -> Calibration | None:
    """The calibration beside a drafter's weights, None if there is none.

    Raises:
        ValueError: it is damaged, or another drafter's.
    """
    if drafting.model is None:
        return None
    path = Path(drafting.model) / file.NAME
    if not path.exists():
        return None
    from vllm_dspark.model.checkpoint import weights_hash

    return file.read(path, weights_hash(drafting.model))


def from_counters(
    method: str,
    width: int,
    decoding: Decoding,
    prompts: Sequence[Prompt],
    console: Console,
) -> list[Evaluation]:
    """Evaluations of another method of vLLM's, from its own counters."""
    drafting = Drafting(method, None, width)
    found = []
    names = list(dict.fromkeys(prompt.dataset for prompt in prompts))
    with engine_vllm.serving(decoding, drafting, prompts, console, None) as server:
        for index, temperature in enumerate(decoding.temperatures):
            parts = {}
            for name in names:
                mine = [prompt for prompt in prompts if prompt.dataset == name]
                before = server.metrics()
                answers = engine_vllm.ask_all(
                    server, decoding, index, mine, lambda: None
                )
                counts = speculation_between(before, server.metrics())
                tokens = sum(map(len, answers.values()))
                parts[name] = counted(counts, tokens - len(answers), width)
            found.append(
                Evaluation(
                    *(method, None, method, temperature, width),
                    datasets=parts,
                    macro=macro(list(parts.values())),
                )
            )
    return found


def counted(counts: Speculation | None, decoded: int, width: int) -> Summary:
    """Figures from vLLM's counters.

    vLLM counts rounds that had drafts. A method that often has none (n-grams) also
    decodes in steps without: they are the tokens that no counted round explains.

    Args:
        decoded: tokens generated after the first of each text.
        width: K.
    """
    counts = counts or Speculation(0, 0, 0, (0,) * width)
    undrafted = max(0, decoded - counts.rounds - counts.accepted)
    rounds = counts.rounds + undrafted
    cumulative = [*counts.acceptance_per_position, *[math.nan] * width][:width]
    earlier = [1.0, *cumulative]
    nothing = (math.nan,) * width
    return Summary(
        tau=1 + counts.accepted / rounds if rounds else math.nan,
        acceptance_conditional=tuple(
            now / before if before else math.nan
            for now, before in zip(cumulative, earlier, strict=False)
        ),
        acceptance_cumulative=tuple(cumulative),
        ece_raw=nothing,
        ece_calibrated=nothing,
        auc=nothing,
        rounds=rounds,
        ece_floor=nothing,
        ece_conditional=nothing,
        auc_survival=nothing,
        brier_raw=nothing,
        brier_calibrated=nothing,
        auc_calibrated=nothing,
    )
