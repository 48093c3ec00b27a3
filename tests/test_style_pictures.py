"""Several pictures of one style as the condition of a generator: the pipeline, the command line, batches, and `verify`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TINTS, quiet, refused, same, seeds, told
from PIL import Image

from cond_pdiff import CondPDiffPipeline, LoraAdapter, StyleImage
from cond_pdiff.conditions.style_image import STYLE_VIEWS
from cond_pdiff.errors import ConditionError
from cond_pdiff.verify import verify


@pytest.fixture
def pipe(style_generator: Path) -> CondPDiffPipeline:
    return quiet(CondPDiffPipeline.from_pretrained(style_generator))


@pytest.fixture
def paths(tmp_path: Path) -> list[Path]:
    found = []
    for name, tint in TINTS.items():
        found.append(tmp_path / f"{name}.png")
        Image.linear_gradient("L").resize((90, 60)).convert("RGB").point(lambda value: value // 2 + 40).save(found[-1])
        with Image.open(found[-1]) as shown:
            Image.blend(shown, Image.new("RGB", shown.size, tint), 0.5).save(found[-1])
    return found


@pytest.mark.parametrize("threshold", [-1.0, 2.0], ids=["in distribution", "unseen"])
def test_pictures_give_one_adapter_whatever_their_order(pipe: CondPDiffPipeline, paths: list[Path], threshold: float) -> None:
    pipe.condition_index.threshold.fill_(threshold)
    one, other = pipe(paths, generator=seeds(3)), pipe(image=tuple(reversed(paths)), generator=seeds(3))
    assert same(one.adapter, other.adapter)
    assert one.adapter.metadata["condition"] == StyleImage.of(paths).to_json() == other.adapter.metadata["condition"]
    assert one.report.to_json()["condition"]["pictures"] == 3
    for alone in (paths[0], paths[1]):
        single = pipe(alone, generator=seeds(3)).adapter
        assert same(single, pipe([alone], generator=seeds(3)).adapter)
        assert not same(single, one.adapter)
        assert not same(pipe(paths[:2], generator=seeds(3)).adapter, one.adapter)


def test_unseen_pictures_are_all_looked_at_in_views(pipe: CondPDiffPipeline, paths: list[Path]) -> None:
    pipe.condition_index.threshold.fill_(2.0)
    embeddings, _ = pipe.encode_condition(StyleImage.of(paths), 2)
    assert len(embeddings) == 2 * (1 + len(StyleImage.of(paths).views()))
    assert len(embeddings) > 2 * STYLE_VIEWS
    alone, _ = pipe.condition_encoder.encode(paths)
    assert all(any(torch.equal(row, shown) for row in embeddings) for shown in alone)


def test_other_lists_are_refused(pipe: CondPDiffPipeline, paths: list[Path]) -> None:
    paths[1].write_bytes(b"no picture")
    for condition, message in (
        (paths, r"style image 2 of 3: 'lagoon\.png' is not an image"),
        ([], "give 1 to 64 style images, got 0"),
        ([paths[0], "a description"], "style image 2 of 2: there is no image file"),
        ([paths[0], [0.5, 0.5]], "style image 2 of 2: a list in a list"),
    ):
        with pytest.raises(ConditionError, match=message):
            pipe(condition)


def test_adapters_of_several_pictures_are_saved_and_verified(pipe: CondPDiffPipeline, paths: list[Path], tmp_path: Path) -> None:
    folder = pipe(paths, generator=seeds(3)).save_adapter(tmp_path / "adapter")
    adapter = LoraAdapter.load(folder)
    assert "from 3 pictures of one style" in (folder / "README.md").read_text()
    assert verify(adapter, pipe._card_folder, list(reversed(paths))).same
    with pytest.raises(ConditionError, match="give all files"):
        verify(adapter, pipe._card_folder, paths[0])


def test_the_command_line_takes_the_option_again(run: Any, style_generator: Path, paths: list[Path], tmp_path: Path) -> None:
    images = [part for path in reversed(paths) for part in ("--image", path)]
    out = ["--out", tmp_path / "adapter", "--generator", style_generator]
    facts = told(run("generate", *images, *out, "--seed", 3, "--json"))
    assert facts["report"]["condition"]["pictures"] == 3
    expected = quiet(CondPDiffPipeline.from_pretrained(style_generator))(paths, generator=seeds(3)).adapter
    assert same(LoraAdapter.load(tmp_path / "adapter"), expected)
    assert told(run("verify", tmp_path / "adapter", "--generator", style_generator, *images, "--json"))["same"]
    refused(run("generate", *images, "--image", tmp_path / "gone.png", *out, "--force"), "style image 4 of 4: there is no image file")
    refused(run("generate", "Is it kind?", *images, *out, "--force"), "not both")


def test_a_batch_takes_lists_of_pictures(run: Any, style_generator: Path, paths: list[Path], tmp_path: Path) -> None:
    names = [path.name for path in paths]
    lines = [{"id": "all", "image": names}, {"id": "turned", "image": names[::-1]}, {"id": "one", "image": names[:1]},
             {"id": "plain", "image": names[0]}, {"id": "none", "image": []}, {"id": "gone", "image": [*names, "gone.png"]}]  # fmt: skip
    (tmp_path / "requests.jsonl").write_text("\n".join(map(json.dumps, lines)))
    out = tmp_path / "out"
    facts = told(run("generate", "--batch", tmp_path / "requests.jsonl", "--out", out, "--generator", style_generator, "--json"))
    assert (facts["adapters"], sorted(facts["skipped"])) == (4, ["5", "6"])
    assert "style image 4 of 4: there is no image file" in facts["skipped"]["6"]
    made = {name: LoraAdapter.load(out / name) for name in ("all", "turned", "one", "plain")}
    assert same(made["all"], made["turned"])
    assert same(made["one"], made["plain"])
    assert not same(made["all"], made["one"])
    assert made["one"].metadata == made["plain"].metadata
