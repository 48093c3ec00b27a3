"""How an adapter acts: attached to the modules of a base model by forward hooks, and detached again."""

from __future__ import annotations

import contextlib
import copy
import math
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from cond_pdiff.base_state import FirstRun, check_state
from cond_pdiff.errors import AdapterError
from cond_pdiff.guidance import PositiveSide, Watched
from cond_pdiff.layout import tensor_shapes
from cond_pdiff.locks import lock_of
from cond_pdiff.lora import KEY_PREFIX, LoraSpec, head_modules, target_linears, update_shape


def check_shapes(spec: LoraSpec, tensors: Mapping[str, torch.Tensor], model: nn.Module) -> None:
    """Raise `AdapterError` unless every targeted module of `model` has an update of its shape, and every head a tensor of its own."""
    linears = target_linears(model, spec)
    for name in sorted(set(linears) ^ set(adapted_names(tensors))):
        where = "the model but not in the adapter" if name in linears else "the adapter but not in the model"
        raise AdapterError(f"module {name!r} is in {where}; is this the base {spec.base_model!r}?")
    shapes = tensor_shapes(tensors)
    for name, linear in linears.items():
        lora_a, lora_b = (shapes[f"{KEY_PREFIX}{name}.{factor}.weight"] for factor in ("lora_A", "lora_B"))
        rows, columns = update_shape(linear)
        found = lora_b[0], math.prod(lora_a[1:])
        if found != (rows, columns) or (len(lora_a) == 4) != isinstance(linear, nn.Conv2d):
            raise AdapterError(f"module {name!r} is {rows}×{columns}, but the adapter's update is {found[0]}×{found[1]}")
        if isinstance(linear, nn.Conv2d) and (lora_a[2:] != tuple(linear.weight.shape[2:]) or linear.groups > 1):
            raise AdapterError(f"module {name!r} is a {linear}, to which kernels of {lora_a[2:]} cannot be attached")
    _check_head(spec, shapes, model)


def _check_head(spec: LoraSpec, shapes: Mapping[str, tuple[int, ...]], model: nn.Module) -> None:
    wanted = {
        f"{KEY_PREFIX}{name}.{part}": tuple(parameter.shape)
        for name, module in head_modules(model, spec).items()
        for part, parameter in module.named_parameters(recurse=False)
    }
    head = {key: shape for key, shape in shapes.items() if spec.saves(key.removeprefix(KEY_PREFIX))}
    for key in sorted(wanted.keys() | head.keys()):
        if key not in head or key not in wanted:
            raise AdapterError(f"{'missing' if key in wanted else 'unexpected'} tensor {key!r} of the head")
        if head[key] != wanted[key]:
            raise AdapterError(
                f"tensor {key!r} of the head has shape {head[key]}, but the model's is {wanted[key]}; "
                "was the base loaded with as many labels?"
            )


def adapted_names(keys: Iterable[str]) -> list[str]:
    """Return the names of the modules that have an update, from the keys of an adapter's tensors; sorted."""
    return sorted(key.removeprefix(KEY_PREFIX).rpartition(".lora_A.")[0] for key in keys if ".lora_A." in key)


