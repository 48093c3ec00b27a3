from __future__ import annotations

import hashlib
import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import TINTS
from diffusers import PixArtAlphaPipeline
from diffusers.models.transformers.pixart_transformer_2d import PixArtTransformer2DModel
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
from diffusers.schedulers.scheduling_dpmsolver_multistep import DPMSolverMultistepScheduler
from peft import PeftModel
from PIL import Image

from cond_pdiff import CondPDiffPipeline, LoraAdapter, StyleImage
from cond_pdiff.errors import AdapterError, ConditionError, CondPDiffError, HubError, TaskDataError, TrainingError
from cond_pdiff.hub import Backbone
from cond_pdiff.text_to_image import load_text_to_image, make_pictures
from cond_pdiff.training.config import CollectConfig, UNetConfig, parse
from cond_pdiff.training.finetuning.style_fine_tuning import StyleFineTuning
from cond_pdiff.training.stages.train import train
from cond_pdiff.training.tasks.styles import Style, load_styles
from cond_pdiff.training.zoo.collect import collect
from cond_pdiff.training.zoo.params import ZooParams
from cond_pdiff.training.zoo.zoo import Zoo

B_KEY = "base_model.model.transformer_blocks.0.attn1.to_q.lora_B.weight"
PROMPTS = ["a red house beside a tree", "a blue boat on the sea at night"]


def weights_sha256(pipe: PixArtAlphaPipeline) -> str:
    tensors = pipe.transformer.state_dict()
    return hashlib.sha256(b"".join(tensors[key].numpy().tobytes() for key in sorted(tensors))).hexdigest()


# --- folders -----------------------------------------------------------------------------------------------------------------


def test_a_style_folder_is_read_as_written(styles_folder: Path) -> None:
    style = Style.load(styles_folder / "embers")
    assert (style.name, style.group, style.licence) == ("embers", "tint", "CC0-1.0")
    pixels, captions = style.pictures("train")
    assert (pixels.shape, pixels.dtype, len(captions)) == ((6, 64, 64, 3), torch.uint8, 6)
    assert style.image.image.size == (120, 90)
    assert [found.name for found in load_styles(styles_folder)] == sorted(TINTS)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / "style.png").unlink(), "no style picture"),
        (lambda f: (f / "captions.json").write_text('{"train": ["one"], "test": []}'), "with a caption each"),
        (lambda f: (f / "captions.json").write_text("{"), "cannot be read"),
        (lambda f: (f / "pictures.safetensors").write_bytes(b"x"), "cannot be read"),
        (lambda f: (f / "meta.json").write_text('{"name": "other", "task_type": "style"}'), "expected task_type"),
        (lambda f: (f / "meta.json").unlink(), "meta.json is missing"),
    ],
)
def test_damaged_style_folders_are_named(styles_folder: Path, tmp_path: Path, damage: Any, message: str) -> None:

    folder = Path(shutil.copytree(styles_folder / "moss", tmp_path / "moss"))
    damage(folder)

    def read() -> None:
        style = Style.load(folder)
        _ = style.pictures("train"), style.image

    with pytest.raises(TaskDataError, match=message):
        read()


def test_style_variants_are_crops_of_the_picture_and_of_what_was_made_in_it(styles_folder: Path) -> None:
    style = Style.load(styles_folder / "embers")
    variants = style.conditions(12)
    assert [v.sha256 for v in variants[:6]] == [v.sha256 for v in style.conditions(6)]
    assert variants[1].sha256 != style.conditions(2, "test")[1].sha256
    assert len({v.sha256 for v in variants}) == 12
    assert all(v.image.width == v.image.height for v in variants)
    assert variants[0].image.width == 90


# --- from pictures to adapters -----------------------------------------------------------------------------------------------


def test_the_zoo_holds_what_was_asked_for(style_zoo: Zoo, tmp_path: Path) -> None:
    assert {name: len(style_zoo.runs(name)) for name in (*style_zoo.task_names, *style_zoo.unseen_names)} == {
        "embers": 2,
        "lagoon": 2,
        "moss": 1,
    }
    adapter = style_zoo.runs("embers")[0].adapter()
    assert adapter.spec.task_type is None
    assert len(adapter.modules) == 8  # one block of two attentions
    assert style_zoo.multitask() is not None
    for run in style_zoo.runs("embers"):
        assert {"test_loss", "test_loss_base"} <= set(run.facts)
        last, earlier = run.adapters()
        assert (run.folder / "step-3").is_dir()
        assert 0 < float((last.tensors[B_KEY] - earlier.tensors[B_KEY]).norm()) < float(last.tensors[B_KEY].norm())
    data = ZooParams.load(style_zoo, tmp_path / "params")
    assert len(data) == 8  # two styles, two runs, two checkpoints
    assert data.tasks.tolist() == [0] * 4 + [1] * 4


