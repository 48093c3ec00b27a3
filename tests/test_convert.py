from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import fingerprint, refused
from safetensors.torch import load_file, save_file
from transformers import AutoModel, GPT2Config, GPT2Model

from cond_pdiff import LoraAdapter
from cond_pdiff.adapter_card import merged_card
from cond_pdiff.convert import from_comfyui, save_comfyui, save_merged, to_comfyui
from cond_pdiff.errors import AdapterError, CondPDiffError, HubError, OutputExistsError
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
    file = save_comfyui(style_adapter, tmp_path / "embers.safetensors")
    tensors = load_file(file)
    assert len(tensors) == 3 * len(style_adapter.modules)
    for module in style_adapter.modules:
        stem = f"transformer.{module}"
        down, up, alpha = (tensors[f"{stem}.{name}"] for name in ("lora_down.weight", "lora_up.weight", "alpha"))
        torch.testing.assert_close(float(alpha) / down.shape[0] * up @ down, style_adapter.delta(module))
    back = from_comfyui(tensors)
    assert back.keys() == style_adapter.tensors.keys()
    assert all(torch.equal(back[key], tensor) for key, tensor in style_adapter.tensors.items())


def test_a_file_is_not_replaced_and_strange_tensors_are_refused(
    style_adapter: LoraAdapter, tiny_adapter: LoraAdapter, tmp_path: Path
) -> None:
    file = tmp_path / "there.safetensors"
    file.write_bytes(b"mine")
    with pytest.raises(OutputExistsError, match=r"there\.safetensors is already there"):
        save_comfyui(style_adapter, file)
    assert file.read_bytes() == b"mine"
    with pytest.raises(AdapterError, match="only adapters of PixArt's attention layers"):
        save_comfyui(tiny_adapter, tmp_path / "text.safetensors")
    with pytest.raises(AdapterError, match=r"unexpected tensor 'lora_unet_x\.lora_down\.weight'"):
        from_comfyui({"lora_unet_x.lora_down.weight": torch.zeros(1)})
    with pytest.raises(AdapterError, match="unexpected tensor"):
        from_comfyui({**to_comfyui(style_adapter), "transformer.x.dora_scale": torch.zeros(1)})
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
    again = ["convert", folder, "--to", "comfyui", "--out", tmp_path / "embers.safetensors"]
    refused(run(*again), "is already there")
    assert run(*again, "--force").status == 0
    again = ["convert", folder, "--to", "merged", "--out", tmp_path / "merged", "--base", tiny_base.repo_id]
    refused(run(*again), "is not empty")
    assert run(*again, "--force").status == 0
    (tmp_path / "merged" / "mine.txt").touch()
    refused(run(*again, "--force"), "not ours to replace")
