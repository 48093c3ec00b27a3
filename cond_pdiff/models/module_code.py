"""ModuleCode: what autoencoders for large adapters share. Each module has a code of its own, and is decoded without the others."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from cond_pdiff.atomic import atomic_file
from cond_pdiff.component import Component
from cond_pdiff.errors import CondPDiffError, HubError
from cond_pdiff.models.param_autoencoder import to_unit_variance
from cond_pdiff.tensor_file import Entry, TensorFile, write_tensors

MODULES_FILE = "modules.safetensors"
MEAN = "mean"
CELL = 2**14
"""The numbers that are decoded together, counted from a span's start: whatever part is asked for comes out with the same bits."""


class ModuleCode(Component):
    """An autoencoder of which each column of the code stands for one module, or a part of a long one.

    What is as long as an adapter (the zoo's mean, for one) stays in a file beside the weights, of which no more is read than the part that
    is decoded: memory does not grow with the adapter. Values are raw params (normaliser "none"): the mean and the scales are its own.

    A subclass decodes cells (`decode_cell`) and encodes spans (`encode_span`).

    Args of every subclass:
        spans: (start, stop) of each module in the flat vector, without gaps: `ParamLayout.module_spans`.
        width: numbers of the code of one module: the channels of the latents.
        scaling_factor: see `ParamAutoencoder`.
    """

    scales: torch.Tensor

    def __init__(self, spans: Sequence[Sequence[int]], width: int) -> None:
        super().__init__()
        edges = [0, *(stop for _, stop in spans)]
        if not spans or width < 1 or [start for start, _ in spans] != edges[:-1] or edges != sorted(set(edges)):
            raise CondPDiffError("expected spans that begin at 0 and follow each other without gaps, and a width of at least 1")
        self.spans: list[tuple[int, int]] = [(start, stop) for start, stop in spans]
        self.register_buffer("scales", torch.ones(len(spans)))
        self._file: TensorFile | None = None

    # --- what a subclass does ------------------------------------------------------------------------------------

    def encode_span(self, index: int, values: torch.Tensor) -> torch.Tensor:
        """Encode a module's values without their mean, shape `(length,)`, float32 on the CPU, into `(width,)`."""
        raise NotImplementedError

    def decode_cell(self, index: int, codes: torch.Tensor, start: int, stop: int) -> torch.Tensor:
        """Decode a few values of a module, without the mean; gradients flow.

        Args:
            index: of the module.
            codes: shape `(batch, width)`, float32 on the CPU.
            start, stop: of the values, counted from the module's first; a multiple of `CELL`, and at most `CELL` further.

        Returns:
            shape `(batch, stop - start)`; each row depends on its own code alone, to the bit.
        """
        raise NotImplementedError

    # --- the code of all modules ---------------------------------------------------------------------------------

    @property
    def latent_shape(self) -> tuple[int, int]:
        """The shape (width, number of modules) of the latents of one adapter."""
        return int(self.config.width), len(self.spans)

    @property
    def file(self) -> TensorFile:
        """The file of what is as long as an adapter; raises `CondPDiffError` before it was fitted."""
        if self._file is None:
            raise CondPDiffError(f"this {type(self).__name__} has not been fitted to a zoo; train it, or load one that is")
        return self._file

    def encode(self, values: torch.Tensor) -> torch.Tensor:
        """Encode params, shape `(batch, num_params)`, into scaled latents, shape `(batch, width, modules)`, a module at a time."""
        if values.ndim != 2 or values.shape[1] != self.spans[-1][1]:
            raise CondPDiffError(f"expected values of shape (batch, {self.spans[-1][1]}), got {tuple(values.shape)}")
        columns = []
        for index, (start, stop) in enumerate(self.spans):
            mean = self.file.read(MEAN, slice(start, stop))
            codes = [self.encode_span(index, row - mean) for row in values[:, start:stop].to("cpu", torch.float32)]
            columns.append(torch.stack(codes) / self.scales[index].cpu().float())
        return torch.stack(columns, dim=2).to(values.device) * self.config.scaling_factor

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Decode scaled latents, shape `(batch, width, modules)`, into params, shape `(batch, num_params)`."""
        if tuple(latents.shape[1:]) != self.latent_shape:
            raise CondPDiffError(
                f"expected latents of shape (batch, {self.latent_shape[0]}, {self.latent_shape[1]}), got {tuple(latents.shape)}"
            )
        return self.decode_part(latents, 0, self.spans[-1][1])

    def decode_part(self, latents: torch.Tensor, start: int, stop: int) -> torch.Tensor:
        """Decode the values `start` to `stop` alone, with the bits that `decode` gives them, shape `(batch, stop - start)`."""
        parts = []
        for index, (first, last) in enumerate(self.spans):
            if first < stop and start < last:
                codes = latents[:, :, index].to("cpu", torch.float32) * (self.scales[index].cpu().float() / self.config.scaling_factor)
                parts += list(self._decode_span(index, codes, max(start - first, 0), min(stop, last) - first))
        return torch.cat(parts, dim=1).to(latents.device)

    def _decode_span(self, index: int, codes: torch.Tensor, start: int, stop: int) -> Iterator[torch.Tensor]:
        """Decode a part of a module, a cell at a time."""
        first, last = self.spans[index]
        for edge in range(start // CELL * CELL, stop, CELL):
            end = min(edge + CELL, last - first)
            made = self.decode_cell(index, codes, edge, end) + self.file.read(MEAN, slice(first + edge, first + end))
            yield made[:, max(start - edge, 0) : min(stop, end) - edge]

    def fit_scaling_factor(self, latents: torch.Tensor) -> torch.Tensor:
        """Change `scaling_factor` so that `latents`, which were encoded with it, get unit variance (root mean square); return those."""
        return to_unit_variance(self, latents)

    # --- the file ------------------------------------------------------------------------------------------------

    def write_file(self, path: Path, entries: Mapping[str, Entry], pieces: Iterable[torch.Tensor]) -> None:
        """Write the file, complete or not at all, and read from it from now on.

        Args:
            entries: see `write_tensors`; the mean of all params is one of them.
            pieces: the tensors in their order, each perhaps in pieces.
        """
        for leftover in path.parent.glob(f".{path.name}.*"):  # of a killed process
            leftover.unlink()
        with atomic_file(path) as file:
            write_tensors(file, entries, pieces)
        self.open_file(path)

    def open_file(self, path: Path) -> None:
        """Read from a file that `write_file` made from now on.

        Raises:
            HubError: it is missing, damaged, or of another layout.
        """
        try:
            file = TensorFile(path)
            length = file.shape(MEAN)
        except (OSError, ValueError, KeyError) as error:
            raise HubError(f"{path} is missing or damaged ({error}); fetch or train the generator again") from error
        if length != (self.spans[-1][1],):
            raise HubError(f"{path} is of adapters with {length[0]} numbers, expected {self.spans[-1][1]}")
        self._file = file

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, **kwargs: Any) -> Any:
        """Load as `Component.from_pretrained` does; the file beside the weights is read when it is needed."""
        loaded = super().from_pretrained(pretrained_model_name_or_path, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        model.open_file(Path(pretrained_model_name_or_path, kwargs.get("subfolder") or "") / MODULES_FILE)
        return loaded

    def save_pretrained(self, save_directory: str | os.PathLike[Any], *args: Any, **kwargs: Any) -> None:
        """Save as any diffusers model, with the file beside the weights: the same one, where the file system allows that."""
        super().save_pretrained(save_directory, *args, **kwargs)
        target = Path(save_directory) / MODULES_FILE
        if target.exists() and target.samefile(self.file.path):
            return
        target.unlink(missing_ok=True)
        try:
            os.link(self.file.path, target)
        except OSError:  # another file system
            shutil.copyfile(self.file.path, target)
