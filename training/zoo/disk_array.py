"""DiskArray: an array that is too large for memory, as one safetensors file of which only what is asked for is read."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cond_pdiff.atomic import atomic_file
from cond_pdiff.errors import TrainingError

TENSOR = "array"
DTYPES = {torch.float32: ("F32", "<f4"), torch.uint8: ("U8", "u1")}
"""The type of an array → safetensors' name for it and numpy's."""
NUMBERS_AT_ONCE = 2**22


class DiskArray:
    """An array on disk: `array[index]` is read as a tensor of its own, nothing else stays in memory.

    The file is mapped for each read alone: pages that were read once would otherwise count as this process's memory.

    Args:
        path: made by `write`.

    Raises:
        TrainingError: not such a file, or a part of one.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with path.open("rb") as file:
                length = int.from_bytes(file.read(8), "little")
                entry = json.loads(file.read(length))[TENSOR]
            self._offset = 8 + length
            self.shape = torch.Size(entry["shape"])
            self._type = dict(DTYPES.values())[entry["dtype"]]
            self._map()
        except (OSError, ValueError, KeyError, TypeError, OverflowError) as error:
            raise TrainingError(f"{path} is damaged ({error}); delete it to make it again") from error

    @classmethod
    def write(cls, path: Path, rows: Iterable[torch.Tensor], count: int) -> DiskArray:
        """Write `count` rows of one shape and type, complete or not at all."""
        for leftover in path.parent.glob(f".{path.name}.*"):  # of a killed process
            leftover.unlink()
        rows = iter(rows)
        first = next(rows)
        shape, written = [count, *first.shape], 0
        entry = {"dtype": DTYPES[first.dtype][0], "shape": shape, "data_offsets": [0, math.prod(shape) * first.element_size()]}
        header = json.dumps({TENSOR: entry}).encode()
        header += b" " * (-len(header) % 8)
        with atomic_file(path) as file:
            file.write(len(header).to_bytes(8, "little") + header)
            for row in itertools.chain([first], rows):
                file.write(row.contiguous().numpy().data)
                written += 1
            if written != count:
                raise TrainingError(f"{path}: expected {count} rows, {written} came")
        return cls(path)

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, index: Any) -> torch.Tensor:
        places = index if isinstance(index, tuple) else (index,)
        return torch.from_numpy(np.array(self._map()[tuple(np.asarray(place) for place in places)]))

    def chunks(self, rows: torch.Tensor | None = None) -> Iterator[torch.Tensor]:
        """Yield all rows, or these, in order, a few megabytes at a time."""
        order = torch.arange(len(self)) if rows is None else rows
        for part in order.split(max(1, NUMBERS_AT_ONCE // math.prod(self.shape[1:]))):
            yield self[part]

    def _map(self) -> np.memmap:
        return np.memmap(self.path, self._type, "r", self._offset, tuple(self.shape))
