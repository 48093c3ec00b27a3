"""Component: the base class of everything that a generator saves."""

from __future__ import annotations

from typing import Any

from diffusers.configuration_utils import ConfigMixin
from diffusers.models.modeling_utils import ModelMixin

from cond_pdiff.errors import HubError
from cond_pdiff.locks import LOADING


class PathlessConfig(ConfigMixin):
    """A diffusers config that does not keep the folder it was loaded from: it would be saved, and published, with what is saved again."""

    def register_to_config(self, **kwargs: Any) -> None:
        """Set entries of the config."""
        kwargs.pop("_name_or_path", None)
        super().register_to_config(**kwargs)


class Component(ModelMixin, PathlessConfig):  # type: ignore[misc]  # both define config_name, as in every diffusers model
    """A diffusers model whose weights are safetensors, always: a pickle is never read, also not from a local folder.

    Subclasses set `__module__ = "cond_pdiff"`: `model_index.json` then names a component by its public place, which stays
    when code moves.
    """

    config: Any

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, **kwargs: Any) -> Any:
        """Load as any diffusers model, from safetensors only.

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
