"""How an adapter acts: attached to the modules of a base model by forward hooks, and detached again."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from cond_pdiff.errors import AdapterError
from cond_pdiff.locks import lock_of
from cond_pdiff.lora import KEY_PREFIX, LoraSpec, head_linears, target_linears, update_shape


def check_shapes(spec: LoraSpec, tensors: Mapping[str, torch.Tensor], model: nn.Module) -> None:
    """Raise `AdapterError` unless every targeted module of `model` has an update of its shape, and every head a tensor of its own."""
    linears = target_linears(model, spec)
    for name in sorted(set(linears) ^ set(adapted_names(tensors))):
        where = "the model but not in the adapter" if name in linears else "the adapter but not in the model"
        raise AdapterError(f"module {name!r} is in {where}; is this the base {spec.base_model!r}?")
    for name, linear in linears.items():
        lora_a, lora_b = factors_of(tensors, name)
        rows, columns = update_shape(linear, spec)
        found = lora_b.shape[0], lora_a[0].numel()
        if found != (rows, columns) or (lora_a.ndim == 4) != isinstance(linear, nn.Conv2d):
            raise AdapterError(f"module {name!r} is {rows}×{columns}, but the adapter's update is {found[0]}×{found[1]}")
        if isinstance(linear, nn.Conv2d) and (lora_a.shape[2:] != linear.weight.shape[2:] or linear.groups > 1):
            raise AdapterError(f"module {name!r} is a {linear}, to which kernels of {tuple(lora_a.shape[2:])} cannot be attached")
    _check_head(spec, tensors, model)


def _check_head(spec: LoraSpec, tensors: Mapping[str, torch.Tensor], model: nn.Module) -> None:
    wanted = {
        f"{KEY_PREFIX}{name}.{part}": tuple(parameter.shape)
        for name, linear in head_linears(model, spec).items()
        for part, parameter in linear.named_parameters()
    }
    head = {key: tensor for key, tensor in tensors.items() if spec.saves(key.removeprefix(KEY_PREFIX))}
    for key in sorted(wanted.keys() | head.keys()):
        if key not in head or key not in wanted:
            raise AdapterError(f"{'missing' if key in wanted else 'unexpected'} tensor {key!r} of the head")
        if tuple(head[key].shape) != wanted[key]:
            raise AdapterError(
                f"tensor {key!r} of the head has shape {tuple(head[key].shape)}, but the model's is {wanted[key]}; "
                "was the base loaded with as many labels?"
            )


def adapted_names(keys: Iterable[str]) -> list[str]:
    """Return the names of the modules that have an update, from the keys of an adapter's tensors; sorted."""
    return sorted(key.removeprefix(KEY_PREFIX).rpartition(".lora_A.")[0] for key in keys if ".lora_A." in key)


