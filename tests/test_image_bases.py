"""Styles on every pipeline of the table: its target is the one that it samples by, and it collects, trains, generates and paints."""

from __future__ import annotations

import copy
import importlib.util
import inspect
import json
import random
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import tiny_pipelines
import torch
from conftest import STYLE_TARGETS, quiet
from diffusers import (
    EDMEulerScheduler,
    FlowMatchEulerDiscreteScheduler,
    StableDiffusionImg2ImgPipeline,
    UNet2DConditionModel,
    WanPipeline,
    ZImagePipeline,
)
from loopback_hub import LoopbackHub
from PIL import Image

from cond_pdiff import CondPDiffPipeline, LoraAdapter, LoraSpec
from cond_pdiff.errors import AdapterError, CondPDiffError, HubError, TaskDataError, TrainingError
from cond_pdiff.hub import Backbone
from cond_pdiff.image_bases import IMAGE_BASES
from cond_pdiff.lora import KEY_PREFIX, target_linears
from cond_pdiff.preview import comparison_sheet, load_base
from cond_pdiff.text_to_image import TRANSFORMER_WEIGHTS, load_text_to_image, make_pictures
from cond_pdiff.training.config import CollectConfig, parse
from cond_pdiff.training.evaluate.card import check_collected
from cond_pdiff.training.finetuning.denoiser_inputs import lengths
from cond_pdiff.training.finetuning.style_fine_tuning import EncodedPictures, StyleBatch, StyleFineTuning
from cond_pdiff.training.finetuning.style_refinement import refine_style
from cond_pdiff.training.recipe import read_recipe
from cond_pdiff.training.stages.train import train
from cond_pdiff.training.tasks.styles import Style, write_style
from cond_pdiff.training.zoo.collect import collect

ROOT = Path(__file__).parents[1]
PROMPTS = ["a red house", "a boat"]
FULL_PRECISION = {"half_precision_base": False, "gradient_checkpointing": False, "precision": "no"}
"""What recipes have the other way; tried in a test of its own, as half precision is slow on many CPUs."""
pytestmark = pytest.mark.filterwarnings("ignore:`FluxPosEmbed` is deprecated:FutureWarning")  # by diffusers' Chroma itself


class Kind(NamedTuple):
    """How a tiny pipeline is made, the recipe for bases like it, and what differs from that."""

    make: Callable[[], Any]
    recipe: str
    collect: dict[str, Any] = {}  # noqa: RUF012 - of a NamedTuple


RECIPE = "diffusers-styles"
# Of U-Nets convolutions, too, as small ones do little with attention.
CONVOLUTIONS = {"target_modules": [*STYLE_TARGETS, "conv2", "conv_out"]}
OTHERS = {"family": "diffusion-transformer"}
KINDS = {
    "pixart": Kind(tiny_pipelines.pixart, f"{RECIPE}+pixart-xl"),
    "sd": Kind(tiny_pipelines.stable_diffusion, RECIPE, CONVOLUTIONS),
    "sd-v": Kind(tiny_pipelines.stable_diffusion_v, RECIPE, CONVOLUTIONS),
    "sdxl": Kind(tiny_pipelines.stable_diffusion_xl, f"{RECIPE}+sdxl", CONVOLUTIONS),
    "sd3": Kind(tiny_pipelines.stable_diffusion_3, f"{RECIPE}+sd3"),
    "flux": Kind(tiny_pipelines.flux, f"{RECIPE}+flux"),
    "pixart-sigma": Kind(tiny_pipelines.pixart_sigma, f"{RECIPE}+pixart-xl"),
    "chroma": Kind(tiny_pipelines.chroma, RECIPE, OTHERS),
    "aura-flow": Kind(tiny_pipelines.aura_flow, RECIPE, {**OTHERS, "target_modules": [*STYLE_TARGETS, "proj_out"]}),
    "lumina-2": Kind(tiny_pipelines.lumina2, RECIPE, OTHERS),
    "sana": Kind(tiny_pipelines.sana, RECIPE, OTHERS),
    "qwen-image": Kind(tiny_pipelines.qwen_image, f"{RECIPE}+qwen-image"),
    "z-image": Kind(tiny_pipelines.z_image, f"{RECIPE}+z-image"),
}


