"""Refinement of styles: training steps on the shown pictures, from a generated adapter."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload_with_hook
from conftest import fingerprint, quiet, refused, same, seeds, told
from diffusers import PixArtAlphaPipeline
from diffusers.hooks import apply_group_offloading
from PIL import Image
from torch import nn

from cond_pdiff import CondPDiffPipeline, LoraAdapter, StyleImage
from cond_pdiff.errors import AdapterError, ConditionError, CondPDiffError
from cond_pdiff.hub import Backbone
from cond_pdiff.text_to_image import load_text_to_image
from cond_pdiff.training.config import CollectConfig
from cond_pdiff.training.finetuning.style_fine_tuning import StyleFineTuning
from cond_pdiff.training.finetuning.style_refinement import ShownStyle, refine_style, side_of
from cond_pdiff.training.objectives import denoising_loss
from cond_pdiff.verify import verify

CAPTIONS = ["a red house", "a red house at night"]


@pytest.fixture(scope="module")
def shown(styles_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two pictures of one style."""
    folder = tmp_path_factory.mktemp("shown")
    with Image.open(styles_folder / "moss" / "style.png") as style:
        for number, box in enumerate(((0, 0, 90, 90), (30, 0, 120, 80))):
            style.crop(box).save(folder / f"{number}.png")
    return sorted(folder.iterdir())


@pytest.fixture
def pipe(style_generator: Path) -> CondPDiffPipeline:
    return quiet(CondPDiffPipeline.from_pretrained(style_generator))


def loss_of(base: PixArtAlphaPipeline, adapter: LoraAdapter, style: ShownStyle) -> float:
    """The objective on the shown pictures with one set of noises."""
    tuning = StyleFineTuning(CollectConfig(family="text-to-image", max_length=16), base)
    batch = tuning._with_noise(tuning._encode(style, "train", 64), torch.Generator().manual_seed(1))
    with torch.no_grad(), adapter.attached(base):
        return float(denoising_loss(*tuning._predict(batch)))


def test_steps_bring_the_loss_on_the_pictures_down(pipe: CondPDiffPipeline, shown: list[Path]) -> None:
    base = pipe.base_model()
    before, wanted = fingerprint(base.transformer), [parameter.requires_grad for parameter in base.transformer.parameters()]
    output = pipe(shown, generator=seeds(3), refine_steps=12)
    start, end = output.adapters[0], output.adapter
    assert same(start, pipe(shown, generator=seeds(3)).adapter)
    changed = [key for key, tensor in start.tensors.items() if not torch.equal(tensor, end.tensors[key])]
    assert changed == [key for key in start.tensors if ".lora_B." in key]
    style = ShownStyle.of(StyleImage.of(shown), side_of(base))
    assert loss_of(base, end, style) < loss_of(base, start, style)
    assert not any(tensor.requires_grad for tensor in end.tensors.values())
    assert fingerprint(base.transformer) == before
    assert [parameter.requires_grad for parameter in base.transformer.parameters()] == wanted
    assert all(parameter.grad is None for parameter in base.transformer.parameters())
    facts = {"steps": 12, "learning_rate": 0.015, "seed": 0, "pictures": 2, "captions": []}
    assert end.metadata == {**start.metadata, "refined": facts}


def test_the_same_seed_gives_the_same_bytes_in_any_order(pipe: CondPDiffPipeline, shown: list[Path]) -> None:
    one, other = (pipe(order, generator=seeds(3), refine_steps=2, refine_seed=5).adapter for order in (shown, shown[::-1]))
    assert same(one, other)
    assert not same(one, pipe(shown, generator=seeds(3), refine_steps=2, refine_seed=6).adapter)
    start = pipe(shown, generator=seeds(3)).adapter
    assert same(one, refine_style(pipe.base_model(), start, shown, 2, 5))
    with torch.inference_mode():
        assert same(one, refine_style(pipe.base_model(), start, shown, 2, 5))


