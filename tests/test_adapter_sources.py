"""Where adapters come from: folders, the Hub, and what people point at that is none; a refusal says what is there."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_bert
from loopback_hub import LoopbackHub
from peft import IA3Config, LoraConfig, get_peft_model
from safetensors.torch import load_file

from cond_pdiff import LoraAdapter
from cond_pdiff.cli import main
from cond_pdiff.errors import AdapterError, HubError
from cond_pdiff.peft_files import CONFIG_FILE, METADATA_FILE, WEIGHTS_FILE

POINTER = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'5e' * 32}\nsize 71234\n"


def pickled(folder: Path) -> None:
    """As peft saved before it knew safetensors."""
    torch.save(load_file(folder / WEIGHTS_FILE), folder / "adapter_model.bin")
    (folder / WEIGHTS_FILE).unlink()


def instead(folder: Path, *files: str) -> None:
    """Other files in the place of the adapter's."""
    shutil.rmtree(folder)
    for name in files:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("{}")


OTHERS: dict[str, tuple[Callable[[Path], object], str]] = {
    "LFS weights": (lambda f: (f / WEIGHTS_FILE).write_text(POINTER), f"{WEIGHTS_FILE} is a Git LFS pointer, .* run `git lfs pull` in"),
    "LFS configuration": (lambda f: (f / CONFIG_FILE).write_text(POINTER), f"{CONFIG_FILE} is a Git LFS pointer, .* run `git lfs pull` in"),
    "pickle": (pickled, rf"{WEIGHTS_FILE} is missing; there is adapter_model\.bin, a pickle: .*weights_only=True"),
    "pickle alone": (lambda f: (shutil.rmtree(f), f.with_suffix(".bin").write_text("")), "there is no such folder"),
    "MLX": (lambda f: instead(f, "adapters.safetensors"), "it holds an adapter of MLX, not of peft"),
    "diffusers": (lambda f: instead(f, "pytorch_lora_weights.safetensors"), "it holds a LoRA in diffusers' own form"),
    "a model": (lambda f: instead(f, "config.json", "model.safetensors"), "it holds a whole model, no adapter"),
    "a pipeline": (lambda f: instead(f, "model_index.json"), "it holds a pipeline"),
    "another file": (lambda f: instead(f, "style.safetensors"), r"it holds style\.safetensors alone"),
    "checkpoints": (
        lambda f: instead(f, *(f"checkpoint-{step}/{CONFIG_FILE}" for step in range(1, 8)), "config.json"),
        "adapters lie in its sub-folders checkpoint-1, checkpoint-2, checkpoint-3, checkpoint-4, checkpoint-5 and 2 more, give one of",
    ),
    "styles": (lambda f: instead(f, f"style/unet/{CONFIG_FILE}"), "adapters lie in its sub-folders style/unet, give one of these"),
}


@pytest.mark.parametrize(("change", "message"), OTHERS.values(), ids=OTHERS)
def test_refusals_say_what_is_there(saved: Path, change: Callable[[Path], object], message: str) -> None:
    change(saved)
    with pytest.raises(AdapterError, match=message):
        LoraAdapter.load(saved)


def test_single_files_are_no_folders(saved: Path) -> None:
    with pytest.raises(AdapterError, match=r"no adapter folder at .*: it is a single file \(\.safetensors\); expected adapter_config"):
        LoraAdapter.load(saved / WEIGHTS_FILE)
    pickled(saved)
    with pytest.raises(AdapterError, match=r"it is a single file \(\.bin\), a pickle\? .*weights_only=True"):
        LoraAdapter.load(saved / "adapter_model.bin")


def test_the_command_that_is_named_converts_a_pickle(saved: Path) -> None:
    wanted = LoraAdapter.load(saved)
    pickled(saved)
    with pytest.raises(AdapterError) as refused:
        LoraAdapter.load(saved)
    command = re.search(r"python -c \".*\"", str(refused.value))
    assert command
    subprocess.run([sys.executable, *shlex.split(command[0])[1:]], cwd=saved, check=True, timeout=120)
    assert all(torch.equal(tensor, wanted.tensors[key]) for key, tensor in LoraAdapter.load(saved).tensors.items())


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (IA3Config(target_modules=["key"], feedforward_modules=[]), "peft_type is 'IA3'.*another method of peft's"),
        (LoraConfig(target_modules=["key"], use_dora=True), "use_dora is True: DoRA"),
        (LoraConfig(target_modules=["key", "word_embeddings"]), r"lora_embedding_A.* is of LoRA on an embedding"),
        (LoraConfig(target_modules=["key"], trainable_token_indices={"word_embeddings": [3]}), "trainable_token_indices is .*single rows"),
    ],
    ids=["IA3", "DoRA", "embedding", "token rows"],
)
def test_other_methods_are_refused_by_their_name(config: LoraConfig, message: str, tmp_path: Path) -> None:
    get_peft_model(make_bert(), config).save_pretrained(tmp_path)
    with pytest.raises(AdapterError, match=message):
        LoraAdapter.load(tmp_path)


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("query.lora_magnitude_vector", "is of DoRA"),
        ("query.lora_B.bias", "biases of its own"),
        ("conv.lora_A.weight", "on a 3-D convolution"),
    ],
)
def test_tensors_tell_what_a_configuration_conceals(tiny_adapter: LoraAdapter, key: str, message: str) -> None:
    from cond_pdiff.peft_files import peft_config
    from cond_pdiff.plain_lora import plain_lora

    more = {f"base_model.model.{key}": torch.ones(2, 3, 1, 1, 1)}
    with pytest.raises(AdapterError, match=message):
        plain_lora(peft_config(tiny_adapter.spec), Path(CONFIG_FILE), {**tiny_adapter.tensors, **more})


