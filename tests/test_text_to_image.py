from __future__ import annotations

import copy
import json
import random
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import TINY_BASE, interrupt_at
from diffusers import PixArtAlphaPipeline
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from PIL import Image
from safetensors.torch import load_file
from test_training import bits
from transformers import T5Tokenizer

from cond_pdiff import CondPDiffError
from cond_pdiff.cli import main
from cond_pdiff.hub import bundled, find_backbone
from cond_pdiff.text_to_image import PIXART_MINI, TRANSFORMER_WEIGHTS, load_text_to_image, make_pictures, stack_pictures
from cond_pdiff.training.config import parse
from cond_pdiff.training.objectives import draw_noise_levels, flow_pair
from cond_pdiff.training.recipe import read_recipe
from cond_pdiff.training.text_to_image.config import ImageAutoencoderConfig, SampleConfig, SceneClassifierConfig, TransformerConfig
from cond_pdiff.training.text_to_image.drawing import render
from cond_pdiff.training.text_to_image.evaluate import psnr, reconstruct, sample, shares
from cond_pdiff.training.text_to_image.latents import SceneLatents
from cond_pdiff.training.text_to_image.pictures import effects, patterns, render_pool
from cond_pdiff.training.text_to_image.scenes import COLOURS, OBJECTS, PLACES, RELATIONS, TIMES, Scene, caption_words, scene_stream
from cond_pdiff.training.text_to_image.tokenizer import build_tokenizer
from cond_pdiff.training.text_to_image.train import STAGES, train_base
from cond_pdiff.training.text_to_image.train_autoencoder import ImageAutoencoderStage
from cond_pdiff.training.text_to_image.train_classifier import SceneClassifier, SceneClassifierStage, attribute_labels
from cond_pdiff.training.text_to_image.train_transformer import TransformerStage


@pytest.fixture(scope="session")
def pipe(tiny_run: Path) -> PixArtAlphaPipeline:
    """The tiny base model as a user loads it."""
    pipe = PixArtAlphaPipeline.from_pretrained(tiny_run / "pipeline")
    pipe.set_progress_bar_config(disable=True)
    return pipe


def draws(count: int, seed: int = 0, held_out: bool = False) -> list[tuple[Scene, random.Random]]:
    return list(islice(scene_stream(seed, held_out), count))


# --- scenes ------------------------------------------------------------------------------------------------------------------


def test_the_same_random_numbers_give_the_same_scene_picture_and_caption() -> None:
    first, again = ([(scene, render(scene, rng).tobytes(), scene.caption(rng)) for scene, rng in draws(20)] for _ in range(2))
    assert first == again
    others = [(scene, render(scene, rng).tobytes(), scene.caption(rng)) for scene, rng in draws(20, seed=1)]
    assert not {picture for _, picture, _ in first} & {picture for _, picture, _ in others}


def test_a_scene_of_a_stream_does_not_depend_on_how_many_were_used_before() -> None:
    used = [(scene, [rng.random() for _ in range(50)])[0] for scene, rng in islice(scene_stream(3), 10)]
    assert used == [scene for scene, _ in draws(10, seed=3)]


def test_the_held_out_combinations_are_never_drawn_for_training() -> None:
    training, held_out = ([scene for scene, _ in draws(1500, held_out=part)] for part in (False, True))
    assert not any(scene.held_out for scene in training)
    assert all(scene.held_out for scene in held_out)
    combinations = [Scene(name, colour, place, "day") for name in OBJECTS for colour in COLOURS for place in PLACES]
    assert 0.07 < sum(scene.held_out for scene in combinations) / len(combinations) < 0.13
    for attribute, values in (("object", OBJECTS), ("colour", COLOURS), ("place", PLACES), ("time", TIMES)):  # each part alone is known
        for scenes in (training, held_out):
            assert {getattr(scene, attribute) for scene in scenes} == set(values)
    assert {scene.relation for scene in training} == {None, *RELATIONS}


