"""Does an arm say what the reference says? Greedy answers, compared token by token.

In bfloat16 two candidates of the target can be a near-tie, and verification computes
in batches of another shape than plain decoding; a first difference counts as explained
where the target itself has the two candidates on top and next to each other.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import _bench_common  # noqa: F401  (makes the package importable)
from _sweep_fleet import Endpoint
from _sweep_prompts import Prompt

from vllm_dspark.cli import near_tie
from vllm_dspark.cli.arms import Answer, ask, connect
from vllm_dspark.cli.near_tie import Difference

# Float32 logits of two candidates so near that 16 bits may swap them: twice the largest
# gap seen in this project's own measurements (results/e2e.json).
NEAR = 0.25
TOKENS = 64  # of an answer


class Texts:
    """Answers by arm, kept in a file so that a resumed sweep need not ask again.

    Args:
        folder: of the sweep.
        resume: whether what is in the folder belongs to this sweep.
    """

    def __init__(self, folder: Path, resume: bool) -> None:
        self._file = folder / "texts.json"
        if not resume:
            self._file.unlink(missing_ok=True)
        raw = json.loads(self._file.read_text()) if self._file.exists() else {}
        self.answers: dict[str, dict[str, Answer]] = {
            arm: {name: Answer(**row) for name, row in by_name.items()}
            for arm, by_name in raw.get("answers", {}).items()
        }
        self.failures: dict[str, str] = raw.get("failures", {})

    def missing(self, arm: str) -> bool:
        return arm not in self.answers

    def ask(self, arm: str, server: Endpoint, prompts: Sequence[Prompt]) -> None:
        """Ask one server all prompts, one after the other; a failure is noted."""
        client = connect(server)
        found = {}
        try:
            for prompt in prompts:
                name = f"{prompt.dataset}-{prompt.number}"
                found[name] = ask(client, prompt.messages, TOKENS, lambda *_: None)
        # openai's own errors, and answers without token ids: it may not be vLLM.
        except Exception as error:
            self.failures[arm] = f"{type(error).__name__}: {error}"
        else:
            self.answers[arm] = found
            self.failures.pop(arm, None)
        self._write()

    def _write(self) -> None:
        raw = {
            arm: {name: asdict(answer) for name, answer in by_name.items()}
            for arm, by_name in self.answers.items()
        }
        content = {"answers": raw, "failures": self.failures}
        self._file.write_text(json.dumps(content))

    def judged(self, target: str, reference: str) -> dict[str, Any]:
        """What there is to say of every arm but the reference, for result.json.

        Args:
            target: model folder, asked about first differences.
            reference: the arm that says what is right.
        """
        arms: dict[str, Any] = {
            arm: {"verdict": f"not compared: {why}", "passed": None}
            for arm, why in self.failures.items()
        }
        if reference in self.answers:
            want = self.answers[reference]
            for arm, answers in self.answers.items():
                if arm != reference:
                    found = near_tie.differences(Path(target), want, answers)
                    arms[arm] = verdict(answers, found)
        return {"reference": reference, "arms": arms}


def verdict(
    answers: Mapping[str, Answer], differences: Sequence[Difference]
) -> dict[str, Any]:
    """One arm's entry: how many texts are equal, and what the others are."""
    total, equal = len(answers), len(answers) - len(differences)
    wrong = [d for d in differences if not is_near_tie(d)]
    text = f"{equal} of {total} equal, token for token"
    if differences:
        most = max(d.gap_float32 for d in differences)
        near = len(differences) - len(wrong)
        text += f"; {near} part at a near-tie (largest gap {most:.3f})" if near else ""
    for d in wrong:
        text += (
            f"; {d.prompt} DIFFERS at token {d.position}: {d.texts[1]!r} for "
            f"{d.texts[0]!r}, {d.gap_float32:.3f} apart, ranks {d.ranks}"
        )
    return {
        "equal": equal,
        "total": total,
        "passed": not wrong,
        "verdict": text,
        "differences": [asdict(d) for d in differences],
    }


def is_near_tie(difference: Difference) -> bool:
    """Whether the target's two best candidates are the two that differ, and close."""
    return difference.gap_float32 <= NEAR and max(difference.ranks) <= 1
