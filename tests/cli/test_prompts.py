"""Prompt files of `calibrate` and `evaluate`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.tiny import make_tiny_target, make_tiny_tokenizer
from vllm_dspark.cli import main
from vllm_dspark.cli.rounds.prompts import read_rows, tokenize

CHAT = {"dataset": "a", "messages": [{"role": "user", "content": "hi\u2028there"}]}


def write(path: Path, *rows: object) -> Path:
    lines = (json.dumps(row, ensure_ascii=False) for row in rows)
    path.write_text("\n".join(lines) + "\n\n", encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(make_tiny_tokenizer(tmp_path_factory.mktemp("tokenizer")))


def test_rows_of_several_files(tmp_path: Path) -> None:
    one = write(tmp_path / "one", CHAT, {**CHAT, "dataset": "b"}, CHAT)
    two = write(tmp_path / "two", {"prompt": "plain"})
    rows = read_rows([one, two])
    assert [row["dataset"] for row in rows] == ["a", "b", "a", "prompts"]
    assert rows[0]["messages"] == CHAT["messages"] and rows[3]["text"] == "plain"
    limited = read_rows([one, two], limit=1)
    assert [row["dataset"] for row in limited] == ["a", "b", "prompts"]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("[1", "line 2: not JSON"),
        ("[1]", 'line 2: neither "messages"'),
        ('{"messages": []}', 'line 2: neither "messages"'),
        ('{"messages": ["hi"]}', 'line 2: neither "messages"'),
        ('{"prompt": ""}', 'line 2: neither "messages"'),
    ],
)
def test_a_bad_row_is_named(tmp_path: Path, row: str, message: str) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps(CHAT) + "\n" + row)
    with pytest.raises(ValueError, match=rf"rows\.jsonl, {message}"):
        read_rows([file])


def test_no_rows(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="there is no file"):
        read_rows([tmp_path / "none"])
    empty = tmp_path / "empty"
    empty.write_text("\n\n")
    with pytest.raises(ValueError, match="has no prompts"):
        read_rows([empty])
    (tmp_path / "binary").write_bytes(b"\xff\xfe\xff")
    with pytest.raises(ValueError, match="cannot be read as text"):
        read_rows([tmp_path / "binary"])


def test_tokenized_with_the_chat_template(tmp_path: Path, tokenizer: str) -> None:
    long = {"prompt": "x" * 99}
    rows = read_rows([write(tmp_path / "p", CHAT, long, {"prompt": "ab"})])
    prompts, left_out = tokenize(tokenizer, rows, max_tokens=60)
    assert left_out == 1 and [p.number for p in prompts] == [0, 2]
    assert len(prompts[0].token_ids) > len(prompts[1].token_ids) == 2
    with pytest.raises(ValueError, match="all 3 prompts are longer than 1 tokens"):
        tokenize(tokenizer, rows, max_tokens=1)


def test_a_target_without_tokenizer(tmp_path: Path) -> None:
    target = make_tiny_target(tmp_path / "target")
    with pytest.raises(ValueError, match="tokenizer does not load"):
        tokenize(str(target), [{"dataset": "a", "text": "hi"}], 10)


@pytest.mark.parametrize("command", ["evaluate", "calibrate"])
@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--max-tokens", "1"], "ask for at least 2"),
        (["--limit", "0"], "--limit is 0; at least 1"),
        (["--temperature", "-1"], "choose from 0 to 2"),
        (["--temperature", "1", "1"], "names one twice"),
        (["--json", "/nowhere/x.json"], "there is no folder /nowhere"),
        (["--num-speculative-tokens", "9"], "block_size is 5"),
        ([], "no file /nowhere/prompts"),
    ],
)
def test_bad_arguments_end_at_once(
    command: str,
    extra: list[str],
    message: str,
    tiny_target: Path,
    tiny_drafter: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    asked = [command, "--target", str(tiny_target), "--drafter", str(tiny_drafter)]
    assert main([*asked, "--prompts", "/nowhere/prompts", *extra]) == 2
    assert message in capsys.readouterr().err
