"""An attached adapter acts as stock peft's, or is refused by the name of the base model's state, before anything is changed."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
from conftest import fingerprint, make_bert
from diffusers import FluxTransformer2DModel, PixArtAlphaPipeline
from diffusers.hooks import apply_group_offloading, apply_layerwise_casting
from peft import LoraConfig, PeftModel, get_peft_model
from test_adapter_head import head_adapter, load_classifier
from torch import nn
from transformers import BertModel
from transformers.integrations.bitnet import BitLinear

from cond_pdiff import LoraAdapter
from cond_pdiff.attach import UpdateHook, attached_to_groups
from cond_pdiff.errors import AdapterError
from cond_pdiff.hub import Backbone
from cond_pdiff.text_to_image import make_pictures
from cond_pdiff.training.zoo.zoo import Zoo

IDS = torch.arange(5, 21).reshape(2, 8)
QUERY = "encoder.layer.0.attention.self.query"


def output(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS)[0]


@pytest.fixture
def adapted(saved: Path) -> torch.Tensor:
    """What stock peft answers with the adapter on a model as it was loaded."""
    return output(PeftModel.from_pretrained(make_bert(), str(saved)).eval())


def hooks_of(model: nn.Module) -> list[Any]:
    return [hook for module in model.modules() for hook in (*module._forward_hooks.values(), *module._forward_pre_hooks.values())]


def refused(adapter: LoraAdapter, model: nn.Module, message: str) -> None:
    """With and without a check of the base; nothing is left on the model, and it is locked for nobody."""
    before = hooks_of(model)
    for check in (True, False):
        with pytest.raises(AdapterError, match=message):
            adapter.attach(model, check=check)
        with pytest.raises(AdapterError, match=message), adapter.attached(model, check=check):
            pass
    with pytest.raises(AdapterError, match=message), attached_to_groups(model, adapter.spec, adapter.tensors):
        pass
    assert hooks_of(model) == before


# --- compiled ----------------------------------------------------------------------------------------------------------------


def compile_forward(model: BertModel) -> BertModel:
    model.encoder.forward = torch.compile(model.encoder.forward, backend="eager")
    return model


def compile_part(model: BertModel) -> BertModel:
    model.encoder.layer[1] = torch.compile(model.encoder.layer[1], backend="eager")
    return model


def compile_in_place(model: BertModel, part: str = "") -> BertModel:
    model.get_submodule(part).compile(backend="eager")
    return model


COMPILED: dict[str, tuple[Callable[[BertModel], Any], str]] = {
    "the model": (lambda model: torch.compile(model, backend="eager"), "the model is compiled"),
    "in place": (compile_in_place, "the model is compiled"),
    "a part of it": (compile_part, r"module 'encoder.layer.1' is compiled"),
    "a part in place": (lambda model: compile_in_place(model, "encoder.layer.1"), "module 'encoder.layer.1' is compiled"),
    "a layer in place": (lambda model: compile_in_place(model, QUERY), f"module '{QUERY}' is compiled"),
    "a function of it": (compile_forward, "module 'encoder' is compiled"),
}


@pytest.mark.parametrize("kind", list(COMPILED))
def test_a_compiled_model_is_refused(tiny_adapter: LoraAdapter, kind: str) -> None:
    compiled, message = COMPILED[kind]
    model = compiled(make_bert())
    if kind == "in place":  # code that exists already is what would go on without the hooks
        output(model)
    refused(tiny_adapter, model, f"{message}, .*attach the adapter to the model as it was loaded, and compile")


def compile_layers(model: BertModel) -> BertModel:
    for layer in model.encoder.layer:
        layer.compile(backend="eager")
    return model


@pytest.mark.parametrize("compiled", [compile_in_place, compile_layers, compile_part])
def test_compiled_after_attaching_it_acts(
    tiny_adapter: LoraAdapter, adapted: torch.Tensor, compiled: Callable[[BertModel], BertModel]
) -> None:
    other = compiled(make_bert())
    base = output(other)  # code that dynamo takes for any model of this class
    model = make_bert()
    with tiny_adapter.attached(model):
        assert torch.allclose(output(compiled(model)), adapted, atol=1e-6)
    assert torch.allclose(output(model), base, atol=1e-6)


def test_a_function_compiled_around_the_model_sees_the_adapters_of_now(tiny_adapter: LoraAdapter, adapted: torch.Tensor) -> None:
    model, other = make_bert(), tiny_adapter.scaled(-1)
    answer = torch.compile(lambda ids: model(ids)[0], backend="eager")

    def check(expected: torch.Tensor) -> None:
        with torch.no_grad():
            assert torch.allclose(answer(IDS), expected, atol=1e-6)

    base = output(model)
    check(base)
    first = tiny_adapter.attach(model)
    check(adapted)
    second = other.attach(model)
    check(base)
    second.detach()
    check(adapted)
    second = other.attach(model)
    first.detach()
    check(output(model))
    assert not torch.allclose(output(model), base, atol=1e-3)
    second.detach()
    check(base)


def test_a_compiled_part_without_adapted_layers_is_none_of_its_business(tiny_adapter: LoraAdapter, adapted: torch.Tensor) -> None:
    model = make_bert()
    model.pooler.compile(backend="eager")
    output(model)
    with tiny_adapter.attached(model):
        assert torch.allclose(output(model), adapted, atol=1e-6)


# --- weights elsewhere, or of another kind -----------------------------------------------------------------------------------


def sequential(model: BertModel, folder: Path) -> None:
    accelerate.cpu_offload(model, execution_device="cpu")


def on_a_disk(model: BertModel, folder: Path) -> None:
    accelerate.disk_offload(model, folder, execution_device="cpu")


def mapped(model: BertModel, folder: Path) -> None:
    places = {"embeddings": "cpu", "encoder.layer.0": "disk", "encoder.layer.1": "cpu", "pooler": "cpu"}
    accelerate.dispatch_model(model, places, main_device="cpu", offload_dir=folder)


def groups_on_a_disk(model: BertModel, folder: Path) -> None:
    apply_group_offloading(model, onload_device="cpu", offload_type="leaf_level", offload_to_disk_path=str(folder))


@pytest.mark.parametrize("offload", [sequential, on_a_disk, mapped, groups_on_a_disk])
def test_weights_that_are_not_in_memory_are_refused(
    tiny_adapter: LoraAdapter, tmp_path: Path, offload: Callable[[BertModel, Path], None]
) -> None:
    model, base = make_bert(), output(make_bert())
    offload(model, tmp_path)
    message = r"the weights of module 'encoder.layer.0\S* are (not in memory|offloaded to a disk).*enable_model_cpu_offload"
    refused(tiny_adapter, model, message)
    assert torch.equal(output(model), base)


def whole(model: BertModel) -> None:
    """As `enable_model_cpu_offload` does it."""
    accelerate.cpu_offload_with_hook(model, execution_device="cpu")


def all_mapped(model: BertModel) -> None:
    accelerate.dispatch_model(model, {"": "cpu"}, main_device="cpu")


def groups(model: BertModel) -> None:
    apply_group_offloading(model, onload_device="cpu", offload_type="leaf_level")


@pytest.mark.parametrize("offload", [whole, all_mapped, groups])
def test_with_offloading_that_keeps_weights_in_memory_it_acts(
    tiny_adapter: LoraAdapter, adapted: torch.Tensor, offload: Callable[[BertModel], None]
) -> None:
    model = make_bert()
    base = output(model)
    offload(model)
    with tiny_adapter.attached(model):
        assert torch.allclose(output(model), adapted, atol=1e-6)
    assert torch.equal(output(model), base)


@pytest.mark.parametrize("prepare", [whole, all_mapped, groups, compile_in_place])
def test_a_head_acts_as_well(tiny_backbone: Backbone, tmp_path: Path, prepare: Callable[[Any], object]) -> None:
    base = load_classifier(tiny_backbone.repo_id)
    adapter = head_adapter(base, tiny_backbone.repo_id)
    folder = adapter.save(tmp_path / "adapter")
    right = output(PeftModel.from_pretrained(load_classifier(tiny_backbone.repo_id), str(folder)).eval())
    before = output(base)
    offloaded = prepare is not compile_in_place
    if offloaded:
        prepare(base)
    with adapter.attached(base):
        if not offloaded:
            prepare(base)
        assert torch.allclose(output(base), right, atol=1e-6)
    assert torch.allclose(output(base), before, atol=1e-6)


def test_the_update_is_where_the_layer_runs_and_in_its_precision(tiny_adapter: LoraAdapter, adapted: torch.Tensor) -> None:
    model = make_bert()
    with tiny_adapter.attached(model):
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.allclose(output(model).float(), adapted, atol=0.1)
        model.to(torch.bfloat16)
        assert output(model).dtype == torch.bfloat16
        assert torch.allclose(output(model).float(), adapted, atol=0.1)
        model.to("meta")
        with torch.no_grad():
            assert model(IDS.to("meta"))[0].is_meta


def in_int8(model: BertModel) -> None:
    """As bitsandbytes' Linear8bitLt keeps them."""
    layer = model.get_submodule(QUERY)
    layer.weight = nn.Parameter((layer.weight * 100).to(torch.int8), requires_grad=False)


