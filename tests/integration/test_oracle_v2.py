"""Drafts, probabilities and confidences equal those of vLLM's own DSpark.

vLLM's V2 runner is run by itself under the Triton interpreter (``oracle.v2_run``), then
our V1 engine on the same checkpoint and prompts. Both see prompts in parts and prefix
hits. Only what the two share is compared: the vanilla head, drafters with their own
``lm_head`` where the vocabulary is reduced (vLLM's loader insists), and ``k_norm``
weights alike in all layers: vLLM's grouped ``rms_norm`` reads only the first layer's on
CPU, in V2 as well (ours is right: ``test_every_layer_has_its_own_key_norm``).

- greedy: no help. Texts, rounds and drafts must come out alike, token for token.
- sampled: the random numbers differ, so our engine is led through V2's texts and drafts
  (``oracle.teacher``) and the distributions are compared on equal prefixes, with a
  reduced vocabulary (V2 scatters to the target's) and with ``dspark_draft_topk`` (V2
  cuts by base logits, before the Markov bias).

Both run in float32 on this CPU and differ in the order of sums: 1e-5 absolute on
probabilities and confidences, 1e-5 relative on hidden states and logits.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.integration.engine import engine
from tests.integration.oracle.history import relative
from tests.integration.oracle.teacher import Transcript, forced
from tests.integration.recorder import Block, prompt, recording, text_of
from tests.integration.subprocesses import run_module
from tests.tiny import make_tiny_drafter, make_tiny_target
from vllm_dspark.model.checkpoint import draft_to_target_ids, load_state

pytestmark = pytest.mark.slow

VOCAB = 128
TOLERANCE = 1e-5
SETTINGS = {
    "block_size": 32,
    "max_num_batched_tokens": 64,
    "max_num_seqs": 4,
    "enable_prefix_caching": True,
}


def waves(temperatures: tuple[float, ...], max_tokens: int) -> list[list[dict]]:
    """Three prompts; then the longest again, and a new one that shares its start."""
    long = prompt(110, 1)
    rows = [
        [long, prompt(3, 2), prompt(75, 3)],
        [long, long[:80] + prompt(30, 4)],
    ]
    result, seed = [], 0
    for prompts in rows:
        wave = []
        for tokens in prompts:
            temperature = temperatures[seed % len(temperatures)]
            seed += 1
            params = {
                "temperature": temperature,
                "max_tokens": max_tokens,
                "seed": seed,
            }
            wave.append({"prompt": tokens, "params": params})
        result.append(wave)
    return result


SAMPLED = {"draft_sample_method": "probabilistic"}
JOBS: dict[str, dict[str, Any]] = {
    "greedy": {
        "arch": "llama",
        "drafter": {},
        "spec": {},
        "waves": waves((0.0,), 24),
    },
    "reduced-vocab": {
        "arch": "llama",
        "drafter": {
            "draft_vocab_size": 100,
            "with_lm_head": True,
            "target_layer_ids": (0, 2),
        },
        "spec": SAMPLED,
        "waves": waves((0.6, 1.0, 0.0, 1.5), 16),
    },
    "top-16": {
        "arch": "qwen3",
        "drafter": {"confidence_with_markov": False, "own_embeddings": True},
        "spec": {**SAMPLED, "dspark_draft_topk": 16, "num_speculative_tokens": 4},
        "waves": waves((1.2, 0.8), 12),
    },
}


def same_key_norms(drafter: Path) -> Path:
    """Give every layer the first one's ``k_norm`` weights (see the module's text)."""
    file = drafter / "model.safetensors"
    state = load_file(file)
    for name in state:
        if name.endswith("k_norm.weight"):
            state[name] = state["layers.0.self_attn.k_norm.weight"].clone()
    save_file(state, file, metadata={"format": "pt"})
    return drafter


@pytest.fixture(scope="module")
def theirs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """vLLM's results per job, with the folders it ran on (one process for all)."""
    pytest.importorskip("triton", reason="vLLM's V2 runner is interpreted with Triton")
    folder = tmp_path_factory.mktemp("v2")
    for arch in ("llama", "qwen3"):
        make_tiny_target(folder / arch, arch=arch, vocab_size=VOCAB)
    jobs = []
    for name, job in JOBS.items():
        target = folder / job["arch"]
        drafter = make_tiny_drafter(folder / name, target, **job["drafter"])
        jobs.append(
            {
                "target": str(target),
                "drafter": str(same_key_norms(drafter)),
                "spec": job["spec"],
                "settings": SETTINGS,
                "waves": job["waves"],
            }
        )
    (folder / "jobs.json").write_text(json.dumps(jobs))
    files = folder / "jobs.json", folder / "out.pt"
    run_module("tests.integration.oracle.v2_run", *files, timeout=600, plugins="")
    results = torch.load(folder / "out.pt")
    pairs = zip(JOBS, jobs, results, strict=True)
    return {name: {**job, **result} for name, job, result in pairs}


