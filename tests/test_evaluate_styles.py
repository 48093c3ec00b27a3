from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import interrupt_at
from diffusers import PixArtAlphaPipeline
from PIL import Image
from safetensors.torch import load_file

from cond_pdiff.conditions.style_image import StyleImage
from cond_pdiff.errors import CondPDiffError, TaskDataError
from cond_pdiff.text_to_image import make_pictures
from cond_pdiff.training.evaluate.card import write_generator_card
from cond_pdiff.training.evaluate.evaluate import evaluate
from cond_pdiff.training.evaluate.measure import EvaluateConfig
from cond_pdiff.training.evaluate.pictures import colour_texture, colour_texture_distance, features, frechet_distance, kernel_distance
from cond_pdiff.training.evaluate.similarity import ZooSpace
from cond_pdiff.training.evaluate.styles import shown_picture
from cond_pdiff.training.reproduce.continuum import evaluate_continuum, make_continuum
from cond_pdiff.training.stages.train import train
from cond_pdiff.training.tasks.styles import Style
from cond_pdiff.training.zoo.zoo import Zoo, soup

B_KEY = "base_model.model.transformer_blocks.0.attn1.to_q.lora_B.weight"


def test_a_style_generator_is_measured_beside_its_baselines(
    style_generator: Path, style_zoo: Zoo, styles_folder: Path, text_to_image: PixArtAlphaPipeline, tmp_path: Path
) -> None:
    config = EvaluateConfig(samples=3, max_rows=2)
    evaluation = evaluate(style_generator, style_zoo.folder, styles_folder, tmp_path, config)
    assert evaluation is not None
    assert [result["task"] for result in evaluation["tasks"]] == ["embers", "lagoon", "moss"]
    assert (evaluation["zoo"]["styles"], evaluation["unseen"]["styles"]) == (2, 1)
    assert evaluation["zoo"]["routing_samples"] == 10
    assert evaluation["unseen"]["routing"] is None
    embers = evaluation["tasks"][0]
    pixels, captions = Style.load(styles_folder / "embers").pictures("test")
    images = make_pictures(text_to_image, captions, [(style_zoo.runs("embers")[0].adapter(), 1.0)], range(len(captions)))
    made = torch.from_numpy(np.stack([np.asarray(image) for image in images]))
    assert embers["kid"]["trained"] == pytest.approx(kernel_distance(features(made), features(pixels)), rel=1e-2)
    assert embers["frechet"]["trained"] == pytest.approx(frechet_distance(features(made), features(pixels)), rel=1e-2)
    assert embers["look"]["trained"] == pytest.approx(colour_texture_distance(colour_texture(made), colour_texture(pixels)), abs=1e-3)
    assert embers["frechet"]["base"] != embers["frechet"]["trained"]
    assert embers["frechet"]["base_floor"] < embers["frechet"]["base"]
    assert embers["look"]["trained_floor"] > 0  # the other noise is another one
    moss = evaluation["tasks"][2]
    assert moss["frechet"]["trained"] is not None
    assert moss["frechet"]["soup"] is None  # of one run, which would be the same number twice
    assert evaluation["unseen"]["frechet"]["soup"] is None
    gap = evaluation["zoo"]["differences"]["kid"]["retrieval"]
    assert set(evaluation["zoo"]["differences"]["kid"]) == {"base", "trained", "soup", "multitask", "retrieval"}
    seen = evaluation["tasks"][:2]
    assert gap["mean"] == pytest.approx(np.mean([row["kid"]["generated"] - row["kid"]["retrieval"] for row in seen]), abs=1e-4)
    assert gap["interval"][0] <= gap["mean"] <= gap["interval"][1]
    own = [run.adapter() for run in style_zoo.runs("embers")]
    space = ZooSpace(own, ["", ""])
    assert embers["frechet"]["soup"] == pytest.approx(embers["frechet"]["retrieval"]) or embers["retrieved"] != "embers"
    assert embers["between_runs"] == pytest.approx(float((space.distances(own) / space.norms)[[0, 1], [1, 0]].mean()), abs=1e-4)
    with Image.open(tmp_path / "pictures" / "moss.png") as sheet:
        assert sheet.size == (8 + 2 * 104, 8 + 6 * 124 + 20)  # two captions, six rows: no soup
    report = (tmp_path / "evaluation.md").read_text(encoding="utf-8")
    assert "not Inception's" in report
    assert "| 1 unseen styles, kernel distance |" in report
    assert evaluate(style_generator, style_zoo.folder, styles_folder, tmp_path, config) == evaluation
    generator = tmp_path / "generator"
    shutil.copytree(style_generator, generator)
    card = write_generator_card(generator, style_zoo.folder, evaluation, tmp_path / "pictures").read_text(encoding="utf-8")
    assert "![moss](pictures/unseen.png)" in card
    assert (generator / "pictures" / "unseen.png").read_bytes() == (tmp_path / "pictures" / "moss.png").read_bytes()
    assert (generator / "pictures" / "zoo.png").is_file()


