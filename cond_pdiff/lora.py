"""What an adapter is: its specification, and the modules of a base model that belong to it.

Two kinds of modules: those that get an update ΔW (`target_modules`), and heads (`modules_to_save`), which the adapter brings
whole, as peft does for a classification head that the base model does not have, or for embeddings that were trained along.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
from torch import nn

from cond_pdiff.errors import AdapterError

if TYPE_CHECKING:
    from transformers.pytorch_utils import Conv1D

KEY_PREFIX = "base_model.model."
MAX_RANK = 1024
HEAD_TASK = "SEQ_CLS"
"""The task type that peft gives to adapters for `AutoModelForSequenceClassification`."""
LANGUAGE_TASK = "CAUSAL_LM"
"""The task type that peft gives to adapters for `AutoModelForCausalLM`."""


@dataclass(frozen=True)
class LoraSpec:
    """The specification that all adapters of a zoo share: everything besides shapes.

    Args:
        base_model: Hub id of the base model, or None if unknown.
        rank: r of ΔW = (alpha / rank) · B · A (paper, equation 1).
        alpha: the scale's numerator.
        target_modules: suffixes of the adapted modules' names, or the whole names.
        task_type: peft's task type, or None.
        base_fingerprint: `base_fingerprint` of the base model, or None if unknown (then attaching cannot check it). Specifications
            that differ only in it are equal: see `same_base`.
        modules_to_save: full names of the modules that the adapter brings whole: its heads.
        fan_in_fan_out: peft's word for adapted modules that keep their weights as (in, out), as GPT-2's Conv1D does. It is only handed
            on: the modules themselves tell (see `is_transposed`), as in peft, and ΔW is (out, in) all the same.
        family: of the base model, by name (see `cond_pdiff.families`); None where the rest of the specification tells it.
    """

    base_model: str | None
    rank: int
    alpha: float
    target_modules: tuple[str, ...]
    task_type: str | None = "FEATURE_EXTRACTION"
    base_fingerprint: str | None = field(default=None, compare=False)
    modules_to_save: tuple[str, ...] = ()
    fan_in_fan_out: bool = False
    family: str | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.rank, int) or isinstance(self.rank, bool) or not 1 <= self.rank <= MAX_RANK:
            raise AdapterError(f"rank (r) must be a whole number from 1 to {MAX_RANK}, got {self.rank!r}")
        if not isinstance(self.alpha, (int, float)) or not 0 < self.alpha <= sys.float_info.max:
            raise AdapterError(f"lora_alpha must be a positive number, got {self.alpha!r}")
        if not self.target_modules:
            raise AdapterError("target_modules is empty; name at least one module")
        if not isinstance(self.fan_in_fan_out, bool):
            raise AdapterError(f"fan_in_fan_out must be true or false, got {self.fan_in_fan_out!r}")
        for name in ("base_fingerprint", "family"):
            if not isinstance(getattr(self, name), str | None):
                raise AdapterError(f"{name} must be a string or null, got {getattr(self, name)!r:.80}")
        if not all(isinstance(head, str) and head for head in self.modules_to_save):
            raise AdapterError(f"modules_to_save must name modules, got {self.modules_to_save!r:.80}")
        # The order means nothing to peft, so specifications that differ only in it are equal.
        object.__setattr__(self, "target_modules", tuple(sorted(self.target_modules)))
        object.__setattr__(self, "modules_to_save", tuple(sorted(self.modules_to_save)))

    @property
    def scaling(self) -> float:
        """The factor alpha / rank in front of B · A, by peft's word for it."""
        return self.alpha / self.rank

    def targets(self, module_name: str) -> bool:
        """Return whether the module with this full name is one of the adapted ones (peft's suffix rule; never a part of a head)."""
        return not self.saves(module_name) and any(suffix in self.target_modules for suffix in name_suffixes(module_name))

    def saves(self, name: str) -> bool:
        """Return whether the module or parameter with this full name is a head, or a part of one."""
        return any(name == head or name.startswith(head + ".") for head in self.modules_to_save)

    def to_json(self) -> dict[str, Any]:
        """Return a JSON-ready description; `from_json` reads it back. What came later stands in it only where it says something."""
        facts = {**self.__dict__, "target_modules": list(self.target_modules), "modules_to_save": list(self.modules_to_save)}
        return {name: value for name, value in facts.items() if value or name not in ("modules_to_save", "fan_in_fan_out", "family")}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> LoraSpec:
        """Read what `to_json` wrote."""
        try:
            lists = {name: tuple(data.get(name, ())) for name in ("target_modules", "modules_to_save")}
            return cls(**{**data, **lists})
        except (KeyError, TypeError, AttributeError) as error:
            raise AdapterError(f"not a LoRA specification: {error}") from error


def name_suffixes(module_name: str) -> Iterator[str]:
    """Yield what may stand in `target_modules` for a module: its full name "a.b.c", then "b.c", then "c"."""
    yield module_name
    while "." in module_name:
        module_name = module_name.partition(".")[2]
        yield module_name


