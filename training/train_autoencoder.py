"""Stage one: the autoencoder over a zoo's params (paper, section 3.2)."""

from __future__ import annotations

import hashlib
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from cond_pdiff.errors import TaskDataError
from cond_pdiff.models.adapter_template import AdapterTemplate
from cond_pdiff.models.param_autoencoder import ParamAutoencoder
from cond_pdiff.normalization import ParamNormalizer
from cond_pdiff.training.config import AutoencoderConfig, build
from cond_pdiff.training.objectives import add_latent_noise, reconstruction_loss
from cond_pdiff.training.zoo import Zoo


@dataclass(frozen=True)
class ZooParams:
    """All adapters of a zoo's trained tasks as one matrix.

    Args:
        template: layout and constants.
        params: shape `(num_adapters, num_params)`.
        tasks: index of each adapter's task in `zoo.task_names`, shape `(num_adapters,)`.
        names: `task/run` of each adapter, for messages.
    """

    template: AdapterTemplate
    params: torch.Tensor
    tasks: torch.Tensor
    names: list[str]

    @classmethod
    def load(cls, zoo: Zoo) -> ZooParams:
        """Read a finished zoo; `TaskDataError` if a task has no adapter yet."""
        runs = [(index, run) for index, task in enumerate(zoo.task_names) for run in zoo.runs(task)]
        missing = sorted(set(range(len(zoo.task_names))) - {index for index, _ in runs})
        if missing:
            raise TaskDataError(f"{zoo.folder} has no adapter of {zoo.task_names[missing[0]]!r} yet; run `cond-pdiff collect` to the end")
        found = [(index, f"{run.task}/{run.folder.name}", adapter) for index, run in runs for adapter in run.adapters()]
        tasks, names, adapters = (list(column) for column in zip(*found, strict=True))
        template = AdapterTemplate.from_adapters(adapters, zoo.base, int(zoo.facts["collect"]["max_length"]))
        params = torch.stack([template.to_params(adapter) for adapter in adapters])
        return cls(template, params, torch.tensor(tasks), names)

    @property
    def sha256(self) -> str:
        """Of the matrix: a run may only be continued on the data it began with."""
        return hashlib.sha256(self.params.numpy().tobytes()).hexdigest()


class AutoencoderStage:
    """See `cond_pdiff.training.loop.Stage`."""

    name = "autoencoder"

    def __init__(self, data: ZooParams, config: AutoencoderConfig) -> None:
        self.data, self.config = data, config
        torch.manual_seed(config.fit.seed)
        self.module = build(ParamAutoencoder, "autoencoder, model", data.template.layout.num_params, **config.model)
        self.normalizer = ParamNormalizer(config.normalizer, data.template.layout.sizes)
        self.normalizer.fit(data.params)
        self.values, self.statistics = self.normalizer.normalize(data.params)
        self.identity: dict[str, Any] = {"config": asdict(config), "data": data.sha256}

    def draw(self, batch_size: int, rng: torch.Generator) -> torch.Tensor:
        """Indices of adapters."""
        return torch.randint(len(self.values), (batch_size,), generator=rng)

    def loss(self, module: nn.Module, batch: torch.Tensor, rng: torch.Generator) -> torch.Tensor:
        """Equation 7, with noise on the input and on the latents."""
        values = self.values[batch]
        noisy = values + self.config.input_noise * torch.randn(values.shape, generator=rng)
        device = next(module.parameters()).device
        reconstructed = module(noisy.to(device), lambda latents: add_latent_noise(latents, self.config.latent_noise, rng))
        return reconstruction_loss(values.to(device), reconstructed)

    def describe(self, batch: torch.Tensor) -> str:
        """Names of the batch's adapters."""
        return ", ".join(self.data.names[index] for index in batch.tolist())

    @torch.no_grad()
    def reconstruction_error(self) -> float:
        """Share of the zoo's energy (in normalised params) that a pass through the autoencoder loses."""
        return float((self.module(self.values) - self.values).square().sum() / self.values.square().sum())
