"""Prompt files and user headers, with a real (tiny) tokenizer and its templates."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.tiny import make_tiny_tokenizer
from vllm_dspark.train.prompts import Prompt, Renderer, Stop, read_prompts

CHATML = (
    "{% for m in messages %}<s>{{ m.role }}\n{{ m.content }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant\n{% endif %}"
)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory):
    """The tiny tokenizer; its template ends a user turn with a line break."""
    transformers = pytest.importorskip("transformers")
    path = make_tiny_tokenizer(tmp_path_factory.mktemp("tokenizer"))
    return transformers.AutoTokenizer.from_pretrained(path)


@pytest.fixture
def template(tokenizer, monkeypatch):
    """Give the tokenizer another template for one test."""

    def use(text: str | None) -> Renderer:
        monkeypatch.setattr(tokenizer, "chat_template", text)
        return Renderer(tokenizer)

    return use


def write(path: Path, *rows) -> Path:
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    path.write_text("\n".join(lines) + "\n")
    return path


def user(text: str) -> dict:
    return {"messages": [{"role": "user", "content": text}]}


def test_rows_become_prompts(tokenizer, tmp_path: Path) -> None:
    file = write(
        tmp_path / "rows.jsonl",
        user("one") | {"dataset": "math"},
        "",
        user("two"),
        user("one"),
        user("far too long " * 9),
        {"prompt": "plain text"},
    )
    found = read_prompts([file], Renderer(tokenizer), 60)
    texts = [tokenizer.decode(p.ids) for p in found.prompts]
    assert texts == ["user: one\nassistant: ", "user: two\nassistant: ", "plain text"]
    assert [p.source for p in found.prompts] == ["math", "prompts", "prompts"]
    assert found.facts["rows"] == 5 and found.facts["too_long"] == 1
    assert found.facts["duplicate"] == 1
    assert found.facts["files"][0]["name"] == "rows.jsonl"


def test_an_answer_at_the_end_is_left_to_the_target(tokenizer, tmp_path: Path) -> None:
    answered = user("one")
    answered["messages"].append({"role": "assistant", "content": "hm"})
    file = write(tmp_path / "rows.jsonl", answered, user("two"))
    found = read_prompts([file], Renderer(tokenizer), 60)
    assert found.prompts[0] == Prompt(
        Renderer(tokenizer).messages(user("one")["messages"]), "prompts"
    )


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("{", "line 2: not JSON"),
        ("[1]", "line 2: expected"),
        ({"text": "x"}, "line 2: expected"),
        (user("x") | {"prompt": "x"}, "line 2: expected"),
        ({"prompt": ""}, "line 2: 'prompt' is ''"),
        ({"messages": "x"}, "line 2: 'messages' is no list"),
        ({"messages": [{"role": "user"}]}, "line 2: 'messages' is no list"),
        ({"messages": []}, "line 2: there is no message to answer"),
        (user("x") | {"dataset": 3}, "line 2: 'dataset' is 3"),
    ],
)
def test_malformed_rows_name_their_line(tokenizer, tmp_path, row, message) -> None:
    file = write(tmp_path / "rows.jsonl", user("one"), row, user("two"))
    with pytest.raises(ValueError, match=rf"rows\.jsonl, {message}"):
        read_prompts([file], Renderer(tokenizer), 60)


@pytest.mark.parametrize("rows", [[], [user("one")], [user("one"), user("one")]])
def test_too_few_prompts_are_refused(tokenizer, tmp_path: Path, rows) -> None:
    file = write(tmp_path / "rows.jsonl", *rows)
    with pytest.raises(ValueError, match=r"different prompts are left.*needs many"):
        read_prompts([file], Renderer(tokenizer), 60)


def test_no_file_and_a_template_that_refuses(template, tmp_path: Path) -> None:
    renderer = template("{{ raise_exception('only system first') }}")
    with pytest.raises(ValueError, match="cannot be read"):
        read_prompts([tmp_path / "nowhere"], renderer, 60)
    file = write(tmp_path / "rows.jsonl", user("one"))
    with pytest.raises(ValueError, match=r"line 1: the chat template.*only sys"):
        read_prompts([file], renderer, 60)


def test_a_base_target_takes_plain_text(template, tokenizer, tmp_path: Path) -> None:
    renderer = template(None)
    assert not renderer.is_chat and renderer.beginning() == (tokenizer.bos_token_id,)
    file = write(tmp_path / "rows.jsonl", {"prompt": "a"}, {"prompt": "b"})
    assert len(read_prompts([file], renderer, 60).prompts) == 2
    file = write(tmp_path / "rows.jsonl", user("one"))
    with pytest.raises(ValueError, match="line 1: the target has no chat template"):
        read_prompts([file], renderer, 60)


def test_user_turns_that_end_with_text(tokenizer) -> None:
    renderer = Renderer(tokenizer)
    header, stop = renderer.user_header()
    assert tokenizer.decode(header) == "user: " and stop == Stop(text="\n")
    turn = tokenizer("What is this?\nassist", add_special_tokens=False)["input_ids"]
    own = renderer.own_prompt(turn, stop)
    assert tokenizer.decode(own) == "user: What is this?\nassistant: "


def test_user_turns_that_end_with_a_special_token(template, tokenizer) -> None:
    renderer = template(CHATML)
    header, stop = renderer.user_header()
    assert tokenizer.decode(header) == "<s>user\n"
    assert stop == Stop(ids=(tokenizer.eos_token_id,))
    words = tokenizer(" What is this?\n", add_special_tokens=False)["input_ids"]
    own = renderer.own_prompt([*words, *stop.ids], stop)
    assert tokenizer.decode(own) == "<s>user\nWhat is this?</s>\n<s>assistant\n"
    inside = [*words, tokenizer.bos_token_id, *words, *stop.ids]
    assert renderer.own_prompt(inside, stop) == "malformed prompt"
    short = tokenizer("Hi!", add_special_tokens=False)["input_ids"]
    assert renderer.own_prompt([*short, *stop.ids], stop) == "short prompt"


@pytest.mark.parametrize("text", ["no words", "{{ messages[0].content | upper }}"])
def test_templates_without_a_user_header(template, text) -> None:
    with pytest.raises(ValueError, match="no user header to continue from"):
        template(text).user_header()
