"""ParamNormalizer: raw params ↔ values that an autoencoder can learn. A saved component of every generator."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Literal, get_args

import torch
from diffusers.configuration_utils import register_to_config

from cond_pdiff.component import ExactComponent, register_component
from cond_pdiff.errors import CondPDiffError

Mode = Literal["none", "batch", "task", "tensor", "soup"]
EPSILON = 1e-8
NUM_TASK_STATISTICS = 2


@register_component
class ParamNormalizer(ExactComponent):
    """The z-score normalisation of params (paper, section 3.2 and table 3a).

    - `none`: values are params.
    - `batch`: one mean and one standard deviation for the whole zoo.
    - `tensor`: a mean and a standard deviation for each of the layout's tensors.
    - `soup`: the zoo's soup (the mean of every parameter) is taken away, and a standard deviation for each of the layout's tensors
      divides what is left. For adapters that start from a common one, of which values then have nothing to tell.
    - `task`: the paper's z-score. Each adapter has its own mean and standard deviation. For an unseen request these do not
      exist, so they are statistics that are generated together with the latents, never looked up by a task's name.
      (The authors' code normalises every coordinate by its task's mean, which makes zero decode to the task's soup; one mean
      and one standard deviation an adapter keep the soup in what is modelled.)

    Args:
        mode: one of the above.
        tensor_sizes: number of values of each modelled tensor, in the layout's order.
    """

    mean: torch.Tensor
    std: torch.Tensor

    @register_to_config
    def __init__(self, mode: Mode = "task", tensor_sizes: Sequence[int] = (1,)) -> None:
        super().__init__()
        if mode not in get_args(Mode):
            raise CondPDiffError(f"normaliser mode must be one of {get_args(Mode)}, got {mode!r}")
        tensors = len(tensor_sizes)
        size = {"none": 0, "batch": 1, "tensor": tensors, "soup": tensors, "task": NUM_TASK_STATISTICS}[mode]
        self.register_buffer("mean", torch.zeros(sum(tensor_sizes) if mode == "soup" else size))
        self.register_buffer("std", torch.ones(size))
        # safetensors cannot name an empty file's device; a marker also tells a fitted normaliser from a fresh one.
        self.register_buffer("fitted", torch.zeros(1))

    @property
    def num_statistics(self) -> int:
        """The number of statistics that an adapter has besides its values: 2 in mode `task`, else 0."""
        return NUM_TASK_STATISTICS if self.config.mode == "task" else 0

    def fit(self, params: torch.Tensor | Iterable[torch.Tensor]) -> None:
        """Measure the zoo. `params` has shape `(num_adapters, num_params)`, or is gone through once, in chunks of that shape."""
        mode, sizes = self.config.mode, list(self.config.tensor_sizes)
        moments = [_Moments() for _ in (sizes if mode == "tensor" else [0])]
        for chunk in [params] if isinstance(params, torch.Tensor) else params:
            if chunk.ndim != 2 or chunk.shape[1] != sum(sizes) or not len(chunk):
                raise CondPDiffError(f"expected params of shape (n, {sum(sizes)}), got {tuple(chunk.shape)}")
            if mode == "tensor":
                for each, piece in zip(moments, chunk.split(sizes, dim=1), strict=True):
                    each.add(piece.reshape(-1, 1))
            else:
                moments[0].add(self._raw_statistics(chunk) if mode == "task" else chunk.reshape(-1, 1) if mode == "batch" else chunk)
        if not moments[0].count:
            raise CondPDiffError("expected the params of at least one adapter, none came")
        if mode == "soup":
            self.mean.copy_(moments[0].mean)
            self.std.copy_(torch.stack([piece.mean() for piece in moments[0].variance.split(sizes)]).sqrt())
        elif mode != "none":
            self.mean.copy_(torch.cat([each.mean for each in moments]))
            self.std.copy_(torch.cat([each.variance for each in moments]).sqrt())
        self.fitted.fill_(1)

    def normalize(self, params: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Turn params, shape `(batch, num_params)`, into values of the same shape and statistics, shape `(batch, num_statistics)`."""
        self._check(params)
        if self.config.mode != "task":
            mean, std = self._per_value(params)
            return (params - mean) / (std + EPSILON), params.new_zeros(len(params), 0)
        raw = self._raw_statistics(params)
        values = (params - params.mean(1, keepdim=True)) / (raw[:, 1:].exp() + EPSILON)
        return values, (raw - self.mean) / (self.std + EPSILON)

    def denormalize(self, values: torch.Tensor, statistics: torch.Tensor) -> torch.Tensor:
        """Turn values and statistics into params again: the inverse of `normalize`.

        In mode `task`, values have mean 0 and variance 1 by definition, so a lossy decoder's output is brought back to that
        first: the update's size then comes from the statistics alone. (Halving an update costs 8 to 15 points of accuracy.)
        """
        self._check(values)
        if statistics.shape != (len(values), self.num_statistics):
            raise CondPDiffError(f"expected statistics of shape {(len(values), self.num_statistics)}, got {tuple(statistics.shape)}")
        if self.config.mode != "task":
            mean, std = self._per_value(values)
            return values * (std + EPSILON) + mean
        raw = statistics * (self.std + EPSILON) + self.mean
        values = values - values.mean(1, keepdim=True)
        values = values / (values.std(1, correction=0, keepdim=True) + EPSILON)
        return values * (raw[:, 1:].exp() + EPSILON) + raw[:, :1]

    def _check(self, values: torch.Tensor) -> None:
        if not bool(self.fitted):
            raise CondPDiffError("the normaliser has not been fitted; call fit(params) with the zoo's params first")
        if values.ndim != 2 or values.shape[1] != sum(self.config.tensor_sizes):
            raise CondPDiffError(f"expected shape (batch, {sum(self.config.tensor_sizes)}), got {tuple(values.shape)}")

    def _per_value(self, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if self.config.mode == "none":
            return values.new_zeros(1), values.new_ones(1)
        if self.config.mode == "batch":
            return self.mean, self.std
        sizes = torch.tensor(self.config.tensor_sizes, device=values.device)
        mean = self.mean if self.config.mode == "soup" else self.mean.repeat_interleave(sizes)
        return mean, self.std.repeat_interleave(sizes)

    @staticmethod
    def _raw_statistics(params: torch.Tensor) -> torch.Tensor:
        """Return mean and logarithm of the standard deviation of each adapter, shape `(batch, 2)`."""
        return torch.stack([params.mean(1), (params.std(1, correction=0) + EPSILON).log()], dim=1)


class _Moments:
    """The mean and variance of columns whose rows come in parts (Chan, Golub and LeVeque, 1979), in double precision."""

    count: int = 0
    mean: torch.Tensor
    variance: torch.Tensor

    def add(self, rows: torch.Tensor) -> None:
        """Add rows, shape `(n, columns)`."""
        rows = rows.double()
        mean, variance, new = rows.mean(0), rows.var(0, correction=0), len(rows) / (self.count + len(rows))
        if self.count:
            away = mean - self.mean
            mean = self.mean + new * away
            variance = (1 - new) * self.variance + new * variance + new * (1 - new) * away.square()
        self.count, self.mean, self.variance = self.count + len(rows), mean, variance


def join_statistics(code: torch.Tensor, statistics: torch.Tensor) -> torch.Tensor:
    """Put statistics behind the autoencoder's code: `(batch, channels, length)` → `(batch, channels, length + extra)`.

    `extra` is the smallest number of columns that holds them; unused places are zero.
    """
    if not statistics.shape[1]:
        return code
    batch, channels, _ = code.shape
    extra = extra_length(statistics.shape[1], channels)
    columns = code.new_zeros(batch, channels * extra)
    columns[:, : statistics.shape[1]] = statistics
    return torch.cat([code, columns.reshape(batch, channels, extra)], dim=2)


def split_statistics(latents: torch.Tensor, num_statistics: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Split latents into (code, statistics): the inverse of `join_statistics`."""
    extra = extra_length(num_statistics, latents.shape[1])
    length = latents.shape[2] - extra
    return latents[..., :length], latents[..., length:].reshape(len(latents), -1)[:, :num_statistics]


def extra_length(num_statistics: int, channels: int) -> int:
    """Return the number of columns that `join_statistics` adds."""
    return -(-num_statistics // channels)
