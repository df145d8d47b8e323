"""First differences, and the target's logit gap there, against a direct computation."""

import pytest

from vllm_dspark.cli.arms import Answer
from vllm_dspark.cli.near_tie import differences, first_difference


@pytest.mark.parametrize(
    ("one", "other", "expected"),
    [
        ([1, 2, 3], [1, 2, 3], None),
        ([1, 2, 3], [1, 9, 3], 1),
        ([], [], None),
        ([1, 2], [1, 2, 3], 2),  # one ended earlier: that is a difference too
        ([1, 2, 3], [1, 2], 2),
    ],
)
def test_first_difference(one, other, expected):
    assert first_difference(one, other) == expected


def test_equal_answers_load_no_model(tmp_path):
    answer = Answer("", [1], [2, 3], [1.0])
    assert differences(tmp_path / "missing", {"a": answer}, {"a": answer}) == []


def test_gap_is_the_targets_own(tmp_path):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    tokenizers = pytest.importorskip("tokenizers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=32,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
    )
    model = transformers.LlamaForCausalLM(config).to(torch.bfloat16)
    model.save_pretrained(tmp_path)
    vocabulary = {f"w{i}": i for i in range(32)}
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizers.Tokenizer(
            tokenizers.models.WordLevel(vocabulary, unk_token="w0")
        ),
        eos_token="w2",
    ).save_pretrained(tmp_path)

    prompt, common = [5, 6, 7], [8, 9]
    with torch.inference_mode():
        logits = model.float()(torch.tensor([prompt + common])).logits[0, -1]
    one = Answer("", prompt, [*common, 10, 11], [1.0])
    other = Answer("", prompt, [*common, 12, 13, 14], [1.0])
    (found,) = differences(tmp_path, {"a": one}, {"a": other})
    assert (found.prompt, found.position, found.tokens) == ("a", 2, (10, 12))
    assert found.texts == ("w10", "w12")
    expected = float((logits[10] - logits[12]).abs())
    assert found.gap_float32 == pytest.approx(expected, rel=1e-5)
    # bfloat16 rounds the logits to 8 bits: near, not equal.
    assert found.gap_bfloat16 == pytest.approx(expected, abs=0.02)
    assert found.ranks[0] == int((logits > logits[10]).sum())

    # An answer that just ended stands for the end token.
    ended = Answer("", prompt, common, [1.0])
    (found,) = differences(tmp_path, {"a": ended}, {"a": other})
    assert found.tokens == (2, 12)
