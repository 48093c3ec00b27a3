"""AdapterCodec: adapters ↔ latents (paper, section 3.2). Four saved parts as one: template, normaliser, autoencoder, statistics."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any, Protocol, runtime_checkable

import torch

from cond_pdiff.adapter import LoraAdapter
from cond_pdiff.errors import CondPDiffError
from cond_pdiff.models.adapter_template import AdapterTemplate
from cond_pdiff.normalization import ParamNormalizer, extra_length, join_statistics, split_statistics


@runtime_checkable
class Autoencoder(Protocol):
    """The part of a codec between normalised params and a code: a network, or whatever else does this; `ParamAutoencoder` is one.

    However many adapters it is given at once, it takes no more memory for its feature maps than a few of them need.
    """

    @property
    def spans(self) -> Sequence[tuple[int, int]] | None:
        """The values that each column of the code stands for, (start, stop); None: all columns are of all values.

        Where there are some, the autoencoder has a method `decode_part`, which makes a few values without the others (see `ModuleCode`).
        """

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of its weights."""

    @property
    def device(self) -> torch.device:
        """The device that its weights are on."""

    @property
    def latent_shape(self) -> tuple[int, int]:
        """The shape (channels, length) of the code of one adapter."""

    def encode(self, values: torch.Tensor) -> torch.Tensor:
        """Encode normalised params, shape `(batch, num_params)`, into a scaled code, shape `(batch, *latent_shape)`."""

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Decode a scaled code into normalised params: the inverse of `encode`, up to what the code loses."""

    def fit_scaling_factor(self, latents: torch.Tensor) -> torch.Tensor:
        """Change the code's scale so that `latents`, which were encoded, get unit variance; return those."""


