"""LoRA files of other tools, read and written; diffusers' own loaders and savers are the judges."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny_pipelines
import torch
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file
from tiny_pipelines import denoised
from torch import nn

from cond_pdiff import LoraAdapter
from cond_pdiff.adapter import FACTORS
from cond_pdiff.errors import AdapterError, OutputExistsError
from cond_pdiff.formats.lora_file import LoraFile, read_adapter
from cond_pdiff.formats.lora_writer import lora_file_tensors, save_lora_file
from cond_pdiff.formats.module_names import ModuleNames, flat
from cond_pdiff.lora import KEY_PREFIX, LoraSpec, adapted_module

ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
MODELS: dict[str, tuple[Callable[[], Any], tuple[str, ...], tuple[str, ...]]] = {
    "stable-diffusion": (
        tiny_pipelines.stable_diffusion, (*ATTENTION, "conv1", "proj_in", "ff.net.0.proj", "time_emb_proj", "downsamplers.0.conv"),
        ("diffusers", "kohya", "comfyui"),
    ),
    "stable-diffusion-xl": (
        tiny_pipelines.stable_diffusion_xl, (*ATTENTION, "conv2", "conv_shortcut", "proj_out", "ff.net.2"),
        ("diffusers", "kohya", "comfyui"),
    ),
    "stable-diffusion-3": (tiny_pipelines.stable_diffusion_3, (*ATTENTION, "add_q_proj", "ff.net.2"), ("diffusers", "comfyui")),
    "flux": (tiny_pipelines.flux, (*ATTENTION, "add_k_proj", "proj_mlp", "ff_context.net.2"), ("diffusers", "comfyui", "kohya")),
}  # fmt: skip


def made(pipe: Any, targets: tuple[str, ...], rank: int = 2, alpha: float = 3.0, skip: str = "?") -> LoraAdapter:
    """A random adapter for the linear and convolution layers of the pipeline's denoiser that end so."""
    rng = torch.Generator().manual_seed(1)
    tensors = {}
    for name, module in adapted_module(pipe).named_modules():
        if name.endswith(tuple("." + target for target in targets)) and skip not in name and isinstance(module, (nn.Linear, nn.Conv2d)):
            out, *inner = module.weight.shape
            shapes = {"lora_A": (rank, *inner), "lora_B": (out, rank, *(1 for _ in inner[1:]))}
            tensors |= {f"{KEY_PREFIX}{name}.{factor}.weight": 0.3 * torch.randn(shape, generator=rng) for factor, shape in shapes.items()}
    modules = {key.removeprefix(KEY_PREFIX).rpartition(".lora_")[0] for key in tensors}
    return LoraAdapter(LoraSpec("tiny", rank, alpha, tuple(modules), None), tensors)


def attached(adapter: LoraAdapter, pipe: Any) -> torch.Tensor:
    with adapter.attached(pipe):
        return denoised(pipe)


@pytest.mark.parametrize("name", MODELS)
def test_what_is_written_is_read_back_and_does_the_same_in_diffusers(name: str, tmp_path: Path) -> None:
    make, targets, forms = MODELS[name]
    pipe = make()
    adapter, plain = made(pipe, targets), denoised(pipe)
    right = attached(adapter, pipe)
    assert float((right - plain).abs().max()) > 1e-3
    for form in forms:
        file = save_lora_file(adapter, tmp_path / f"{form}.safetensors", form)
        for names in (None, ModuleNames.of(adapter.modules)):  # told by their parts, and known
            back = LoraFile.read(file, names).adapter()
            own = {key: back.tensors[key] for key in adapter.tensors}  # a fused layer brings zeros for what the adapter leaves alone
            back = replace(back, spec=replace(back.spec, target_modules=adapter.spec.target_modules), tensors=own)
            assert all(torch.equal(back.tensors[key], tensor) for key, tensor in adapter.tensors.items() if "lora_A" in key)
            for module in adapter.modules:
                torch.testing.assert_close(back.delta(module), adapter.delta(module), atol=1e-6, rtol=1e-6)
            if form != "diffusers":  # which has no alpha
                assert all(torch.equal(back.tensors[key], tensor) for key, tensor in adapter.tensors.items())
                assert back.spec.alpha == adapter.spec.alpha
        if (form, name) == ("kohya", "flux") or (form == "comfyui" and name in ("flux", "stable-diffusion-3")):
            continue  # diffusers reads the first at FLUX's own size alone, see below, and the others are for ComfyUI alone
        loaded = make()
        loaded.load_lora_weights(file)
        assert len([1 for module in adapted_module(loaded).modules() if isinstance(module, LoraLayer)]) == len(adapter.modules)
        torch.testing.assert_close(denoised(loaded), right, atol=1e-5, rtol=1e-4)


