"""ParamLayout: the ordered (key, shape) list that maps an adapter's tensors to a flat vector and back.

The only place that knows the order. "We flatten parameter matrix to a one-dimensional vector" (paper, section 3.2).
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from cond_pdiff.errors import AdapterError

MAX_ABS_VALUE = 1e4
"""The largest number that is accepted: no LoRA weight of a working adapter comes near it; larger ones are corruption and
overflow half precision."""


MAX_SPAN = 2**21
"""The most numbers of one `ModuleSpan`."""


@dataclass(frozen=True)
class ModuleSpan:
    """The part of the flat vector that belongs to one module, or a part of that.

    Args:
        module: its full name, as tensors' keys have it.
        start, stop: of the part.
    """

    module: str
    start: int
    stop: int

    @property
    def layer(self) -> tuple[int, ...]:
        """The numbers in the module's name: of its layer, of its block within that, and so on."""
        return tuple(int(part) for part in self.module.split(".") if part.isdigit())

    @property
    def kind(self) -> str:
        """The module's name without these numbers."""
        return re.sub(r"(?<=\.)\d+(?=\.|$)", "*", self.module)


@dataclass(frozen=True)
class ParamLayout:
    """The ordered keys and shapes of an adapter's tensors.

    Args:
        shapes: key → shape, in the order in which tensors stand in the flat vector. `from_tensors` sorts by key.
        constants: keys whose tensors are equal throughout a zoo (for example a shared, frozen `lora_A`). They are part
            of every adapter but not of the flat vector.
    """

    shapes: Mapping[str, tuple[int, ...]]
    constants: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not self.shapes:
            raise AdapterError("a layout needs at least one tensor, none came")
        unknown = sorted(set(self.constants) - set(self.shapes))
        if unknown:
            raise AdapterError(f"constant tensors {unknown[:3]} are not in the layout")

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, torch.Tensor], constants: Sequence[str] = ()) -> ParamLayout:
        """Make the layout of `tensors`, sorted by key."""
        return cls(dict(sorted(tensor_shapes(tensors).items())), tuple(sorted(constants)))

    @property
    def modelled(self) -> tuple[str, ...]:
        """The keys that make up the flat vector, in order."""
        constants = set(self.constants)
        return tuple(key for key in self.shapes if key not in constants)

    @property
    def sizes(self) -> tuple[int, ...]:
        """The number of values of each modelled tensor, in the order of `modelled`."""
        return tuple(math.prod(self.shapes[key]) for key in self.modelled)

    @property
    def num_params(self) -> int:
        """The length of the flat vector."""
        return sum(self.sizes)

    @property
    def num_adapter_params(self) -> int:
        """The number of values in a whole adapter, constants included."""
        return sum(math.prod(shape) for shape in self.shapes.values())

    def places(self) -> dict[str, tuple[int, int]]:
        """Return where each modelled tensor stands in the flat vector: key → (start, stop)."""
        ends = itertools.accumulate(self.sizes)
        return {key: (end - size, end) for key, size, end in zip(self.modelled, self.sizes, ends, strict=True)}

    def module_spans(self) -> list[ModuleSpan]:
        """Return what each module takes of the flat vector, its factors together, in order; a long one comes in several parts."""
        spans = []
        for module, keys in itertools.groupby(self.places().items(), key=lambda place: module_of(place[0])):
            places = [place for _, place in keys]
            start, stop = places[0][0], places[-1][1]
            parts = -(-(stop - start) // MAX_SPAN)
            edges = [start + (stop - start) * part // parts for part in range(parts + 1)]
            spans += [ModuleSpan(module, first, last) for first, last in itertools.pairwise(edges)]
        return spans

    def validate(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Raise `AdapterError` naming the first missing, extra, misshapen, non-float or non-finite tensor."""
        missing = sorted(set(self.shapes) - set(tensors))
        extra = sorted(set(tensors) - set(self.shapes))
        if missing or extra:
            parts = [f"missing {missing[0]!r}"] if missing else []
            parts += [f"unexpected {extra[0]!r}"] if extra else []
            raise AdapterError(
                f"adapter does not fit its layout: {' and '.join(parts)} "
                f"({len(missing)} missing, {len(extra)} unexpected of {len(self.shapes)} tensors)"
            )
        found = tensor_shapes(tensors)
        for key, shape in self.shapes.items():
            if found[key] != shape:
                raise AdapterError(f"tensor {key!r} has shape {found[key]}, expected {shape}")
        check_values(tensors)

    def flatten(self, tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Flatten adapter tensors into params, float32, shape `(num_params,)`, after validating them."""
        self.validate(tensors)
        return torch.cat([tensors[key].detach().reshape(-1).to(torch.float32) for key in self.modelled])

    def unflatten(self, params: torch.Tensor, constants: Mapping[str, torch.Tensor] | None = None) -> dict[str, torch.Tensor]:
        """Turn params, shape `(num_params,)`, into adapter tensors, in the order of `shapes`.

        `constants` supplies the tensors that are not part of the vector; it must hold exactly the keys in `constants`.
        """
        if tuple(params.shape) != (self.num_params,):
            raise AdapterError(f"params have shape {tuple(params.shape)}, expected ({self.num_params},)")
        given = dict(constants or {})
        if set(given) != set(self.constants):
            raise AdapterError(f"expected the {len(self.constants)} constant tensors of the layout, {len(given)} came")
        for key, tensor in given.items():
            if tuple(tensor.shape) != self.shapes[key]:
                raise AdapterError(f"constant tensor {key!r} has shape {tuple(tensor.shape)}, expected {self.shapes[key]}")
        pieces = dict(zip(self.modelled, params.split(list(self.sizes)), strict=True))
        return {key: (pieces[key].reshape(shape) if key in pieces else given[key]).clone() for key, shape in self.shapes.items()}

    def to_json(self) -> dict[str, Any]:
        """Return a JSON-ready description; `from_json` reads it back."""
        return {"shapes": [[key, list(shape)] for key, shape in self.shapes.items()], "constants": list(self.constants)}

    @classmethod
    def from_json(cls, data: Any) -> ParamLayout:
        """Read what `to_json` wrote; raise `AdapterError` for anything else."""
        try:
            shapes = {str(key): tuple(int(size) for size in shape) for key, shape in data["shapes"]}
            constants = tuple(str(key) for key in data["constants"])
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise AdapterError(f"not a layout: expected 'shapes' and 'constants' lists ({error})") from error
        if len(shapes) != len(data["shapes"]):
            raise AdapterError("not a layout: a key stands in it twice")
        if any(size < 1 for shape in shapes.values() for size in shape):
            raise AdapterError("not a layout: every size must be at least 1")
        return cls(shapes, constants)

    def sha256(self) -> str:
        """Return a stable fingerprint of keys, shapes and order."""
        return hashlib.sha256(json.dumps(self.to_json(), sort_keys=True).encode()).hexdigest()


def module_of(key: str) -> str:
    """Return what the keys of one module's tensors have in common: its full name, behind peft's prefix."""
    return re.sub(r"(\.lora_[AB])?\.[^.]*$", "", key)


class DecodedTensors(Mapping[str, torch.Tensor]):
    """The tensors of an adapter that are made when they are read, checked then, and not kept: no more than one is in memory.

    Args:
        shapes: key → shape, of all tensors, in their order.
        make: a key → its tensor.
    """

    def __init__(self, shapes: Mapping[str, tuple[int, ...]], make: Callable[[str], torch.Tensor]) -> None:
        self.shapes, self._make = shapes, make

    def __getitem__(self, key: str) -> torch.Tensor:
        tensor = self._make(key).reshape(self.shapes[key])
        check_values({key: tensor})
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)


def tensor_entries(tensors: Mapping[str, torch.Tensor]) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """Return the types and shapes of an adapter's tensors, by key, without making any of `DecodedTensors`, which are float32."""
    if isinstance(tensors, DecodedTensors):
        return {key: (torch.float32, shape) for key, shape in tensors.shapes.items()}
    return {key: (tensor.dtype, tuple(tensor.shape)) for key, tensor in tensors.items()}


def tensor_shapes(tensors: Mapping[str, torch.Tensor]) -> dict[str, tuple[int, ...]]:
    """Return the shapes alone; see `tensor_entries`."""
    return {key: shape for key, (_, shape) in tensor_entries(tensors).items()}


def check_values(tensors: Mapping[str, torch.Tensor]) -> None:
    """Raise `AdapterError` naming the first tensor that is not floating point, not finite, or absurdly large.

    `DecodedTensors` are checked when they are read.
    """
    if isinstance(tensors, DecodedTensors):
        return
    for key, tensor in tensors.items():
        if tensor.dtype not in (torch.float32, torch.float16, torch.bfloat16):
            raise AdapterError(f"tensor {key!r} has dtype {tensor.dtype}, expected float32, float16 or bfloat16")
        if not bool(torch.isfinite(tensor).all()):
            raise AdapterError(f"tensor {key!r} holds NaN or infinite values")
        largest = float(tensor.detach().abs().max()) if tensor.numel() else 0.0
        if largest > MAX_ABS_VALUE:
            raise AdapterError(f"tensor {key!r} holds a value of size {largest:.3g}; at most {MAX_ABS_VALUE:.0e} is accepted")
