"""The first stage for large adapters, trained: one network over segments of all modules."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import load_file, save
from torch import nn

from cond_pdiff.atomic import write_bytes
from cond_pdiff.models.module_code import MEAN, MODULES_FILE
from cond_pdiff.models.segment_autoencoder import SegmentAutoencoder
from cond_pdiff.training.config import AutoencoderConfig
from cond_pdiff.training.objectives import add_latent_noise, reconstruction_loss
from cond_pdiff.training.stages.loop import fit
from cond_pdiff.training.stages.module_stage import ModuleStage
from cond_pdiff.training.zoo.params import ZooParams

SIZES_FILE = "sizes.safetensors"
SEGMENTS_AT_ONCE = 32
"""The segments of a module that a step decodes, drawn anew each time; all of them are encoded."""


class SegmentStage(ModuleStage):
    """The stage that trains a `SegmentAutoencoder`. A step's samples are modules of adapters; it costs the same whatever their number."""

    name = "autoencoder"
    at_once = 1

    def __init__(self, data: ZooParams, config: AutoencoderConfig) -> None:
        super().__init__(data, config, SegmentAutoencoder)

    def train(self, folder: Path, tensorboard: bool = False) -> None:
        """Train the autoencoder, or go on where it stopped; see `fit`."""
        self.prepare(folder)
        self.module.sizes.copy_(load_file(folder / SIZES_FILE)["sizes"])
        fit(self, self.config.fit, folder, tensorboard)

    def write(self, folder: Path) -> None:
        """See `ModuleStage`."""
        sizes: list[torch.Tensor] = []
        self.module.write_file(folder / MODULES_FILE, {MEAN: (torch.float32, (self.module.spans[-1][1],))}, self._means(sizes))
        write_bytes(folder / SIZES_FILE, save({"sizes": torch.stack(sizes)}))

    def _means(self, sizes: list[torch.Tensor]) -> Iterator[torch.Tensor]:
        """Yield the mean of all adapters, in pieces, and fill in the root mean square of what is left of each module."""
        for start, stop in self.module.spans:
            energy = torch.zeros((), dtype=torch.float64)
            for part in self.columns((start, stop)):
                mean = part.mean(0)
                yield mean
                energy += (part - mean).double().square().sum()
            size = (energy / len(self.data) / (stop - start)).sqrt().float()
            sizes.append(size if size > 0 else torch.ones(()))

    def latents(self) -> torch.Tensor:
        """Return the latents of the whole zoo."""
        with torch.no_grad():
            return self.codec.encode(self.data.chunks())

    def lost(self) -> float:
        """Return the share of the zoo's energy, beside the mean, that the code loses."""
        return self.codec.reconstruction_error(self.data.chunks())

    def draw(self, batch_size: int, rng: torch.Generator) -> list[tuple[int, int]]:
        """Draw adapters and a module of each."""
        adapters, modules = (torch.randint(most, (batch_size,), generator=rng) for most in (len(self.data), len(self.module.spans)))
        return list(zip(adapters.tolist(), modules.tolist(), strict=True))

    def loss(self, module: nn.Module, batch: list[tuple[int, int]], rng: torch.Generator) -> torch.Tensor:
        """Return the loss of equation 7 for some segments of each module, with noise on the code."""
        losses = []
        for adapter, index in batch:
            start, stop = self.module.spans[index]
            values = self.data.part([adapter]).columns(start, stop)[0] - self.module.file.read(MEAN, slice(start, stop))
            values = (values / self.module.sizes[index].cpu()).to(self.module.device)
            noisy = values + self.config.input_noise * torch.randn(values.shape, generator=rng).to(values)
            segment = self.module.config.segment
            segments = torch.randint(-(-len(values) // segment), (SEGMENTS_AT_ONCE,), generator=rng).to(values.device)
            padded = nn.functional.pad(values, (0, -len(values) % segment)).unflatten(0, (-1, segment))
            made = module(index, noisy, segments, lambda code: add_latent_noise(code, self.config.latent_noise, rng))
            losses.append(reconstruction_loss(padded[segments], made))
        return torch.stack(losses).mean()

    def describe(self, batch: list[tuple[int, int]]) -> str:
        """Return the names of the batch's adapters."""
        return ", ".join(self.data.names[adapter] for adapter, _ in batch)
