"""The compatibility matrix: README's table is what this file renders.

Each row names the tests that serve such requests and compare the text with that of vLLM
without speculation; ``tests/test_matrix.py`` checks that they are there.
``python -m tests.matrix`` prints the table.
"""

from __future__ import annotations

from dataclasses import dataclass

SERVER = "integration/test_matrix_server.py"
OFFLINE = "integration/test_matrix_offline.py"
SCHEDULES = "integration/test_drafter_schedules.py"
STRUCTURED = "integration/test_structured_output.py"
FEATURES = "integration/test_sampling_features.py"


@dataclass(frozen=True)
class Row:
    """One line of the table.

    Args:
        feature: what is combined with DSpark.
        tests: under ``tests/``; ``FILE::FUNCTION``, perhaps with a parameter.
        state: ``yes``, or what vLLM says where it does not serve it here.
    """

    feature: str
    tests: tuple[str, ...]
    state: str = "yes"


def _served(feature: str, name: str, *more: str) -> Row:
    return Row(feature, (f"{SERVER}::test_feature[{name}]", *more))


ROWS = (
    _served("completions", "completion"),
    _served("chat completions", "chat"),
    Row("`LLM.generate`, `LLM.chat`", (f"{OFFLINE}::test_chat",)),
    _served("streaming", "streaming", f"{SERVER}::test_feature[streaming_chat]"),
    _served("n > 1", "several", f"{FEATURES}::test_several_completions"),
    _served("seed", "seed", "integration/test_seeds.py::test_in_other_company"),
    _served("logprobs", "logprobs", "integration/test_logprobs.py::test_top"),
    _served("penalties", "penalties", f"{FEATURES}::test_all_greedy"),
    _served("bad words", "bad_words", f"{FEATURES}::test_all_greedy"),
    _served("logit bias", "logit_bias", f"{FEATURES}::test_all_greedy"),
    _served("min and max tokens", "min_tokens", f"{FEATURES}::test_all_greedy"),
    _served("stop strings and tokens", "stop", f"{FEATURES}::test_all_greedy"),
    _served("JSON schema", "json_schema", f"{SERVER}::test_structured_output"),
    _served("regex, choice", "regex", f"{STRUCTURED}::test_greedy"),
    _served(
        "tool calls (`--enable-auto-tool-choice`)",
        "tools_auto",
        f"{SERVER}::test_feature[tools_required]",
        "integration/test_server.py::test_tool_calls",
    ),
    _served("LoRA on the target", "lora", f"{OFFLINE}::test_lora"),
    _served("priorities", "priority", f"{OFFLINE}::test_priorities"),
    _served(
        "a request's own `slo_tps`",
        "goal",
        f"{OFFLINE}::test_a_requests_own_goal",
    ),
    Row("all of these but LoRA in one batch", (f"{SERVER}::test_everything_at_once",)),
    Row("prefix caching", (f"{SCHEDULES}::test_prefix_hits_bring_their_context",)),
    Row(
        "chunked prefill",
        (f"{SCHEDULES}::test_chunked_prefill_with_requests_joining_and_leaving",),
    ),
    Row(
        "preemption",
        (
            f"{SCHEDULES}::test_preempted_requests_get_their_context_back",
            "integration/test_adaptive.py::test_the_text_is_that_without_speculation",
        ),
    ),
    _served(
        "prompts of one token",
        "one_token",
        f"{OFFLINE}::test_one_token",
    ),
    _served("empty answers, stop at the first token", "ends_at_once"),
    _served(
        "context to the model's limit",
        "to_the_limit",
        f"{SCHEDULES}::test_a_request_at_the_end_of_the_context_does_not_disturb_others",
    ),
    Row(
        "a drafter with a shorter context than the target",
        (f"{SCHEDULES}::test_a_drafter_with_a_shorter_context_than_the_target",),
    ),
    _served("prompts that are too long: refused as by vLLM", "too_long"),
    Row(
        "tensor parallel, 2 ranks",
        (
            "integration/test_tensor_parallel.py::"
            "test_two_ranks_serve_the_text_of_one_rank_without_speculation",
        ),
    ),
    Row("data parallel, 2 engines", ("integration/test_stats.py::test_two_engines",)),
    Row(
        "two API server processes",
        (
            "integration/test_server.py::test_every_api_process_takes_min_p_and_logit_bias",
        ),
    ),
    Row("K/V cache in fp8", (f"{OFFLINE}::test_fp8_kv_cache",)),
    Row(
        "quantised target (compressed-tensors W8A8)",
        (f"{OFFLINE}::test_a_quantised_target",),
    ),
    Row(
        "engines without DSpark beside it: embeddings, ngram, none",
        ("integration/test_plugin.py::test_inert",),
        "untouched",
    ),
    Row(
        "sleep mode",
        (f"{OFFLINE}::test_sleep_mode_is_not_there",),
        '"Sleep mode is not supported on current platform." (vLLM)',
    ),
)


def render() -> str:
    """The table as README has it."""
    lines = ["| feature | served | shown by `tests/integration/` |", "|---|---|---|"]
    for row in ROWS:
        names = dict.fromkeys(
            test.partition("::")[0].removeprefix("integration/") for test in row.tests
        )
        files = ", ".join(name.removesuffix(".py") for name in names)
        lines.append(f"| {row.feature} | {row.state} | {files} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(render(), end="")