# --- the Hub ---------------------------------------------------------------------------------------------------------------------


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_adapters_are_loaded_from_the_hub(hub: LoopbackHub, saved: Path, tiny_adapter: LoraAdapter) -> None:
    first = hub.add("owner/adapter", {**contents(saved), "adapter_model.bin": b"", "run.py": b"", "model.safetensors": b"9" * 99})
    config = {**json.loads((saved / CONFIG_FILE).read_text()), "lora_alpha": 8.0}
    (saved / METADATA_FILE).unlink()
    (saved / CONFIG_FILE).write_text(json.dumps(config))
    hub.add("owner/adapter", contents(saved), branch="strong")
    loaded = LoraAdapter.load("owner/adapter")
    assert hub.asked_for() == {CONFIG_FILE, WEIGHTS_FILE, METADATA_FILE}
    assert loaded.spec == tiny_adapter.spec
    assert all(torch.equal(loaded.tensors[key], tensor) for key, tensor in tiny_adapter.tensors.items())
    assert LoraAdapter.load("owner/adapter", revision="strong").spec.alpha == 8
    assert LoraAdapter.load("owner/adapter", revision=first).spec.alpha == 4
    with pytest.raises(HubError, match=r"there is no folder owner/adapter, and of the Hub: .*cannot be"):
        LoraAdapter.load("owner/adapter", revision="weak")
    with pytest.raises(HubError, match=r"there is no folder owner/gone, and of the Hub: owner/gone"):
        LoraAdapter.load("owner/gone")
    with pytest.raises(HubError, match="a revision is one of a Hub repository"):
        LoraAdapter.load(saved, revision="main")


def test_a_folder_comes_before_the_hub(hub: LoopbackHub, saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(saved.parent.parent)
    LoraAdapter.load(f"{saved.parent.name}/{saved.name}")
    assert hub.requests == []


def test_repositories_without_an_adapter_at_the_top(hub: LoopbackHub, saved: Path) -> None:
    hub.add("owner/many", {f"{name}/{file}": data for name in ("a", "b") for file, data in contents(saved).items()})
    with pytest.raises(AdapterError, match="adapters lie in its sub-folders a, b, give one of these"):
        LoraAdapter.load("owner/many")
    hub.add("owner/old", {CONFIG_FILE: (saved / CONFIG_FILE).read_bytes(), "adapter_model.bin": b""})
    with pytest.raises(AdapterError, match=f"{WEIGHTS_FILE} is missing"):
        LoraAdapter.load("owner/old")
    assert not any(name.endswith((".bin", "a/adapter_model.safetensors")) for name in hub.asked_for())


def test_classify_takes_a_repository(hub: LoopbackHub, saved: Path, capsys: pytest.CaptureFixture[str]) -> None:
    hub.add("owner/adapter", contents(saved))
    assert main(["classify", "owner/adapter", "the good film", "--json"]) == 0
    (answer,) = json.loads(capsys.readouterr().out)
    assert set(answer["probabilities"]) == {"positive", "negative"}


def test_commands_take_a_repository(hub: LoopbackHub, run: Any, saved: Path, tmp_path: Path) -> None:
    """Each says something of the adapter that it has loaded."""
    hub.add("owner/adapter", contents(saved))
    for words, message in (
        (["verify", "owner/adapter"], "the adapter does not record its generator"),
        (["convert", "owner/adapter", "--to", "comfyui", "--out", tmp_path / "file"], "cannot be written as a file for comfyui"),
        (["preview", "owner/adapter", "--prompt", "a house"], "owner/adapter is not a style adapter"),
        (["preview", "owner/adapter", "--prompt", "a house", "--card"], "there is no folder owner/adapter"),
    ):
        assert message in run(*words).err[-1]  # behind the Hub's bar