def test_the_held_out_part_stays_what_it_is() -> None:
    """Another rule would let an old model be measured on what it was trained on."""
    combinations = [Scene(name, colour, place, "day") for name in OBJECTS for colour in COLOURS for place in PLACES]
    first = [f"{scene.object} {scene.colour} {scene.place}" for scene in combinations if scene.held_out][:4]
    assert first == ["house orange city", "house yellow beach", "house yellow snow", "house green sea"]


@pytest.mark.parametrize("name", OBJECTS)
def test_objects_and_their_colours_are_seen(name: str) -> None:
    def picture(place: str, time: str, colour: str) -> np.ndarray:
        return render(Scene(name, colour, place, time), random.Random(0)).astype(int)

    pictures = [picture(place, time, "red") for place in PLACES for time in TIMES]
    assert {image.shape for image in pictures} == {(64, 64, 3)}
    assert len({image.tobytes() for image in pictures}) == len(PLACES) * len(TIMES)
    differing = np.abs(picture("snow", "day", "red") - picture("snow", "day", "blue")).sum(2) > 60
    assert 60 < differing.sum() < 1200  # the object, not the whole picture


def test_relations_put_the_main_object_where_they_say() -> None:
    for relation, left in (("left of", True), ("right of", False)):
        scene = Scene("ball", "red", "snow", "day", "car", "black", relation)
        for index in range(5):
            picture = render(scene, random.Random(index)).astype(int)
            columns = np.nonzero((picture[..., 0] - picture[..., 1] > 90) & (picture[..., 2] < 110))[1]
            assert (columns.mean() < 32) == left


@pytest.mark.parametrize("full", [False, True])
def test_every_caption_is_of_known_words_and_fits(full: bool) -> None:
    tokenizer = build_tokenizer(caption_words())
    captions = [scene.caption(rng, full) for scene, rng in draws(1500)]
    tokens = tokenizer(captions)["input_ids"]
    assert tokenizer.unk_token_id not in {token for row in tokens for token in row}
    assert max(map(len, tokens)) <= TransformerConfig().max_length
    assert len(set(captions)) > 1200
    assert captions == [caption.lower().strip() for caption in captions]  # what PixArt's pipeline does to a prompt


def test_a_full_caption_tells_everything() -> None:
    for scene, rng in draws(200):
        caption = f" {scene.caption(rng, full=True).replace(',', '')} "
        assert f" {scene.colour} " in caption
        assert any(f" {word} " in caption for word in OBJECTS[scene.object])
        assert any(f" {words} " in caption for words in PLACES[scene.place])
        assert any(f" {words} " in caption for words in TIMES[scene.time])
        if scene.second and scene.relation:
            assert f" {scene.second_colour} " in caption
            assert any(f" {words} " in caption for words in RELATIONS[scene.relation])


# --- tokenizer ---------------------------------------------------------------------------------------------------------------


def test_words_are_tokens_and_unknown_words_are_unknown(tmp_path: Path) -> None:
    tokenizer = build_tokenizer(caption_words())
    tokenizer.save_pretrained(tmp_path)
    prompts = ["a red house beside a tree", "a blue boat on the sea at night", "at dawn, a cat!", "", "three zébras 中", "?unknown?"]
    for one in (tokenizer, T5Tokenizer.from_pretrained(tmp_path)):
        rows = [one.convert_ids_to_tokens(one(prompt)["input_ids"]) for prompt in prompts]
        assert rows[0] == ["▁a", "▁red", "▁house", "▁beside", "▁a", "▁tree", "</s>"]
        assert not any("<unk>" in row for row in rows[:4])
        assert rows[3] == ["</s>"]
        assert all("<unk>" in row for row in rows[4:])
        assert (one.pad_token_id, one.eos_token_id, one.unk_token_id, one.model_max_length) == (0, 1, 2, 120)


# --- pictures ----------------------------------------------------------------------------------------------------------------


