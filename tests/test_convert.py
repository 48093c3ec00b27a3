from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny_pipelines
import torch
from conftest import fingerprint, refused
from safetensors.torch import load_file, save_file
from test_formats import made
from transformers import AutoModel, GPT2Config, GPT2Model

from cond_pdiff import LoraAdapter
from cond_pdiff.adapter_card import merged_card
from cond_pdiff.convert import save_merged, save_peft
from cond_pdiff.errors import AdapterError, CondPDiffError, HubError, OutputExistsError
from cond_pdiff.formats.lora_file import LoraFile, read_adapter
from cond_pdiff.formats.lora_writer import lora_file_tensors, save_lora_file
from cond_pdiff.formats.module_names import ModuleNames
from cond_pdiff.hub import Backbone
from cond_pdiff.lora import KEY_PREFIX, LoraSpec
from cond_pdiff.models.sentence_backbone import SentenceBackbone
from cond_pdiff.text_to_image import load_text_to_image, make_pictures
from cond_pdiff.training.zoo.zoo import Zoo

TEXTS = ["the good film", "the awful meal and the kitten"]


@pytest.fixture(scope="module")
def style_adapter(style_zoo: Zoo) -> LoraAdapter:
    return style_zoo.runs("embers")[0].adapter()


def test_comfyui_reads_down_up_and_alpha_and_they_give_the_same_update(style_adapter: LoraAdapter, tmp_path: Path) -> None:
    file = save_lora_file(style_adapter, tmp_path / "embers.safetensors", "comfyui")
    tensors = load_file(file)
    assert len(tensors) == 3 * len(style_adapter.modules)
    for module in style_adapter.modules:
        stem = f"transformer.{module}"
        down, up, alpha = (tensors[f"{stem}.{name}"] for name in ("lora_down.weight", "lora_up.weight", "alpha"))
        torch.testing.assert_close(float(alpha) / down.shape[0] * up @ down, style_adapter.delta(module))
    back = read_adapter(file)
    assert back.tensors.keys() == style_adapter.tensors.keys()
    assert all(torch.equal(back.tensors[key], tensor) for key, tensor in style_adapter.tensors.items())
    assert (back.spec.base_model, back.spec.alpha) == (None, style_adapter.spec.alpha)  # its base is a folder, which is not given away


def test_a_pixart_file_for_diffusers_is_refused(style_adapter: LoraAdapter, tiny_base: Backbone, tmp_path: Path) -> None:
    """Its PixArt has no loader of LoRA files: peft's folder is what is used with it."""
    assert not hasattr(load_text_to_image(tiny_base).transformer, "load_lora_adapter")
    with pytest.raises(AdapterError, match="cannot be written as a file for diffusers: it has comfyui"):
        save_lora_file(style_adapter, tmp_path / "embers.safetensors", "diffusers")


def test_a_file_is_not_replaced_and_strange_tensors_are_refused(
    style_adapter: LoraAdapter, tiny_adapter: LoraAdapter, tmp_path: Path
) -> None:
    file = tmp_path / "there.safetensors"
    file.write_bytes(b"mine")
    with pytest.raises(OutputExistsError, match=r"there\.safetensors is already there"):
        save_lora_file(style_adapter, file, "comfyui")
    assert file.read_bytes() == b"mine"
    with pytest.raises(AdapterError, match="cannot be written as a file for comfyui"):
        save_lora_file(tiny_adapter, tmp_path / "text.safetensors", "comfyui")
    with pytest.raises(AdapterError, match=r"'x' in 'x' is no part of a module's name"):
        LoraFile.of_tensors({"lora_unet_x.lora_down.weight": torch.zeros(1, 1)}, {}, ModuleNames())
    tensors = {**lora_file_tensors(style_adapter, "comfyui"), "transformer.x.dora_scale": torch.zeros(1)}
    with pytest.raises(AdapterError, match="is of DoRA"):
        LoraFile.of_tensors(tensors, {}, ModuleNames())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["there.safetensors"]


