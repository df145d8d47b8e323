"""`fuzz_api`: what is a finding, what is compared, and the schemas it asks by."""

from __future__ import annotations

from typing import Any

import fuzz_api as fuzz


def asked(path: str, body: str, status: int | None, *failed: str) -> dict[str, Any]:
    checks = [{"name": name, "status": "FAILURE"} for name in failed]
    return {
        "request": {"method": "POST", "uri": f"http://x:1{path}", "body": body},
        "response": None if status is None else {"status": {"code": status}},
        "checks": [*checks, {"name": "fine", "status": "SUCCESS"}],
    }


def test_findings_and_statuses_that_differ_are_named() -> None:
    without = [
        asked("/a", "1", 200),
        asked("/a", "2", 400, "slow"),
        asked("/b", "", 200),
    ]
    assert fuzz.compare(without, without)["status_differs"] == {}
    worse = [asked("/a", "1", 500, "error"), without[1], asked("/c", "", None)]
    found = fuzz.compare(without, worse)
    assert found["findings_of_both"] == [("POST /a", "slow", "400")]
    assert found["findings_only_without"] == []
    assert found["findings_only_with"] == [("POST /a", "error", "500")]
    assert found["status_differs"] == {'POST /a? "1"': [["200"], ["500"]]}
    assert (found["different_requests"], found["requests_of_both"]) == ([3, 3], 2)
    assert fuzz.statuses(worse)["POST /c"] == {"no response": 1}


def test_frames_of_ours_are_counted() -> None:
    log = 'File "x/vllm_dspark/ops/a.py", line 1\nFile "x/vllm/a.py", line 2'
    assert fuzz.our_frames(log) == 1


def test_the_model_is_pinned_and_the_narrow_schema_has_few_keys() -> None:
    request = {"title": "CompletionRequest", "properties": {"model": {}, "suffix": {}}}
    chat = {"title": "ChatCompletionRequest", "properties": {"model": {}, "tools": {}}}
    schemas = {"CompletionRequest": request, "ChatCompletionRequest": chat}
    schema = {"components": {"schemas": schemas}}
    whole = fuzz.served_schema(schema)["components"]["schemas"]["CompletionRequest"]
    assert whole["properties"]["model"]["enum"] == [fuzz.NAME]
    assert "suffix" in whole["properties"] and request["properties"]["model"] == {}
    narrow = fuzz.narrow_schema(schema)["components"]["schemas"]
    assert "messages" not in narrow["CompletionRequest"]["properties"]
    assert narrow["ChatCompletionRequest"]["required"] == ["messages", "model"]
