"""Target and drafter as llama.cpp reads them: names, values, what it cannot have."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import llama_cpp
import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from tests.tiny import make_tiny_drafter
from vllm_dspark.model.checkpoint import load_config
from vllm_dspark.model.headers import WEIGHTS
from vllm_dspark.model.vocab_maps import draft_to_target_ids

NAMES = ["<a>", "b", "c"]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A GGUF file with a tokenizer and two weights, one of them quantised."""
    file = tmp_path / "source.gguf"
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_block_count(1)
    writer.add_token_list(NAMES)
    writer.add_bool("tokenizer.ggml.add_bos_token", False)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q8_0)
    weight = np.random.default_rng(0).normal(size=(4, 32)).astype(np.float32)
    packed = gguf.quants.quantize(weight, gguf.GGMLQuantizationType.Q8_0)
    writer.add_tensor(
        "token_embd.weight", packed, raw_dtype=gguf.GGMLQuantizationType.Q8_0
    )
    writer.add_tensor("output_norm.weight", weight[0] / 3)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def read(file: Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Fields and float32 tensors."""
    reader = gguf.GGUFReader(file)
    assert all(t.tensor_type == gguf.GGMLQuantizationType.F32 for t in reader.tensors)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    return fields, {t.name: np.array(t.data) for t in reader.tensors}


def test_the_target_is_the_folders(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    argv = ["convert", "--gguf", str(source), "--out", str(out)]
    assert llama_cpp.main(argv) == 0
    fields, tensors = read(out / "target.gguf")
    assert fields["tokenizer.ggml.tokens"] == NAMES
    assert fields["tokenizer.ggml.add_bos_token"] is False
    assert fields["general.architecture"] == "llama"
    assert fields["general.file_type"] == gguf.LlamaFileType.ALL_F32
    assert set(tensors) == {"token_embd.weight", "output_norm.weight"}
    for tensor in gguf.GGUFReader(source).tensors:
        plain = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        wanted = torch.tensor(plain).to(torch.bfloat16).float().numpy()
        assert (wanted != plain).any()  # the rounding is seen
        np.testing.assert_array_equal(tensors[tensor.name], wanted)


@pytest.mark.parametrize("draft_vocab_size", [None, 40])
def test_the_drafter(
    draft_vocab_size: int | None, source: Path, tiny_target: Path, tmp_path: Path
) -> None:
    reduced = {} if draft_vocab_size is None else {"draft_vocab_size": draft_vocab_size}
    folder = make_tiny_drafter(tmp_path / "drafter", tiny_target, **reduced)
    out = tmp_path / "drafter.gguf"
    llama_cpp.convert_drafter(folder, source, out)
    fields, tensors = read(out)
    state, config = load_file(folder / WEIGHTS), load_config(folder)
    assert fields["general.architecture"] == "dflash"
    assert fields["tokenizer.ggml.tokens"] == NAMES
    assert "llama.block_count" not in fields
    assert fields["dflash.block_size"] == config.block_size
    assert fields["dflash.target_layers"] == list(config.target_layer_ids)
    assert fields["dflash.block_count"] == config.num_hidden_layers
    layers = 11 * config.num_hidden_layers
    assert len(tensors) == layers + 7 and "d2t" not in tensors
    query = state["layers.0.self_attn.q_proj.weight"].float().numpy()
    np.testing.assert_array_equal(tensors["blk.0.attn_q.weight"], query)
    w2 = state[llama_cpp.MARKOV_W2].float().numpy()
    found = tensors["markov_w2.weight"]
    assert len(found) == config.vocab_size
    if draft_vocab_size is None:
        np.testing.assert_array_equal(found, w2)
    else:
        ids = draft_to_target_ids(state["d2t"]).numpy()
        np.testing.assert_array_equal(found[ids], w2)
        assert not np.delete(found, ids, axis=0).any()


@pytest.mark.parametrize(
    ("made", "message"),
    [
        ({"head_type": "gated"}, "type 'gated', which llama.cpp has not"),
        ({"markov_rank": 0}, "type 'none', which llama.cpp has not"),
        ({"confidence_with_markov": False}, "without the Markov embedding"),
    ],
)
def test_what_llama_cpp_has_not(
    made: dict[str, Any],
    message: str,
    source: Path,
    tiny_target: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = make_tiny_drafter(tmp_path / "drafter", tiny_target, **made)
    argv = ["convert", "--gguf", str(source), "--drafter", str(folder)]
    assert llama_cpp.main([*argv, "--out", str(tmp_path / "out")]) == 2
    assert message in capsys.readouterr().err


def test_files_that_are_not_there(capsys: pytest.CaptureFixture[str]) -> None:
    assert llama_cpp.main(["serve", "--gguf", "nowhere.gguf", "--port", "1"]) == 2
    assert "--gguf nowhere.gguf: is not there" in capsys.readouterr().err