def test_a_trained_style_is_asked_for_with_what_was_not_trained_on(styles_folder: Path) -> None:
    style = Style.load(styles_folder / "embers")
    assert shown_picture(style, 0, trained=False).sha256 == style.image.sha256
    held_out = [StyleImage(Image.fromarray(pixels.numpy())).sha256 for pixels in style.pictures("test")[0]]
    assert {shown_picture(style, seed, trained=True).sha256 for seed in range(20)} == set(held_out)


def test_a_part_of_the_styles_is_measured_beside_a_part_of_the_zoo(
    style_generator: Path, style_zoo: Zoo, styles_folder: Path, tmp_path: Path
) -> None:
    part = tmp_path / "zoo"
    shutil.copytree(style_zoo.folder, part)
    facts = json.loads((part / "zoo.json").read_text())
    del facts["tasks"]["lagoon"]
    (part / "zoo.json").write_text(json.dumps(facts))
    config = EvaluateConfig(samples=1, max_rows=2)
    evaluation = evaluate(style_generator, part, styles_folder, tmp_path / "out", config, only=["moss"])
    assert evaluation is not None
    assert [(result["task"], result["retrieved"]) for result in evaluation["tasks"]] == [("moss", "embers")]
    report = (tmp_path / "out" / "evaluation.md").read_text(encoding="utf-8")
    assert "The zoo holds 1 of the 2 styles that the generator was trained on" in report
    with pytest.raises(TaskDataError, match="has no 'lagoon' that could be measured; it has embers, moss"):
        evaluate(style_generator, part, styles_folder, tmp_path / "out", config, only=["lagoon"])
    generator = shutil.copytree(style_generator, tmp_path / "generator")
    with pytest.raises(TaskDataError, match="holds 1 of the 2 tasks"):
        write_generator_card(generator, part, evaluation)


def test_the_kernel_distance_is_unbiased_for_small_paired_sets() -> None:
    rng = torch.Generator().manual_seed(0)

    def paired(shift: float, shared: float) -> float:
        """The mean distance of sets of eight whose rows share a part, as pictures of one caption do."""
        found = []
        for _ in range(2000):
            both, first, second = torch.randn(3, 8, 4, generator=rng, dtype=torch.float64)
            found.append(kernel_distance(shared * both + first, shared * both + second + shift))
        return float(np.mean(found))

    apart = paired(1.0, 0.0)
    # By hand: E k for independent x, y is the mean of (xᵀy / 4 + 1)³ over many pairs.
    one, other, third, fourth = torch.randn(4, 1_000_000, 4, generator=rng, dtype=torch.float64)
    third, fourth = third + 1, fourth + 1
    kernel = [((left * right).sum(1) / 4 + 1).pow(3).mean() for left, right in ((one, other), (third, fourth), (one, third))]
    assert apart == pytest.approx(float(kernel[0] + kernel[1] - 2 * kernel[2]), rel=0.05)
    for shared in (0.0, 1.0):
        assert paired(0.0, shared) == pytest.approx(0, abs=0.06 * (1 + 5 * shared))
    one = torch.randn(8, 4, generator=rng)
    assert kernel_distance(one, one) == pytest.approx(0, abs=1e-5)
    with pytest.raises(CondPDiffError, match="at least two pictures each, got 1 and 1"):
        kernel_distance(one[:1], one[:1])


