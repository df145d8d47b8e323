"""What the Triton kernels would cost on GPUs, from their binaries and bytes; no GPU.

    python benchmarks/aot_report.py --json aot.json
    python benchmarks/aot_report.py --targets sm_90 --kernels topk_kernel  # seconds

Every kernel that a call launches in its default configurations is compiled ahead of
time for each target: registers, shared memory, spills (see `_aot`). `bytes needed` is
what the operation must read and write once; `bytes moved` is what the launch asks the
memory system for, each tile as often as a program reads it; the roofline is the larger
of the two over the published bandwidth of the card. It is a lower bound of the time,
computed and not measured: none of these kernels has run on a GPU.
"""

from __future__ import annotations

import argparse
import dataclasses
from typing import Any
from unittest import mock

import _bench_common as common
import torch
from _aot import TARGETS, Launch, Recorder, compile_launch
from _aot_v2 import v2_launches
from torch._subclasses.fake_tensor import FakeTensorMode

from vllm_dspark.ops import rejection_triton, sequential_triton
from vllm_dspark.ops.rejection import RejectionInputs
from vllm_dspark.ops.sequential import SequentialHead, SequentialInputs

# Published peak memory bandwidth, bytes a second (NVIDIA's data sheets: H100 SXM 3.35
# TB/s, B200 8 TB/s).
BANDWIDTH = {"H100": 3.35e12, "B200": 8.0e12}
R, K, V, D, RANK, TOPK = 32, 7, 151_936, 4096, 256, 64
BF16, F32, I32, F64 = 2, 4, 4, 8
# Columns of the file only: the table has no room.
HIDDEN = ("scalar_spills", "local_bytes", "programs", "moved_us_H100", "moved_us_B200")


def sequential_launches(head_type: str, topk: int | None, greedy: bool) -> list[Launch]:
    """What one drafted block launches: one launch of each kernel."""
    weights = {
        "vanilla": None,
        "gated": (RANK, D + RANK),
        "rnn": (3 * RANK, D + 2 * RANK),
    }
    shape, bf16 = weights[head_type], torch.bfloat16
    recorder = Recorder()
    with FakeTensorMode():
        head = SequentialHead(
            head_type,
            torch.empty(V, RANK, dtype=bf16),
            torch.empty(V, RANK, dtype=bf16),
            None if shape is None else torch.empty(shape, dtype=bf16),
            None if shape is None else torch.empty(shape[0], dtype=bf16),
            torch.empty(D + RANK),
            torch.empty(1),
        )
        inputs = SequentialInputs(
            torch.empty(R, K, V, dtype=bf16),
            torch.empty(R, K, D, dtype=bf16),
            torch.empty(R, dtype=torch.int64),
            head,
            None if greedy else torch.empty(R),
            None if greedy else torch.empty(R, K, dtype=torch.float64),
            topk,
            not greedy,
        )
        with mock.patch.object(sequential_triton, "launch", recorder):
            sequential_triton.run(inputs)
    return recorder.launches


def rejection_launches(mode: str, method: str) -> list[Launch]:
    """The one kernel of a verification: dense, one-hot or truncated drafts, greedy."""
    recorder, n = Recorder(), R * K
    columns = {"dense": V, "top-k": TOPK}.get(mode)
    with FakeTensorMode():
        inputs = RejectionInputs(
            torch.empty(n + R, V, dtype=torch.bfloat16),
            torch.empty(n, dtype=torch.int64),
            torch.empty(R, dtype=torch.int32),
            K,
            None if columns is None else torch.empty(n, columns),
            torch.empty(n, TOPK, dtype=torch.int32) if mode == "top-k" else None,
            None if mode == "greedy" else torch.empty(R),
            torch.empty(n, dtype=torch.float64),
            torch.empty(R, dtype=torch.float64),
            method,
        )
        with mock.patch.object(rejection_triton, "launch", recorder):
            rejection_triton.run(inputs)
    return recorder.launches


def configurations() -> dict[str, list[Launch]]:
    """Name to the launches of every default configuration."""
    named = {}
    for head in ("vanilla", "gated", "rnn"):
        for topk in (None, TOPK):
            columns = "full" if topk is None else f"top-{topk}"
            named[f"{head} {columns}"] = sequential_launches(head, topk, False)
        named[f"{head} full greedy"] = sequential_launches(head, None, True)
    for mode in ("dense", "one-hot", "top-k", "greedy"):
        named[f"rejection {mode}"] = rejection_launches(mode, "standard")
    for mode in ("dense", "one-hot", "top-k"):
        named[f"rejection block {mode}"] = rejection_launches(mode, "block")
    for method in ("standard", "block"):
        for mode in ("dense", "one-hot"):
            named[f"v2 {method} {mode}"] = v2_launches(
                (R, K, V), mode == "dense", method, processed=mode == "dense"
            )
    return named


def joint_bytes(launch: Launch) -> int:
    """The part of a head's joint layer that depends on the drafts."""
    sizes = {0: 0, 1: 0, 2: RANK * RANK, 3: 3 * RANK * 2 * RANK}
    return sizes[launch.constants["HEAD"]] * BF16