def test_a_merged_sentence_model_is_the_base_with_the_adapter(
    tiny_adapter: LoraAdapter, tiny_backbone: Backbone, sentence_backbone: SentenceBackbone, tmp_path: Path
) -> None:
    before = fingerprint(sentence_backbone.model)
    folder = save_merged(tiny_adapter, tmp_path / "merged", tiny_backbone)
    merged = SentenceBackbone.load(Backbone(str(folder)))
    with tiny_adapter.attached(sentence_backbone.model):
        expected = sentence_backbone.embed(TEXTS)
    torch.testing.assert_close(merged.embed(TEXTS), expected, atol=1e-5, rtol=1e-4)
    assert float((merged.embed(TEXTS) - sentence_backbone.embed(TEXTS)).abs().max()) > 1e-3
    names = {path.name for path in Path(tiny_backbone.repo_id).iterdir() if path.suffix in (".json", ".safetensors", ".txt", ".md")}
    assert {path.name for path in folder.iterdir()} == {*names, "README.md"}
    card = (folder / "README.md").read_text()
    assert "base_model" not in card  # a folder
    known = replace(tiny_adapter, spec=replace(tiny_adapter.spec, base_model="owner/tiny"))
    assert 'base_model: "owner/tiny"\nbase_model_relation: merge\n' in merged_card(known, 1.0)
    assert "plus 1 times the adapter's update" in card
    with pytest.raises(CondPDiffError, match="must be a finite number, got nan"):
        save_merged(tiny_adapter, tmp_path / "nan", tiny_backbone, scale=float("nan"))
    none = save_merged(tiny_adapter, tmp_path / "none", tiny_backbone, scale=0.0)
    assert fingerprint(AutoModel.from_pretrained(none)) == fingerprint(AutoModel.from_pretrained(tiny_backbone.repo_id))
    assert fingerprint(sentence_backbone.model) == before


def test_a_merged_gpt2_keeps_its_weights_transposed(tiny_backbone: Backbone, tmp_path: Path) -> None:
    """`attn.c_proj` is square, so that a ΔW the wrong way round would fit; a wrong `fan_in_fan_out` changes nothing."""
    base = GPT2Model(GPT2Config(vocab_size=200, n_embd=16, n_layer=1, n_head=2, n_positions=32))
    base.save_pretrained(tmp_path / "base")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(Path(tiny_backbone.repo_id) / name, tmp_path / "base" / name)
    spec = LoraSpec(str(tmp_path / "base"), 2, 4.0, ("attn.c_proj",))
    stem = f"{KEY_PREFIX}h.0.attn.c_proj"
    factors = {f"{stem}.lora_A.weight": torch.randn(2, 16), f"{stem}.lora_B.weight": torch.randn(16, 2)}
    for flag in (False, True):
        adapter = LoraAdapter(replace(spec, fan_in_fan_out=flag), factors)
        save_merged(adapter, tmp_path / f"merged {flag}")
        merged = AutoModel.from_pretrained(tmp_path / f"merged {flag}").h[0].attn.c_proj.weight
        torch.testing.assert_close(merged, base.h[0].attn.c_proj.weight + adapter.delta("h.0.attn.c_proj").T)


def test_a_merged_pixart_has_the_sums_and_is_else_the_base(style_adapter: LoraAdapter, tiny_base: Backbone, tmp_path: Path) -> None:
    rng = torch.Generator().manual_seed(0)
    random = {key: torch.randn(tensor.shape, generator=rng) for key, tensor in style_adapter.tensors.items()}
    adapter = replace(style_adapter, tensors=random)
    merged = load_text_to_image(Backbone(str(save_merged(adapter, tmp_path / "merged", tiny_base, scale=0.5))))
    base = load_text_to_image(tiny_base)
    weights = base.transformer.state_dict()
    for module in adapter.modules:
        weights[f"{module}.weight"] = weights[f"{module}.weight"] + 0.5 * adapter.delta(module)
    for key, tensor in merged.transformer.state_dict().items():
        torch.testing.assert_close(tensor, weights[key], atol=5e-3, rtol=1e-3)  # the base is stored in half precision
    for part in ("vae", "text_encoder"):
        assert fingerprint(getattr(merged, part)) == fingerprint(getattr(base, part))
    assert make_pictures(merged, ["a red house beside a tree"])[0].size == (64, 64)