def recipe_for(kind: Kind, folder: Path, **collect: Any) -> dict[str, Any]:
    """Save a pipeline; return the recipe for it, with what makes it large and slow cut down."""
    kind.make().save_pretrained(folder)
    recipe = read_recipe(kind.recipe)
    recipe["collect"] |= {
        **kind.collect, "tasks": ["embers", "lagoon"], "base": Backbone(str(folder)).to_json(), "rank": 2, "alpha": 4, "runs": 1,
        "steps": 20, "batch_size": 4, "max_length": 16, "max_pictures": 1, "subset": 1.0, "learning_rates": [0.02],
        "multitask_steps": 2, "metric_rows": 2, "last_checkpoints": 2, **FULL_PRECISION, **collect,
    }  # fmt: skip
    recipe["unet"] |= {
        "denoiser": {"type": "TokenDenoiser", "width": 8, "depth": 1, "heads": 2}, "conditions_per_task": 2,
        "fit": {"steps": 2, "batch_size": 2, "warmup_steps": 1, "checkpoint_every": 2},
        "condition_encoder": {**recipe["unet"]["condition_encoder"], "channels": [4, 8], "condition_dim": 8},
    }  # fmt: skip
    return recipe


def settings(recipe: dict[str, Any]) -> CollectConfig:
    return parse(CollectConfig, recipe["collect"], "collect")