def test_distances_between_sets_of_pictures() -> None:
    rng = torch.Generator().manual_seed(0)
    first, shift = torch.randn(4000, 3, generator=rng, dtype=torch.float64), torch.tensor([1.0, 0.0, 2.0])
    stretched = torch.randn(4000, 3, generator=rng, dtype=torch.float64) * torch.tensor([2.0, 1.0, 1.0])
    assert frechet_distance(first, first) == pytest.approx(0, abs=1e-6)
    assert frechet_distance(first, first + shift) == pytest.approx(5, abs=1e-6)
    assert frechet_distance(first, stretched) == pytest.approx(1, abs=0.15)  # (2 − 1)² of the deviations
    grey, white = torch.full((2, 8, 8, 3), 128, dtype=torch.uint8), torch.full((2, 8, 8, 3), 255, dtype=torch.uint8)
    assert colour_texture(grey).shape == (15,)
    assert colour_texture_distance(colour_texture(grey), colour_texture(white)) == pytest.approx(127 / 255 * 3**0.5, abs=1e-5)


def test_a_continuum_is_made_learnt_and_recovered(
    style_recipe: dict[str, Any], style_zoo: Zoo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "continuum"
    with pytest.raises(TaskDataError, match="name two trained styles"):
        make_continuum(style_zoo, "embers", "moss", folder)
    with pytest.raises(TaskDataError, match="at least 20 mixtures"):
        make_continuum(style_zoo, "embers", "lagoon", folder, count=3)
    with monkeypatch.context() as patch:
        interrupt_at(patch, "cond_pdiff.training.reproduce.continuum.make_pictures", 3)
        with pytest.raises(KeyboardInterrupt):
            make_continuum(style_zoo, "embers", "lagoon", folder, count=20)
    make_continuum(style_zoo, "embers", "lagoon", folder, count=20)
    made = Zoo(folder / "zoo")
    assert [name.removeprefix("mixture-000") for name in made.task_names] == ["00", "01", "04", "05", "08", "09", "12", "13", "16", "17"]
    ends = [soup([run.adapter() for run in style_zoo.runs(name)]) for name in ("embers", "lagoon")]
    (run,) = made.runs("mixture-00005")
    torch.testing.assert_close(run.adapter().tensors[B_KEY], torch.lerp(ends[0].tensors[B_KEY], ends[1].tensors[B_KEY], 5 / 19))
    with pytest.raises(TaskDataError, match="holds another continuum"):
        make_continuum(style_zoo, "lagoon", "embers", folder, count=20)

    generator = train(copy.deepcopy(style_recipe), folder / "zoo", folder / "styles", tmp_path / "run")
    result = evaluate_continuum(generator, folder, tmp_path / "result")
    assert result["tests"] == 10
    assert json.loads((tmp_path / "result" / "ratios.json").read_text()) == result
    assert result["mean_error"] == pytest.approx(np.mean([abs(true - found) for true, found in result["ratios"]]), abs=1e-3)
    with Image.open(tmp_path / "result" / "continuum.png") as picture:
        assert picture.size[0] > 800
    # A generator that returned what it was asked for would be right.
    test = load_file(folder / "test.safetensors")
    monkeypatch.setattr("cond_pdiff.training.reproduce.continuum._params", lambda pipe, pixels, index: test["params"][index : index + 1])
    perfect = evaluate_continuum(generator, folder, tmp_path / "result")
    assert (perfect["mean_error"], perfect["mean_off_line"]) == (0, 0)
    with pytest.raises(TaskDataError, match="has no test half"):
        evaluate_continuum(generator, tmp_path, tmp_path / "result")
