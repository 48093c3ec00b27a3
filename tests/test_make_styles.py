from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from cond_pdiff.errors import TaskDataError
from cond_pdiff.training.config import CollectConfig, parse
from cond_pdiff.training.tasks.make_styles import draw_scenes, make_styles
from cond_pdiff.training.zoo.collect import collect


@pytest.fixture
def paintings(tmp_path: Path) -> Path:
    """Two pictures: one in blues with stripes, one in reds with dots; and what is known of the first."""
    folder = tmp_path / "paintings"
    folder.mkdir()
    y, x = np.mgrid[:80, :100]
    stripes = np.stack([20 + 0 * x, 60 + 40 * (y // 8 % 2), 150 + 90 * (y // 8 % 2)], -1)
    dots = np.stack([150 + 100 * ((x // 10 + y // 10) % 2), 40 + 0 * x, 30 + 0 * x], -1)
    Image.fromarray(stripes.astype(np.uint8)).save(folder / "stripes.png")
    Image.fromarray(dots.astype(np.uint8)).save(folder / "dots.jpg")
    (folder / "index.json").write_text('{"images": [{"file": "x/stripes.png", "group": "lines", "artist": "nobody", "source": "here"}]}')
    return folder


def test_pictures_become_styles(paintings: Path, tmp_path: Path) -> None:
    dots, stripes = make_styles(paintings, tmp_path / "styles", train=5, test=3)
    assert (stripes.name, stripes.group, stripes.licence) == ("stripes", "lines", "nobody; here")
    assert (dots.group, dots.licence) == ("", "")
    pixels, captions = stripes.pictures("train")
    assert pixels.shape == (5, 64, 64, 3)
    assert dots.pictures("train")[1] == captions
    assert len(dots.pictures("test")[1]) == 3
    reds = dots.pictures("train")[0].float().mean((0, 1, 2))
    blues = pixels.float().mean((0, 1, 2))
    assert reds[0] > reds[2] + 30
    assert blues[2] > blues[0] + 30
    scenes, _ = draw_scenes(5, 0, held_out=False)
    for made, scene in zip(pixels, scenes, strict=True):  # what was there is still there
        grey = np.asarray(scene.resize((64, 64)).convert("L"), float)
        assert np.corrcoef(grey.ravel(), made.float().mean(2).numpy().ravel())[0, 1] > 0.3


def test_made_styles_are_kept_and_other_settings_refused(paintings: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (paintings / "dots.jpg").unlink()
    out = tmp_path / "styles"
    first = make_styles(paintings, out, train=2, test=1)
    with monkeypatch.context() as patch:
        patch.setattr("cond_pdiff.training.tasks.make_styles.stylise", lambda *_: pytest.fail("made again"))
        assert make_styles(paintings, out, train=2, test=1) == first
    with pytest.raises(TaskDataError, match=r"was made with the settings .* choose another folder"):
        make_styles(paintings, out, train=3, test=1)


def test_recoloured_styles_name_their_source_and_stay_out_of_the_zoo_with_it(
    paintings: Path, style_recipe: dict[str, Any], tmp_path: Path
) -> None:
    made = {style.name: style for style in make_styles(paintings, tmp_path / "styles", train=3, test=10, recoloured=2)}
    assert {name: style.source for name, style in made.items()} == {
        "dots": "", "dots_recoloured_1": "dots", "dots_recoloured_2": "dots",
        "stripes": "", "stripes_recoloured_1": "stripes", "stripes_recoloured_2": "stripes",
    }  # fmt: skip
    assert made["stripes_recoloured_1"].group == "lines"
    assert [len(made[name].pictures("test")[1]) for name in ("stripes", "stripes_recoloured_1")] == [10, 8]
    shown = [np.asarray(made[name].image.image, float) for name in ("stripes", "stripes_recoloured_1", "stripes_recoloured_2")]
    for first, second in itertools.combinations(shown, 2):
        assert np.abs(first - second).mean() > 10
    changes = {"tasks": [], "unseen": ["dots"], "runs": 2, "steps": 1, "last_checkpoints": 1, "multitask_steps": 0}
    section = {**style_recipe["collect"], **changes}
    zoo = collect(parse(CollectConfig, section, "collect"), tmp_path / "styles", tmp_path / "zoo")
    assert zoo.task_names == ["stripes", "stripes_recoloured_1", "stripes_recoloured_2"]
    assert zoo.unseen_names == ["dots"]
    assert [zoo.facts["tasks"][name].get("source") for name in zoo.task_names] == [None, "stripes", "stripes"]
    assert [len(zoo.runs(name)) for name in zoo.task_names] == [2, 1, 1]


def test_make_styles_refuses_bad_pictures(paintings: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(TaskDataError, match="no PNG, JPEG or WebP pictures"):
        make_styles(tmp_path / "empty", tmp_path / "styles")
    (paintings / "twice.png").touch()
    (paintings / "twice.webp").touch()
    with pytest.raises(TaskDataError, match=r"twice\.png and .*twice\.webp would both be the style 'twice'"):
        make_styles(paintings, tmp_path / "styles", train=1, test=1)
    (paintings / "twice.png").unlink()
    (paintings / "twice.webp").unlink()
    (paintings / "broken.png").write_bytes(b"no picture")
    with pytest.raises(TaskDataError, match=r"broken\.png"):
        make_styles(paintings, tmp_path / "styles", train=1, test=1)
    assert not (tmp_path / "styles" / "broken").exists()
    (paintings / "index.json").write_text("[]")
    with pytest.raises(TaskDataError, match=r'index\.json: expected \{"images"'):
        make_styles(paintings, tmp_path / "styles", train=1, test=1)
