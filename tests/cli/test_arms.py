"""Streaming and measuring: tokens, medians, speculation counters."""

import pytest

from tests.cli.fake_vllm import PROMPT_IDS, WORDS
from vllm_dspark.cli.arms import Answer, Arm, Speculation, geometric_mean, run_arm

PROMPTS = {"math": "?", "chat": "??"}


def measure(server, repeats=2):
    shown = {}

    def printer(name):
        chunks = shown.setdefault(name, [])
        return lambda text, tokens: chunks.append((text, tokens))

    arm = Arm("fake", 0.0)
    with server:
        server.wait_ready(lambda elapsed, line: None)
        run_arm(arm, server, PROMPTS, printer, max_tokens=5, repeats=repeats)
    return arm, shown


def test_speculating_server(fake_server):
    arm, shown = measure(fake_server("speculate"), repeats=3)
    answer = arm.answers["math"]
    assert answer.text == "".join(WORDS[:5])
    assert answer.token_ids == [0, 1, 2, 3, 4]
    assert answer.prompt_ids == PROMPT_IDS
    assert len(answer.seconds) == 3
    # 5 tokens in chunks of 2: 3 rounds a request; the warm-up is not counted.
    assert arm.speculation == Speculation(18, 36, 18, (18, 0))
    assert arm.speculation.accepted_length == 2.0
    assert arm.speculation.acceptance_per_position == [1.0, 0.0]
    # Shown once, as it arrived.
    assert [tokens for _, tokens in shown["chat"] if tokens] == [2, 2, 1]


def test_server_without_speculation_has_no_counters(fake_server):
    arm, _ = measure(fake_server("plain"))
    assert arm.speculation is None
    assert arm.answers["chat"].token_ids == [0, 1, 2, 3, 4]


def test_speed_is_by_the_median_time():
    answer = Answer("", [], list(range(10)), [9.0, 2.0, 1.0])
    assert answer.tokens_per_second == 5.0


def test_arm_speed_is_the_geometric_mean():
    arm = Arm("x", 0.0)
    arm.answers = {
        "a": Answer("", [], [1] * 2, [1.0]),
        "b": Answer("", [], [1] * 8, [1.0]),
    }
    assert arm.tokens_per_second == pytest.approx(4.0)
    assert geometric_mean([2.0, 0.5]) == pytest.approx(1.0)


def test_no_rounds_is_not_a_division_by_zero():
    counts = Speculation(0, 0, 0, (0,))
    assert counts.accepted_length is None
    assert counts.acceptance_per_position == []
