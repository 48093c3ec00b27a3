from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import ResNetConfig, ResNetModel

from cond_pdiff import BackboneStyleConditionEncoder, StyleCnnConditionEncoder
from cond_pdiff.conditions.style_image import StyleImage
from cond_pdiff.errors import ConditionError, HubError
from cond_pdiff.hub import Backbone
from cond_pdiff.models.style_encoders import style_pixels

Encoder = StyleCnnConditionEncoder | BackboneStyleConditionEncoder


def texture(seed: int, size: tuple[int, int] = (300, 240)) -> Image.Image:
    """Stripes of a seeded direction, width and colours: a style without a subject."""
    rng = np.random.default_rng(seed)
    x, y = np.meshgrid(np.arange(size[0]), np.arange(size[1]))
    angle, width = rng.uniform(0, np.pi), rng.uniform(6, 20)
    mix = (0.5 + 0.5 * np.sin((x * np.cos(angle) + y * np.sin(angle)) / width))[..., None]
    return Image.fromarray((mix * rng.integers(0, 255, 3) + (1 - mix) * rng.integers(0, 255, 3)).astype(np.uint8))


@pytest.fixture(scope="module")
def resnet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny ResNet with random weights."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("resnet")
    config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 12, 16, 20], depths=[1, 1, 1, 1], layer_type="basic")
    ResNetModel(config).save_pretrained(folder)
    return folder


@pytest.fixture(params=["cnn", "backbone"])
def encoder(request: pytest.FixtureRequest, resnet: Path) -> Encoder:
    if request.param == "cnn":
        torch.manual_seed(0)
        return StyleCnnConditionEncoder(condition_dim=24, image_side=64).eval()
    made = BackboneStyleConditionEncoder(Backbone(str(resnet)).to_json(), (1, 2, 3), (8, 12, 16), 64)
    made.fit_center([texture(seed) for seed in range(20)])
    return made


def test_embeddings_are_unit_vectors_and_a_batch_equals_single_calls(encoder: Encoder) -> None:
    pictures = [texture(0), texture(1, (80, 200)), StyleImage(texture(2))]
    together, reports = encoder.encode(pictures)
    assert together.shape == (3, encoder.condition_dim)
    parts = 3 if isinstance(encoder, BackboneStyleConditionEncoder) else 1
    assert together.norm(dim=1).tolist() == pytest.approx([parts**0.5] * 3, rel=1e-4)
    assert torch.equal(together, torch.cat([encoder.encode([picture])[0] for picture in pictures]))
    assert [(report.width, report.height) for report in reports] == [(80, 64), (64, 160), (80, 64)]


def test_crops_and_resizes_are_nearer_than_other_pictures(encoder: Encoder) -> None:
    pictures = [texture(seed) for seed in range(8)]
    variants = [[picture, picture.crop((30, 20, 270, 220)), picture.resize((150, 120)), picture.resize((600, 480))] for picture in pictures]
    rows = torch.stack([encoder.encode(group)[0] for group in variants])
    rows = rows - rows.mean((0, 1))  # what all pictures share tells none of them apart
    same = (rows - rows.mean(1, keepdim=True)).square().sum(2).mean()
    other = (rows.mean(1) - rows.mean((0, 1))).square().sum(1).mean()
    assert same < 0.2 * other


def test_saved_and_loaded_it_gives_the_same(encoder: Encoder, tmp_path: Path) -> None:
    encoder.save_pretrained(tmp_path)
    back = type(encoder).from_pretrained(tmp_path)
    torch.testing.assert_close(back.encode([texture(3)])[0], encoder.encode([texture(3)])[0], rtol=0, atol=1e-6)
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) < 2_000_000


def test_other_conditions_are_refused(encoder: Encoder) -> None:
    with pytest.raises(ConditionError, match="there is no image file"):
        encoder.encode(["a task description"])


def test_the_papers_cnn_has_its_shape() -> None:
    encoder = StyleCnnConditionEncoder()
    first, second = encoder.convolutions[0], encoder.convolutions[2]
    assert (first.in_channels, first.out_channels, first.kernel_size, first.stride) == (3, 64, (7, 7), (4, 4))
    assert (second.in_channels, second.out_channels, second.kernel_size, second.stride) == (64, 256, (5, 5), (2, 2))
    pixels = torch.rand(2, 3, 40, 64, requires_grad=True)
    encoder(pixels).sum().backward()
    assert pixels.grad is not None
    assert all(parameter.grad is not None for parameter in encoder.parameters())


def test_very_long_pictures_are_read_in_the_middle() -> None:
    wide = Image.new("RGB", (500, 40), "black")
    wide.paste("white", (185, 0, 315, 40))
    pixels = style_pixels(StyleImage(wide), 64)
    assert pixels.shape == (3, 64, 192)
    assert float(pixels.min()) == 1.0


def test_a_missing_backbone_is_named(tmp_path: Path) -> None:
    with pytest.raises(HubError, match=r"no model.safetensors"):
        BackboneStyleConditionEncoder(Backbone(str(tmp_path)).to_json()).encode([texture(0)])
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(HubError, match="cannot be loaded as"):
        BackboneStyleConditionEncoder(Backbone(str(tmp_path)).to_json()).encode([texture(0)])


def test_several_pictures_have_the_mean_of_their_embeddings_in_any_order(encoder: Encoder) -> None:
    encoder.fit_center([texture(seed) for seed in range(4)])
    images = [texture(seed) for seed in range(3)]
    alone, _ = encoder.encode(images)
    (pooled, one), (report, single) = encoder.encode([images, images[:1]])
    assert torch.equal(one, alone[0])  # to the bit
    assert torch.equal(pooled, encoder.encode([list(reversed(images))])[0][0])
    sizes = [2 * count for count in encoder.config.channels] if isinstance(encoder, BackboneStyleConditionEncoder) else [len(pooled)]
    expected = [torch.nn.functional.normalize(part, dim=0) for part in alone.mean(0).split(sizes)]
    torch.testing.assert_close(pooled, torch.cat(expected), rtol=0, atol=1e-6)
    assert (report.to_json()["pictures"], "pictures" in single.to_json()) == (3, False)
    with pytest.raises(ConditionError, match="style image 2 of 2: there is no image file"):
        encoder.encode([[images[0], "gone.png"]])