def test_the_text_encoder_knows_the_order_of_words_from_the_start() -> None:
    """Else colours go to the wrong objects, and training does not mend it."""
    recipe = read_recipe("pixart-mini")
    latents = SceneLatents([], torch.zeros(1, 4, 32, 32), "")
    stage = TransformerStage(latents, parse(TransformerConfig, recipe["transformer"], "transformer"))
    words = ["a red house beside a blue tree", "a blue house beside a red tree", "a blue tree beside a red house"]
    tokens = stage.tokenizer(words, return_tensors="pt")
    with torch.no_grad():
        embeddings = stage.text_encoder(**tokens)[0]
    house, with_another_colour, behind = embeddings[0, 2], embeddings[1, 2], embeddings[2, 6]
    assert float((house - with_another_colour).norm() / house.norm()) > 0.3
    assert float((house - behind).norm() / house.norm()) > 0.3


def test_effects_change_pictures_within_their_range_and_in_the_same_way_again() -> None:
    pictures = render_pool(16, 0)[1].float() / 255
    before = pictures.clone()
    first, again = (effects(pictures, torch.Generator().manual_seed(0)) for _ in range(2))
    assert torch.equal(first, again)
    assert torch.equal(pictures, before)
    assert first.shape == pictures.shape
    assert 0 <= float(first.min()) <= float(first.max()) <= 1
    assert int(((first - pictures).abs().mean(dim=(1, 2, 3)) > 0.01).sum()) >= 12
    noise = patterns(4, 64, torch.Generator().manual_seed(0))
    assert noise.shape == (4, 3, 64, 64)
    assert 0 <= float(noise.min()) < float(noise.max()) <= 1


# --- flow matching -----------------------------------------------------------------------------------------------------------


def test_noise_levels_cover_everything_and_flows_are_straight() -> None:
    levels = draw_noise_levels(4000, 0.0, torch.Generator().manual_seed(0))
    assert torch.histc(levels, 10, 0, 1).min() > 60
    assert draw_noise_levels(4000, 1.0, torch.Generator().manual_seed(0)).mean() > levels.mean() + 0.1
    clean, noise = torch.randn(2, 3, 4, 5, 5, generator=torch.Generator().manual_seed(0))
    noisy, velocity = flow_pair(clean, noise, torch.tensor([0.0, 0.5, 1.0]))
    assert torch.equal(noisy[0], clean[0])
    assert torch.equal(noisy[2], noise[2])
    torch.testing.assert_close(noisy[1] - 0.5 * velocity[1], clean[1])


