"""The load sweep's parts without a server: arms, prompts, order."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import _sweep_amounts as amounts
import _sweep_arms as arms
import _sweep_client as client
import _sweep_fleet as fleet
import _sweep_grid as grid
import _sweep_texts as texts
import pytest
from _sweep_prompts import Prompt, Prompts

from vllm_dspark.cli.arms import Answer
from vllm_dspark.cli.near_tie import Difference


def prompts(**sizes: int) -> Prompts:
    rows = [Prompt(name, i, [], 5) for name, n in sizes.items() for i in range(n)]
    return Prompts(rows, seed=0)


# ---- arms ----


def test_the_adaptive_arm_has_no_number_of_drafts():
    arm = arms.named("dspark-adaptive", "D")
    assert arm.speculative_config == {"method": "dspark", "model": "D"}
    flag, value = arm.arguments[2:]
    assert flag == "--additional-config"
    assert json.loads(value) == {"dspark": {"policy": "adaptive"}}
    assert arms.named("none", "D").arguments == []
    fixed = arms.named("dspark-fixed-3", "D")
    assert fixed.speculative_config["num_speculative_tokens"] == 3


def test_the_plugin_knows_the_options_of_every_named_arm():
    from vllm_dspark.config import DSparkOptions

    for options in arms.DSPARK.values():
        DSparkOptions.from_dict(options)


def test_arms_have_short_names_and_peers_may_need_a_model():
    for name in ("fixed-1", "fixed-3", "fixed-7", "threshold", "no-bypass", "adaptive"):
        assert arms.named(name, "D") == arms.named(f"dspark-{name}", "D")
    no_bypass = arms.named("no-bypass", "D").additional_config
    assert no_bypass == {"dspark": {"policy": "adaptive", "bypass": False}}
    assert "num_speculative_tokens" not in arms.named("fixed", "D").speculative_config
    spec = arms.named("eagle3", "D", {"eagle3": "E"}).speculative_config
    assert spec["model"] == "E" and spec["method"] == "eagle3"
    with pytest.raises(ValueError, match="--draft-model dflash=FOLDER"):
        arms.named("dflash", "D")
    assert "model" not in arms.named("suffix", "D").speculative_config


def test_an_arm_of_ones_own():
    arm = arms.custom('mine={"additional_config": {"dspark": {"policy": "fixed"}}}')
    assert arm == arms.Arm("mine", None, {"dspark": {"policy": "fixed"}})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("mine", "NAME="),
        ("a/b={}", "NAME="),
        ("mine={", "damaged"),
        ("mine=[]", "objects"),
        ('mine={"speculative_config": 3}', "objects"),
        ('mine={"spec": {}}', "unknown key 'spec'"),
    ],
)
def test_bad_arms_are_refused(text: str, message: str):
    with pytest.raises(ValueError, match=message):
        arms.custom(text)


def test_servers_that_do_not_fit_are_not_started():
    fleet.check_memory(2.0, available=8.0, more=4)
    with pytest.raises(ValueError, match=r"5 more servers of about 2\.0 GiB"):
        fleet.check_memory(2.0, available=8.0, more=5)


def test_the_cache_holds_what_the_models_keep_of_each_token(tmp_path: Path):
    shape = {"num_attention_heads": 9, "num_key_value_heads": 3, "hidden_size": 576}
    for name, layers in (("target", 30), ("drafter", 2)):
        config = {"text_config": {**shape, "num_hidden_layers": layers}}
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(config))
    folders = [str(tmp_path / name) for name in ("target", "drafter")]
    # 32 layers of 3 heads of 64 numbers, keys and values, of 2 bytes: 24 KiB a token.
    assert fleet.kv_gib(folders, 2**15) == pytest.approx(0.94, abs=0.01)
    assert fleet.kv_gib(folders, 2**15, 4) == pytest.approx(1.88, abs=0.01)
    (tmp_path / "target" / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="give --kv-gib"):
        fleet.kv_gib(folders, 1)


# ---- prompts ----


def test_every_window_is_balanced_and_the_order_is_not_a_cycle():
    taken = prompts(math=9, code=5, chat=7).take(3, 30)
    assert Counter(p.dataset for p in taken) == {"math": 10, "code": 10, "chat": 10}
    blocks = {tuple(p.dataset for p in taken[i : i + 3]) for i in range(0, 30, 3)}
    assert len(blocks) > 1


def test_windows_join_and_do_not_depend_on_who_asks():
    one, other = prompts(a=6, b=4), prompts(a=6, b=4)
    assert one.take(0, 10) == other.take(0, 4) + other.take(4, 6)


def test_one_dataset_alone_is_used_up_before_it_starts_again():
    taken = prompts(a=6, b=4).take(0, 8, "b")
    assert {p.dataset for p in taken} == {"b"}
    assert sorted(p.number for p in taken[:4]) == [0, 1, 2, 3]
    assert taken[4:] == taken[:4]


def test_a_domain_takes_its_datasets_in_turn():
    found = prompts(gsm8k=4, math500=4, mbpp=4, mine=4)
    assert found.domains == ["code", "math", "mine"]
    taken = found.take(0, 6, "math")
    assert Counter(p.dataset for p in taken) == {"gsm8k": 3, "math500": 3}
    assert {p.dataset for p in found.take(0, 4, "gsm8k")} == {"gsm8k"}


def test_shares_hold_in_every_block_and_no_prompt_comes_twice_before_its_turn():
    found = prompts(gsm8k=6, math500=6, mbpp=9, mine=4)
    rows = [row for rows in found._datasets.values() for row in rows]
    mixed = Prompts(rows, 0, {"math": 3, "mbpp": 1})
    for start in (0, 4, 40):
        taken = mixed.take(start, 4)
        assert Counter(p.domain for p in taken) == {"math": 3, "code": 1}
    taken = [p for p in mixed.take(0, 16) if p.domain == "math"]
    assert len({(p.dataset, p.number) for p in taken}) == 12
    assert Counter(p.dataset for p in taken) == {"gsm8k": 6, "math500": 6}
    assert mixed.domains == ["code", "math"]
    with pytest.raises(ValueError, match="no prompt is of dataset or domain 'chat'"):
        Prompts(rows, 0, {"chat": 1})


def test_an_unknown_dataset_is_refused():
    with pytest.raises(ValueError, match="no prompt is of dataset or domain 'c'"):
        prompts(a=1).take(0, 1, "c")


# ---- order ----


def test_arms_take_turns_at_each_load_and_in_being_first():
    found = grid.points(["a", "b", "c"], [1, 8], 2)
    order = [(p.run, p.concurrency, p.arm) for p in found]
    assert [arm for run, c, arm in order if (run, c) == (0, 1)] == ["a", "b", "c"]
    assert [arm for run, c, arm in order if (run, c) == (0, 8)] == ["b", "c", "a"]
    assert [arm for run, c, arm in order if (run, c) == (1, 1)] == ["b", "c", "a"]
    assert [c for run, c, _ in order if run == 0] == [1, 1, 1, 8, 8, 8]


def test_one_at_a_time_has_the_same_points_arm_by_arm():
    split = [("a", "math", 4)]
    found = grid.points(["a", "b"], [1, 8], 2, split, one_at_a_time=True)
    assert set(found) == set(grid.points(["a", "b"], [1, 8], 2, split))
    assert [p.arm for p in found] == ["a"] * 3 + ["b"] * 4 + ["a"] * 3


def test_points_have_whole_waves_of_clients():
    assert amounts.num_prompts(8, 3.2, 8) == 24
    assert amounts.num_prompts(64, 0.4, 8) == 128  # two waves at least
    assert amounts.num_prompts(3, 0.4, 8) == 9
    assert amounts.estimated_counts({1: 0.5, 8: 2.0}, 40.0, 8) == {1: 20, 8: 80}


def test_answers_differ_in_length_but_not_on_average() -> None:
    lengths = [client.answer_tokens(128, 0.5, i) for i in range(64)]
    assert min(lengths) < 72 and max(lengths) > 184 and min(lengths) >= 64
    assert sum(lengths) / 64 == pytest.approx(128, rel=0.02)
    assert len(set(lengths[:8])) == 8
    assert {client.answer_tokens(128, 0.0, i) for i in range(64)} == {128}


# ---- texts ----


def difference(gap: float, ranks: tuple[int, int] = (0, 1)) -> Difference:
    return Difference("math-1", 4, (5, 6), ("a", "b"), gap, gap, ranks)


def test_a_first_difference_must_be_a_near_tie_of_the_two_best():
    answers = {f"math-{i}": Answer("", [], [], []) for i in range(3)}
    assert texts.verdict(answers, [])["verdict"] == "3 of 3 equal, token for token"
    near = texts.verdict(answers, [difference(0.1)])
    assert near["passed"] and near["equal"] == 2 and "near-tie" in near["verdict"]
    for wrong in (difference(0.1, (0, 2)), difference(0.5)):
        found = texts.verdict(answers, [difference(0.1), wrong])
        assert not found["passed"] and "DIFFERS at token 4" in found["verdict"]
