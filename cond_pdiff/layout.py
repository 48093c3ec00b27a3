"""ParamLayout: the ordered (key, shape) list that maps an adapter's tensors to a flat vector and back.

The only place that knows the order. "We flatten parameter matrix to a one-dimensional vector" (paper, section 3.2).
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from cond_pdiff.errors import AdapterError

MAX_ABS_VALUE = 1e4
"""The largest number that is accepted: no LoRA weight of a working adapter comes near it; larger ones are corruption and
overflow half precision."""


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
        return cls({key: tuple(tensors[key].shape) for key in sorted(tensors)}, tuple(sorted(constants)))

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
        for key, shape in self.shapes.items():
            if tuple(tensors[key].shape) != shape:
                raise AdapterError(f"tensor {key!r} has shape {tuple(tensors[key].shape)}, expected {shape}")
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


def check_values(tensors: Mapping[str, torch.Tensor]) -> None:
    """Raise `AdapterError` naming the first tensor that is not floating point, not finite, or absurdly large."""
    for key, tensor in tensors.items():
        if tensor.dtype not in (torch.float32, torch.float16, torch.bfloat16):
            raise AdapterError(f"tensor {key!r} has dtype {tensor.dtype}, expected float32, float16 or bfloat16")
        if not bool(torch.isfinite(tensor).all()):
            raise AdapterError(f"tensor {key!r} holds NaN or infinite values")
        largest = float(tensor.detach().abs().max()) if tensor.numel() else 0.0
        if largest > MAX_ABS_VALUE:
            raise AdapterError(f"tensor {key!r} holds a value of size {largest:.3g}; at most {MAX_ABS_VALUE:.0e} is accepted")
