"""The controller's metrics in vLLM's Prometheus registry, and a request's own numbers.

Engines in this process (statistics are handed over as they are), in another (they are
encoded), and servers: with two API processes, and with two engines side by side. What
is counted must agree with vLLM's own counters, which are counted apart from ours.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.integration.engine import Engine, engine
from tests.integration.forks import ForkedServer
from tests.integration.recorder import prompt
from tests.integration.subprocesses import run_python, run_python_with_output
from tests.integration.test_adaptive import adaptive, cost_table, dear, free, jagged
from tests.integration.test_server import ARGUMENTS, ENVIRONMENT
from vllm_dspark.cli.server import Server
from vllm_dspark.metrics import METRICS, PREFIX, Kind

pytestmark = pytest.mark.slow

SPEC = "vllm:spec_decode_num_"
REQUESTS = [prompt(9), prompt(40), prompt(3)]


def params(**settings: Any) -> Any:
    from vllm import SamplingParams

    return SamplingParams(
        **{"temperature": 0.0, "max_tokens": 24, "ignore_eos": True, **settings}
    )


def read(eng: Engine) -> dict[str, Any]:
    """By name without prefix: a value, values by label, or a histogram."""
    found: dict[str, Any] = {}
    labels = {m.name: m.label for m in METRICS}
    for metric in eng.llm.get_metrics():
        name = metric.name.removeprefix(PREFIX)
        if metric.name.startswith(SPEC) and hasattr(metric, "value"):
            found[metric.name] = metric.value
        elif labels.get(name):
            found.setdefault(name, {})[metric.labels[labels[name]]] = metric.value
        elif name in labels:
            found[name] = getattr(metric, "value", metric)
    return found


def test_counts_are_those_of_vllm(tiny_target: Path, tiny_drafter: Path) -> None:
    with engine(tiny_target, tiny_drafter) as eng:
        before = read(eng)
        eng.generate(REQUESTS, params())
        found = read(eng)
        totals = eng.scheduler.controller.totals
        width = eng.scheduler.controller.width
    assert before["verified_tokens"] == before["steps"] == 0
    assert found["verified_tokens"] == found[SPEC + "draft_tokens"] > 50
    assert found["accepted_tokens"] == found[SPEC + "accepted_tokens"]
    assert found["steps"] == totals.steps > 10
    # What is drafted for a request that is about to end is never looked at.
    assert found["drafted_tokens"] >= found["verified_tokens"] + 3 * width
    assert found["trimmed_tokens"] == found["bypassed_steps"] == 0
    assert found["steps_by_stop"]["fixed"] == found["steps"]
    assert set(found["calibration_error"]) == {str(k) for k in range(width)}
    tau = 1 + found["accepted_tokens"] / found["rounds"]
    assert found["accepted_length"] == pytest.approx(tau)
    assert 1 < found["predicted_accepted_length"] < 1 + width
    lengths = found["verify_length"]
    assert lengths.sum >= found["verified_tokens"]
    assert lengths.count == sum(totals.verify_lens.values())
    assert len(lengths.buckets) == width + 2
    assert found["draft_length"].count == found["steps"]


@pytest.mark.parametrize("seconds", [free, dear, jagged], ids=lambda f: f.__name__)
def test_what_the_planner_does(
    tiny_target: Path, tiny_drafter: Path, tmp_path: Path, seconds: Any
) -> None:
    table = cost_table(tmp_path, seconds)
    with adaptive((tiny_target, tiny_drafter), table) as eng:
        eng.generate(REQUESTS, params(max_tokens=60))
        found = read(eng)
        controller = eng.scheduler.controller
    assert found["verified_tokens"] == found.get(SPEC + "draft_tokens", 0)
    assert found["drafted_tokens"] >= found["verified_tokens"] + found["trimmed_tokens"]
    assert found["steps_by_reason"] == {
        **dict.fromkeys(found["steps_by_reason"], 0),
        **{str(r): n for r, n in controller.drafting.counts.items()},
    }
    assert sum(found["steps_by_reason"].values()) > 20
    assert (found["bypassed_steps"] > 10) == (seconds is dear)
    assert found["draft_length"].buckets["0.0"] == found["bypassed_steps"]
    assert 0 < found["planner_max_seconds"] <= controller.totals.planner_seconds
    assert math.isnan(found["cost_error_ratio"])  # `adaptive` shows it no times


# ---- engines in other processes ----

ELSEWHERE = """
import json, sys
from vllm import LLM, SamplingParams
if __name__ == "__main__":
    target, drafter = sys.argv[1:]
    llm = LLM(
        target, skip_tokenizer_init=True, enforce_eager=True, dtype="float32",
        max_model_len=256, kv_cache_memory_bytes=64 << 20, disable_log_stats=False,
        speculative_config={"method": "dspark", "model": drafter},
        additional_config={"dspark": {"policy": "fixed"}},
    )
    params = SamplingParams(
        temperature=0.0, max_tokens=24, ignore_eos=True,
        extra_args={"dspark_stats": True},
    )
    out = llm.generate([{"prompt_token_ids": [5, 6, 7]}], params, use_tqdm=False)
    values = {m.name: m.value for m in llm.get_metrics() if hasattr(m, "value")}
    told = out[0].outputs[0].spec_decode_metrics.to_dict()
    print(json.dumps({"metrics": values, "request": told}))