def step_bytes(launch: Launch) -> tuple[int, int]:
    """Needed and moved by one step of the batch."""
    c, rows = launch.constants, sequential_triton.ROWS
    groups, blocks = -(-R // rows), launch.grid[0]
    width = TOPK if c["TOPK"] else V
    joint = joint_bytes(launch)
    logits = R * width * BF16
    w2 = width * RANK * BF16 * (R if c["TOPK"] else 1)
    needed = logits + w2 + joint + R * RANK * BF16
    if c["TOPK"]:
        needed += R * width * I32
    if c["RANDOM"]:
        needed += R * width * F32  # the probabilities that are returned
    moved = logits + w2 * (1 if c["TOPK"] else groups) + joint * groups
    moved += R * blocks * RANK * BF16  # every program reads its requests' latents
    moved += R * blocks * (F32 + I32) * 2 + R * RANK * BF16 * 3
    if c["TOPK"]:
        moved += R * width * I32
    if c["RANDOM"]:
        moved += R * width * F32 + R * blocks * (F64 + F32) * 3
        moved += R * c["BLOCK"] * F32
    return needed, moved


def rejection_bytes(launch: Launch) -> tuple[int, int]:
    """Needed and moved if every draft is accepted but the last, which is the most.

    For block verification the residual masses of all rows but the first come to that.
    """
    mode, random = launch.constants["MODE"], launch.constants["RANDOM"]
    row = V * BF16
    if not random:
        return R * (K + 1) * row, R * (K + 1) * row
    q = {0: 0, 1: V * F32, 2: TOPK * (F32 + I32)}[mode]
    block = launch.constants["METHOD"] == "block"
    whole = q if block or mode == 2 else F32  # of the rows before the last draft's
    needed = R * (K * row + q + (K - 1) * whole)
    # Twice a row, for its maximum and its normaliser; twice more where one is drawn.
    dense = V * F32 if mode == 2 else q  # zeroed, then read
    moved = R * (2 * K * row + 2 * row + 2 * dense + K * (q if mode == 2 else F32))
    if block:
        again = row + dense if mode else 0
        moved += R * (2 * row + (K - 1) * again)
    return needed, moved + (R * V * F32 if mode == 2 else 0)


def v2_bytes(launch: Launch) -> tuple[int, int]:
    """Needed and moved if every draft is accepted but the last, which is the most."""
    c, target, draft = launch.constants, launch.args[0], launch.args[6]
    row = V * target.element_size() + (V * draft.element_size() if c["DENSE"] else 0)
    # Twice a row for its normaliser, once for a residual mass; then one row to draw.
    moved = 2 * K * row + (3 if c["DENSE"] else 1) * row
    if c["METHOD"] == "block" and c["DENSE"]:
        moved += (K - 1) * row
    return R * K * row, R * moved


def other_bytes(launch: Launch) -> tuple[int, int]:
    """Needed and moved by what is launched once a block."""
    if launch.name == "topk_kernel":
        needed = R * K * (V * BF16 + TOPK * I32)
        return needed, needed + launch.constants["PASSES"] * R * K * V * BF16
    if launch.name == "finish_kernel":
        width = launch.args[6]
        return 2 * R * K * width * F32, 2 * R * K * width * F32
    if launch.name == "project_kernel":
        outputs, size = launch.args[10], launch.args[5].element_size()
        hidden, weight = R * K * D * BF16, outputs * D * size
        out = R * K * outputs * F32
        tiles = launch.grid
        return hidden + weight + out, hidden * tiles[1] + weight * tiles[0] + out
    weight = joint_bytes(launch)
    return weight + R * RANK * BF16, weight * launch.grid[0] + R * RANK * BF16 * 3


def bytes_of(launch: Launch) -> tuple[int, int]:
    """Bytes the operation must move, and those that the launch asks for."""
    if launch.name == "step_kernel":
        return step_bytes(launch)
    if launch.name == "rejection_kernel":
        return rejection_bytes(launch)
    if launch.name == "v2_rejection_kernel":
        return v2_bytes(launch)
    return other_bytes(launch)


def report(targets: list[str], kernels: list[str]) -> list[dict[str, Any]]:
    """One row for each kernel, configuration and target."""
    rows = []
    for name, launches in configurations().items():
        seen: set[tuple[str, int]] = set()
        for launch in launches:
            outputs = launch.args[10] if launch.name == "project_kernel" else 0
            if (launch.name, outputs) in seen or launch.name not in (
                kernels or [launch.name]
            ):
                continue
            seen.add((launch.name, outputs))
            needed, moved = bytes_of(launch)
            for target in targets:
                usage = compile_launch(launch, target)
                row = {
                    "kernel": launch.name,
                    "configuration": name,
                    "target": target,
                    **dataclasses.asdict(usage),
                    "programs": launch.grid,
                    "bytes_needed": needed,
                    "bytes_moved": moved,
                }
                for card, bandwidth in BANDWIDTH.items():
                    row[f"roofline_us_{card}"] = round(needed / bandwidth * 1e6, 2)
                    row[f"moved_us_{card}"] = round(moved / bandwidth * 1e6, 2)
                rows.append(row)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", metavar="FILE")
    parser.add_argument("--targets", nargs="+", default=list(TARGETS), choices=TARGETS)
    parser.add_argument("--kernels", nargs="+", default=[])
    args = parser.parse_args()
    rows = report(args.targets, args.kernels)
    columns = [c for c in rows[0] if c not in HIDDEN]
    common.print_table(
        f"R={R} K={K} V={V} d={D} r={RANK}; computed, not measured",
        columns,
        [[str(row[c]) for c in columns] for row in rows],
    )
    shape = {"R": R, "K": K, "V": V, "d": D, "r": RANK, "topk": TOPK}
    common.write_json(args.json, {"shape": shape, "bandwidth": BANDWIDTH, "rows": rows})


if __name__ == "__main__":
    main()