def factors_of(tensors: Mapping[str, torch.Tensor], module: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the factors (A, B) of one module from an adapter's tensors."""
    return tensors[f"{KEY_PREFIX}{module}.lora_A.weight"], tensors[f"{KEY_PREFIX}{module}.lora_B.weight"]


def attach(spec: LoraSpec, tensors: Mapping[str, torch.Tensor], model: nn.Module, scale: float) -> Attachment:
    """Add scale · ΔW to the targeted layers of a model that `check_shapes` has seen, and put the adapter's heads in the place of its own.

    Raises:
        AdapterError: another adapter has its head on the model.
    """
    with lock_of(model):
        hooks: list[tuple[nn.Module, UpdateHook | HeadHook]] = []
        for name in adapted_names(tensors):
            linear = model.get_submodule(name)
            weight: torch.Tensor = linear.weight  # type: ignore[assignment]
            lora_a, lora_b = (factor.to(weight.device, weight.dtype) for factor in factors_of(tensors, name))
            kind = ConvUpdateHook if lora_a.ndim == 4 else UpdateHook
            hooks.append((linear, kind(lora_a, lora_b * (scale * spec.scaling))))
        for name, head in head_linears(model, spec).items():
            if HeadHook.on(head):
                raise AdapterError(f"another adapter has its head on {name!r}; detach it first, or mix the two with interpolate")
            parts = {part: tensors[f"{KEY_PREFIX}{name}.{part}"].to(head.weight) for part, _ in head.named_parameters()}
            hooks.append((head, HeadHook(parts["weight"], parts.get("bias"))))
        return Attachment([layer.register_forward_hook(hook) for layer, hook in hooks], lock_of(model))


@contextlib.contextmanager
def attached_to_groups(model: nn.Module, spec: LoraSpec, tensors: Mapping[str, torch.Tensor]) -> Iterator[None]:
    """Attach several adapters at once, each to its own group of the rows of every batch; gradients flow into their tensors.

    The thread has the model to itself inside the block, as in `LoraAdapter.attached`.

    Args:
        model: the base model, which is not checked.
        spec: of all adapters; without heads.
        tensors: an adapter's keys → the tensors of all adapters, shape `(adapters, *shape)`. A batch has equally many neighbouring
            rows for each adapter.
    """
    hooks = {}
    for name, linear in target_linears(model, spec).items():
        lora_a, lora_b = (tensors[f"{KEY_PREFIX}{name}.{factor}.weight"] for factor in ("lora_A", "lora_B"))
        hooks[linear] = GroupedUpdateHook(lora_a, lora_b, spec.scaling)
    with lock_of(model):
        attachment = Attachment([linear.register_forward_hook(hook) for linear, hook in hooks.items()], lock_of(model))
        try:
            yield
        finally:
            attachment.detach()


class Attachment:
    """The attachment of an adapter to a model; `detach` removes it. The base model's weights are never written to."""

    def __init__(self, handles: list[RemovableHandle], lock: threading.RLock) -> None:
        self._handles, self._lock = handles, lock

    def detach(self) -> None:
        """Remove the adapter from the model, once no other thread is using it; calling it again does nothing."""
        with self._lock:
            while self._handles:
                self._handles.pop().remove()


@dataclass(frozen=True, eq=False)
class UpdateHook:
    """A forward hook that adds B · A · x to a linear layer's output."""

    lora_a: torch.Tensor
    lora_b: torch.Tensor

    def __call__(self, module: nn.Module, args: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
        """Return the layer's output with the update added."""
        return output + nn.functional.linear(nn.functional.linear(args[0], self.lora_a), self.lora_b)


@dataclass(frozen=True, eq=False)
class ConvUpdateHook(UpdateHook):
    """A forward hook that adds to a convolution's output that of a convolution into rank channels, and of one by 1 × 1 out of them."""

    def __call__(self, module: nn.Module, args: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
        """Return the convolution's output with the update added."""
        assert isinstance(module, nn.Conv2d)
        inner = module._conv_forward(args[0], self.lora_a, None)
        return output + nn.functional.conv2d(inner, self.lora_b)


@dataclass(frozen=True, eq=False)
class GroupedUpdateHook:
    """A forward hook that adds to each group of a batch the update of its own adapter.

    Args:
        lora_a: of each group, shape `(groups, rank, in)`.
        lora_b: of each group, shape `(groups, out, rank)`; an optimiser may change it while it is attached.
        scale: alpha / rank.
    """

    lora_a: torch.Tensor
    lora_b: torch.Tensor
    scale: float

    def __call__(self, module: nn.Module, args: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
        """Return the layer's output with every group's update added."""
        rows = args[0].reshape(len(self.lora_b), -1, args[0].shape[-1])
        return output + (self.scale * (rows @ self.lora_a.mT) @ self.lora_b.mT).reshape(output.shape)


@dataclass(frozen=True, eq=False)
class HeadHook:
    """A forward hook that puts another layer's output in the place of a linear layer's."""

    weight: torch.Tensor
    bias: torch.Tensor | None

    def __call__(self, module: nn.Module, args: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
        """Return the other layer's output for the same input."""
        return nn.functional.linear(args[0], self.weight, self.bias)

    @staticmethod
    def on(module: nn.Module) -> bool:
        """Return whether the layer has such a hook."""
        return any(isinstance(hook, HeadHook) for hook in module._forward_hooks.values())
