"""The classifier that the evaluation asks what a picture shows. It learns from rendered scenes only, never from generated pictures."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from itertools import pairwise
from typing import Any

import torch
from torch import nn

from cond_pdiff.training.config import recorded
from cond_pdiff.training.text_to_image.config import SceneClassifierConfig
from cond_pdiff.training.text_to_image.pictures import render_pool, to_input
from cond_pdiff.training.text_to_image.scenes import ATTRIBUTES, COLOURS, OBJECTS, PLACES, TIMES, Scene

NONE, UNKNOWN = "none", -100
SIDES = ("left of", "right of", "in front of")
CLASSES: dict[str, tuple[str, ...]] = {
    "object": tuple(OBJECTS),
    "colour": tuple(COLOURS),
    "place": tuple(PLACES),
    "time": tuple(TIMES),
    "second": (NONE, *OBJECTS),
    "second_colour": (NONE, *COLOURS),
    "relation": (NONE, *SIDES),
}
"""The values of each attribute. `beside` is no class: it is said of pictures with the main object on either side."""


def attribute_labels(scenes: Sequence[Scene]) -> torch.Tensor:
    """Return class indices, shape `(num_scenes, num_attributes)`; `UNKNOWN` where the scene does not determine the picture (`beside`)."""
    rows = [[_label(name, getattr(scene, name)) for name in ATTRIBUTES] for scene in scenes]
    return torch.tensor(rows)


def _label(attribute: str, value: str | None) -> int:
    return UNKNOWN if value == "beside" else CLASSES[attribute].index(value or NONE)


class SceneClassifier(nn.Module):
    """A small convolutional network with one answer an attribute.

    Args:
        channels: of the stages, each of which halves the picture.
    """

    def __init__(self, channels: Sequence[int]) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for before, after in pairwise((3, *channels)):
            for inner, stride in ((before, 2), (after, 1)):
                layers += [nn.Conv2d(inner, after, 3, stride, 1), nn.GroupNorm(8, after), nn.SiLU()]
        self.features = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(4), nn.Flatten())
        self.heads = nn.ModuleList(nn.Linear(16 * channels[-1], len(classes)) for classes in CLASSES.values())

    def forward(self, pictures: torch.Tensor) -> list[torch.Tensor]:
        """Return the logits of each attribute, for pictures from -1 to 1."""
        features = self.features(pictures)
        return [head(features) for head in self.heads]

    @torch.no_grad()
    def predict(self, pictures: torch.Tensor) -> torch.Tensor:
        """Predict class indices, shape `(num_pictures, num_attributes)`, for uint8 pictures of shape `(num_pictures, 3, 64, 64)`."""
        parts = [self(to_input(part)) for part in pictures.split(64)]
        return torch.cat([torch.stack([logits.argmax(1) for logits in part], 1) for part in parts])


class SceneClassifierStage:
    """The stage (see `cond_pdiff.training.stages.loop`) that trains the classifier on rendered scenes."""

    name = "scene_classifier"
    at_once = None

    def __init__(self, config: SceneClassifierConfig) -> None:
        self.config = config
        torch.manual_seed(config.fit.seed)
        self.classifier = SceneClassifier(config.channels)
        self.module: nn.Module = self.classifier
        self.identity: dict[str, Any] = {"config": recorded(config)}

    @cached_property
    def data(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Pictures and labels of training scenes, rendered when they are first needed."""
        scenes, pictures = render_pool(self.config.scenes, self.config.fit.seed)
        return pictures, attribute_labels(scenes)

    def draw(self, batch_size: int, rng: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        """Draw pictures, a little noisy, moved and sometimes softened, with their labels."""
        pictures, labels = self.data
        picks = torch.randint(len(pictures), (batch_size,), generator=rng)
        inputs = to_input(pictures[picks])
        soft = nn.functional.avg_pool2d(nn.functional.pad(inputs, (1, 1, 1, 1), mode="replicate"), 3, 1)
        inputs = torch.lerp(inputs, soft, torch.rand(batch_size, 1, 1, 1, generator=rng) * 0.8)
        shift = torch.randint(-2, 3, (2,), generator=rng).tolist()
        grain = 0.08 * torch.rand(batch_size, 1, 1, 1, generator=rng) * torch.randn(inputs.shape, generator=rng)
        return inputs.roll(shift, (2, 3)) + grain, labels[picks]

    def loss(self, module: nn.Module, batch: tuple[torch.Tensor, torch.Tensor], rng: torch.Generator) -> torch.Tensor:
        """Return the sum of the attributes' cross entropies."""
        device = next(module.parameters()).device
        inputs, labels = batch[0].to(device), batch[1].to(device)
        answers = zip(module(inputs), labels.unbind(1), strict=True)
        return torch.stack([nn.functional.cross_entropy(logits, right, ignore_index=UNKNOWN) for logits, right in answers]).sum()

    def describe(self, batch: tuple[torch.Tensor, torch.Tensor]) -> str:
        """Say how many scenes there are."""
        return f"{len(batch[0])} rendered scenes"
