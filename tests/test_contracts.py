"""What users of diffusers rely on, for every class that a generator saves (after the testers of diffusers itself)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from cond_pdiff import CondPDiffPipeline
from cond_pdiff.component import Component

COMPONENTS = ("autoencoder", "unet", "condition_encoder", "normalizer", "template", "condition_index")
VARIANT_FILE = "diffusion_pytorch_model.fp16.safetensors"


def state(model: Component) -> dict[str, torch.Tensor]:
    return dict(model.state_dict())


@pytest.mark.parametrize("name", COMPONENTS)
def test_a_component_saves_and_loads_alone(pipe: CondPDiffPipeline, tmp_path: Path, name: str) -> None:
    model: Any = getattr(pipe, name)
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    assert type(loaded) is type(model)
    assert dict(loaded.config) == dict(model.config)
    assert state(loaded).keys() == state(model).keys()
    assert all(torch.equal(state(loaded)[key], tensor) for key, tensor in state(model).items())
    assert not loaded.training


@pytest.mark.parametrize("name", COMPONENTS)
def test_a_component_has_variants_and_precisions(pipe: CondPDiffPipeline, tmp_path: Path, name: str) -> None:
    model: Any = getattr(pipe, name)
    model.half().save_pretrained(tmp_path, variant="fp16")
    assert [path.name for path in tmp_path.glob("*.safetensors")] == [VARIANT_FILE]
    with pytest.raises(OSError, match=r"diffusion_pytorch_model\.safetensors"):
        type(model).from_pretrained(tmp_path)
    half = type(model).from_pretrained(tmp_path, variant="fp16", dtype=torch.float16)
    assert all(torch.equal(state(half)[key], tensor) for key, tensor in load_file(tmp_path / VARIANT_FILE).items())
    single = type(model).from_pretrained(tmp_path, variant="fp16")
    kinds = {tensor.dtype for tensor in state(single).values() if tensor.is_floating_point()}
    assert kinds <= {torch.float32}


@pytest.mark.parametrize("name", COMPONENTS)
def test_a_component_is_built_from_its_config(pipe: CondPDiffPipeline, name: str) -> None:
    model: Any = getattr(pipe, name)
    built = type(model).from_config(model.config)
    assert {key: tensor.shape for key, tensor in state(built).items()} == {key: tensor.shape for key, tensor in state(model).items()}


def test_the_unet_answers_as_an_object_or_a_tuple(pipe: CondPDiffPipeline) -> None:
    config = pipe.unet.config
    sample = torch.randn(2, config.sample_channels, config.sample_length)
    condition = torch.randn(2, config.condition_dim)
    with torch.no_grad():
        whole = pipe.unet(sample, 3, condition)
        (bare,) = pipe.unet(sample, 3, condition, return_dict=False)
    assert torch.equal(whole.sample, bare)
    assert torch.equal(whole[0], bare)


def test_the_pipeline_answers_as_an_object_or_a_tuple(pipe: CondPDiffPipeline) -> None:
    def call(**options: Any) -> Any:
        return pipe("Is the film good?", generator=[torch.Generator().manual_seed(0)], **options)

    whole, bare = call(), call(return_dict=False)
    assert isinstance(bare, tuple)
    assert torch.equal(whole.latents, bare[-1])
    assert len(whole.to_tuple()) == len(bare)


def test_components_serve_another_pipeline_and_none_may_be_left_out(pipe: CondPDiffPipeline, tiny_generator: Path) -> None:
    again = CondPDiffPipeline(**pipe.components)
    assert all(again.components[name] is part for name, part in pipe.components.items())
    assert CondPDiffPipeline._optional_components == []
    for name in pipe.components:
        with pytest.raises(TypeError, match=name):
            CondPDiffPipeline(**{key: part for key, part in pipe.components.items() if key != name})
    assert CondPDiffPipeline.from_pretrained(tiny_generator, unet=pipe.unet).unet is pipe.unet


def test_one_precision_for_the_whole_pipeline(tiny_generator: Path, tmp_path: Path) -> None:
    pipe = CondPDiffPipeline.from_pretrained(tiny_generator, dtype=torch.bfloat16)
    assert {pipe.unet.dtype, pipe.autoencoder.dtype} == {torch.bfloat16}
    pipe.save_pretrained(tmp_path)
    assert CondPDiffPipeline.from_pretrained(tmp_path).unet.dtype == torch.float32
    assert pipe.to(torch.float32).unet.dtype == torch.float32