class AdapterCodec:
    """The conversion of adapters and their params into latents, and back.

    Of autoencoders that decode parts values are the params themselves (normaliser "none"), so that a part of them needs no other.

    The latents of an adapter are the autoencoder's code, and behind it, in as few columns as hold them, the adapter's statistics (mean and
    size, where the normaliser is of mode "task"): for a request that nobody has seen these are generated, too.

    Args:
        template: layout, LoRA settings and constant tensors.
        normalizer: params ↔ values; fitted, or see `fit_normalizer`.
        autoencoder: values ↔ code, in evaluation mode.
    """

    def __init__(self, template: AdapterTemplate, normalizer: ParamNormalizer, autoencoder: Autoencoder) -> None:
        self.template, self.normalizer, self.autoencoder = template, normalizer, autoencoder
        if autoencoder.spans is not None and normalizer.config.mode != "none":
            raise CondPDiffError(f"a {type(autoencoder).__name__} needs the normaliser's mode 'none', got {normalizer.config.mode!r}")

    @property
    def latent_shape(self) -> tuple[int, int]:
        """The shape (channels, length) of the latents of one adapter, with the columns of its statistics."""
        channels, length = self.autoencoder.latent_shape
        return channels, length + extra_length(self.normalizer.num_statistics, channels)

    @property
    def guided_length(self) -> int:
        """The number of first columns that are code: guidance would scale what stands behind them, an update's size among it."""
        return self.autoencoder.latent_shape[1]

    @property
    def token_places(self) -> dict[str, list[int]]:
        """Where in the base model each column of the latents is, if it stands for a module: the arguments that a denoiser may have for it.

        `token_layers` has the number of each module's layer (or block …), `token_modules` that of its kind within a layer.
        """
        if self.autoencoder.spans is None:
            return {}
        spans, parts = self.template.layout.module_spans(), Counter[str]()
        layers, kinds = [], []
        for span in spans:
            layers.append(span.layer)
            kinds.append((span.kind, parts[span.module]))  # a long module has several columns
            parts[span.module] += 1
        numbers = [{place: number for number, place in enumerate(dict.fromkeys(places))} for places in (layers, kinds)]
        return {"token_layers": [numbers[0][layer] for layer in layers], "token_modules": [numbers[1][kind] for kind in kinds]}

    # --- what is measured, in the order of training: the normaliser, (the autoencoder is trained,) the latents' scale --------------

    def fit_normalizer(self, chunks: Iterable[torch.Tensor]) -> None:
        """Measure a zoo's params, which come in chunks of shape `(n, num_params)` and are gone through once."""
        self.normalizer.fit(chunks)

    def fit_scaling_factor(self, latents: torch.Tensor) -> torch.Tensor:
        """Give the code of a whole zoo, encoded by this codec, unit variance from now on; return its latents as they are then."""
        code, statistics = split_statistics(latents, self.normalizer.num_statistics)
        return join_statistics(self.autoencoder.fit_scaling_factor(code.contiguous()), statistics)

    @torch.no_grad()
    def reconstruction_error(self, chunks: Iterable[torch.Tensor]) -> float:
        """Return the share of a zoo's energy (in normalised params) that a pass through the autoencoder loses; for its params in chunks.

        Codes of modules keep the zoo's mean aside, so theirs is the energy beside the mean.
        """
        lost = energy = 0.0
        aside = 0.0 if self.autoencoder.spans is None else self.autoencoder.decode(torch.zeros(1, *self.autoencoder.latent_shape))
        for chunk in chunks:
            values, _ = self.normalizer.normalize(chunk.to(self.normalizer.device))
            code = self.autoencoder.encode(values.to(self.autoencoder.device, self.autoencoder.dtype))
            lost += float((self.autoencoder.decode(code).to(values) - values).double().square().sum())
            energy += float((values - aside).double().square().sum())
        return lost / energy

    # --- there and back -------------------------------------------------------------------------------------------

    def encode(self, params: torch.Tensor | Iterable[torch.Tensor]) -> torch.Tensor:
        """Encode params into latents, float32 (equation 6a).

        Args:
            params: shape `(batch, num_params)`, on any device; or chunks of that shape, which need not fit into memory together.

        Returns:
            shape `(batch, *latent_shape)`, on the device of the params.
        """
        return torch.cat([self._encode(chunk) for chunk in ([params] if isinstance(params, torch.Tensor) else params)])

    def _encode(self, params: torch.Tensor) -> torch.Tensor:
        values, statistics = self.normalizer.normalize(params.to(self.normalizer.device))
        code = self.autoencoder.encode(values.to(self.autoencoder.device, self.autoencoder.dtype))
        return join_statistics(code.to(statistics), statistics).to(params.device)

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Decode latents, shape `(batch, *latent_shape)`, into params, shape `(batch, num_params)`, float32 (equation 6b).

        All on the autoencoder's device. Gradients flow if they are wanted.
        """
        code, statistics = split_statistics(latents, self.normalizer.num_statistics)
        values = self.autoencoder.decode(code.to(self.autoencoder.dtype))
        return self.normalizer.denormalize(values.float(), statistics.float())

    def decode_tensors(self, latents: torch.Tensor) -> list[Mapping[str, torch.Tensor]]:
        """Decode latents, shape `(batch, *latent_shape)`, into the tensors of each adapter, float32, on the CPU.

        Where the autoencoder decodes parts, tensors are made when they are read (see `DecodedTensors`).
        """
        if self.autoencoder.spans is None:
            return [self.template.to_tensors(params.detach().to("cpu", torch.float32)) for params in self.decode(latents)]
        decode_part: Any = getattr(self.autoencoder, "decode_part")  # noqa: B009  # the protocol says when it is there
        return [self.template.read_tensors(partial(decode_part, row[None].detach().cpu().clone())) for row in latents]

    def to_adapter(self, params: torch.Tensor, metadata: Mapping[str, Any] | None = None) -> LoraAdapter:
        """Turn params, shape `(num_params,)`, into a validated adapter, float32, on the CPU."""
        return self.template.to_adapter(params, metadata)

    def to_params(self, adapter: LoraAdapter) -> torch.Tensor:
        """Flatten an adapter of the codec's layout into params, shape `(num_params,)`."""
        return self.template.to_params(adapter)
