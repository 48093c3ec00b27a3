"""Condition encoders for style images: the paper's small CNN, trained with the U-Net, or a frozen ImageNet backbone.

Both see the whole picture, at its own aspect ratio, and average over places: a style is everywhere in it, so crops and
resizes of a picture give nearly the same embedding. Several pictures of one style have the mean of their embeddings.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from diffusers.configuration_utils import register_to_config
from PIL import Image
from torch import nn
from transformers import AutoModel

from cond_pdiff.component import ExactComponent, register_component
from cond_pdiff.conditions.style_image import StyleImage
from cond_pdiff.hub import Backbone
from cond_pdiff.locks import load_once
from cond_pdiff.models.condition_encoder import ConditionEncoder, EncoderReport
from cond_pdiff.models.frozen import load_frozen

MAX_ASPECT = 3
"""The largest aspect ratio of a picture that is read whole; of a longer one, the middle is read."""
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class StyleReport(EncoderReport):
    """A report of what an encoder read of a style image.

    Args:
        width: of the picture as it was read, in pixels; of several, of the first in their order.
        height: the same.
        pictures: how many there were.
    """

    condition_kind: ClassVar[type[StyleImage]] = StyleImage

    width: int
    height: int
    pictures: int = 1

    def to_json(self) -> dict[str, int]:
        """Return a JSON-ready description; the number of pictures stands in it where there are several."""
        return {name: value for name, value in super().to_json().items() if name != "pictures" or value > 1}


def style_pixels(style: StyleImage, side: int) -> torch.Tensor:
    """Return the picture with its shorter side at `side` pixels, shape `(3, height, width)`, from 0 to 1."""
    width, height = style.image.size
    crop_width, crop_height = min(width, MAX_ASPECT * height), min(height, MAX_ASPECT * width)
    left, top = (width - crop_width) // 2, (height - crop_height) // 2
    ratio = side / min(crop_width, crop_height)
    size = (max(side, round(crop_width * ratio)), max(side, round(crop_height * ratio)))
    box = (left, top, left + crop_width, top + crop_height)
    pixels = np.asarray(style.image.resize(size, Image.Resampling.BOX if ratio < 1 else Image.Resampling.BICUBIC, box))
    return torch.from_numpy(pixels.copy()).permute(2, 0, 1).float() / 255


def _read_pictures(condition: Any, side: int) -> list[torch.Tensor]:
    """Return the pixels of each picture of a condition (see `style_pixels`)."""
    return [style_pixels(picture, side) for picture in StyleImage.of(condition).pictures]


def _report(pictures: Sequence[torch.Tensor]) -> StyleReport:
    return StyleReport(pictures[0].shape[2], pictures[0].shape[1], len(pictures))


def _mean_direction(embeddings: torch.Tensor, sizes: Sequence[int]) -> torch.Tensor:
    """Return the mean of embeddings, shape `(count, condition_dim)`, each part of these sizes of length one again.

    That is the condition of a mixture as the U-Net sees it in training (`mixing`). A single embedding stays as it is, to the bit.
    """
    if len(embeddings) == 1:
        return embeddings[0]
    return torch.cat([nn.functional.normalize(part, dim=0) for part in embeddings.mean(0).split(list(sizes))])


@register_component
class StyleCnnConditionEncoder(ConditionEncoder):
    """The paper's style encoder: two strided convolutions, a mean over all places, a linear layer; trained with the U-Net.

    Args:
        channels: of the two convolutions.
        condition_dim: length of a condition embedding.
        image_side: shorter side of the picture as it is read, in pixels.
    """

    condition_kind = StyleImage
    is_trained = True

    @register_to_config
    def __init__(self, channels: Sequence[int] = (64, 256), condition_dim: int = 256, image_side: int = 128) -> None:
        super().__init__()
        self.convolutions = nn.Sequential(
            nn.Conv2d(3, channels[0], 7, stride=4, padding=3),
            nn.LeakyReLU(0.2),
            nn.Conv2d(channels[0], channels[1], 5, stride=2, padding=2),
            nn.LeakyReLU(0.2),
        )
        self.project = nn.Linear(channels[1], condition_dim)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """Turn pixels from 0 to 1, shape `(batch, 3, height, width)`, into unit-length embeddings, shape `(batch, condition_dim)`."""
        features = self.convolutions(2 * pixels - 1).mean((2, 3))
        return nn.functional.normalize(self.project(features), dim=1)

    def read(self, condition: Any) -> torch.Tensor:
        """Return the picture as it is read, uint8, shape `(3, height, width)`; square pictures have one shape."""
        return (255 * style_pixels(StyleImage.of(condition), self.config.image_side)).round().to(torch.uint8)

    @torch.no_grad()
    def encode(self, conditions: Sequence[Any]) -> tuple[torch.Tensor, Sequence[EncoderReport]]:
        """Return condition embeddings, shape `(len(conditions), condition_dim)`, and a report for each.

        Raises:
            ConditionError: not a style image.
        """
        shown = [_read_pictures(condition, self.config.image_side) for condition in conditions]
        rows = [[self(picture[None].to(self.device, self.dtype)) for picture in pictures] for pictures in shown]
        means = [_mean_direction(torch.cat(own), [self.config.condition_dim]) for own in rows]
        return torch.stack(means), [_report(pictures) for pictures in shown]


@register_component
class BackboneStyleConditionEncoder(ExactComponent, ConditionEncoder):  # type: ignore[misc]  # as in `Component`
    """An encoder of channel means and standard deviations of a frozen image backbone's feature maps: what style transfer calls a style.

    The embedding is one unit vector a stage, each with the training pictures' mean taken away.

    Args:
        backbone: reference of a convolutional transformers model (ResNet, ConvNext) with `config.json` and `model.safetensors`.
        stages: which of its stages are read, from 1.
        channels: of those stages' feature maps.
        image_side: shorter side of the picture as it is read, in pixels.
    """

    condition_kind = StyleImage
    center: torch.Tensor

    @register_to_config
    def __init__(
        self,
        backbone: Mapping[str, Any] = Backbone("microsoft/resnet-18").to_json(),
        stages: Sequence[int] = (1, 2, 3),
        channels: Sequence[int] = (64, 128, 256),
        image_side: int = 224,
    ) -> None:
        super().__init__()
        self.register_buffer("center", torch.zeros(2 * sum(channels)))
        # Kept out of the module tree: a frozen backbone is neither saved nor counted, and is loaded on first use.
        self._loaded: list[Any] = []

    @property
    def condition_dim(self) -> int:
        """The length of a condition embedding."""
        return 2 * sum(self.config.channels)

    @property
    def index_options(self) -> Mapping[str, Any]:  # type: ignore[override]  # a constant of most encoders
        """The arguments of `ConditionIndex` that say how it compares the encoder's embeddings."""
        return {"num_parts": len(self.config.stages)}

    @property
    def backbone(self) -> Any:
        """The frozen backbone, on this module's device; `HubError` if it cannot be loaded."""
        return load_once(self._loaded, lambda: load_frozen(Backbone.from_json(self.config.backbone), AutoModel)[0]).to(self.center.device)

    def encode(self, conditions: Sequence[Any]) -> tuple[torch.Tensor, Sequence[EncoderReport]]:
        """Return condition embeddings, shape `(len(conditions), condition_dim)`, and a report for each.

        Raises:
            ConditionError: not a style image.
        """
        shown = [_read_pictures(condition, self.config.image_side) for condition in conditions]
        centered = self._statistics([picture for pictures in shown for picture in pictures]) - self.center.float()
        sizes = [2 * count for count in self.config.channels]
        parts = torch.cat([nn.functional.normalize(part, dim=1) for part in centered.split(sizes, dim=1)], 1)
        means = [_mean_direction(own, sizes) for own in parts.split(list(map(len, shown)))]
        return torch.stack(means).to(self.center.dtype), [_report(pictures) for pictures in shown]

    @torch.no_grad()
    def fit_center(self, conditions: Sequence[Any]) -> None:
        """Measure the mean statistics over training pictures."""
        self.center.copy_(
            self._statistics([style_pixels(StyleImage.of(condition), self.config.image_side) for condition in conditions]).mean(0)
        )

    @torch.no_grad()
    def _statistics(self, pictures: Sequence[torch.Tensor]) -> torch.Tensor:
        """Return the unit-length (means, standard deviations) of each stage side by side, shape `(len(pictures), condition_dim)`."""
        mean, std = (torch.tensor(values)[:, None, None] for values in (IMAGENET_MEAN, IMAGENET_STD))
        rows = []
        for picture in pictures:
            hidden = self.backbone(((picture - mean) / std)[None].to(self.center.device), output_hidden_states=True).hidden_states
            maps = [hidden[stage] for stage in self.config.stages]
            rows.append(torch.cat([nn.functional.normalize(torch.cat([m.mean((2, 3)), m.std((2, 3))], 1), dim=1) for m in maps], 1))
        return torch.cat(rows).float()
