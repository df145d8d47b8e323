"""Token folders: written whole or not at all, read checked, one target each."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from vllm_dspark.model.target import TargetIdentity
from vllm_dspark.train import manifest as manifests
from vllm_dspark.train import tokens as module
from vllm_dspark.train.tokens import Sample, TokenWriter, read_tokens

TARGET = TargetIdentity("tiny", "a" * 64, 100)
SAMPLES = [Sample([1, 2, 3], [4, 5], 0.0, 0), Sample([6], [7, 8, 9], 0.6, 1)]


def writer(folder: Path, **changes) -> TokenWriter:
    settings = {
        "target": TARGET,
        "sampling": {"seed": 0, "temperatures": [(0.0, 1.0)]},
        "sources": ["prompts", "self"],
        "provenance": {"command": ["x"]},
    }
    return TokenWriter(folder, **(settings | changes))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder of two shards with two samples and one."""
    with writer(tmp_path / "data") as out:
        out.append(SAMPLES, items=(0, 3), counts={"dropped": {"short": 1}})
        out.append([Sample([10], [11], 1.0, 0)])
    return tmp_path / "data"


def refused(folder: Path, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_tokens(folder)


def edit(folder: Path, **changes) -> None:
    file = folder / "manifest.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def test_what_is_written_is_read(folder: Path) -> None:
    data = read_tokens(folder)
    assert len(data) == 3 and data.target == TARGET
    assert data.sources == ("prompts", "self")
    assert [data.sample(i)[0].tolist() for i in range(3)] == [
        [1, 2, 3, 4, 5],
        [6, 7, 8, 9],
        [10, 11],
    ]
    assert [data.sample(i)[1] for i in range(3)] == [3, 1, 1]
    assert data.temperature.tolist() == [0.0, np.float32(0.6), 1.0]
    assert data.source.tolist() == [0, 1, 0] and data.tokens.dtype == np.int32
    with pytest.raises(IndexError):
        data.sample(3)


def test_the_manifest_is_the_contract(folder: Path) -> None:
    raw = json.loads((folder / "manifest.json").read_text())
    assert raw["schema"] == 1 and raw["kind"] == "dspark-tokens"
    assert raw["target"] == {"name": "tiny", "hash": "a" * 64, "vocab_size": 100}
    assert raw["shards"][0] == {
        "file": "shard-00000.safetensors",
        "samples": 2,
        "prompt_tokens": 4,
        "response_tokens": 5,
        "items": [0, 3],
    }
    assert "items" not in raw["shards"][1]
    assert raw["counts"] == {"dropped": {"short": 1}}
    assert raw["provenance"] == {"command": ["x"]}


def test_several_folders_are_one_set_with_their_sources_by_name(
    folder: Path, tmp_path: Path
) -> None:
    with writer(tmp_path / "more", sources=["self", "third"]) as out:
        out.append([Sample([20], [21], 0.0, 0), Sample([22], [23], 0.0, 1)])
    data = read_tokens([folder, tmp_path / "more"])
    assert data.sources == ("prompts", "self", "third")
    assert data.source.tolist() == [0, 1, 0, 1, 2]
    assert data.sample(4)[0].tolist() == [22, 23]


def test_folders_of_two_targets_do_not_mix(folder: Path, tmp_path: Path) -> None:
    other = replace(TARGET, hash="b" * 64, name="other")
    with writer(tmp_path / "other", target=other) as out:
        out.append(SAMPLES)
    with pytest.raises(ValueError, match=r"other holds text of other \(bbbb"):
        read_tokens([folder, tmp_path / "other"])


def test_a_folder_is_continued(folder: Path) -> None:
    with writer(folder, provenance={"another": "run"}) as out:
        assert len(out.manifest.shards) == 2
        out.append(SAMPLES)
        assert out.manifest.provenance == {"command": ["x"]}  # who began it
        assert out.manifest.counts == {"dropped": {"short": 1}}
    assert len(read_tokens(folder)) == 5


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"sampling": {"seed": 1, "temperatures": [(0.0, 1.0)]}},
            "sampling seed = 0, this run has 1",
        ),
        ({"sampling": {"seed": 0}}, "sampling temperatures = .*this run has None"),
        ({"target": replace(TARGET, hash="b" * 64)}, "target hash = 'aaa.*'bbb"),
        ({"sources": ["prompts"]}, "sources names"),
    ],
)
def test_other_settings_are_refused_by_name(folder: Path, changes, message) -> None:
    with pytest.raises(ValueError, match=message):
        writer(folder, **changes)
    writer(folder).close()  # and the refusal holds no lock


def test_another_name_of_the_same_target_is_no_difference(folder: Path) -> None:
    writer(folder, target=replace(TARGET, name="renamed")).close()


def test_two_writers_at_once_are_refused(folder: Path) -> None:
    with writer(folder), pytest.raises(ValueError, match="another process is writing"):
        writer(folder)


def test_a_folder_of_other_things_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(ValueError, match=r"not empty.*thesis\.tex"):
        writer(tmp_path)