def test_a_recipe_that_names_no_styles_takes_all_but_the_unseen(style_recipe: dict[str, Any], styles_folder: Path, tmp_path: Path) -> None:
    section = {**style_recipe["collect"], "tasks": [], "runs": 1, "multitask_steps": 0}
    zoo = collect(parse(CollectConfig, section, "collect"), styles_folder, tmp_path / "zoo", shard=(2, 3))
    assert (zoo.task_names, zoo.unseen_names) == (["embers", "lagoon"], ["moss"])
    assert [name for name in TINTS if zoo.runs(name)] == ["moss"]
    with pytest.raises(TrainingError, match="has no 'fog', which the recipe keeps out of the zoo"):
        collect(parse(CollectConfig, {**section, "unseen": ["fog"]}, "collect"), styles_folder, tmp_path / "other")


def test_checkpoints_that_a_run_cannot_have_are_refused(style_recipe: dict[str, Any]) -> None:
    with pytest.raises(TrainingError, match="a run of 4 steps has no 3 checkpoints 2 steps apart"):
        parse(CollectConfig, {**style_recipe["collect"], "last_checkpoints": 3, "checkpoint_every": 2}, "collect")


def test_longer_training_lowers_the_held_out_loss(style_recipe: dict[str, Any], styles_folder: Path, tmp_path: Path) -> None:
    section = {**style_recipe["collect"], "tasks": ["embers"], "unseen": [], "runs": 1, "steps": 60, "batch_size": 4, "multitask_steps": 0}
    (run,) = collect(parse(CollectConfig, section, "collect"), styles_folder, tmp_path / "zoo").runs("embers")
    assert run.facts["test_loss"] < run.facts["test_loss_base"]


def test_a_picture_gives_adapters_that_peft_and_the_pipeline_take(
    style_generator: Path, text_to_image: PixArtAlphaPipeline, tiny_base: Backbone, styles_folder: Path, tmp_path: Path
) -> None:
    pipe = CondPDiffPipeline.from_pretrained(style_generator)
    picture = Image.new("RGB", (100, 80), TINTS["embers"])
    out = pipe(picture, num_adapters=3, generator=[torch.Generator().manual_seed(seed) for seed in range(3)])
    again = pipe(StyleImage(picture), generator=[torch.Generator().manual_seed(1)])
    torch.testing.assert_close(dict(again.adapter.tensors), dict(out.adapters[1].tensors), rtol=0, atol=1e-5)
    assert {neighbour.task for neighbour in out.report.nearest} == {"embers", "lagoon"}
    for name in ("embers", "lagoon"):
        shown = np.asarray(pipe.condition_index.preview(name), int)
        style = Style.load(styles_folder / name)
        pixels, _ = style.pictures("train")
        scene = Image.fromarray(pixels[style.shown_scene(len(pixels))].numpy())
        small = np.asarray(scene.resize((48, 48), Image.Resampling.BOX), int)
        assert shown.shape == (48, 48, 3)
        assert np.abs(shown - small).mean() < 12
        assert np.abs(shown.mean((0, 1)) - small.mean((0, 1))).max() < 4
    assert str(out.report).startswith("request    ")
    assert "labels" not in str(out.report)
    assert out.report.facts() == {}
    assert len({Style(f"style {number}", styles_folder, "", "", "").shown_scene(128) for number in range(20)}) > 10

    folder = out.save_adapter(tmp_path / "embers")
    metadata = LoraAdapter.load(folder).metadata
    assert metadata["condition"] == {"image_size": [100, 80], "image_sha256": StyleImage(picture).sha256}
    assert "labels" not in metadata
    plain = make_pictures(text_to_image, PROMPTS, num_inference_steps=2)
    styled = make_pictures(text_to_image, PROMPTS, [(out.adapter, 4.0)], num_inference_steps=2)
    assert [image.size for image in styled] == [(64, 64)] * 2
    assert np.abs(np.asarray(plain[0], int) - np.asarray(styled[0], int)).max() > 0

    stock = load_text_to_image(tiny_base)
    stock.transformer = PeftModel.from_pretrained(stock.transformer, folder)
    other = make_pictures(text_to_image, PROMPTS, seed=(0, 1), num_inference_steps=2)
    assert [picture == same for picture, same in zip(other, plain, strict=True)] == [True, False]
    attached = make_pictures(text_to_image, PROMPTS, [(out.adapter, 1.0)], num_inference_steps=2)
    with_peft = make_pictures(stock, PROMPTS, num_inference_steps=2)
    for ours, theirs in zip(attached, with_peft, strict=True):
        assert np.abs(np.asarray(ours, int) - np.asarray(theirs, int)).max() <= 1