"""


def test_an_engine_in_another_process(tiny_target: Path, tiny_drafter: Path) -> None:
    found = run_python(
        ELSEWHERE, tiny_target, tiny_drafter, VLLM_ENABLE_V1_MULTIPROCESSING="1"
    )
    counted = found["metrics"]
    assert counted[PREFIX + "verified_tokens"] == counted[SPEC + "draft_tokens"] > 20
    told = found["request"]["dspark"]
    assert told["verified"] == counted[SPEC + "draft_tokens"]
    assert told["accepted"] == counted[SPEC + "accepted_tokens"]


def serve(
    pair: tuple[Path, Path], log: Path, *more: str, cost_table: str | None = None
) -> Server:
    """With everything verified, or with lengths by a table of costs."""
    target, drafter = pair
    spec = json.dumps({"method": "dspark", "model": str(drafter)})
    chosen = {"cost_table": cost_table} if cost_table else {"policy": "fixed"}
    ours = json.dumps({"dspark": chosen})
    extra = ["--speculative-config", spec, "--additional-config", ours, *more]
    return ForkedServer(target, ARGUMENTS + extra, log, ENVIRONMENT)


def total(server: Server, name: str, **labels: str) -> float:
    """Summed over whatever labels are not given."""
    return sum(
        value
        for (found, have), value in server.metrics().items()
        if found == name and labels.items() <= dict(have).items()
    )


def complete(server: Server, **settings: Any) -> Any:
    from openai import OpenAI

    client = OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
    body = {"ignore_eos": True, **settings.pop("extra_body", {})}
    return client.completions.create(
        **{"model": "tiny", "prompt": "tea at ten", "max_tokens": 24, **settings},
        extra_body=body,
    )


@pytest.fixture(scope="module")
def server(
    text_pair: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Server]:
    log = tmp_path_factory.mktemp("logs") / "server.log"
    with serve(text_pair, log, "--api-server-count", "2") as server:
        server.wait_ready(lambda *_: None)
        yield server


def test_two_api_servers_count_once(server: Server) -> None:
    for _ in range(8):
        complete(server)
    verified = total(server, PREFIX + "verified_tokens_total")
    assert verified == total(server, SPEC + "draft_tokens_total") > 100
    exposed = {name for (name, _) in server.metrics()}
    for metric in METRICS:
        suffix = "_bucket" if metric.kind is Kind.HISTOGRAM else ""
        assert metric.exposed + suffix in exposed
    labelled = [have for (name, have) in server.metrics() if name.startswith(PREFIX)]
    assert {dict(have)["model_name"] for have in labelled} == {"tiny"}
    # A gauge is one engine's, whichever API server it was told.
    assert 1 <= total(server, PREFIX + "accepted_length") < 8


@pytest.mark.alone
def test_two_engines(text_pair: tuple[Path, Path], tmp_path: Path) -> None:
    """Data parallel: each has its labels, and both say what the target says."""
    from vllm import SamplingParams

    prompts = [[5, 9, 17, 33], [7] * 3, list(range(3, 60)), [100, 50]] * 2
    with engine(text_pair[0], skip_tokenizer_init=False) as plain:
        params = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)
        expected = [o.outputs[0].text for o in plain.generate(prompts, params)]
    table, two = cost_table(tmp_path, jagged), ("--data-parallel-size", "2")
    with serve(text_pair, tmp_path / "log", *two, cost_table=table) as server:
        server.wait_ready(lambda *_: None)
        for _ in range(4):
            complete(server, n=4, temperature=1.0)
        answer = complete(server, prompt=prompts, temperature=0)
        assert [choice.text for choice in answer.choices] == expected
        for engine_index in ("0", "1"):
            ours, theirs = (
                total(server, name, engine=engine_index)
                for name in (
                    PREFIX + "verified_tokens_total",
                    SPEC + "draft_tokens_total",
                )
            )
            assert ours == theirs > 0


# ---- one request's own numbers ----

ASK = {"vllm_xargs": {"dspark_stats": True}}


def test_an_answer_tells_who_asks(server: Server) -> None:
    before = total(server, SPEC + "draft_tokens_total")
    told = complete(server, extra_body=ASK).model_dump()["metrics"]
    told = told["speculative_decoding"]["dspark"]
    assert told["verified"] == total(server, SPEC + "draft_tokens_total") - before > 0
    assert told["drafted"] >= told["verified"] >= told["accepted"]
    assert told["mean_verify_length"] == told["verified"] / told["rounds"]
    quiet = complete(server).model_dump()
    assert quiet.get("metrics") is None


@pytest.mark.parametrize("asked", [True, False])
def test_a_stream_tells_with_its_usage(server: Server, asked: bool) -> None:
    chunks = list(
        complete(
            server,
            stream=True,
            stream_options={"include_usage": True},
            extra_body=ASK if asked else {},
        )
    )
    told = [c.model_dump().get("metrics") for c in chunks]
    assert not any(told[:-1])
    if asked:
        assert told[-1]["speculative_decoding"]["dspark"]["rounds"] > 0
    else:
        assert told[-1] is None


def test_chat_tells_too(server: Server) -> None:
    from openai import OpenAI

    client = OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
    answer = client.chat.completions.create(
        model="tiny",
        messages=[{"role": "user", "content": "is it hot there"}],
        max_tokens=24,
        extra_body={"ignore_eos": True, **ASK},
    )
    told = answer.model_dump()["metrics"]["speculative_decoding"]
    assert told["dspark"]["verified"] == told["num_draft_tokens"] > 0


@pytest.mark.parametrize("seconds", [free, dear, jagged], ids=lambda f: f.__name__)
def test_requests_sum_up_to_the_totals(
    tiny_target: Path, tiny_drafter: Path, tmp_path: Path, seconds: Any
) -> None:
    table = cost_table(tmp_path, seconds)
    asking = params(max_tokens=60, extra_args={"dspark_stats": True})
    with adaptive((tiny_target, tiny_drafter), table) as eng:
        outputs = eng.generate(REQUESTS, [asking, asking, asking])
        told = [o.outputs[0].spec_decode_metrics.dspark for o in outputs]
        quiet = eng.generate(REQUESTS[:1], params())
        found = read(eng)
        totals = eng.scheduler.controller.totals
    assert quiet[0].outputs[0].spec_decode_metrics is None
    summed = {key: sum(t[key] for t in told) for key in told[0]}
    assert summed["drafted"] <= found["drafted_tokens"]
    assert summed["verified"] <= summed["drafted"]
    assert 0 < summed["rounds"] <= totals.rounds
    if seconds is free:
        assert summed["verified"] > 0.8 * summed["drafted"] > 60 * len(REQUESTS)
    if seconds is dear:  # a bypass from the start, and its probes
        assert summed["drafted"] < 0.5 * 60 * len(REQUESTS)


def test_rounds_without_drafts_do_not_count() -> None:
    """As in vLLM's own numbers of a request; a bypass would thin out the mean."""
    from vllm_dspark.integration import stats

    stats.add_fields()
    asked = SimpleNamespace(extra_args={"dspark_stats": True})
    request = SimpleNamespace(sampling_params=asked, spec_decode_metrics=None)
    stats.count_if_asked(request, 5)
    for drafted, verified, accepted in ((5, 3, 1), (0, 0, 0), (5, 0, 0)):
        stats.count_round(request, drafted, verified, accepted)
    assert stats.with_counts(request.spec_decode_metrics, {"num": 1}) == {
        "num": 1,
        "dspark": {
            **{"rounds": 2, "drafted": 10, "verified": 3, "accepted": 1},
            "mean_verify_length": 1.5,
        },
    }