def in_float8(model: BertModel) -> None:
    apply_layerwise_casting(model, storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)


def packed(model: BertModel) -> None:
    model.encoder.layer[0].attention.self.query = BitLinear(32, 32, bias=False)


@pytest.mark.parametrize(
    ("quantise", "kind"),
    [(in_int8, "Linear .*torch.int8"), (in_float8, "Linear .*torch.float8_e4m3fn"), (packed, "BitLinear .*torch.uint8")],
)
def test_a_quantised_base_is_refused(tiny_adapter: LoraAdapter, quantise: Callable[[BertModel], None], kind: str) -> None:
    model = make_bert()
    quantise(model)
    refused(tiny_adapter, model, f"module '{QUERY}' is a {kind}.*load the base in float32")


# --- adapters of others ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", ["query", "intermediate.dense"])
def test_a_model_with_an_adapter_of_peft_is_refused_until_it_is_off(
    tiny_adapter: LoraAdapter, adapted: torch.Tensor, target: str
) -> None:
    model = get_peft_model(make_bert(), LoraConfig(r=2, target_modules=[target], init_lora_weights=False)).eval()
    inside = model.base_model.model
    refused(tiny_adapter, model, r"the model is peft's PeftModel: .*unload\(\)")
    refused(tiny_adapter, inside, rf"module 'encoder.layer.0.\S*{target}' is peft's Linear: .*unload\(\)")
    plain = model.unload()
    with tiny_adapter.attached(plain):
        assert torch.allclose(output(plain), adapted, atol=1e-6)