def test_flux_double_blocks_in_kohya_s_keys_are_what_diffusers_loads(tmp_path: Path) -> None:
    """Its layers of queries, keys and values are one. Of single blocks diffusers knows the sizes of the original only."""
    pipe = tiny_pipelines.flux()
    adapter = made(pipe, (*ATTENTION, "add_q_proj", "add_k_proj", "add_v_proj", "ff.net.2"), skip="single_")
    adapter = replace(adapter, spec=replace(adapter.spec, family="flux"))
    file = save_lora_file(adapter, tmp_path / "kohya.safetensors", "kohya")
    assert {key for key in load_file(file) if "double_blocks_1_img_attn" in key} == {
        f"lora_unet_double_blocks_1_img_attn_{layer}.{part}"
        for layer in ("qkv", "proj")
        for part in ("alpha", "lora_down.weight", "lora_up.weight")
    }
    loaded = tiny_pipelines.flux()
    loaded.load_lora_weights(file)
    torch.testing.assert_close(denoised(loaded), attached(adapter, pipe), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", ["stable-diffusion", "stable-diffusion-xl", "stable-diffusion-3", "flux"])
def test_what_diffusers_saves_is_read(name: str, tmp_path: Path) -> None:
    """With its settings in the header: one alpha, another one for some modules, and other ranks."""
    make, targets, _ = MODELS[name]
    pipe = make()
    denoiser = adapted_module(pipe)
    torch.manual_seed(3)
    config = LoraConfig(
        r=4, lora_alpha=6, target_modules=list(targets), init_lora_weights=False, rank_pattern={"to_q": 2}, alpha_pattern={"to_k": 3}
    )
    denoiser.add_adapter(config)
    right = denoised(pipe)
    part = "unet" if hasattr(pipe, "unet") else "transformer"
    metadata = {f"{part}_lora_adapter_metadata": {**config.to_dict(), "target_modules": list(targets)}}
    pipe.save_lora_weights(tmp_path, **{f"{part}_lora_layers": get_peft_model_state_dict(denoiser)}, **metadata)
    adapter = read_adapter(tmp_path / "pytorch_lora_weights.safetensors", base_model="someone/tiny")
    assert (adapter.spec.base_model, adapter.spec.rank, adapter.spec.alpha) == ("someone/tiny", 4, 4.0)
    torch.testing.assert_close(attached(adapter, make()), right, atol=1e-5, rtol=1e-4)


def test_kohya_s_names_of_stable_diffusion_xl_are_sgm_s(tmp_path: Path) -> None:
    pipe = tiny_pipelines.stable_diffusion_xl()
    names = {
        "input_blocks_0_0": "conv_in", "input_blocks_3_0_op": "down_blocks.0.downsamplers.0.conv",
        "input_blocks_4_1_proj_in": "down_blocks.1.attentions.0.proj_in",
        "input_blocks_8_1_transformer_blocks_1_attn2_to_out_0": "down_blocks.2.attentions.1.transformer_blocks.1.attn2.to_out.0",
        "input_blocks_7_0_in_layers_2": "down_blocks.2.resnets.0.conv1", "middle_block_0_out_layers_3": "mid_block.resnets.0.conv2",
        "middle_block_1_transformer_blocks_0_attn1_to_q": "mid_block.attentions.0.transformer_blocks.0.attn1.to_q",
        "output_blocks_1_1_transformer_blocks_1_ff_net_0_proj": "up_blocks.0.attentions.1.transformer_blocks.1.ff.net.0.proj",
        "output_blocks_2_2_conv": "up_blocks.0.upsamplers.0.conv",
        "output_blocks_8_0_skip_connection": "up_blocks.2.resnets.2.conv_shortcut",
        "output_blocks_3_0_emb_layers_1": "up_blocks.1.resnets.0.time_emb_proj", "time_embed_2": "time_embedding.linear_2",
        "label_emb_0_0": "add_embedding.linear_1", "out_2": "conv_out",
    }  # fmt: skip
    rng, tensors = torch.Generator().manual_seed(0), {}
    for place, (theirs, mine) in enumerate(names.items()):
        out, *inner = pipe.unet.get_submodule(mine).weight.shape
        rank = 1 + place % 3
        tensors[f"lora_unet_{theirs}.lora_down.weight"] = torch.randn(rank, *inner, generator=rng)
        tensors[f"lora_unet_{theirs}.lora_up.weight"] = torch.randn(out, rank, *(1 for _ in inner[1:]), generator=rng)
        tensors[f"lora_unet_{theirs}.alpha"] = torch.tensor(0.5)
    save_file(tensors, tmp_path / "sgm.safetensors")
    adapter = read_adapter(tmp_path / "sgm.safetensors")
    assert set(adapter.modules) == set(names.values())
    loaded = tiny_pipelines.stable_diffusion_xl()
    loaded.load_lora_weights(tmp_path / "sgm.safetensors")
    torch.testing.assert_close(attached(adapter, pipe), denoised(loaded), atol=1e-4, rtol=1e-4)
    dotted = {f"diffusion_model.{key.removeprefix('lora_unet_')}": tensor for key, tensor in tensors.items()}
    spelled = {key.replace("_blocks_", "_blocks.", 1).replace("_to_", ".to_"): tensor for key, tensor in dotted.items()}
    for renamed in (dotted, spelled):
        found = LoraFile.of_tensors(renamed, {}, ModuleNames())
        assert set(found.updates) == set(names.values())


def test_text_encoders_stand_under_their_prefix(tmp_path: Path) -> None:
    pipe = tiny_pipelines.stable_diffusion()
    config = LoraConfig(r=2, lora_alpha=2, target_modules=["q_proj", "fc1"], init_lora_weights=False)
    torch.manual_seed(0)
    layers = get_peft_model_state_dict(get_peft_model(pipe.text_encoder, config))
    layers = {key.removeprefix(KEY_PREFIX): tensor for key, tensor in layers.items()}
    pipe.save_lora_weights(tmp_path, text_encoder_lora_layers=layers)
    adapter = read_adapter(tmp_path / "pytorch_lora_weights.safetensors")
    assert {key.removeprefix(f"{KEY_PREFIX}text_encoder.") for key in adapter.tensors} == set(layers)
    assert all(torch.equal(adapter.tensors[f"{KEY_PREFIX}text_encoder.{key}"], tensor) for key, tensor in layers.items())
    both = made(tiny_pipelines.stable_diffusion(), ATTENTION, alpha=2.0)
    modules = (*both.modules, *adapter.modules)
    both = LoraAdapter(LoraSpec("tiny", 2, 2.0, modules, None), {**both.tensors, **adapter.tensors})
    for form, key in (("diffusers", "text_encoder."), ("kohya", "lora_te_")):
        file = save_lora_file(both, tmp_path / f"{form}.safetensors", form)
        assert sum(name.startswith(key) for name in load_file(file)) >= 2 * len(adapter.modules)
        back = LoraFile.read(file).adapter()
        assert all(torch.equal(back.tensors[name], tensor) for name, tensor in both.tensors.items())
    with pytest.raises(AdapterError, match=r"is in the adapter but not in the model"):
        both.attach(tiny_pipelines.stable_diffusion())


def test_keys_of_older_files_are_read() -> None:
    a, b, alpha = torch.randn(2, 8), torch.randn(8, 2), torch.tensor(1.0)
    block = "up_blocks.0.attentions.1.transformer_blocks.0.attn2"
    text = "text_model.encoder.layers.0.self_attn"
    for down, up, scale, module in (
        (f"unet.{block}.processor.to_q_lora.down.weight", f"unet.{block}.processor.to_q_lora.up.weight", None, f"{block}.to_q"),
        (f"{block}.processor.to_out_lora.down.weight", f"{block}.processor.to_out_lora.up.weight", None, f"{block}.to_out.0"),
        (f"unet.{block}.to_k.lora.down.weight", f"unet.{block}.to_k.lora.up.weight", f"unet.{block}.to_k.alpha", f"{block}.to_k"),
        (f"transformer.{block}.to_v.lora_A.weight", f"transformer.{block}.to_v.lora_B.weight", None, f"{block}.to_v"),
        (f"base_model.model.{block}.to_v.lora_A.weight", f"base_model.model.{block}.to_v.lora_B.weight", None, f"{block}.to_v"),
        (f"text_encoder.{text}.to_k_lora.down.weight", f"text_encoder.{text}.to_k_lora.up.weight", None, f"text_encoder.{text}.k_proj"),
        (f"text_encoder.{text}.q_proj.lora_linear_layer.down.weight", f"text_encoder.{text}.q_proj.lora_linear_layer.up.weight", None,
         f"text_encoder.{text}.q_proj"),
        (f"lora_te2_{flat(text)}_out_proj.lora_down.weight", f"lora_te2_{flat(text)}_out_proj.lora_up.weight",
         f"lora_te2_{flat(text)}_out_proj.alpha", f"text_encoder_2.{text}.out_proj"),
    ):  # fmt: skip
        found = LoraFile.of_tensors({down: a, up: b, **({scale: alpha} if scale else {})}, {}, ModuleNames())
        assert list(found.updates) == [module]
        assert found.updates[module].alpha == (1.0 if scale else 2.0)
        assert torch.equal(found.updates[module].lora_a, a)


def test_scales_are_folded_without_rounding() -> None:
    """Of half-precision factors, where modules have other alphas."""
    rng = torch.Generator().manual_seed(0)
    tensors = {}
    for place in range(3):
        tensors[f"unet.block.{place}.lora_A.weight"] = torch.randn(3, 8, generator=rng).half()
        tensors[f"unet.block.{place}.lora_B.weight"] = torch.randn(8, 3, generator=rng).half()
        tensors[f"unet.block.{place}.alpha"] = torch.tensor(1.0 + place)
    adapter = LoraFile.of_tensors(tensors, {}, ModuleNames()).adapter("someone/tiny")
    for place in range(3):
        a, b = (tensors[f"unet.block.{place}.{factor}.weight"].double() for factor in FACTORS)
        torch.testing.assert_close(adapter.delta(f"block.{place}").double(), (1 + place) / 3 * b @ a, atol=1e-6, rtol=1e-6)


def test_fused_layers_that_were_trained_as_one_are_shared_out() -> None:
    """Every part gets all of A, and its own rows of B."""
    rng = torch.Generator().manual_seed(0)
    down, up = torch.randn(4, 8, generator=rng), torch.randn(24 + 32, 4, generator=rng)
    key = "diffusion_model.single_blocks.3.linear1"
    adapter = LoraFile.of_tensors({f"{key}.lora_A.weight": down, f"{key}.lora_B.weight": up}, {}, ModuleNames()).adapter()
    names = ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp")
    together = torch.cat([adapter.delta(f"single_transformer_blocks.3.{name}") for name in names])
    torch.testing.assert_close(together, up @ down)


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("lora_unet_mid_block_attentions_0_proj_in.dora_scale", "is of DoRA; only plain LoRA is read"),
        ("lora_unet_mid_block_attentions_0_proj_in.hada_w1_a", "is of LoHa"),
        ("lora_unet_mid_block_attentions_0_proj_in.lokr_w2", "is of LoKr"),
        ("lora_unet_mid_block_resnets_0_conv1.lora_mid.weight", "is of a Tucker decomposition"),
        ("diffusion_model.blocks.0.norm.diff", "is of a difference of whole weights"),
        ("unet.conv_in.weight", "expected keys that end in lora_down.weight, lora_A.weight or the like"),
        ("lora_unet_joint_blocks_0_x_block_attn_qkv.lora_down.weight", "'joint' in .* is no part of a module's name that is known here"),
        ("something_else.alpha", "expected a beginning such as lora_unet_"),
        ("unet.mid_block.attentions.0.proj_in.lora_A.weight", "has no lora_up"),
    ],
)
def test_other_kinds_and_strange_keys_are_refused_by_name(key: str, message: str, tmp_path: Path) -> None:
    save_file({key: torch.zeros(2, 2)}, tmp_path / "strange.safetensors")
    with pytest.raises(AdapterError, match=message) as told:
        LoraFile.read(tmp_path / "strange.safetensors")
    assert "strange.safetensors" in str(told.value)