def base_fingerprint(model: nn.Module, spec: LoraSpec) -> str:
    """Return what tells a base model from others of its shape: a sha256 of its weights in float16, "+", and one of them in bfloat16.

    Each is over the shape-giving entries of `model.config` and the targeted weights, rounded; heads are the adapter's own. A base that
    is loaded in half precision has one of the two of its float32 form, so `same_base` compares them one by one. Hashing takes a second
    for a billion weights: a model is hashed once, until its weights change.
    """
    linears = target_linears(model, spec)
    weights = [module.weight for module in linears.values()]
    state = [_shape_entries(model), *linears, *(_state(weight) for weight in weights)]
    known = _FINGERPRINTS.get(model)
    if known is None or known[0] != state:
        known = state, "+".join(_digest(model, linears, dtype) for dtype in (torch.float16, torch.bfloat16))
        _FINGERPRINTS[model] = known
    return known[1]


_FINGERPRINTS: WeakKeyDictionary[nn.Module, tuple[list[Any], str]] = WeakKeyDictionary()


def _state(weight: torch.Tensor) -> tuple[int, int, float]:
    """Return what is another where weights were changed: their place, autograd's count of changes, the sum of some hundred of them.

    The sum is for changes behind autograd's back, and for models made in inference mode, whose changes are not counted.
    """
    flat = weight.detach().reshape(-1)
    changes = 0 if weight.is_inference() else weight._version
    return weight.data_ptr(), changes, float(flat[:: max(1, len(flat) // 500)].float().sum())


def _shape_entries(model: nn.Module) -> str:
    config = getattr(model, "config", {})
    named = ("model_type", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "vocab_size")
    return json.dumps({name: getattr(config, name, None) for name in named})


def _digest(model: nn.Module, linears: Mapping[str, nn.Linear | nn.Conv2d | Conv1D], dtype: torch.dtype) -> str:
    digest = hashlib.sha256(_shape_entries(model).encode())
    for name, module in linears.items():
        digest.update(name.encode())
        digest.update(module.weight.detach().to("cpu", dtype).contiguous().view(torch.int16).numpy().tobytes())
    return digest.hexdigest()


def same_base(recorded: str, found: str) -> bool:
    """Return whether fingerprints are of one base model, in whatever precision it was loaded. Those of 0.1.0 are of float16 only."""
    return any(first == second for first, second in zip(recorded.split("+"), found.split("+"), strict=False))


def target_linears(model: nn.Module, spec: LoraSpec) -> dict[str, nn.Linear | nn.Conv2d | Conv1D]:
    """Return the linear modules of `model` that `spec` targets, convolutions too, by name; raise `AdapterError` if there are none."""
    found = {name: module for name, module in sorted(model.named_modules()) if spec.targets(name)}
    if not found:
        raise AdapterError(
            f"the model ({type(model).__name__}) has no module named {sorted(spec.target_modules)}; "
            f"these adapters are for {spec.base_model or 'another base model'}"
        )
    for name, module in found.items():
        if is_transposed(module):
            from transformers.pytorch_utils import Conv1D

            if not isinstance(module, Conv1D):
                raise AdapterError(
                    f"module {name!r} is a {type(module).__name__}, expected a Linear, Conv2d or Conv1D (is an adapter already merged in?)"
                )
    return found


def is_transposed(module: nn.Module) -> bool:
    """Return whether a targeted module keeps its weight as (in, out): it is a Conv1D, and no Linear or Conv2d."""
    return not isinstance(module, (nn.Linear, nn.Conv2d))


def update_shape(module: nn.Linear | nn.Conv2d | Conv1D) -> tuple[int, int]:
    """Return the shape (out, in) of a targeted module's ΔW; of a convolution (out, in · height · width)."""
    rows, columns = module.weight.flatten(1).shape
    return (columns, rows) if is_transposed(module) else (rows, columns)


def head_modules(model: nn.Module, spec: LoraSpec) -> dict[str, nn.Module]:
    """Return the modules of the heads of `model` that have parameters of their own, by full name.

    Raises:
        AdapterError: a head is missing.
    """
    parts = {}
    for head in spec.modules_to_save:
        try:
            module = model.get_submodule(head)
        except AttributeError as error:
            raise AdapterError(
                f"the model ({type(model).__name__}) has no module {head!r}, which the adapter brings whole; load the base with the class "
                "that it was trained with, such as AutoModelForSequenceClassification.from_pretrained(…, num_labels=…)"
            ) from error
        for name, part in module.named_modules(prefix=head):
            if next(part.parameters(recurse=False), None) is not None:
                parts[name] = part
    return parts


def adapted_module(model: Any) -> nn.Module:
    """Return `model` itself, the model of a backbone, or the denoiser (`transformer` or `unet`) of a diffusers pipeline: where LoRAs go."""
    for candidate in (model, *(getattr(model, name, None) for name in ("model", "transformer", "unet"))):
        if isinstance(candidate, nn.Module):
            return candidate
    raise AdapterError(f"expected a model or a diffusers pipeline with a transformer or unet, got {type(model).__name__}")