def test_the_adapter_of_an_unseen_picture_is_the_mean_over_views(
    style_generator: Path, styles_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe = CondPDiffPipeline.from_pretrained(style_generator)
    picture = Style.load(styles_folder / "embers").image

    def latents(threshold: float, views: int) -> torch.Tensor:
        pipe.condition_index.threshold.fill_(threshold)
        monkeypatch.setattr("cond_pdiff.conditions.style_image.STYLE_VIEWS", views)
        rngs = [torch.Generator().manual_seed(seed) for seed in (1, 2)]
        return pipe(picture, num_adapters=2, generator=rngs, output_type="latent", num_inference_steps=3)

    known = latents(-1.0, 3)
    mean = latents(2.0, 3)
    assert not torch.allclose(mean, known, atol=1e-4)
    embeddings = pipe.condition_encoder.encode([picture, *picture.views()[:2]])[0]
    alone = []
    for embedding in embeddings:
        monkeypatch.setattr(pipe, "_encode_condition", lambda condition, count, one=embedding: (one.expand(count, -1), None, {}))
        alone.append(latents(-1.0, 3))
    torch.testing.assert_close(mean, torch.stack(alone).mean(0), atol=1e-5, rtol=1e-4)
    monkeypatch.undo()
    pipe.scheduler = DDPMScheduler.from_config(pipe.scheduler.config)  # draws noise at every step
    assert latents(2.0, 3).shape == known.shape


def test_the_trained_encoder_is_part_of_the_generator(style_generator: Path, style_recipe: dict[str, Any]) -> None:
    encoder = CondPDiffPipeline.from_pretrained(style_generator).condition_encoder
    torch.manual_seed(style_recipe["unet"]["fit"].get("seed", 0))
    start = type(encoder)(**{key: style_recipe["unet"]["condition_encoder"][key] for key in ("channels", "condition_dim", "image_side")})
    assert not torch.equal(encoder.convolutions[0].weight, start.convolutions[0].weight)


def test_a_generator_refuses_the_other_kind_of_condition(style_generator: Path, tiny_generator: Path) -> None:
    with pytest.raises(ConditionError, match="there is no image file"):
        CondPDiffPipeline.from_pretrained(style_generator)("Decide whether a sentence is good.")
    with pytest.raises(ConditionError, match=r"reads a task description .*got a Image"):
        CondPDiffPipeline.from_pretrained(tiny_generator)(Image.new("RGB", (64, 64)))


def test_an_encoder_of_the_other_kind_is_refused(style_recipe: dict[str, Any], style_zoo: Zoo, styles_folder: Path, tmp_path: Path) -> None:
    other = {**style_recipe, "unet": {**style_recipe["unet"], "condition_encoder": {"type": "SentenceConditionEncoder"}}}
    with pytest.raises(TrainingError, match=r"a SentenceConditionEncoder reads a task-prompt, .* are a style-image each"):
        train(other, style_zoo.folder, styles_folder, tmp_path / "run")
    with pytest.raises(TrainingError, match="unknown entry 'kind'"):
        parse(CollectConfig, {**style_recipe["collect"], "kind": "music"}, "collect")
    assert parse(UNetConfig, style_recipe["unet"], "unet").conditions_per_task == 4


# --- adapters on pipelines ---------------------------------------------------------------------------------------------------


def test_the_base_is_untouched_whatever_happens(
    style_zoo: Zoo, text_to_image: PixArtAlphaPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapters = [style_zoo.runs(name)[0].adapter() for name in ("embers", "lagoon")]
    before, plain = weights_sha256(text_to_image), make_pictures(text_to_image, PROMPTS[:1], num_inference_steps=2)[0]
    rng = random.Random(0)
    original = PixArtTransformer2DModel.forward
    for _ in range(20):
        fails_at, calls = rng.randint(1, 4), 0

        def failing(self: Any, *args: Any, fails_at: int = fails_at, **kwargs: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == fails_at:
                raise RuntimeError("out of memory")
            return original(self, *args, **kwargs)

        with monkeypatch.context() as patch:
            patch.setattr(PixArtTransformer2DModel, "forward", failing)
            try:
                make_pictures(text_to_image, PROMPTS, [(adapters[0], 0.8), (adapters[1], 0.3)], num_inference_steps=3)
            except RuntimeError:
                assert calls == fails_at
    assert weights_sha256(text_to_image) == before
    assert make_pictures(text_to_image, PROMPTS[:1], num_inference_steps=2)[0].tobytes() == plain.tobytes()


def test_several_adapters_add_up(style_zoo: Zoo, text_to_image: PixArtAlphaPipeline) -> None:
    one, two = (style_zoo.runs(name)[0].adapter() for name in ("embers", "lagoon"))
    middle = one.interpolate(two, 0.5)
    mixed = make_pictures(text_to_image, PROMPTS, [(one, 0.5), (two, 0.5)], num_inference_steps=2)
    single = make_pictures(text_to_image, PROMPTS, [(middle, 1.0)], num_inference_steps=2)
    for first, second in zip(mixed, single, strict=True):
        assert np.abs(np.asarray(first, int) - np.asarray(second, int)).max() <= 1


def test_what_cannot_carry_an_adapter_is_refused(style_zoo: Zoo, text_to_image: PixArtAlphaPipeline, tmp_path: Path) -> None:
    adapter = style_zoo.runs("embers")[0].adapter()
    with pytest.raises(AdapterError, match="expected a model or a diffusers pipeline"):
        adapter.attach("a string")
    with pytest.raises(ConditionError, match="at least one prompt"):
        make_pictures(text_to_image, [" "])
    with pytest.raises(CondPDiffError, match="got 1 seeds for 2 prompts"):
        make_pictures(text_to_image, PROMPTS, seed=[3])
    with pytest.raises(HubError, match="no transformer/diffusion_pytorch_model"):
        load_text_to_image(Backbone(str(tmp_path)))


def test_a_base_that_predicts_noise_and_variance_can_be_tuned(
    tiny_run: Path, style_recipe: dict[str, Any], styles_folder: Path, tmp_path: Path
) -> None:
    """PixArt-XL's kind: the same class with eight output channels and a scheduler over betas."""
    pipe = load_text_to_image(Backbone(str(tiny_run / "pipeline")))
    config = {**pipe.transformer.config, "out_channels": 8}
    pipe.transformer = PixArtTransformer2DModel.from_config(config)
    pipe.scheduler = DPMSolverMultistepScheduler(beta_start=1e-4, beta_end=0.02, prediction_type="epsilon")
    pipe.save_pretrained(tmp_path / "xl")
    section = {**style_recipe["collect"], "base": Backbone(str(tmp_path / "xl")).to_json()}
    fine_tuning = StyleFineTuning(parse(CollectConfig, section, "collect"))
    style = Style.load(styles_folder / "embers")
    torch.manual_seed(0)
    loss = fine_tuning.losses([next(fine_tuning.batches(style, random.Random(0)))], [style])
    assert 0.3 < loss.item() < 3


def test_style_adapters_trained_side_by_side_are_those_trained_alone(
    style_recipe: dict[str, Any], styles_folder: Path, tmp_path: Path
) -> None:
    config = parse(CollectConfig, {**style_recipe["collect"], "steps": 6, "last_checkpoints": 1, "multitask_steps": 2}, "collect")
    alone, together = (collect(config, styles_folder, tmp_path / f"{count}", together=count) for count in (1, 2))
    for name in (*alone.task_names, *alone.unseen_names):
        for one, other in zip(alone.runs(name), together.runs(name), strict=True):
            assert abs(one.facts["test_loss"] - other.facts["test_loss"]) < 0.005
            first, second = one.adapter(), other.adapter()
            for module in first.modules:
                (_, one_b), (_, other_b) = first.factors(module), second.factors(module)
                assert (one_b - other_b).norm() < 0.05 * one_b.norm()