def factors_of(tensors: Mapping[str, torch.Tensor], module: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the factors (A, B) of one module from an adapter's tensors."""
    return tensors[f"{KEY_PREFIX}{module}.lora_A.weight"], tensors[f"{KEY_PREFIX}{module}.lora_B.weight"]


def attach(
    spec: LoraSpec, tensors: Mapping[str, torch.Tensor], model: nn.Module, scale: float, side: PositiveSide | None = None
) -> Attachment:
    """Add scale · ΔW to the targeted layers of a model that `check_shapes` has seen, and put the adapter's heads in the place of its own.

    In its first run the model raises `AdapterError` if it does not run any of these layers (see `FirstRun`).

    Args:
        side: the positive side of guidance, if ΔW is to be added on it alone.

    Raises:
        AdapterError: another adapter has its head on the model, or it is in a state in which adapters do not act (see `check_state`).
    """
    with lock_of(model):
        check_state(model, spec)
        hooks: dict[str, tuple[nn.Module, UpdateHook | PositiveHook | HeadHook]] = {}
        for name in adapted_names(tensors):
            linear = model.get_submodule(name)
            weight: torch.Tensor = linear.weight  # type: ignore[assignment]
            lora_a, lora_b = (factor.to(weight.device, weight.dtype) for factor in factors_of(tensors, name))
            kind = ConvUpdateHook if lora_a.ndim == 4 else UpdateHook
            hook = kind(lora_a, lora_b * (scale * spec.scaling))
            hooks[name] = linear, PositiveHook(hook, side) if side else hook
        for name, head in head_modules(model, spec).items():
            if HeadHook.on(head):
                raise AdapterError(f"another adapter has its head on {name!r}; detach it first, or mix the two with interpolate")
            own = head.named_parameters(recurse=False)
            hooks[name] = head, HeadHook({part: tensors[f"{KEY_PREFIX}{name}.{part}"].to(kept) for part, kept in own})
        watch = FirstRun(model, {name: layer for name, (layer, _) in hooks.items()})
        return Attachment([*_registered(hooks.values()), *watch.handles, *(side.watch() if side else ())], lock_of(model))


@contextlib.contextmanager
def attached_to_groups(model: nn.Module, spec: LoraSpec, tensors: Mapping[str, torch.Tensor]) -> Iterator[None]:
    """Attach several adapters at once, each to its own group of the rows of every batch; gradients flow into their tensors.

    The thread has the model to itself inside the block, as in `LoraAdapter.attached`.

    Args:
        model: the base model, which is not checked.
        spec: of all adapters; without heads.
        tensors: an adapter's keys → the tensors of all adapters, shape `(adapters, *shape)`. A batch has equally many neighbouring
            rows for each adapter.

    Raises:
        AdapterError: see `check_state`; or a targeted module is a convolution.
    """
    check_state(model, spec)
    hooks = {}
    for name, linear in target_linears(model, spec).items():
        if isinstance(linear, nn.Conv2d):
            raise AdapterError(f"module {name!r} is a convolution, on which adapters are trained one at a time only (--together 1)")
        hooks[linear] = GroupedUpdateHook(*factors_of(tensors, name), spec.scaling)
    with lock_of(model):
        attachment = Attachment(_registered(hooks.items()), lock_of(model))
        try:
            yield
        finally:
            attachment.detach()


Part = tuple[LoraSpec, Mapping[str, torch.Tensor]]
"""The specification and the tensors of an adapter."""


def attach_to_rows(model: nn.Module, rows: Sequence[Part | None]) -> Attachment:
    """Attach to each row of every batch an adapter of its own: row i goes through that of `rows[i]`, or through the base model (None).

    Adapters of one rank and the same modules that have equally many rows make one batched product a layer, so that n rows need at most
    about √(2n) products for each rank; every adapter in `rows` is copied once, and nothing else is.

    Args:
        model: the base model, which `check_shapes` has seen for each adapter.
        rows: the adapters of the rows; the same one is the same pair of objects. A batch may also have several neighbouring copies of each
            row, as generation with beams does; any other number of rows is refused when the model runs.

    Raises:
        AdapterError: an adapter brings a head or is of convolutions, or the model is in a state in which adapters do not act.
    """
    own: dict[int, tuple[Part, list[int]]] = {}
    for place, part in enumerate(rows):
        if part is not None:
            own.setdefault(id(part[1]), (part, []))[1].append(place)
    alike: dict[tuple[Any, ...], list[tuple[Part, list[int]]]] = {}
    for (spec, tensors), places in own.values():
        if spec.modules_to_save or any(tensor.ndim != 2 for tensor in tensors.values()):
            raise AdapterError(
                f"an adapter for {spec.base_model!r} brings a head, or updates convolutions; rows of one batch can have adapters of linear "
                "layers only: attach this one alone"
            )
        alike.setdefault((len(places), spec.rank, *adapted_names(tensors)), []).append(((spec, tensors), places))
    with lock_of(model):
        for spec in {spec.target_modules: spec for (spec, _), _ in own.values()}.values():
            check_state(model, spec)
        hooks = [hook for groups in alike.values() for hook in _row_hooks(model, groups, len(rows))]
        watch = FirstRun(model, {name: layer for name, layer, _ in hooks}) if hooks else None
        handles = _registered((layer, hook) for _, layer, hook in hooks)
        return Attachment([*handles, *(watch.handles if watch else ())], lock_of(model))


def _row_hooks(model: nn.Module, groups: Sequence[tuple[Part, list[int]]], total: int) -> Iterator[tuple[str, nn.Module, RowsUpdateHook]]:
    """Yield the hooks for adapters of one rank and the same modules, each with the places of its rows, which are equally many."""
    rows = torch.tensor([places for _, places in groups]).flatten()
    scalings = torch.tensor([spec.scaling for (spec, _), _ in groups])[:, None, None]
    for name in adapted_names(groups[0][0][1]):
        layer = model.get_submodule(name)
        weight: torch.Tensor = layer.weight  # type: ignore[assignment]
        factors = [[factor.to(weight.device, weight.dtype) for factor in factors_of(tensors, name)] for (_, tensors), _ in groups]
        lora_a, lora_b = map(torch.stack, zip(*factors, strict=True))
        yield name, layer, RowsUpdateHook(GroupedUpdateHook(lora_a, lora_b.mul_(scalings.to(lora_b)), 1.0), rows, total)


def _registered(hooks: Iterable[tuple[nn.Module, Callable[..., Any]]]) -> list[RemovableHandle | Mark | Watched]:
    handles: list[RemovableHandle | Mark | Watched] = []
    for layer, hook in hooks:
        handles += [Mark(layer), layer.register_forward_hook(hook, with_kwargs=isinstance(hook, HeadHook))]
    return handles


class Mark:
    """A mark on a layer with hooks, by which compiled code that knows nothing of them is not run for it.

    Dynamo takes code that it compiled for a layer, or for another like it, whether or not hooks were added since; but not where a layer
    has a `forward` of its own. So it gets its class's as its own: for everybody else, nothing has changed.
    """

    def __init__(self, layer: nn.Module) -> None:
        self._layer = layer
        vars(layer).setdefault("forward", layer.forward)

    def remove(self) -> None:
        """Take it away, unless there are other hooks."""
        forward = vars(self._layer).get("forward")
        if not self._layer._forward_hooks and getattr(forward, "__func__", None) is type(self._layer).forward:
            del self._layer.forward


class Attachment:
    """The attachment of an adapter to a model; `detach` removes it. The base model's weights are never written to."""

    def __init__(self, handles: list[RemovableHandle | Mark | Watched], lock: threading.RLock) -> None:
        self._handles, self._lock = handles, lock

    def detach(self) -> None:
        """Remove the adapter from the model, once no other thread is using it; calling it again does nothing."""
        with self._lock:
            while self._handles:
                self._handles.pop().remove()


@dataclass(frozen=True, eq=False)
class UpdateHook:
    """A forward hook that adds B · A · x to a linear layer's output.

    It computes where the output is and in its precision: weights may be moved for each run (offloading), or cast (autocast).
    """

    lora_a: torch.Tensor
    lora_b: torch.Tensor

    def __call__(self, module: nn.Module, args: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
        """Return the layer's output with the update added."""
        rows, lora_a, lora_b = (tensor.to(output) for tensor in (args[0], self.lora_a, self.lora_b))
        return output + nn.functional.linear(nn.functional.linear(rows, lora_a), lora_b)


@dataclass(frozen=True, eq=False)
class ConvUpdateHook(UpdateHook):
    """A forward hook that adds to a convolution's output that of a convolution into rank channels, and of one by 1 × 1 out of them."""

    def __call__(self, module: nn.Module, args: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
        """Return the convolution's output with the update added."""
        assert isinstance(module, nn.Conv2d)
        rows, lora_a, lora_b = (tensor.to(output) for tensor in (args[0], self.lora_a, self.lora_b))
        return output + nn.functional.conv2d(module._conv_forward(rows, lora_a, None), lora_b)


@dataclass(frozen=True, eq=False)
class PositiveHook:
    """A forward hook that adds what another one does on the positive side of guidance alone."""

    hook: UpdateHook
    side: PositiveSide

    def __call__(self, module: nn.Module, args: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
        """Return the layer's output with the update added on the positive side."""
        return self.side.merge(output, self.hook(module, args, output))


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
        rows, lora_a, lora_b = (tensor.to(output) for tensor in (args[0], self.lora_a, self.lora_b))
        rows = rows.reshape(len(lora_b), -1, rows.shape[-1])
        return output + (self.scale * (rows @ lora_a.mT) @ lora_b.mT).reshape(output.shape)


@dataclass(frozen=True, eq=False)
class RowsUpdateHook:
    """A forward hook that adds to some rows of a batch what a grouped hook makes of them.

    Args:
        grouped: the hook for these rows, group by group.
        rows: their places in the batch, shape `(rows of all groups,)`.
        total: the number of rows of the batch; it may have several neighbouring copies of each.
    """

    grouped: GroupedUpdateHook
    rows: torch.Tensor
    total: int

    def __call__(self, module: nn.Module, args: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
        """Return the layer's output with the updates added to the rows; `AdapterError` if the batch has other rows than it should."""
        given = args[0]
        copies, rest = divmod(len(given), self.total)
        if rest or not copies or (given.ndim == 2 and copies > 1):  # tokens of all rows in one, as experts of a mixture get them
            raise AdapterError(
                f"a layer was given an input of shape {tuple(given.shape)}, but adapters are attached to {self.total} rows; run the model "
                "on a batch of so many rows (or of equally many neighbouring copies of each), with layers that keep rows apart"
            )
        if self._is_whole:
            return self.grouped(module, args, output)
        places = (self.rows[:, None] * copies + torch.arange(copies)).flatten().to(output.device)
        return output.index_copy(0, places, self.grouped(module, (given[places],), output[places]))

    @cached_property
    def _is_whole(self) -> bool:
        return self.rows.tolist() == list(range(self.total))


@dataclass(frozen=True, eq=False)
class HeadHook:
    """A forward hook that puts the output of a module with other parameters in the place of the module's own; it takes keywords, too.

    Args:
        parameters: the name of each of the module's own parameters (not its children's) → another one.
    """

    parameters: Mapping[str, torch.Tensor]

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        """Return what the module makes of the same input with the other parameters, where its output is."""
        device = next(value.device for value in (output, *args, *kwargs.values()) if isinstance(value, torch.Tensor))
        inputs = [value.to(device) if isinstance(value, torch.Tensor) else value for value in args]
        others: dict[str, Any] = {name: parameter.to(device) for name, parameter in self.parameters.items()}
        replacement = copy.copy(module)  # shares all else, its children included
        replacement._parameters = {**module._parameters, **others}
        return type(module).forward(replacement, *inputs, **kwargs)  # not a call of the module: that would run this hook again

    @staticmethod
    def on(module: nn.Module) -> bool:
        """Return whether the module has such a hook."""
        return any(isinstance(hook, HeadHook) for hook in module._forward_hooks.values())
