"""PrincipalCode: principal components in the place of the autoencoder, for table 3."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from cond_pdiff.normalization import ParamNormalizer


class PrincipalCode(nn.Module):
    """An `Autoencoder` without a network: the code is the values' coordinates along the principal components of a zoo's.

    Args:
        values: the zoo's normalised params, shape `(num_adapters, num_params)`.
        most: components; there are at most `num_adapters - 1`.
    """

    dtype = torch.float32
    spans = None
    center: torch.Tensor
    directions: torch.Tensor

    def __init__(self, values: torch.Tensor, most: int) -> None:
        super().__init__()
        center = values.mean(0)
        directions = torch.linalg.svd(values - center, full_matrices=False).Vh
        self.register_buffer("center", center)
        self.register_buffer("directions", directions[: max(1, min(most, len(values) - 1))])
        self.scale = 1.0

    @classmethod
    def fit(cls, normalizer: ParamNormalizer, chunks: Iterable[torch.Tensor], most: int) -> PrincipalCode:
        """Fit the components to a zoo's params, which come in chunks of shape `(n, num_params)`; all fit into memory together."""
        return cls(torch.cat([normalizer.normalize(chunk)[0] for chunk in chunks]), most)

    @property
    def device(self) -> torch.device:
        """The device of the components."""
        return self.center.device

    @property
    def latent_shape(self) -> tuple[int, int]:
        """The shape of one code: (1, number of components)."""
        return 1, len(self.directions)

    def encode(self, values: torch.Tensor) -> torch.Tensor:
        """Encode normalised params, shape `(batch, num_params)`, as latents, shape `(batch, 1, components)`."""
        return self.scale * ((values - self.center) @ self.directions.T)[:, None]

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Invert `encode`, up to what the components lose."""
        return latents[:, 0] / self.scale @ self.directions + self.center

    def fit_scaling_factor(self, latents: torch.Tensor) -> torch.Tensor:
        """Give `latents`, which were encoded with the present scale, unit variance, and return them."""
        spread = float(latents.detach().square().mean().sqrt())
        self.scale /= spread
        return latents / spread