@pytest.fixture(scope="module", params=KINDS)
def recipe(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return recipe_for(KINDS[request.param], tmp_path_factory.mktemp("base") / request.param)


@pytest.fixture(scope="module")
def fine_tuning(recipe: dict[str, Any]) -> StyleFineTuning:
    return StyleFineTuning(settings(recipe))


@pytest.fixture(scope="module")
def style(styles_folder: Path) -> Style:
    return Style.load(styles_folder / "embers")


def test_every_pipeline_of_the_table_is_tried_here() -> None:
    assert {type(kind.make()).__name__ for kind in KINDS.values()} == set(IMAGE_BASES)


# --- the target --------------------------------------------------------------------------------------------------------------


@contextmanager
def answering(fine_tuning: StyleFineTuning, answer: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> Iterator[None]:
    """Put a denoiser that knows the answer in the place of the pipeline's: of noisy latents and their noise levels (or timesteps)."""
    model, base, scheduler = fine_tuning.model, fine_tuning.base, fine_tuning.pipe.scheduler
    signature = inspect.signature(model.forward)

    def forward(*args: Any, **kwargs: Any) -> tuple[Any]:
        given = signature.bind(*args, **kwargs).arguments
        noisy, time = given[next(iter(signature.parameters))], torch.as_tensor(given[base.time]).float()
        noisy = torch.stack(noisy).squeeze(2) if isinstance(noisy, list) else noisy
        time = time.expand(len(noisy)) / base.time_scale
        steps = scheduler.config.num_train_timesteps
        time = steps - time if base.backwards else time
        answered = answer(noisy, time if fine_tuning.scheduler else time / steps)
        answered = -answered if base.backwards else answered
        if getattr(model.config, "out_channels", None) == 2 * noisy.shape[1]:  # PixArt-XL's variance
            answered = torch.cat([answered, torch.randn(answered.shape)], 1)
        return (list(answered.unsqueeze(2).unbind(0)) if base.listed else answered,)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model, "forward", forward)
        # `inspect.signature` of the stand-in is that of the denoiser.
        forward.__signature__ = signature  # type: ignore[attr-defined]
        yield


def towards(fine_tuning: StyleFineTuning, clean: torch.Tensor) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    """Return the exact answer of a denoiser that knows the clean latents: by the definitions, not by the code that is tested."""
    schedule = fine_tuning.scheduler

    def answer(noisy: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
        shape = (-1, *(1,) * (noisy.ndim - 1))
        if schedule is None:  # x = (1 - s) z + s n; dx/ds = n - z = (x - z) / s
            return (noisy - clean) / time.view(shape)
        kept = schedule.alphas_cumprod[time.long()].view(shape)  # x = √a z + √(1 - a) n
        noise = (noisy - kept.sqrt() * clean) / (1 - kept).sqrt()
        return noise if schedule.config.prediction_type == "epsilon" else kept.sqrt() * noise - (1 - kept).sqrt() * clean

    return answer


def test_a_denoiser_that_returns_the_exact_target_has_no_loss(fine_tuning: StyleFineTuning, style: Style) -> None:
    batch = next(fine_tuning.batches(style, random.Random(0)))
    clean = batch.pictures.latents
    clean = fine_tuning._packed(clean) if fine_tuning.base.packed else clean
    with answering(fine_tuning, towards(fine_tuning, clean)):
        assert fine_tuning.losses([batch], [style]).item() < 1e-6
    with answering(fine_tuning, towards(fine_tuning, clean + 0.1)):
        assert fine_tuning.losses([batch], [style]).item() > 1e-3


def test_what_is_learnt_is_what_the_pipeline_samples_by(fine_tuning: StyleFineTuning, style: Style) -> None:
    """With a denoiser that knows one picture's latents, the pipeline's own call makes that picture: times, signs and scales agree."""
    pixels, _ = style.pictures("train")
    clean = fine_tuning._encode(style, "train", 1).latents
    vae, base = fine_tuning.pipe.vae, fine_tuning.base
    with torch.no_grad():
        picture = pixels[:1].permute(0, 3, 1, 2) / 127.5 - 1
        encoded = vae.encode(picture.unsqueeze(2) if base.frames else picture)
        right = vae.decode(encoded.latent_dist.mode() if "latent_dist" in encoded else encoded.latent).sample
    right = (right.squeeze(2) if base.frames else right).clamp(-1, 1) / 2 + 0.5
    clean = fine_tuning._packed(clean) if base.packed else clean
    with answering(fine_tuning, towards(fine_tuning, clean)):
        made = make_pictures(fine_tuning.pipe, PROMPTS, seed=3, num_inference_steps=8, side=64)
    for one in made:
        assert np.abs(np.asarray(one) / 255 - right[0].permute(1, 2, 0).numpy()).max() < 0.02
    assert right.std() > 0.01


def one_by_one(batch: StyleBatch) -> list[StyleBatch]:
    pictures = [EncodedPictures(batch.pictures.latents[place : place + 1], [one]) for place, one in enumerate(batch.pictures.inputs)]
    return [StyleBatch(one, *parts) for one, *parts in zip(pictures, batch.noise.split(1), batch.times.split(1), strict=True)]


def test_the_loss_of_a_batch_is_the_mean_of_its_pictures(fine_tuning: StyleFineTuning, styles_folder: Path) -> None:
    style = Style.load(styles_folder / "moss")
    fine_tuning = copy.copy(fine_tuning)
    fine_tuning.config = replace(fine_tuning.config, max_pictures=6)
    batch = next(fine_tuning.batches(style, random.Random(1)))
    with torch.no_grad():
        whole = fine_tuning.losses([batch], [style])
        alone = torch.cat([fine_tuning.losses([one], [style]) for one in one_by_one(batch)])
        torch.testing.assert_close(whole[0], alone.mean(), atol=1e-5, rtol=1e-4)
        if len(set(map(lengths, batch.pictures.inputs))) == 1:
            torch.testing.assert_close(fine_tuning.losses(one_by_one(batch), [style] * 4), alone, atol=1e-5, rtol=1e-4)
        else:  # Qwen-Image's captions are as long as they are
            with pytest.raises(TrainingError, match="differ in size"):
                fine_tuning.losses(one_by_one(batch), [style] * 4)


# --- from pictures to pictures -----------------------------------------------------------------------------------------------


def test_it_collects_trains_generates_attaches_and_paints(
    recipe: dict[str, Any], fine_tuning: StyleFineTuning, styles_folder: Path, style: Style, tmp_path: Path
) -> None:
    zoo = collect(settings(recipe), styles_folder, tmp_path / "zoo")
    adapter = zoo.runs("embers")[0].adapter()
    assert adapter.family is zoo.family
    batch = next(fine_tuning.batches(style, random.Random(5)))  # of the one picture that it was trained on
    with torch.no_grad():
        before = fine_tuning.losses([batch], [style]).item()
        with adapter.attached(fine_tuning.pipe):
            after = fine_tuning.losses([batch], [style]).item()
    assert after < 0.98 * before

    generator = train(copy.deepcopy(recipe), zoo.folder, styles_folder, tmp_path / "run")
    made = quiet(CondPDiffPipeline.from_pretrained(generator))(style.image, num_inference_steps=2).adapter
    base = load_base(made)
    plain = make_pictures(base, PROMPTS, num_inference_steps=2, side=64)
    styled = make_pictures(base, PROMPTS, [(made, 4.0)], num_inference_steps=2, side=64)
    assert [one.size for one in (*plain, *styled)] == [(64, 64)] * 4
    assert all(one.tobytes() != other.tobytes() for one, other in zip(plain, styled, strict=True))
    sheet = comparison_sheet(base, PROMPTS, [("style", made, 1.0)], 0, 2, None, 64)
    assert sheet.width > 2 * 64


def test_half_precision_and_checkpointed_gradients(run: Any, tmp_path: Path, styles_folder: Path) -> None:
    """What bases of real sizes need: bfloat16 weights, and activations that are computed again; the adapter stays in float32."""
    as_it_is = {name: read_recipe(KINDS["flux"].recipe)["collect"][name] for name in FULL_PRECISION}
    assert as_it_is == {"half_precision_base": True, "gradient_checkpointing": True, "precision": "bf16"}
    recipe = recipe_for(KINDS["flux"], tmp_path / "flux", **as_it_is)
    zoo = collect(settings(recipe), styles_folder, tmp_path / "zoo")
    trained = zoo.runs("embers")[0]
    adapter = trained.adapter()
    assert {tensor.dtype for tensor in adapter.tensors.values()} == {torch.float32}
    assert trained.facts["test_loss"] < trained.facts["test_loss_base"]
    adapter.attach(tiny_pipelines.flux())  # the base that it was made for, in float32
    folder, picture = adapter.save(tmp_path / "embers"), tmp_path / "preview.png"
    assert run("preview", folder, "--prompt", "a boat", "--steps", 2, "--side", 64, "--out", picture).status == 0
    with Image.open(picture) as sheet:
        assert sheet.height > 2 * 64
    with pytest.raises(TaskDataError, match="no card for generators of adapters for a flux"):
        check_collected(zoo.folder)
    with pytest.raises(TrainingError, match="half_precision_base needs the precision 'bf16'"):
        parse(CollectConfig, {**recipe["collect"], "precision": "no"}, "collect")


def test_of_a_repository_only_what_is_loaded_is_fetched(hub: LoopbackHub, tmp_path: Path) -> None:
    """Weights in shards; beside them the same in another precision, as one file, and what is never fetched."""
    made = tiny_pipelines.flux()
    made.save_pretrained(tmp_path / "flux")
    (tmp_path / "flux" / TRANSFORMER_WEIGHTS).unlink()
    made.transformer.save_pretrained(tmp_path / "flux" / "transformer", max_shard_size="40KB")
    names = {path.relative_to(tmp_path / "flux").as_posix(): path.read_bytes() for path in (tmp_path / "flux").rglob("*") if path.is_file()}
    assert sum("-of-000" in name and name.startswith("transformer/") for name in names) > 1
    others = ("flux1-dev.safetensors", "transformer/diffusion_pytorch_model.fp16.safetensors", "text_encoder/model.fp16.safetensors",
              "text_encoder/pytorch_model.bin", "controlnet/diffusion_pytorch_model.safetensors", "pipeline.py")  # fmt: skip
    hub.add("owner/flux", {**names, **dict.fromkeys(others, b"x")})
    pipe = load_text_to_image(Backbone("owner/flux"))
    assert hub.asked_for() == set(names)
    assert make_pictures(pipe, ["a boat"], num_inference_steps=2, side=64)


# --- bases of real sizes -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["SD 1.5", "PixArt-XL", "SD 3 medium"])
def test_the_page_says_what_adapters_of_real_bases_are(name: str) -> None:
    """Without weights, as the recipe has them; the page's other rows are made by the same script, which takes minutes for them."""
    spec = importlib.util.spec_from_file_location("costs_of_image_bases", ROOT / "benchmarks" / "image_bases.py")
    assert spec is not None
    assert spec.loader is not None
    costs = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, spec.name, costs)  # dataclasses look their module up
        spec.loader.exec_module(costs)
        model, cost = costs.sizes(costs.BASES[name])
    page = (ROOT / "docs" / "styles_on_real_bases.md").read_text(encoding="utf-8")
    assert f"| {' | '.join(costs.size_row(name, cost))} |" in page
    assert 1e6 < cost.numbers < 1e8
    assert all(parameter.is_meta for parameter in model.parameters())


# --- what cannot work --------------------------------------------------------------------------------------------------------


def video_pipeline() -> WanPipeline:
    none = dict.fromkeys(("tokenizer", "text_encoder", "vae", "transformer"))
    return WanPipeline(scheduler=FlowMatchEulerDiscreteScheduler(), **none)


def test_other_pipelines_are_refused_by_name() -> None:
    with pytest.raises(CondPDiffError, match=r"WanPipeline is none of the text-to-image pipelines .*FluxPipeline"):
        make_pictures(video_pipeline(), PROMPTS)
    with pytest.raises(CondPDiffError, match="StableDiffusionImg2ImgPipeline is none of"):
        make_pictures(StableDiffusionImg2ImgPipeline.from_pipe(tiny_pipelines.stable_diffusion()), PROMPTS)


def test_a_compiled_or_offloaded_base_is_refused() -> None:
    pipe = tiny_pipelines.stable_diffusion()
    adapter = random_adapter(pipe.unet)
    assert make_pictures(pipe, PROMPTS, [(adapter, 1.0)], num_inference_steps=2)
    compiled, offloaded = tiny_pipelines.stable_diffusion(), tiny_pipelines.stable_diffusion()
    compiled.unet.compile()
    with pytest.raises(AdapterError, match="the model is compiled"):
        make_pictures(compiled, PROMPTS, [(adapter, 1.0)])
    offloaded.unet.to("meta")
    with pytest.raises(AdapterError, match="are not in memory"):
        make_pictures(offloaded, PROMPTS, [(adapter, 1.0)])


def test_its_adapters_are_refined_on_pictures(fine_tuning: StyleFineTuning, style: Style) -> None:
    """Where it says how large its pictures are; its encoders stay where they were."""
    pipe, start = fine_tuning.pipe, random_adapter(fine_tuning.model)
    if pipe.__class__ is ZImagePipeline:
        with pytest.raises(CondPDiffError, match="does not say how large its pictures are"):
            refine_style(pipe, start, style.image, 1)
        return
    end = refine_style(pipe, start, style.image, 1)
    assert [key for key, tensor in start.tensors.items() if not torch.equal(tensor, end.tensors[key])] == [
        key for key in start.tensors if ".lora_B." in key
    ]


def random_adapter(model: torch.nn.Module) -> LoraAdapter:
    rng = torch.Generator().manual_seed(0)
    spec = LoraSpec(None, 2, 2, ("to_q", "to_k"))
    tensors = {}
    for name, linear in target_linears(model, spec).items():
        tensors[f"{KEY_PREFIX}{name}.lora_A.weight"] = torch.randn(2, linear.in_features, generator=rng)
        tensors[f"{KEY_PREFIX}{name}.lora_B.weight"] = torch.randn(linear.out_features, 2, generator=rng)
    return LoraAdapter(spec, tensors)


def test_bases_that_cannot_be_trained_are_refused(tmp_path: Path, styles_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = settings(recipe_for(KINDS["sd"], tmp_path / "sd"))
    with pytest.raises(TrainingError, match=r"module 'conv_out' is a convolution, .*\(--together 1\)"):
        collect(config, styles_folder, tmp_path / "zoo", together=2)
    pictures = {split: (torch.zeros(1, 64, 60, 3, dtype=torch.uint8), ["a boat"]) for split in ("train", "test")}
    style = write_style(tmp_path / "narrow", Image.new("RGB", (64, 64)), pictures)
    with pytest.raises(TrainingError, match=r"pictures of .* are 60 by 64 pixels; .* must be multiples of 8"):
        next(StyleFineTuning(config).batches(style, random.Random(0)))
    with monkeypatch.context() as patch:
        patch.setattr(UNet2DConditionModel, "_supports_gradient_checkpointing", False)
        with pytest.raises(TrainingError, match="UNet2DConditionModel has no gradient checkpointing"):
            StyleFineTuning(replace(config, gradient_checkpointing=True))

    unet = tmp_path / "sd" / "unet" / "config.json"
    written = unet.read_text()
    unet.write_text(json.dumps({**json.loads(written), "quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}))
    with pytest.raises(HubError, match=r"is quantised \(bitsandbytes\)"):
        StyleFineTuning(config)
    unet.write_text(written)
    EDMEulerScheduler().save_pretrained(tmp_path / "sd" / "scheduler")
    index = json.loads((tmp_path / "sd" / "model_index.json").read_text())
    (tmp_path / "sd" / "model_index.json").write_text(json.dumps({**index, "scheduler": ["diffusers", "EDMEulerScheduler"]}))
    with pytest.raises(TrainingError, match="EDMEulerScheduler has no betas and is no flow"):
        StyleFineTuning(config)


def test_a_base_for_pictures_from_pictures_is_refused_before_anything_is_trained(tmp_path: Path) -> None:
    recipe = recipe_for(KINDS["flux"], tmp_path / "base")
    index = json.loads((tmp_path / "base" / "model_index.json").read_text())
    (tmp_path / "base" / "model_index.json").write_text(json.dumps({**index, "_class_name": "FluxImg2ImgPipeline"}))
    with pytest.raises(CondPDiffError, match="FluxImg2ImgPipeline is none of"):
        StyleFineTuning(settings(recipe))
