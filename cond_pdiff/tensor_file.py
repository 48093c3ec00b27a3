"""Safetensors files that are written and read a tensor at a time, so that memory does not grow with them."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import IO

import numpy as np
import torch

DTYPES = {
    torch.float32: ("F32", "<f4"),
    torch.bfloat16: ("BF16", None),
    torch.float16: ("F16", "<f2"),
    torch.uint8: ("U8", "u1"),
}
"""The types that are written, in the order in which safetensors puts them in a file: its name for them, and numpy's."""

Entry = tuple[torch.dtype, tuple[int, ...]]


def in_file_order(entries: Mapping[str, Entry]) -> list[str]:
    """Return the keys of tensors as safetensors orders them: larger types first, then by name."""
    order = [*DTYPES]
    return sorted(entries, key=lambda key: (order.index(entries[key][0]), key))


def write_tensors(
    file: IO[bytes], entries: Mapping[str, Entry], tensors: Iterable[torch.Tensor], metadata: Mapping[str, str] | None = None
) -> None:
    """Write a safetensors file, with the bytes that the library's own `save` gives for all tensors together.

    Args:
        file: to write to.
        entries: key → type and shape.
        tensors: on the CPU, in the order of `in_file_order`; each may come in pieces, one after the other, and is forgotten when written.
        metadata: of the file's header.

    Raises:
        ValueError: what came is longer or shorter than the entries say.
    """
    header: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    start = 0
    for key in in_file_order(entries):
        dtype, shape = entries[key]
        stop = start + math.prod(shape) * dtype.itemsize
        header[key] = {"dtype": DTYPES[dtype][0], "shape": list(shape), "data_offsets": [start, stop]}
        start = stop
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    file.write(len(text).to_bytes(8, "little") + text)
    written = 0
    for tensor in tensors:
        data = tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data
        file.write(data)
        written += len(data)
    if written != start:
        raise ValueError(f"expected {start} bytes of tensors, {written} came")


class TensorFile:
    """A safetensors file of which only what is asked for is read: `array` maps a tensor, `read` copies a part of it.

    The file is mapped for each read alone: pages that were read once would otherwise count as this process's memory.

    Args:
        path: of the file.

    Raises:
        ValueError: it is not such a file, or a part of one.
        OSError: it cannot be read.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if length > path.stat().st_size:
                raise ValueError("it is cut short, or no safetensors file")
            try:
                header = json.loads(file.read(length))
                types = {name: numpy_type for name, numpy_type in DTYPES.values() if numpy_type}
                self._entries = {
                    key: (types[entry["dtype"]], tuple(entry["shape"]), 8 + length + entry["data_offsets"][0])
                    for key, entry in header.items()
                    if key != "__metadata__"
                }
            except (KeyError, TypeError, AttributeError, OverflowError) as error:
                raise ValueError(f"its header is not that of a safetensors file: {type(error).__name__}: {error}") from error
        for key in self._entries:
            self.array(key)

    def __contains__(self, key: object) -> bool:
        return key in self._entries

    def shape(self, key: str) -> tuple[int, ...]:
        """Return the shape of a tensor; raise `KeyError` if there is none of this name."""
        return self._entries[key][1]

    def array(self, key: str) -> np.memmap:
        """Map a tensor, to read parts of it; raise `KeyError` if there is none of this name."""
        numpy_type, shape, offset = self._entries[key]
        return np.memmap(self.path, numpy_type, "r", offset, shape)

    def read(self, key: str, *place: slice) -> torch.Tensor:
        """Read a tensor, or a part of it, into memory of its own."""
        return torch.from_numpy(np.array(self.array(key)[place]))