def test_killed_between_shard_and_manifest(folder: Path, monkeypatch) -> None:
    """The shard's file exists, the manifest does not know it: redone, not doubled."""

    def killed(*arguments) -> None:
        raise KeyboardInterrupt

    with writer(folder) as out:
        with monkeypatch.context() as patch:
            patch.setattr(module, "write_manifest", killed)
            with pytest.raises(KeyboardInterrupt):
                out.append([Sample([50], [51], 0.0, 0)])
        assert len(out.manifest.shards) == 2
    assert (folder / "shard-00002.safetensors").exists()
    assert len(read_tokens(folder)) == 3
    with writer(folder) as out:
        out.append([Sample([60], [61, 62], 0.0, 0)])
    assert read_tokens(folder).sample(3)[0].tolist() == [60, 61, 62]


@pytest.mark.parametrize("name", ["shard-00002.safetensors", "manifest.json"])
def test_torn_writes_leave_the_old_state(folder: Path, monkeypatch, name) -> None:
    """Killed half through a file: only a temporary one is torn, and it is removed."""
    before = (folder / "manifest.json").read_bytes()
    rename = Path.replace

    def killed(self: Path, target: Path) -> Path:
        if Path(target).name == name:
            self.write_bytes(self.read_bytes()[:10])
            raise KeyboardInterrupt
        return rename(self, target)

    with writer(folder) as out, monkeypatch.context() as patch:
        patch.setattr(Path, "replace", killed)
        with pytest.raises(KeyboardInterrupt):
            out.append(SAMPLES)
    assert (folder / "manifest.json").read_bytes() == before
    assert len(read_tokens(folder)) == 3 and list(folder.glob("*.tmp"))
    with writer(folder) as out:
        assert not list(folder.glob(".*.tmp"))
        out.append(SAMPLES)
    assert len(read_tokens(folder)) == 5


def test_a_first_run_killed_before_its_manifest_is_begun_anew(tmp_path: Path) -> None:
    (tmp_path / ".manifest.json.tmp").write_text('{"sch')
    (tmp_path / ".lock").touch()
    with writer(tmp_path) as out:
        out.append(SAMPLES)
    assert len(read_tokens(tmp_path)) == 2


def test_no_room_says_what_is_safe(folder: Path, monkeypatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    with writer(folder) as out, monkeypatch.context() as patch:
        patch.setattr(manifests.os, "fsync", full)
        with pytest.raises(ValueError, match=r"No space left.*same command again"):
            out.append(SAMPLES)
    assert not list(folder.glob(".*.tmp")) and len(read_tokens(folder)) == 3


def test_truncated_or_missing_shard(folder: Path) -> None:
    file = folder / "shard-00001.safetensors"
    file.write_bytes(file.read_bytes()[:-3])
    refused(folder, r"shard-00001\.safetensors is missing, truncated or corrupt")
    file.unlink()
    refused(folder, r"shard-00001\.safetensors is missing")


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("tokens", np.array([10, 100], np.int32), "token 100, outside .* of 100"),
        ("tokens", np.array([10, -1], np.int32), "token -1"),
        ("tokens", np.array([10, 11], np.int64), "'tokens' is not a int32 vector"),
        ("tokens", np.array([10], np.int32), "1 tokens, but .* add up to 2"),
        ("prompt_len", np.array([2], np.int32), "'prompt_len' adds up to 2, not 1"),
        ("temperature", np.array([np.nan], np.float32), "not a number"),
        ("temperature", np.array([-1.0], np.float32), "negative"),
        ("source", np.array([2], np.int32), "source number"),
        ("source", np.array([0, 0], np.int32), "2 entries; manifest.json says 1"),
    ],
)
def test_shards_unlike_their_manifest(folder: Path, name, value, message) -> None:
    file = folder / "shard-00001.safetensors"
    save_file(load_file(file) | {name: value}, file)
    refused(folder, message)


def test_the_writer_refuses_what_the_reader_would(folder: Path) -> None:
    with writer(folder) as out, pytest.raises(ValueError, match="token 100"):
        out.append([Sample([100], [1], 0.0, 0)])
    assert len(list(folder.glob("shard-*"))) == 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kind": "something"}, "no manifest of token shards"),
        ({"schema": 2}, "schema 2; this version reads 1"),
        ({"shards": None}, "shards is None; expected list"),
        ({"shards": ["x"]}, r"shards\[0\] is 'x'; expected dict"),
        ({"shards": [{"file": "../x"}]}, "expected a plain name"),
        ({"shards": [{"file": "x"}]}, r"shards\[0\].samples is None"),
        ({"target": {"name": "x"}}, r"target.hash is None"),
        ({"sources": [1]}, "sources is 1"),
        ({"shards": []}, "no sample in"),
    ],
)
def test_corrupt_manifests_name_the_entry(folder: Path, changes, message) -> None:
    edit(folder, **changes)
    refused(folder, message)


def test_no_manifest_or_half_of_one(folder: Path, tmp_path: Path) -> None:
    (folder / "manifest.json").write_text('{"schema": 1, "ki')
    refused(folder, r"manifest\.json is not readable JSON")
    refused(tmp_path / "nowhere", "no token folder.*vllm-dspark synthesize")
    with pytest.raises(ValueError, match="no token folder given"):
        read_tokens([])


def test_a_shard_without_samples_records_its_items(tmp_path: Path) -> None:
    with writer(tmp_path) as out:
        out.append([], items=(0, 8))
        out.append(SAMPLES, items=(8, 16))
        assert [s.items for s in out.manifest.shards] == [(0, 8), (8, 16)]
    assert len(read_tokens(tmp_path)) == 2
