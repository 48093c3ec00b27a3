"""Stage one: the autoencoder over a zoo's params (paper, section 3.2)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from cond_pdiff.codec import AdapterCodec
from cond_pdiff.models.param_autoencoder import ParamAutoencoder
from cond_pdiff.normalization import ParamNormalizer
from cond_pdiff.training.config import AutoencoderConfig, build_typed, recorded
from cond_pdiff.training.objectives import add_latent_noise, reconstruction_loss
from cond_pdiff.training.precision import on_training_device
from cond_pdiff.training.stages.loop import fit
from cond_pdiff.training.zoo.params import ZooParams


class AutoencoderStage:
    """The stage (see `cond_pdiff.training.stages.loop`) that trains its `codec`'s autoencoder; it then only lacks the latents' scale."""

    name = "autoencoder"

    def __init__(self, data: ZooParams, config: AutoencoderConfig) -> None:
        self.data, self.config = data, config
        torch.manual_seed(config.fit.seed)
        name = ParamAutoencoder.__name__
        settings = {"type": name, **config.model}
        self.module = build_typed({name: ParamAutoencoder}, "autoencoder, model", settings, data.template.layout.num_params)
        self.codec = AdapterCodec(data.template, ParamNormalizer(config.normalizer, data.template.layout.sizes), self.module)
        self.codec.fit_normalizer(data.chunks())
        # Batch norm sees all samples of a step, or is another network.
        self.at_once = self.module.at_once if self.module.config.norm != "batch" else None
        self.identity: dict[str, Any] = {"config": recorded(config), "data": data.sha256}

    def train(self, folder: Path, tensorboard: bool = False) -> None:
        """Train the autoencoder, or go on where it stopped; see `fit`."""
        fit(self, self.config.fit, folder, tensorboard)

    def latents(self) -> torch.Tensor:
        """Return the latents of the whole zoo."""
        with on_training_device(self.module):
            return self.codec.encode(self.data.chunks())

    def lost(self) -> float:
        """Return the share of the zoo's energy, in normalised params, that a pass through the autoencoder loses."""
        with on_training_device(self.module):
            return self.codec.reconstruction_error(self.data.chunks())

    def draw(self, batch_size: int, rng: torch.Generator) -> torch.Tensor:
        """Draw indices of adapters."""
        return torch.randint(len(self.data), (batch_size,), generator=rng)

    def loss(self, module: nn.Module, batch: torch.Tensor, rng: torch.Generator) -> torch.Tensor:
        """Return the loss of equation 7, with noise on the input and on the latents."""
        values, _ = self.codec.normalizer.normalize(self.data[batch])
        noisy = values + self.config.input_noise * torch.randn(values.shape, generator=rng)
        device = next(module.parameters()).device
        reconstructed = module(noisy.to(device), lambda latents: add_latent_noise(latents, self.config.latent_noise, rng))
        return reconstruction_loss(values.to(device), reconstructed)

    def describe(self, batch: torch.Tensor) -> str:
        """Return the names of the batch's adapters."""
        return ", ".join(self.data.names[index] for index in batch.tolist())