def test_the_saved_sampler_follows_the_velocity_that_is_trained(pipe: PixArtAlphaPipeline) -> None:
    clean, latents = torch.randn(2, 1, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    pipe.scheduler.set_timesteps(8)
    for step, timestep in enumerate(pipe.scheduler.timesteps):
        velocity = (latents - clean) / pipe.scheduler.sigmas[step]
        latents = pipe.scheduler.step(velocity, timestep, latents, return_dict=False)[0]
    torch.testing.assert_close(latents, clean, atol=1e-4, rtol=0)


# --- the whole ---------------------------------------------------------------------------------------------------------------


def test_stock_diffusers_loads_the_pipeline_and_makes_pictures(pipe: PixArtAlphaPipeline) -> None:
    prompts = ["a red house beside a tree", "a dragon of unknown colour"]
    config = SampleConfig(steps=2)
    pictures = sample(pipe, prompts, config)
    assert (pictures.shape, pictures.dtype) == ((2, 3, 64, 64), torch.uint8)
    assert torch.equal(pictures, sample(pipe, prompts, config))
    second = sample(pipe, prompts[1:], config, first=1)
    assert (second.int() - pictures[1:].int()).abs().max() <= 1  # a batch gives what single calls give
    (image,) = pipe("a red house", num_inference_steps=2, use_resolution_binning=False, clean_caption=False).images
    assert image.size == (64, 64)


def test_the_pipeline_is_small_and_holds_no_code_and_no_pickles(tiny_run: Path) -> None:
    folder = tiny_run / "pipeline"
    assert {path.suffix for path in folder.rglob("*") if path.is_file()} == {".json", ".md", ".safetensors"}
    for name, dtype in (("vae", torch.float16), ("transformer", torch.float16), ("text_encoder", torch.float32)):
        (path,) = (folder / name).glob("*.safetensors")
        assert {tensor.dtype for tensor in load_file(path).values()} == {dtype}


def test_latents_of_rendered_scenes_have_mean_zero_and_unit_variance(tiny_run: Path) -> None:
    latents = load_file(tiny_run / "latents" / "part-0000.safetensors")["latents"]
    assert latents.shape == (6, 4, 32, 32)
    assert float(latents.float().std()) == pytest.approx(1, abs=0.05)
    torch.testing.assert_close(latents.float().mean(dim=(0, 2, 3)), torch.zeros(4), atol=0.05, rtol=0)
    assert json.loads((tiny_run / "pipeline" / "vae" / "config.json").read_text())["scaling_factor"] != 0.18215


def test_moving_the_mean_of_latents_changes_no_reconstruction() -> None:
    stage = ImageAutoencoderStage(parse(ImageAutoencoderConfig, TINY_BASE["image_autoencoder"], "image_autoencoder"))
    pictures = render_pool(2, 0)[1]
    before = reconstruct(stage.autoencoder, pictures)
    stage.fit_latent_statistics()
    assert (reconstruct(stage.autoencoder, pictures).int() - before.int()).abs().max() <= 1


def test_the_evaluation_stands_beside_ceiling_and_floor(tiny_run: Path) -> None:
    result = json.loads((tiny_run / "evaluation.json").read_text())
    for name in ("generated", "rendered", "reconstructed", "shuffled"):
        assert set(result[name]) == {"object", "colour", "place", "time", "second", "second_colour", "relation", "mean"}
        assert all(0 <= share <= 1 for share in result[name].values())
    assert result["settings"]["steps"] == 2
    assert result["reconstruction_psnr"] > 0


def test_the_card_tells_what_was_measured(tiny_run: Path) -> None:
    result, text = json.loads((tiny_run / "evaluation.json").read_text()), (tiny_run / "pipeline" / "README.md").read_text()
    assert not [leftover for leftover in ("$", "None", "nan") if leftover in text]
    columns = ("generated", "reconstructed", "rendered", "shuffled")
    for name, value in result["generated"].items():
        (row,) = (line for line in text.splitlines() if line.startswith(f"| {name.replace('_', ' ')} |"))
        assert row.split(" | ")[1:] == [f"{100 * result[column][name]:.1f}" + (" |" if column == "shuffled" else "") for column in columns]
        assert 0 <= value <= 1
    assert "house, tree, boat" in text
    assert "latents 4×32×32 |" in text
    assert '"cond-pdiff/run"' in text
    with Image.open(tiny_run / "samples.png") as sheet:
        assert sheet.width > sheet.height > 2 * 128


class Oracle(SceneClassifier):
    """Answers with given labels."""

    def __init__(self, answers: torch.Tensor) -> None:
        super().__init__([8])
        self.answers = answers

    def predict(self, pictures: torch.Tensor) -> torch.Tensor:
        return self.answers


def test_shares_count_what_a_caption_names_and_nothing_else() -> None:
    scenes = [
        Scene("cat", "red", "sea", "day"),
        Scene("cat", "red", "sea", "night", "tree", "green", "left of"),
        Scene("car", "blue", "city", "day", "tree", "pink", "beside"),
    ]
    labels = attribute_labels(scenes)
    assert labels[2, 6] == -100
    pictures = torch.zeros(3, 3, 64, 64, dtype=torch.uint8)
    assert set(shares(Oracle(labels), pictures, scenes).values()) == {1.0}
    answers = labels.clone()
    answers[0, 4:] = 3  # a second object where none was asked for: not counted
    answers[2, 6] = 1  # the side of `beside`: not counted
    answers[0, 0] += 1
    answers[1, 4] += 1
    assert shares(Oracle(answers), pictures, scenes) == {
        "object": 0.6667, "colour": 1.0, "place": 1.0, "time": 1.0, "second": 0.5, "second_colour": 1.0, "relation": 1.0, "mean": 0.881,
    }  # fmt: skip


def test_psnr_is_in_decibels(pipe: PixArtAlphaPipeline) -> None:
    pictures = render_pool(2, 0)[1]
    darker = (pictures.int() - 10).clamp(0).to(torch.uint8)
    assert psnr(pictures, pictures) > 70
    assert psnr(pictures.clamp(10), (pictures.clamp(10).int() - 10).to(torch.uint8)) == pytest.approx(28.13, abs=0.01)
    assert reconstruct(pipe.vae, darker).shape == pictures.shape


# --- going on after an interruption ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "calls"), [*(("step", calls) for calls in (1, 4, 9)), ("write_bytes", 1), ("save_base", 1)])
def test_an_interrupted_run_ends_in_the_same_bits(tiny_run: Path, tmp_path: Path, name: str, calls: int) -> None:
    places = {
        "step": "torch.optim.AdamW.step",
        "write_bytes": "cond_pdiff.training.text_to_image.latents.write_bytes",
        "save_base": "cond_pdiff.training.text_to_image.train.save_base",
    }
    with pytest.MonkeyPatch.context() as patch:
        interrupt_at(patch, places[name], calls)
        with pytest.raises(KeyboardInterrupt):
            train_base(copy.deepcopy(TINY_BASE), tmp_path / "run")
    train_base(copy.deepcopy(TINY_BASE), tmp_path / "run")
    ours, theirs = (
        {path: sha256 for path, sha256 in bits(run).items() if path != "evaluation.json"} for run in (tmp_path / "run", tiny_run)
    )
    assert ours == theirs
    evaluations = [json.loads((run / "evaluation.json").read_text()) for run in (tmp_path / "run", tiny_run)]
    for evaluation in evaluations:
        evaluation.pop("seconds_of_four_pictures")
    assert evaluations[0] == evaluations[1]


# --- refusals ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("stage", "change", "message"),
    [
        ("image_autoencoder", None, "no recipe of a base model: it has no section 'image_autoencoder'"),
        ("transformer", None, "it has no section 'transformer'"),
        ("image_autoencoder", {"scene": 5}, "image_autoencoder: unknown entry 'scene'"),
        ("image_autoencoder", {"model": {"latent_chanels": 4}}, "image_autoencoder, model: .*latent_chanels"),
        ("image_autoencoder", {"model": {"use_quant_conv": False}}, "image_autoencoder, model: use_quant_conv and .* must be true"),
        ("transformer", {"max_length": "32"}, "transformer: max_length must be a valid integer"),
        ("scene_classifier", {"fit": {"stepz": 5}}, "scene_classifier, fit: unknown entry 'stepz'"),
        ("samples", {"step": 5}, "samples: unknown entry 'step'"),
    ],
)
def test_bad_recipes_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], stage: str, change: dict[str, Any] | None, message: str
) -> None:
    recipe = {name: section for name, section in TINY_BASE.items() if name != stage}
    if change is not None:
        recipe[stage] = {**TINY_BASE[stage], **change}
    with pytest.raises(CondPDiffError, match=message):
        train_base(recipe, tmp_path / "run")
    (tmp_path / "recipe.json").write_text(json.dumps(recipe))
    assert main(["train-base", "--recipe", str(tmp_path / "recipe.json"), "--out", str(tmp_path / "run")]) == 1
    assert capsys.readouterr().err.startswith("cond-pdiff: error: ")


