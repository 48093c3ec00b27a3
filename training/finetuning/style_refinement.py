"""Refinement of styles: a few training steps from a generated adapter, on the pictures that were shown for it."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn

from cond_pdiff.adapter import LoraAdapter
from cond_pdiff.attach import attached_to_groups
from cond_pdiff.base_state import check_trainable
from cond_pdiff.conditions.style_image import StyleImage
from cond_pdiff.defaults import MAX_REFINE_STEPS, REFINE_BATCH, STYLE_REFINE_RATE
from cond_pdiff.errors import CondPDiffError
from cond_pdiff.locks import lock_of
from cond_pdiff.lora import adapted_module
from cond_pdiff.sampling import check_count
from cond_pdiff.training.config import CollectConfig
from cond_pdiff.training.finetuning.style_fine_tuning import StyleFineTuning
from cond_pdiff.training.tasks.styles import Style
from cond_pdiff.training.zoo.collect import one_of, optimise

NEUTRAL_CAPTION = ""
"""The caption of pictures that were given without: the empty one, with which text-to-image models learn what all pictures share."""


@dataclass(frozen=True)
class ShownStyle(Style):
    """A style that is known by the pictures alone that somebody shows.

    Args:
        pixels: uint8 of shape `(count, side, side, 3)`.
        captions: one each.
    """

    pixels: torch.Tensor = dataclasses.field(default_factory=lambda: torch.empty(0))
    captions: tuple[str, ...] = ()

    @classmethod
    def of(cls, condition: StyleImage, side: int) -> ShownStyle:
        """Cut the largest square out of the middle of each picture, at this side in pixels."""
        shown = condition.pictures
        pixels = torch.stack([_square(picture.image, side) for picture in shown])
        captions = tuple(picture.caption or NEUTRAL_CAPTION for picture in shown)
        return cls("the pictures shown", Path(condition.sha256), pixels=pixels, captions=captions)

    def pictures(self, split: str) -> tuple[torch.Tensor, list[str]]:
        """Return all pictures, whatever the split."""
        return self.pixels, list(self.captions)


def refine_style(
    base: Any, adapter: LoraAdapter, condition: Any, steps: int, seed: int = 0, learning_rate: float = STYLE_REFINE_RATE
) -> LoraAdapter:
    """Go on from an adapter with a few optimiser steps on pictures of a style, by the loss that styles of a zoo are trained with.

    `lora_A` stays as it is, as in a zoo.

    Args:
        base: the adapter's text-to-image pipeline, which nobody else uses meanwhile.
        adapter: the start.
        condition: a `StyleImage`, or what `StyleImage.of` reads. Without captions, the empty one is trained on, which is worse.
        steps: of AdamW.
        seed: of pictures, noises and times.
        learning_rate: rises in the first tenth of the steps and falls by a cosine.

    Returns:
        The refined adapter; its metadata say `refined`, with the number of pictures and the captions.

    Raises:
        AdapterError: the base is another, or cannot be trained on (see `check_trainable`).
        ConditionError: the pictures cannot be used.
        CondPDiffError: `steps` is no number from 1 to `MAX_REFINE_STEPS`.
    """
    check_count("steps", steps, MAX_REFINE_STEPS)
    shown, model = StyleImage.of(condition), adapted_module(base)
    shown.refined_on()
    check_trainable(model, adapter.spec)
    adapter.check_base(base)
    config = CollectConfig(
        family="text-to-image", batch_size=REFINE_BATCH, max_length=adapter.metadata.get("max_length", 32), steps=steps, subset=1.0
    )
    with torch.inference_mode(False), torch.enable_grad():
        style = ShownStyle.of(shown, side_of(base))
        device = next(model.parameters()).device
        stacked = {key: tensor.to(device, torch.float32, copy=True)[None] for key, tensor in adapter.tensors.items()}
        moving = {key: tensor.requires_grad_() for key, tensor in stacked.items() if ".lora_B." in key}
        fine_tuning: Any = StyleFineTuning(config, base)
        with frozen(model), attached_to_groups(model, adapter.spec, stacked):
            optimise(fine_tuning, config, list(moving.values()), one_of(fine_tuning, [style], seed), steps, learning_rate)
    done = {key: tensor.detach()[0].to(adapter.tensors[key]) for key, tensor in moving.items()}
    captions = [picture.caption for picture in shown.pictures if picture.caption]
    facts = {"steps": steps, "learning_rate": learning_rate, "seed": seed, "pictures": len(shown.pictures), "captions": captions}
    return dataclasses.replace(adapter, tensors={**adapter.tensors, **done}, metadata={**adapter.metadata, "refined": facts})


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Let no gradients be taken of a model's own parameters inside the block; the thread has the model to itself."""
    with lock_of(model):
        trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
        model.requires_grad_(False)
        try:
            yield
        finally:
            for parameter in trainable:
                parameter.requires_grad_(True)


def side_of(base: Any) -> int:
    """Return the side in pixels of the pictures that a text-to-image pipeline makes; `CondPDiffError` where it does not say."""
    latents = adapted_module(base).config.get("sample_size") or getattr(base, "default_sample_size", None)  # type: ignore[union-attr, operator]
    if not isinstance(latents, int):
        raise CondPDiffError(f"a {type(base).__name__} does not say how large its pictures are, so none can be cut for training steps")
    return int(latents * base.vae_scale_factor)


def _square(image: Image.Image, side: int) -> torch.Tensor:
    shorter = min(image.size)
    left, top = (image.width - shorter) // 2, (image.height - shorter) // 2
    cut = image.resize((side, side), Image.Resampling.LANCZOS, (left, top, left + shorter, top + shorter))
    return torch.from_numpy(np.asarray(cut).copy())
