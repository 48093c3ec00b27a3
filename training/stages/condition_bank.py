"""ConditionBank: many ways to ask for each task of a zoo, as the U-Net is trained on them."""

from __future__ import annotations

import hashlib
import io
import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from cond_pdiff.conditioning import SMALLEST_CROP, StyleImage, TaskPrompt, square_crop
from cond_pdiff.errors import TrainingError
from cond_pdiff.models.condition_encoders import ClipConditionEncoder, SentenceConditionEncoder
from cond_pdiff.models.style_encoders import BackboneStyleConditionEncoder, StyleCnnConditionEncoder, style_pixels
from cond_pdiff.pipelines.pipeline_cond_pdiff import ConditionEncoder
from cond_pdiff.training.config import UNetConfig, build_typed
from cond_pdiff.training.processes import from_main, processes, take_from_main
from cond_pdiff.training.tasks.styles import Style
from cond_pdiff.training.tasks.tasks import Task
from cond_pdiff.training.zoo.disk_array import DiskArray

CONDITION_ENCODERS = {
    encoder.__name__: encoder
    for encoder in (SentenceConditionEncoder, ClipConditionEncoder, StyleCnnConditionEncoder, BackboneStyleConditionEncoder)
}
EXAMPLE_COUNTS = (0, 2, 4, 8, 16)
WORD_DROPOUT = 0.15
BANK_FILE = "conditions.safetensors"
PREVIEW_SIDE, PREVIEW_QUALITY = 48, 80
"""Of the small WebP picture of each style that goes with a generator: about 700 bytes."""


@dataclass(frozen=True)
class ConditionBank:
    """Variants of every task's condition, ready for the network.

    Args:
        encoder: the condition encoder.
        names: the tasks.
        facts: of each task, for the generator's index.
        inputs: embeddings, shape `(num_tasks, variants, condition_dim)`; for an encoder that is trained with the U-Net its
            inputs, shape `(num_tasks, variants, 3, side, side)`, uint8, on disk.
        previews: of styles, one scene in each, as a WebP file.
        sha256: of all prompts or pictures that the inputs are made of.
    """

    encoder: ConditionEncoder
    names: list[str]
    facts: dict[str, dict[str, Any]]
    inputs: torch.Tensor | DiskArray
    previews: list[bytes]
    sha256: str

    @property
    def trained_encoder(self) -> StyleCnnConditionEncoder | None:
        """The encoder, if it is to be trained with the U-Net."""
        return self.encoder if isinstance(self.encoder, StyleCnnConditionEncoder) else None

    @torch.no_grad()
    def embeddings(self) -> torch.Tensor:
        """Embeddings of all variants, shape `(num_tasks, variants, condition_dim)`, by the encoder as it is now."""
        if self.trained_encoder is None:
            assert isinstance(self.inputs, torch.Tensor)  # only pictures are kept on disk
            return self.inputs
        device = self.encoder.device
        return torch.stack([self.trained_encoder(self.inputs[task].to(device).float() / 255).cpu() for task in range(len(self.inputs))])

    @classmethod
    def build(cls, tasks: Sequence[Task] | Sequence[Style], config: UNetConfig, folder: Path) -> ConditionBank:
        """Make the variants of all tasks; `TrainingError` if the encoder does not fit the kind of task.

        Args:
            folder: gets the inputs of an encoder that is trained, which may be more than fit into memory.
        """
        torch.manual_seed(config.fit.seed)
        encoder: Any = build_typed(CONDITION_ENCODERS, "unet, condition_encoder", config.condition_encoder)
        styles = [task for task in tasks if isinstance(task, Style)]
        texts = [task for task in tasks if isinstance(task, Task)]
        if bool(styles) != (encoder.condition_type is StyleImage):
            kind = "styles" if styles else "text tasks"
            raise TrainingError(f"unet, condition_encoder: a {type(encoder).__name__} cannot read the conditions of {kind}")
        count = config.variants_per_task
        if styles:
            facts: dict[str, dict[str, Any]] = {style.name: {"group": style.group} for style in styles}
            previews = [_preview(style) for style in styles]
        else:
            facts = {task.name: {"description": task.description, "labels": list(task.labels), "group": task.group} for task in texts}
            previews = []

        def variants(task: Any, count: int = count) -> Sequence[Any]:
            return style_variants(task, count) if styles else [prompt_variant(task, index) for index in range(count)]

        names, digest = [task.name for task in tasks], hashlib.sha256()

        # One task at a time, and pictures as small as the encoder reads them: all variants of some hundred styles at once, as they
        # were cut, do not fit into memory.
        def made() -> Iterator[torch.Tensor]:
            for task in tasks:
                shown = variants(task)
                digest.update(json.dumps([task.name, [variant.to_json() for variant in shown]], sort_keys=True).encode())
                if isinstance(encoder, StyleCnnConditionEncoder):
                    pixels = torch.stack([style_pixels(variant, encoder.config.image_side) for variant in shown])
                    yield (255 * pixels).round().to(torch.uint8)
                else:
                    yield encoder.encode(shown)[0]

        if isinstance(encoder, StyleCnnConditionEncoder):
            inputs: torch.Tensor | DiskArray = _on_disk(folder / BANK_FILE, made(), len(tasks))
        else:
            if isinstance(encoder, (SentenceConditionEncoder, BackboneStyleConditionEncoder)):
                encoder.fit_center([variants(task, 1)[0] for task in tasks])
            take_from_main(encoder)
            inputs = from_main(torch.stack(list(made())))
        return cls(encoder, names, facts, inputs, previews, digest.hexdigest())