def test_captions_are_trained_on_and_kept(pipe: CondPDiffPipeline, shown: list[Path], tmp_path: Path) -> None:
    captioned = StyleImage.of(shown, CAPTIONS)
    assert captioned.to_json() == StyleImage.of(shown).to_json()  # what is generated does not depend on them
    style = ShownStyle.of(captioned, 64)
    assert (style.pixels.shape, sorted(style.captions)) == ((2, 64, 64, 3), sorted(CAPTIONS))
    plain = ShownStyle.of(StyleImage.of(shown), 64)
    assert torch.equal(plain.pixels, style.pixels)
    assert plain.captions == ("", "")
    adapter = pipe(captioned, generator=seeds(3), refine_steps=2).adapter
    assert not same(adapter, pipe(shown, generator=seeds(3), refine_steps=2).adapter)
    assert sorted(adapter.metadata["refined"]["captions"]) == sorted(CAPTIONS)
    assert "| refined | 2 steps on the pictures (2), learning rate 0.015 |" in (adapter.save(tmp_path / "a") / "README.md").read_text()
    with pytest.raises(AdapterError, match="refined after it was generated"):
        verify(adapter, pipe._card_folder, shown)
    for captions in (CAPTIONS[:1], [*CAPTIONS, "a boat"], CAPTIONS[0]):
        with pytest.raises(ConditionError, match="one for each of the 2 pictures"):
            StyleImage.of(shown, captions)
    half = StyleImage.of([StyleImage.of(shown[:1], CAPTIONS[:1]), shown[1]])
    with pytest.raises(ConditionError, match="some pictures have captions"):
        pipe(half, refine_steps=2)
    assert pipe(half, generator=seeds(3)).adapter.metadata["condition"] == captioned.to_json()


def compiled(pipe: Any) -> None:
    pipe.transformer.proj_out.compile()


def quantised(pipe: Any) -> None:
    layer = pipe.transformer.proj_out  # which no adapter is on
    layer.weight = nn.Parameter((layer.weight * 100).to(torch.int8), requires_grad=False)


def offloaded(pipe: Any) -> None:
    cpu_offload_with_hook(pipe.transformer, torch.device("cpu"))


def offloaded_in_groups(pipe: Any) -> None:
    apply_group_offloading(pipe.transformer, torch.device("cpu"), offload_type="leaf_level", offload_device=torch.device("cpu"))


def in_inference_mode(pipe: Any) -> None:
    with torch.inference_mode():
        pipe.transformer = copy.deepcopy(pipe.transformer)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (compiled, "'proj_out' is compiled"), (quantised, "quantised weights"), (offloaded, "offloading"),
        (offloaded_in_groups, "offloading"), (in_inference_mode, "made in inference mode"),
    ],
)  # fmt: skip
def test_a_base_that_cannot_be_trained_is_refused(
    tiny_base: Backbone, pipe: CondPDiffPipeline, shown: list[Path], change: Any, message: str
) -> None:
    adapter, base = pipe(shown, generator=seeds(3)).adapter, load_text_to_image(tiny_base)
    change(base)
    with pytest.raises(AdapterError, match=message):
        refine_style(base, adapter, shown, 2)


def test_what_cannot_be_refined_is_refused(pipe: CondPDiffPipeline, shown: list[Path], text_to_image: PixArtAlphaPipeline) -> None:
    adapter = pipe(shown, generator=seeds(3)).adapter
    with pytest.raises(CondPDiffError, match="steps must be a whole number from 1 to 1000, got 0"):
        refine_style(text_to_image, adapter, shown, 0)
    foreign = dataclasses.replace(adapter, spec=dataclasses.replace(adapter.spec, base_fingerprint="another"))
    with pytest.raises(AdapterError, match="fingerprints differ"):
        refine_style(text_to_image, foreign, shown, 2)


def test_the_command_line_refines_on_pictures(run: Any, pipe: CondPDiffPipeline, shown: list[Path], tmp_path: Path) -> None:
    images = [part for path in shown for part in ("--image", path)]
    out = ["--generator", pipe._card_folder, "--seed", 3, "--refine", 2, "--out"]
    done = run("generate", *images, *out, tmp_path / "plain")
    assert (done.status, done.out[-2]) == (0, "refined    2 steps on 2 pictures, from candidate 1 of 1"), done.err
    expected = pipe(shown, generator=seeds(3), refine_steps=2, refine_seed=3).adapter
    assert same(LoraAdapter.load(tmp_path / "plain"), expected)
    captions = [part for caption in CAPTIONS for part in ("--caption", caption)]
    assert told(run("generate", *images, *captions, *out, tmp_path / "captioned", "--json"))["refined"]["steps"] == 2
    assert LoraAdapter.load(tmp_path / "captioned").metadata["refined"]["captions"]
    refused(run("generate", *images, *captions[:2], *out, tmp_path / "no"), "one for each of the 2 pictures")
    refused(run("generate", "Is it kind?", *captions, *out, tmp_path / "no"), "give the pictures with --image")