def test_a_recipe_of_a_generator_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CondPDiffError, match="this is no recipe of a base model"):
        train_base(read_recipe("minilm-text-tasks"), tmp_path / "run")


def tiny_autoencoder(seed: int) -> AutoencoderKL:
    torch.manual_seed(seed)
    return AutoencoderKL(**TINY_BASE["image_autoencoder"]["model"]).eval()


def test_latents_of_others_and_damaged_ones_are_refused(tmp_path: Path) -> None:
    made = SceneLatents.make(tiny_autoencoder(0), 3, 0, tmp_path)
    assert SceneLatents.make(tiny_autoencoder(0), 3, 0, tmp_path).sha256 == made.sha256
    for seed, count in ((1, 3), (0, 4)):
        with pytest.raises(CondPDiffError, match="holds the latents of another autoencoder or of other scenes"):
            SceneLatents.make(tiny_autoencoder(seed), count, 0, tmp_path)
    path = tmp_path / "part-0000.safetensors"
    path.write_bytes(path.read_bytes()[:-7])
    with pytest.raises(CondPDiffError, match=r"part-0000.safetensors is damaged"):
        SceneLatents.make(tiny_autoencoder(0), 3, 0, tmp_path)


# --- the recipe --------------------------------------------------------------------------------------------------------------