def _on_disk(path: Path, rows: Iterator[torch.Tensor], count: int) -> DiskArray:
    """Rows that all processes make, which the main one writes, and all read."""
    if processes().is_main_process:
        DiskArray.write(path, rows, count)
    else:
        for _ in rows:
            pass
    processes().wait_for_everyone()
    return DiskArray(path)


def _preview(style: Style) -> bytes:
    """The first scene in the style, small."""
    scene, file = Image.fromarray(style.pictures("train")[0][0].numpy()), io.BytesIO()
    scene.resize((PREVIEW_SIDE, PREVIEW_SIDE), Image.Resampling.BOX).save(file, "WEBP", quality=PREVIEW_QUALITY)
    return file.getvalue()


def prompt_variant(task: Task, index: int) -> TaskPrompt:
    """The index-th way to ask for a task: the full prompt, then with other examples, fewer parts, and words left out.

    People word a task in their own way and give what they have; a generator that has only seen one wording takes everything
    else for another task.
    """
    if index == 0:
        return task.prompt("variant/0", EXAMPLE_COUNTS[-1])
    rng = random.Random(f"{task.name}/variant/{index}")
    prompt = task.prompt(f"variant/{index}", rng.choice(EXAMPLE_COUNTS))
    words = prompt.description.split()
    kept = [word for word in words if rng.random() >= WORD_DROPOUT] or words
    description = " ".join(words if index % 3 == 0 else kept)
    if not prompt.examples and rng.random() < 0.5:
        return TaskPrompt(description)
    return TaskPrompt(description, prompt.examples, prompt.labels)


def style_variants(style: Style, count: int, split: str = "train") -> list[StyleImage]:
    """Ways to show a style: square crops of the style picture, and every second time of a picture made in it.

    Args:
        split: of the pictures made in the style.
    """
    shown = style.image.image
    pixels, _ = style.pictures(split)
    variants = []
    for index in range(count):
        rng = random.Random(f"{style.name}/variant/{split}/{index}")
        image = shown if index % 2 == 0 else Image.fromarray(pixels[rng.randrange(len(pixels))].numpy())
        variants.append(StyleImage(square_crop(image, 1.0 if index == 0 else rng.uniform(SMALLEST_CROP, 1.0), rng)))
    return variants
