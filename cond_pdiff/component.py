"""Component: the base class of everything that a generator saves."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from diffusers.configuration_utils import ConfigMixin
from diffusers.models.modeling_utils import ModelMixin

from cond_pdiff.errors import CondPDiffError, HubError
from cond_pdiff.locks import LOADING

COMPONENTS: dict[str, type] = {}
"""The classes that `register_component` was given, by name."""

Class = TypeVar("Class", bound=type)


def register_component(component: Class) -> Class:
    """Make a class of components known under its name; a decorator.

    `model_index.json` of a saved generator names it as `cond_pdiff.<name>`, and recipes by its name: whoever loads such a generator
    imports the module that registers the class before. So no file decides what is imported.

    Raises:
        CondPDiffError: another class has its name.
    """
    name = component.__name__
    if COMPONENTS.setdefault(name, component) is not component:
        raise CondPDiffError(f"there is a component {name} already; give that of {component.__module__} another name")
    component.__module__ = "cond_pdiff"
    return component


class PathlessConfig(ConfigMixin):
    """A diffusers config that does not keep the folder it was loaded from: it would be saved, and published, with what is saved again."""

    def register_to_config(self, **kwargs: Any) -> None:
        """Set entries of the config."""
        kwargs.pop("_name_or_path", None)
        super().register_to_config(**kwargs)


class Component(ModelMixin, PathlessConfig):  # type: ignore[misc]  # both define config_name, as in every diffusers model
    """A diffusers model whose weights are safetensors, always: a pickle is never read, also not from a local folder.

    Subclasses are given to `register_component`: `model_index.json` then names a component by its public place, which stays when code
    moves.
    """

    config: Any

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, **kwargs: Any) -> Any:
        """Load a component as any diffusers model, from safetensors only.

        Raises:
            HubError: a tensor is missing (diffusers would go on with random numbers), or there is one that does not belong.
        """
        report = bool(kwargs.pop("output_loading_info", False))
        with LOADING:
            loaded: Any = super().from_pretrained(  # diffusers annotates the model alone, also where it returns a pair
                pretrained_model_name_or_path, **{**kwargs, "use_safetensors": True, "output_loading_info": True}
            )
        model, info = loaded
        for what in ("missing_keys", "unexpected_keys"):
            if info[what]:
                raise HubError(
                    f"the weights in {pretrained_model_name_or_path} are not those of a {cls.__name__}: "
                    f"{what.replace('_', ' ')} {sorted(info[what])[:3]}"
                )
        for tensor in (*model.parameters(), *model.buffers()):
            # As loaded, weights lie where the file has them; sums over memory that is aligned in another way round differently.
            tensor.data = tensor.data.clone()
        return (model, info) if report else model

    def to(self, *args: Any, **kwargs: Any) -> Any:  # type: ignore[override]  # diffusers wraps torch's, whose types are not to be had
        """Move and cast as any diffusers model, without its warning at every cast about modules to be kept in float32: there are none."""
        dtypes = [value for value in (*args, kwargs.pop("dtype", None)) if isinstance(value, torch.dtype)]
        if dtypes:
            torch.nn.Module.to(self, dtypes[0])
        return super().to(*(value for value in args if not isinstance(value, torch.dtype)), **kwargs)


class ExactComponent(Component):
    """A component that holds measured numbers and no network: in whatever precision a pipeline is loaded or cast to, they stay float32."""

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, **kwargs: Any) -> Any:
        """Load as `Component.from_pretrained` does, in float32."""
        kwargs.pop("torch_dtype", None)
        return super().from_pretrained(pretrained_model_name_or_path, **{**kwargs, "dtype": torch.float32})

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Any:
        # What `to`, `half`, `cuda` … do to every tensor: here, the moving without the casting.
        def move(tensor: torch.Tensor) -> torch.Tensor:
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        return super()._apply(move, recurse)