# --- diffusers ---------------------------------------------------------------------------------------------------------------


def painted(pipe: PixArtAlphaPipeline, *adapters: tuple[LoraAdapter, float]) -> bytes:
    return make_pictures(pipe, ["a red house"], adapters, num_inference_steps=2)[0].tobytes()


@pytest.fixture
def pixart(text_to_image: PixArtAlphaPipeline) -> PixArtAlphaPipeline:
    """Of its own, as it is changed."""
    pipe = PixArtAlphaPipeline(**{**text_to_image.components, "transformer": copy.deepcopy(text_to_image.transformer)})
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_fused_projections_are_refused_until_they_are_unfused(pixart: PixArtAlphaPipeline, style_zoo: Zoo) -> None:
    style = style_zoo.runs("embers")[0].adapter()
    right, base = painted(pixart, (style, 4.0)), painted(pixart)
    assert right != base
    pixart.transformer.fuse_qkv_projections()
    refused(style, pixart.transformer, r"the projections of module 'transformer_blocks.0.attn1' are fused.*unfuse_qkv_projections\(\)")
    with pytest.raises(AdapterError, match="are fused"):
        painted(pixart, (style, 4.0))
    pixart.transformer.unfuse_qkv_projections()
    assert painted(pixart, (style, 4.0)) == right
    assert painted(pixart) == base


FLUX_INPUTS = {
    "hidden_states": torch.ones(1, 4, 4), "encoder_hidden_states": torch.ones(1, 3, 8), "pooled_projections": torch.ones(1, 8),
    "timestep": torch.ones(1), "img_ids": torch.zeros(4, 3), "txt_ids": torch.zeros(3, 3),
}  # fmt: skip


@pytest.fixture
def flux() -> FluxTransformer2DModel:
    torch.manual_seed(0)
    return FluxTransformer2DModel(
        in_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=8, pooled_projection_dim=8, axes_dims_rope=(4, 4, 8),
    ).eval()  # fmt: skip


def flux_adapter(model: FluxTransformer2DModel, folder: Path) -> tuple[LoraAdapter, torch.Tensor]:
    """Made by peft, and what the model answers with it on."""
    config = LoraConfig(r=2, target_modules=["to_q", "add_k_proj"], init_lora_weights=False)
    peft = get_peft_model(copy.deepcopy(model), config).eval()
    peft.save_pretrained(folder)
    with torch.no_grad():
        return LoraAdapter.load(folder), peft(**FLUX_INPUTS)[0]