# ---- nobody else notices ----


def test_an_engine_without_dspark_has_none_of_it(
    tiny_target: Path, tiny_drafter: Path
) -> None:
    with engine(tiny_target, tiny_drafter):
        pass  # the patches are in place from here on
    with engine(tiny_target) as eng:
        out = eng.generate(REQUESTS, params(extra_args={"dspark_stats": True}))
        assert out[0].outputs[0].spec_decode_metrics is None
        assert not [m for m in eng.llm.get_metrics() if m.name.startswith(PREFIX)]


LATE = """
import json, logging
logging.basicConfig()
from vllm.v1.engine import EngineCoreOutputs
from vllm.v1.metrics.stats import SchedulerStats
from vllm.v1.serial_utils import MsgpackDecoder, MsgpackEncoder
from vllm_dspark.integration.stats import add_fields, take_news
def passed(sent):
    made = EngineCoreOutputs(scheduler_stats=sent)
    return MsgpackDecoder(EngineCoreOutputs).decode(MsgpackEncoder().encode(made))
if {late}:
    passed(SchedulerStats(3))
add_fields()
add_fields()
stats = SchedulerStats(3)
assert take_news(passed(stats).scheduler_stats) is None
stats.dspark = {{"steps": 2, "verify_length": {{0: 1}}, "accepted_length": 1.5}}
found = passed(stats).scheduler_stats
assert found.num_running_reqs == 3
print(json.dumps({{"same": take_news(found) == stats.dspark}}))
"""


@pytest.mark.parametrize("late", [False, True])
def test_what_comes_too_late_is_said(late: bool) -> None:
    """vLLM's reader of messages is fixed once an engine has one."""
    found, output = run_python_with_output(LATE.format(late=late))
    assert found["same"] is not late
    assert output.count("will lack what DSpark adds") == (2 if late else 0)