def test_what_does_not_fit_is_refused(
    tiny_adapter: LoraAdapter, tiny_backbone: Backbone, tiny_base: Backbone, style_adapter: LoraAdapter, tmp_path: Path
) -> None:
    for adapter, base, file in (
        (tiny_adapter, tiny_backbone, "model.safetensors"),
        (style_adapter, tiny_base, "transformer/diffusion_pytorch_model.safetensors"),
    ):
        other = tmp_path / adapter.modules[0]
        shutil.copytree(base.repo_id, other)
        weights = {key: tensor + 0.1 if tensor.is_floating_point() else tensor for key, tensor in load_file(other / file).items()}
        save_file(weights, other / file, {"format": "pt"})
        with pytest.raises(AdapterError, match="fingerprints differ"):
            save_merged(adapter, tmp_path / "merged", Backbone(str(other)))
        (other / file).write_bytes(b"{}")
        with pytest.raises(HubError, match="cannot be loaded"):
            save_merged(adapter, tmp_path / "merged", Backbone(str(other)))
    prefixed = tmp_path / "prefixed"  # as saved from a model with a head: it loads, but under other names than the adapter's
    shutil.copytree(tiny_backbone.repo_id, prefixed)
    weights = {f"bert.{key}": tensor for key, tensor in load_file(prefixed / "model.safetensors").items()}
    save_file(weights, prefixed / "model.safetensors", {"format": "pt"})
    with pytest.raises(AdapterError, match="is not saved as the model"):
        save_merged(tiny_adapter, tmp_path / "merged", Backbone(str(prefixed)))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("x")
    with pytest.raises(OutputExistsError):
        save_merged(style_adapter, tmp_path / "full", tiny_base)
    assert not (tmp_path / "merged").exists()


def test_the_command_converts_both_ways(run: Any, style_adapter: LoraAdapter, tiny_base: Backbone, tmp_path: Path) -> None:
    folder = style_adapter.save(tmp_path / "adapter")
    done = run("convert", folder, "--to", "comfyui", "--out", tmp_path / "embers.safetensors")
    assert (done.status, done.out) == (0, [f"LoRA file  {tmp_path / 'embers.safetensors'}"])
    done = run("convert", folder, "--to", "merged", "--out", tmp_path / "merged", "--base", tiny_base.repo_id)
    assert (done.status, done.out) == (0, [f"model      {tmp_path / 'merged'}"])
    done = run("convert", tmp_path / "embers.safetensors", "--to", "peft", "--out", tmp_path / "peft")
    assert (done.status, done.out) == (0, [f"adapter    {tmp_path / 'peft'}"])
    back = LoraAdapter.load(tmp_path / "peft")
    assert all(torch.equal(back.tensors[key], tensor) for key, tensor in style_adapter.tensors.items())
    again = ["convert", folder, "--to", "comfyui", "--out", tmp_path / "embers.safetensors"]
    refused(run(*again), "is already there")
    assert run(*again, "--force").status == 0
    again = ["convert", folder, "--to", "merged", "--out", tmp_path / "merged", "--base", tiny_base.repo_id]
    refused(run(*again), "is not empty")
    assert run(*again, "--force").status == 0
    (tmp_path / "merged" / "mine.txt").touch()
    refused(run(*again, "--force"), "not ours to replace")


def test_a_merged_u_net_has_the_sums_of_linear_layers_and_convolutions(tmp_path: Path) -> None:
    pipe = tiny_pipelines.stable_diffusion()
    pipe.unet.save_pretrained(tmp_path / "base" / "unet")
    adapter = made(pipe, ("to_q", "conv1", "proj_in"))
    with adapter.attached(pipe):
        right = tiny_pipelines.denoised(pipe)
    folder = save_merged(adapter, tmp_path / "merged", Backbone(str(tmp_path / "base")), scale=1.0)
    merged = type(pipe.unet).from_pretrained(folder / "unet")
    pipe.unet = merged
    torch.testing.assert_close(tiny_pipelines.denoised(pipe), right, atol=1e-5, rtol=1e-4)


def test_a_peft_folder_is_of_one_model(tmp_path: Path) -> None:
    tensors = {"text_encoder.fc1.lora_A.weight": torch.zeros(1, 2), "text_encoder.fc1.lora_B.weight": torch.zeros(2, 1)}
    adapter = LoraFile.of_tensors(tensors, {}, ModuleNames()).adapter("someone/sd")
    with pytest.raises(AdapterError, match="is for text_encoder too, and a peft folder is for one model"):
        save_peft(adapter, tmp_path / "x")
