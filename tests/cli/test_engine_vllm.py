"""Asking a server and reading its trace, without a server."""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from vllm_dspark.cli.rounds import engine_vllm
from vllm_dspark.cli.rounds.prompts import Prompt
from vllm_dspark.cli.rounds.settings import Decoding
from vllm_dspark.types import StepRecord

PROMPTS = [Prompt(number, "d", (1, 2)) for number in range(3)]
DECODING = Decoding("target", (0.0, 1.0), max_tokens=8, concurrency=2)


def line(request: str, accepted: int, position: int) -> str:
    row = {"request": request, "position": position, "anchor": 5, "drafts": [1, 2]}
    row |= {"accepted": accepted, "confidences": [0.5, 0.25], "temperature": 0.0}
    row["certainties"] = [1.5, -0.5]
    return json.dumps(row) + "\n"


def test_an_interrupt_does_not_wait_for_answers(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    stopped = threading.Event()

    def post(server: Any, body: dict[str, Any], request_id: str) -> list[int]:
        if request_id == "dspark-1-0":
            raise KeyboardInterrupt
        stopped.wait(30)  # as an answer would, until the server is stopped
        return []

    monkeypatch.setattr(engine_vllm, "_post", post)
    start = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        engine_vllm.ask_all(None, DECODING, 1, PROMPTS, lambda: None)  # type: ignore[arg-type]
    assert time.monotonic() - start < 10
    stopped.set()


def test_rounds_find_their_prompts(tmp_path: Path) -> None:
    file = tmp_path / "trace.jsonl"
    file.write_text(
        line("cmpl-dspark-0-12-0-ab12cd34", 2, 9)
        + line("cmpl-of-somebody-else-0-ab12cd34", 1, 3)
        + line("cmpl-dspark-1-12-0-ab12cd35", 0, 9)
        + line("cmpl-dspark-0-12-0-ab12cd34", 1, 12)
    )
    found = engine_vllm.read_trace(file)
    assert set(found) == {(0, 12), (1, 12)}
    assert found[0, 12] == [
        StepRecord(9, 5, (1, 2), 2, (0.5, 0.25), (1.5, -0.5)),
        StepRecord(12, 5, (1, 2), 1, (0.5, 0.25), (1.5, -0.5)),
    ]


def test_a_trace_that_lacks_rounds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine_vllm, "_PATIENCE", 0.0)
    file = tmp_path / "trace.jsonl"
    with pytest.raises(ValueError, match="lacks rounds of 1 of 1 answers"):
        engine_vllm._complete(file, {(0, 12): [1, 2, 3]})
    file.write_text(line("cmpl-dspark-0-12-0-ab12cd34", 1, 9))
    # One token from the prefill, two from the round.
    assert len(engine_vllm._complete(file, {(0, 12): [1, 2, 3]})[0, 12]) == 1
    with pytest.raises(ValueError, match="lacks rounds"):
        engine_vllm._complete(file, {(0, 12): [1, 2, 3, 4]})
