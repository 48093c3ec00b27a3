"""ConditionBank: many conditions of each task of a zoo, as the U-Net is trained on them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from cond_pdiff.errors import TrainingError
from cond_pdiff.models.condition_encoder import ConditionEncoder, condition_encoders
from cond_pdiff.training.config import UNetConfig, build_typed
from cond_pdiff.training.processes import from_main, processes, take_from_main
from cond_pdiff.training.tasks.task import ZooTask
from cond_pdiff.training.zoo.disk_array import DiskArray

BANK_FILE = "conditions.safetensors"


@dataclass(frozen=True)
class ConditionBank:
    """Many conditions of every task, ready for the network.

    Args:
        encoder: the condition encoder.
        names: the tasks.
        facts: of each task, for the generator's index.
        inputs: embeddings, shape `(num_tasks, conditions, condition_dim)`; for an encoder that is trained with the U-Net its
            inputs, shape `(num_tasks, conditions, 3, side, side)`, uint8, on disk.
        previews: of styles, a scene in each, as a WebP file.
        sha256: of all prompts or pictures that the inputs are made of.
    """

    encoder: ConditionEncoder
    names: list[str]
    facts: dict[str, dict[str, Any]]
    inputs: torch.Tensor | DiskArray
    previews: list[bytes]
    sha256: str

    @property
    def trained_encoder(self) -> ConditionEncoder | None:
        """The encoder, if it is to be trained with the U-Net."""
        return self.encoder if self.encoder.is_trained else None

    @torch.no_grad()
    def embeddings(self) -> torch.Tensor:
        """Return embeddings of all conditions, shape `(num_tasks, conditions, condition_dim)`, by the encoder as it is now."""
        if not self.encoder.is_trained:
            return self.inputs[torch.arange(len(self.names))]
        device = self.encoder.device
        return torch.stack([self.encoder(self.inputs[task].to(device).float() / 255).cpu() for task in range(len(self.inputs))])

    @classmethod
    def build(cls, tasks: Sequence[ZooTask], config: UNetConfig, folder: Path) -> ConditionBank:
        """Make the conditions of all tasks; raise `TrainingError` if the encoder reads another kind of condition than theirs.

        Args:
            folder: gets the inputs of an encoder that is trained, which may be more than fit into memory.
        """
        torch.manual_seed(config.fit.seed)
        encoder, kind = build_typed(condition_encoders(), "unet, condition_encoder", config.condition_encoder), tasks[0].condition_kind
        if encoder.condition_kind is not kind:
            raise TrainingError(
                f"unet, condition_encoder: a {type(encoder).__name__} reads a {encoder.condition_kind.name}, and the conditions of these "
                f"tasks are a {kind.name} each"
            )
        digest = hashlib.sha256()

        # One task at a time, and pictures as small as the encoder reads them: all conditions of some hundred styles at once, as they
        # were cut, do not fit into memory.
        def made() -> Iterator[torch.Tensor]:
            for task in tasks:
                shown = task.conditions(config.conditions_per_task)
                digest.update(json.dumps([task.name, [condition.to_json() for condition in shown]], sort_keys=True).encode())
                yield torch.stack([encoder.read(condition) for condition in shown]) if encoder.is_trained else encoder.encode(shown)[0]

        if encoder.is_trained:
            inputs: torch.Tensor | DiskArray = _on_disk(folder / BANK_FILE, made(), len(tasks))
        else:
            encoder.fit_center([task.conditions(1)[0] for task in tasks])
            take_from_main(encoder)
            inputs = from_main(torch.stack(list(made())))
        previews = [preview for task in tasks if (preview := task.preview())]
        facts = {task.name: task.index_facts() for task in tasks}
        return cls(encoder, list(facts), facts, inputs, previews, digest.hexdigest())


def _on_disk(path: Path, rows: Iterator[torch.Tensor], count: int) -> DiskArray:
    """Put rows that all processes make on disk, where the main one writes them, and all read."""
    if processes().is_main_process:
        DiskArray.write(path, rows, count)
    else:
        for _ in rows:
            pass
    processes().wait_for_everyone()
    return DiskArray(path)