def test_files_that_contradict_themselves_are_refused(tmp_path: Path) -> None:
    def read(tensors: dict[str, torch.Tensor], names: ModuleNames | None = None, **header: str) -> LoraFile:
        return LoraFile.of_tensors(tensors, header, names or ModuleNames())

    a, b = torch.randn(2, 8), torch.randn(8, 2)
    one = {"unet.conv_in.lora_A.weight": a, "unet.conv_in.lora_B.weight": b}
    with pytest.raises(AdapterError, match="there are two updates for module 'conv_in'"):
        read({**one, "lora_unet_conv_in.lora_down.weight": a, "lora_unet_conv_in.lora_up.weight": b})
    with pytest.raises(AdapterError, match="there are two tensors of lora_A"):
        read({**one, "unet.conv_in.lora_down.weight": a})
    with pytest.raises(AdapterError, match=r"factors of shapes \(2, 8\) and \(8, 3\), which do not fit"):
        read({**one, "unet.conv_in.lora_B.weight": torch.zeros(8, 3)})
    with pytest.raises(AdapterError, match="'conv_out' is no module of the base model, which has conv_in"):
        read({"lora_unet_conv_out.lora_down.weight": a, "lora_unet_conv_out.lora_up.weight": b}, ModuleNames.of(["conv_in"]))
    with pytest.raises(AdapterError, match=r"unet\.use_dora is set in the header"):
        read(one, lora_adapter_metadata=json.dumps({"unet.use_dora": True}))
    with pytest.raises(AdapterError, match="is not valid JSON"):
        read(one, lora_adapter_metadata="{")
    for settings in ({"unet.lora_alpha": "x"}, {"unet.lora_alpha": 2, "unet.alpha_pattern": [[1]]}, {"unet.alpha_pattern": {"a": "b"}}):
        with pytest.raises(AdapterError, match=r"unet\.(lora_alpha|alpha_pattern) in the header must be numbers"):
            read(one, lora_adapter_metadata=json.dumps(settings))
    save_file({**one, "unet.conv_in.lora_A.weight": a * float("nan")}, tmp_path / "nan.safetensors")
    with pytest.raises(AdapterError, match=r"nan\.safetensors: tensor .* holds NaN"):
        read_adapter(tmp_path / "nan.safetensors")
    (tmp_path / "pointer.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    with pytest.raises(AdapterError, match="is a Git LFS pointer"):
        LoraFile.read(tmp_path / "pointer.safetensors")
    with pytest.raises(AdapterError, match="holds no tensors"):
        read({})
    (tmp_path / "short.safetensors").write_bytes(b"123")
    with pytest.raises(AdapterError, match=r"short\.safetensors is not a complete safetensors file"):
        LoraFile.read(tmp_path / "short.safetensors")


def test_a_pickle_is_refused_with_the_command_that_converts_it(tmp_path: Path) -> None:
    a, b = torch.randn(2, 8), torch.randn(8, 2)
    file = tmp_path / "old file.bin"
    torch.save({"unet.conv_in.lora.down.weight": a, "unet.conv_in.lora.up.weight": b}, file)
    with pytest.raises(AdapterError, match="is a pickle, which can run code when it is read; convert it with") as told:
        read_adapter(file)
    command = shlex.split(str(told.value).splitlines()[1])
    subprocess.run([sys.executable, *command[1:]], check=True)
    assert torch.equal(LoraFile.read(tmp_path / "old file.safetensors").updates["conv_in"].lora_a, a)
    (tmp_path / "folder").mkdir()
    file.rename(tmp_path / "folder" / "pytorch_lora_weights.bin")
    with pytest.raises(AdapterError, match="is a pickle"):
        read_adapter(tmp_path / "folder")


def test_no_form_that_no_tool_reads_is_written(tiny_adapter: LoraAdapter, tmp_path: Path) -> None:
    three = made(tiny_pipelines.stable_diffusion_3(), ATTENTION)
    with pytest.raises(AdapterError, match="cannot be written as a file for kohya: it has diffusers, comfyui"):
        save_lora_file(three, tmp_path / "x.safetensors", "kohya")
    with pytest.raises(AdapterError, match="no tool's single files are known for it"):
        save_lora_file(tiny_adapter, tmp_path / "x.safetensors", "comfyui")
    # Video models have attention layers of the same names, elsewhere or everywhere: ComfyUI would ignore such keys, without a word.
    for base, module in (("Lightricks/LTX-Video", "transformer_blocks.0.attn1.to_q"), ("Wan-AI/Wan2.1", "blocks.0.attn1.to_q")):
        tensors = {f"{KEY_PREFIX}{module}.{factor}.weight": torch.randn(2, 2) for factor in FACTORS}
        with pytest.raises(AdapterError, match=f"an adapter for '{base}' cannot be written as a file for comfyui"):
            lora_file_tensors(LoraAdapter(LoraSpec(base, 2, 2, ("to_q",), None), tensors), "comfyui")
    file = save_lora_file(three, tmp_path / "there.safetensors", "comfyui")
    with pytest.raises(OutputExistsError, match=r"there\.safetensors is already there"):
        save_lora_file(three, file, "comfyui")
    save_lora_file(three, file, "comfyui", overwrite=True)
    with pytest.raises(OutputExistsError, match=r"is a folder; name the file to write, such as .*lora\.safetensors"):
        save_lora_file(three, tmp_path, "comfyui", overwrite=True)


def test_an_adapter_of_a_u_net_gets_comfyui_s_keys_of_u_nets() -> None:
    module = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    tensors = {f"{KEY_PREFIX}{module}.{factor}.weight": torch.randn(2, 2) for factor in FACTORS}
    written = lora_file_tensors(LoraAdapter(LoraSpec("sd/1.5", 2, 4, ("to_q",), None), tensors), "comfyui")
    assert sorted(written) == [f"lora_unet_{flat(module)}.{part}" for part in ("alpha", "lora_down.weight", "lora_up.weight")]