def test_the_recipe_builds_networks_that_train_and_are_small() -> None:
    recipe = read_recipe("pixart-mini")
    assert set(recipe) == {"name", "about", "samples", *STAGES}
    assert parse(SampleConfig, recipe["samples"], "samples").scenes >= 200
    autoencoder = ImageAutoencoderStage(parse(ImageAutoencoderConfig, {**recipe["image_autoencoder"], "scenes": 2}, "image_autoencoder"))
    scenes, pictures = render_pool(2, 0)
    with torch.no_grad():
        latents = autoencoder.autoencoder.encode(pictures / 127.5 - 1).latent_dist.mean
    assert latents.shape == (2, 4, 32, 32)
    transformer = TransformerStage(SceneLatents(scenes, latents, ""), parse(TransformerConfig, recipe["transformer"], "transformer"))
    classifier = SceneClassifierStage(parse(SceneClassifierConfig, {**recipe["scene_classifier"], "scenes": 2}, "scene_classifier"))
    for stage in (autoencoder, transformer, classifier):
        rng = torch.Generator().manual_seed(0)
        batch = stage.draw(2, rng)
        loss = stage.loss(stage.module, batch, rng)
        loss.backward()
        assert torch.isfinite(loss)
        assert stage.describe(batch)
        assert sum(parameter.grad is not None for parameter in stage.module.parameters()) > 0.9 * len(list(stage.module.parameters()))
    vae, text, main_network = (sum(parameter.numel() for parameter in network.parameters())
                               for network in (autoencoder.autoencoder, transformer.text_encoder, transformer.transformer))  # fmt: skip
    assert main_network <= 5e6
    assert 2 * (vae + main_network) + 4 * text < 15e6  # bytes: 16 MB may be bundled


# --- the bundled base --------------------------------------------------------------------------------------------------------


def test_the_bundled_base_is_whole_and_small() -> None:
    folder = bundled(PIXART_MINI.repo_id)
    assert find_backbone(PIXART_MINI, TRANSFORMER_WEIGHTS) == folder
    assert read_recipe("pixart-mini-styles")["collect"]["base"] == PIXART_MINI.to_json()
    sizes = {path: path.stat().st_size for path in folder.rglob("*") if path.is_file()}
    assert {path.suffix for path in sizes} == {".json", ".md", ".safetensors"}
    assert max(sizes.values()) <= 12e6
    assert sum(sizes.values()) <= 16e6
    card = (folder / "README.md").read_text()
    assert not [leftover for leftover in ("$", "None", "nan", "More Information Needed") if leftover in card]
    assert f'bundled("{PIXART_MINI.repo_id}")' in card


def test_the_bundled_base_draws_what_is_asked_for() -> None:
    """Balloons by day and at night: known by how bright the picture is, and by the colours of its middle."""
    prompts = [f"a {colour} balloon in the snow {time}" for colour in ("red", "yellow", "blue") for time in ("by day", "at night")]
    pixels = stack_pictures(make_pictures(load_text_to_image(), prompts, seed=3)).float() / 255
    brightness = pixels.mean((1, 2, 3))
    assert float(brightness[0::2].min()) > float(brightness[1::2].max()) + 0.2
    red, yellow, blue = pixels[0::2, 4:24, 16:48].flatten(1, 2).unbind()
    assert (red[:, 0] > red[:, 1:].amax(1) + 0.35).float().mean() > 0.2
    assert (yellow[:, :2].amin(1) > yellow[:, 2] + 0.35).float().mean() > 0.2
    assert (blue[:, 2] > blue[:, 0] + 0.35).float().mean() > 0.2
    for other in (yellow, blue):
        assert (other[:, 0] > other[:, 1:].amax(1) + 0.35).float().mean() < 0.02


def test_no_steps_are_refused_and_not_taken_for_the_bases_own() -> None:
    with pytest.raises(CondPDiffError, match="num_inference_steps must be"):
        make_pictures(load_text_to_image(), ["a red house"], num_inference_steps=0)
