"""Stage one: the autoencoder over a zoo's params (paper, section 3.2)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

import torch
from torch import nn

from cond_pdiff.models.param_autoencoder import ParamAutoencoder
from cond_pdiff.normalization import ParamNormalizer, join_statistics
from cond_pdiff.training.config import AutoencoderConfig, build
from cond_pdiff.training.objectives import add_latent_noise, reconstruction_loss
from cond_pdiff.training.precision import training_device
from cond_pdiff.training.processes import from_main
from cond_pdiff.training.zoo.params import ZooParams


class AutoencoderStage:
    """See `cond_pdiff.training.stages.loop.Stage`."""

    name = "autoencoder"

    def __init__(self, data: ZooParams, config: AutoencoderConfig) -> None:
        self.data, self.config = data, config
        torch.manual_seed(config.fit.seed)
        self.module = build(ParamAutoencoder, "autoencoder, model", data.template.layout.num_params, **config.model)
        self.normalizer = ParamNormalizer(config.normalizer, data.template.layout.sizes)
        self.normalizer.fit(data.chunks())
        # Batch norm sees all samples of a step, or is another network.
        self.at_once = self.module.at_once if self.module.config.norm != "batch" else None
        self.identity: dict[str, Any] = {"config": asdict(config), "data": data.sha256}

    def draw(self, batch_size: int, rng: torch.Generator) -> torch.Tensor:
        """Indices of adapters."""
        return torch.randint(len(self.data), (batch_size,), generator=rng)

    def loss(self, module: nn.Module, batch: torch.Tensor, rng: torch.Generator) -> torch.Tensor:
        """Equation 7, with noise on the input and on the latents."""
        values, _ = self.normalizer.normalize(self.data[batch])
        noisy = values + self.config.input_noise * torch.randn(values.shape, generator=rng)
        device = next(module.parameters()).device
        reconstructed = module(noisy.to(device), lambda latents: add_latent_noise(latents, self.config.latent_noise, rng))
        return reconstruction_loss(values.to(device), reconstructed)

    def describe(self, batch: torch.Tensor) -> str:
        """Names of the batch's adapters."""
        return ", ".join(self.data.names[index] for index in batch.tolist())

    def values(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Normalised params and statistics of all adapters in order, a few at a time."""
        return map(self.normalizer.normalize, self.data.chunks())

    @torch.no_grad()
    def encode(self) -> torch.Tensor:
        """Give the trained module its scaling factor, and return the latents of all adapters, statistics behind them."""
        device = training_device()
        self.module.to(device)
        found = [(self.module.encode(values.to(device)).cpu(), statistics) for values, statistics in self.values()]
        self.module.to("cpu")
        code, statistics = (from_main(torch.cat(column)) for column in zip(*found, strict=True))
        return join_statistics(self.module.fit_scaling_factor(code), statistics)

    @torch.no_grad()
    def reconstruction_error(self) -> float:
        """Share of the zoo's energy (in normalised params) that a pass through the autoencoder loses."""
        device = training_device()
        self.module.to(device)
        lost = energy = 0.0
        for values, _ in self.values():
            lost += float((self.module(values.to(device)).cpu() - values).double().square().sum())
            energy += float(values.double().square().sum())
        self.module.to("cpu")
        return lost / energy
