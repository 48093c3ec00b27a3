"""DiskArray: an array that is too large for memory, as one safetensors file of which only what is asked for is read."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cond_pdiff.atomic import atomic_file
from cond_pdiff.errors import TrainingError
from cond_pdiff.tensor_file import TensorFile, write_tensors

TENSOR = "array"
NUMBERS_AT_ONCE = 2**22


class DiskArray:
    """An array on disk: `array[index]` is read as a tensor of its own, nothing else stays in memory.

    Args:
        path: made by `write`.

    Raises:
        TrainingError: not such a file, or a part of one.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._file = TensorFile(path)
            self.shape = torch.Size(self._file.shape(TENSOR))
        except (OSError, ValueError, KeyError) as error:
            raise TrainingError(f"{path} is damaged ({error}); delete it to make it again") from error

    @classmethod
    def write(cls, path: Path, rows: Iterable[torch.Tensor], count: int) -> DiskArray:
        """Write `count` rows of one shape and type, complete or not at all."""
        for leftover in path.parent.glob(f".{path.name}.*"):  # of a killed process
            leftover.unlink()
        rows, came = iter(rows), itertools.count(1)
        first = next(rows)
        counted = (row for row, _ in zip(itertools.chain([first], rows), came, strict=False))
        try:
            with atomic_file(path) as file:
                write_tensors(file, {TENSOR: (first.dtype, (count, *first.shape))}, counted)
        except ValueError as error:
            raise TrainingError(f"{path}: expected {count} rows, {next(came) - 1} came") from error
        return cls(path)

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, index: Any) -> torch.Tensor:
        places = index if isinstance(index, tuple) else (index,)
        return torch.from_numpy(np.array(self._file.array(TENSOR)[tuple(np.asarray(place) for place in places)]))

    def columns(self, rows: torch.Tensor, start: int, stop: int) -> torch.Tensor:
        """Read the columns `start` to `stop` of these rows of a matrix, shape `(len(rows), stop - start)`."""
        matrix = self._file.array(TENSOR)
        return torch.from_numpy(np.stack([matrix[row, start:stop] for row in rows.tolist()]))

    def chunks(self, rows: torch.Tensor | None = None) -> Iterator[torch.Tensor]:
        """Yield all rows, or these, in order, a few megabytes at a time."""
        order = torch.arange(len(self)) if rows is None else rows
        for part in order.split(max(1, NUMBERS_AT_ONCE // math.prod(self.shape[1:]))):
            yield self[part]