def by_place(their: dict[str, Any]) -> dict[tuple[str, int], dict[str, Any]]:
    """V2's blocks by request and anchor position, less those of ended requests."""
    ends = {t["req_id"]: len(t["tokens"]) for t in their["texts"]}
    blocks = {(b["req_id"], b["anchor_position"]): b for b in their["blocks"]}
    return {key: b for key, b in blocks.items() if key[1] < ends[key[0]] - 1}


def ours(their: dict[str, Any], teach: bool) -> tuple[list[Any], dict[Any, Block]]:
    """Our engine on the same waves: texts, and blocks by request and position."""
    from vllm import SamplingParams

    settings = their["settings"]
    with engine(
        Path(their["target"]), Path(their["drafter"]), spec=their["spec"], **settings
    ) as eng:
        texts = []

        def serve() -> None:
            for wave in their["waves"]:
                params = [
                    SamplingParams(ignore_eos=True, detokenize=False, **row["params"])
                    for row in wave
                ]
                prompts = [row["prompt"] for row in wave]
                texts.extend(text_of(o) for o in eng.generate(prompts, params))

        if not teach:
            with recording(eng.runner) as record:
                serve()
        else:
            places = by_place(their)
            transcripts = {
                t["req_id"]: Transcript(
                    t["tokens"],
                    {
                        p: b["drafts"]
                        for (r, p), b in places.items()
                        if r == t["req_id"]
                    },
                )
                for t in their["texts"]
            }
            with recording(eng.runner) as record, forced(eng.runner, transcripts):
                serve()
    blocks = {
        (t.req_id, b.anchor_position): b
        for t in texts
        for b in record.of(t)
        if b.anchor_position < len(t.tokens) - 1
    }
    assert [s for s in record.steps if s[0] > 0], "no prompt came in parts"
    return texts, blocks


def compare(their: dict[str, Any], blocks: dict[Any, Block]) -> None:
    """The same places, drafts, hidden states, base logits and confidences."""
    places = by_place(their)
    assert blocks.keys() == places.keys()
    for place, block in blocks.items():
        v2 = places[place]
        assert block.anchor_id == v2["anchor_id"], place
        assert block.drafts == v2["drafts"], place
        assert relative(block.hidden, v2["hidden"]) < TOLERANCE, place
        assert relative(block.base, v2["base"]) < TOLERANCE, place
        assert block.confidence is not None
        gap = (block.confidence - v2["confidence"]).abs().max()
        assert float(gap) < TOLERANCE, place


def test_greedy(theirs: dict[str, dict[str, Any]]) -> None:
    their = theirs["greedy"]
    texts, blocks = ours(their, teach=False)
    assert [vars(t) for t in texts] == their["texts"]  # prefix hits alike, too
    assert [t.cached for t in texts] == [0, 0, 0, 64, 32]
    compare(their, blocks)
    assert len(blocks) > 30
    tau = sum(len(t.output) for t in texts) / len(blocks)
    assert 1.2 < tau < 5


@pytest.mark.parametrize("name", ["reduced-vocab", "top-16"])
def test_sampled(name: str, theirs: dict[str, dict[str, Any]]) -> None:
    their = theirs[name]
    texts, blocks = ours(their, teach=True)
    assert [t.tokens for t in texts] == [t["tokens"] for t in their["texts"]]
    compare(their, blocks)
    offsets = load_state(their["drafter"]).get("d2t")
    ids = None if offsets is None else draft_to_target_ids(offsets)
    params = [row["params"] for wave in their["waves"] for row in wave]
    places, compared = by_place(their), 0
    for (req_id, position), block in blocks.items():
        temperature = params[int(req_id)]["temperature"]
        if temperature == 0:
            continue
        logits = places[req_id, position]["logits"]
        if "dspark_draft_topk" in their["spec"]:
            assert bool((logits.isfinite().sum(-1) == 16).all())
        expected = (logits / temperature).softmax(-1)
        actual = block.probs
        assert actual is not None
        if block.support is not None:
            columns = block.support.long()
            actual = torch.zeros(len(actual), VOCAB).scatter(-1, columns, actual)
        if ids is not None:
            expected = torch.zeros(len(actual), VOCAB).index_copy(-1, ids, expected)
        assert float((actual - expected).abs().max()) < TOLERANCE, (req_id, position)
        compared += 1
    assert compared > 20
