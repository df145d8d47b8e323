"""Dequantise a GGUF file into a bfloat16 Hugging Face folder.

    python -m vllm_dspark.cli.convert_gguf model.gguf out/

Run by the demo as a process of its own. Works for the architectures whose GGUF files
transformers can read (Llama and Qwen among them).
"""

import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig


def convert(gguf: Path, out: Path) -> None:
    """Write weights, tokenizer and chat template of ``gguf`` to the folder ``out``."""
    folder, name = str(gguf.parent), gguf.name
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=name)
    model = AutoModelForCausalLM.from_pretrained(
        folder,
        gguf_file=name,
        quantization_config=GgufConfig(dequantize=True),
        dtype=torch.bfloat16,
    )
    if tokenizer.eos_token_id != model.config.eos_token_id:
        # A server that misses the end of an answer talks on: better no target.
        raise ValueError(
            f"{name}: the tokenizer ends with {tokenizer.eos_token_id}, "
            f"the model with {model.config.eos_token_id}"
        )
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)


if __name__ == "__main__":
    convert(Path(sys.argv[1]), Path(sys.argv[2]))