def test_fused_projections_of_newer_models_are_refused_too(flux: FluxTransformer2DModel, tmp_path: Path) -> None:
    adapter, right = flux_adapter(flux, tmp_path)
    flux.fuse_qkv_projections()
    refused(adapter, flux, r"module '\S*transformer_blocks.0.attn' are fused")
    flux.unfuse_qkv_projections()
    with torch.no_grad(), adapter.attached(flux):
        assert torch.allclose(flux(**FLUX_INPUTS)[0], right, atol=1e-6)


def test_an_adapter_that_diffusers_put_on_is_refused_until_it_is_off(flux: FluxTransformer2DModel, tmp_path: Path) -> None:
    adapter, right = flux_adapter(flux, tmp_path)
    flux.add_adapter(LoraConfig(r=2, target_modules=["proj_out"], init_lora_weights=False))
    refused(adapter, flux, r"is peft's Linear: .*unload_lora_weights\(\)")
    flux.unload_lora()
    with torch.no_grad(), adapter.attached(flux):
        assert torch.allclose(flux(**FLUX_INPUTS)[0], right, atol=1e-6)


# --- the first run -----------------------------------------------------------------------------------------------------------


class Reader(nn.Module):
    """Attention that reads the weights of its last layer without running it, as torch's own does, and a layer that is run."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.project = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.project(self.attention(x, x, x)[0])


def reader_adapter(model: nn.Module, folder: Path, *targets: str) -> LoraAdapter:
    """Made from the layers' names and shapes, as peft makes one of attention's whole module."""
    plain = nn.Sequential()
    for name in targets:
        parent, _, leaf = name.rpartition(".")
        holder = plain
        for part in filter(None, [parent]):
            holder.add_module(part, nn.Sequential())
            holder = holder.get_submodule(part)
        holder.add_module(leaf, nn.Linear(8, 8))
    leaves = [name.rpartition(".")[2] for name in targets]
    get_peft_model(plain, LoraConfig(r=2, target_modules=leaves, init_lora_weights=False)).save_pretrained(folder)
    return LoraAdapter.load(folder)


def test_a_model_that_runs_none_of_the_adapted_layers_says_so_once(tmp_path: Path) -> None:
    model, x = Reader(), torch.ones(1, 3, 8)
    before, base = fingerprint(model), model(x)
    attachment = reader_adapter(model, tmp_path, "attention.out_proj").attach(model)
    with pytest.raises(AdapterError, match=r"none of the adapter's 1 modules in it \('attention.out_proj'\) did"):
        model(x)
    assert torch.equal(model(x), base)
    attachment.detach()
    assert fingerprint(model) == before


def test_a_model_that_leaves_some_of_the_adapted_layers_out_warns_once(tmp_path: Path) -> None:
    model, x = Reader(), torch.ones(1, 3, 8)
    before, base = fingerprint(model), model(x)
    attachment = reader_adapter(model, tmp_path, "attention.out_proj", "project").attach(model)
    with pytest.warns(UserWarning, match=r"1 of the adapter's 2 modules were not run by the model \('attention.out_proj'\)"):
        assert not torch.equal(model(x), base)
    model(x)
    attachment.detach()
    assert fingerprint(model) == before


def test_after_the_first_run_nothing_but_the_updates_is_left(tiny_adapter: LoraAdapter) -> None:
    model = make_bert()
    with tiny_adapter.attached(model):
        assert len(hooks_of(model)) > len(tiny_adapter.modules)
        output(model)
        assert [type(hook) for hook in hooks_of(model)] == [UpdateHook] * len(tiny_adapter.modules)
    attachment = tiny_adapter.attach(model)  # and where there was none, nothing at all
    attachment.detach()
    assert hooks_of(model) == []
    assert not any("forward" in vars(module) for module in model.modules())


def test_at_no_strength_it_acts_as_well(tiny_adapter: LoraAdapter) -> None:
    model = make_bert()
    base = output(model)
    with tiny_adapter.attached(model, scale=0):
        assert torch.equal(output(model), base)


def test_a_run_that_had_begun_before_is_not_judged(tiny_adapter: LoraAdapter, adapted: torch.Tensor) -> None:
    model, inside, attached = make_bert(), threading.Event(), threading.Event()
    found: list[torch.Tensor] = []

    def wait(*ignored: object) -> None:
        inside.set()
        attached.wait()

    base, waiting = output(model), model.pooler.register_forward_pre_hook(wait)
    thread = threading.Thread(target=lambda: found.append(output(model)))
    thread.start()
    inside.wait()
    waiting.remove()
    attachment = tiny_adapter.attach(model)
    attached.set()
    thread.join()
    assert torch.equal(found[0], base)
    assert torch.allclose(output(model), adapted, atol=1e-6)
    attachment.detach()
