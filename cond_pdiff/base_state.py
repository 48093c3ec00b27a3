"""The states of a base model in which an adapter would not act: refused before it is attached, or seen in the model's first run."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from cond_pdiff.errors import AdapterError

if TYPE_CHECKING:
    from torch.utils.hooks import RemovableHandle

    from cond_pdiff.lora import LoraSpec

COMPILED_WRAPPER = "_orig_mod"
"""The name under which what `torch.compile` returns holds the module that was compiled."""

FUSED_PROJECTIONS = ("to_q", "to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj")
"""The layers of diffusers' attention that `fuse_qkv_projections` replaces; they stay in the model, and are not run."""

KEPT_IN_MEMORY = (
    "load it whole (without device_map or sequential offloading), or with offloading that keeps weights in memory: "
    "a pipeline's enable_model_cpu_offload(), or group offloading without offload_to_disk_path"
)


def check_state(model: nn.Module, spec: LoraSpec) -> None:
    """Refuse a model on which an adapter would do nothing, or something else than it should, in the state in which the model is now.

    These are compiled modules, weights that are not in memory, fused projections, quantised weights, and adapters that peft or diffusers
    put on it.

    Raises:
        AdapterError: names the module and its state, and says what to do. The model is only read.
    """
    modules = dict(model.named_modules())
    for name, module in modules.items():
        if type(module).__module__.partition(".")[0] == "peft":
            raise AdapterError(
                f"{_called(name)} is peft's {type(module).__name__}: the model has an adapter on it already, or had one merged in; take it "
                "off first (peft: unload(), diffusers: unload_lora_weights()), or load that one as a LoraAdapter, too: updates add up"
            )
    adapted = [name for name in modules if _belongs(name, spec)]
    for holder in dict.fromkeys(holder for name in adapted for holder in _holders(name)):
        _check_runs_hooks(holder, modules[holder])
    for name in adapted:
        _check_weights(name, modules[name])
        parent, _, leaf = name.rpartition(".")
        if leaf in FUSED_PROJECTIONS and _is_fused(modules[parent]):
            raise AdapterError(
                f"the projections of {_called(parent)} are fused, so {name!r} is not run; "
                "call unfuse_qkv_projections() on the model or pipeline, and leave it so while the adapter is attached"
            )


def check_trainable(model: nn.Module, spec: LoraSpec) -> None:
    """Refuse a model through which no gradients can be sent to an adapter that is attached to it, beside all that `check_state` refuses.

    Raises:
        AdapterError: a part of it is compiled, quantised, offloaded, or was made in inference mode.
    """
    check_state(model, spec)
    for name, module in model.named_modules():
        hooks = getattr(getattr(module, "_diffusers_hook", None), "hooks", {})
        if hasattr(module, "_hf_hook") or any(hasattr(hook, "group") for hook in hooks.values()):
            raise AdapterError(
                f"the weights of {_called(name)} are moved for each run (offloading), which training does not survive; load the base whole"
            )
        _check_runs_hooks(name, module)
        _check_weights(name, module)
        if any(parameter.is_inference() for parameter in module.parameters(recurse=False)):
            raise AdapterError(f"the weights of {_called(name)} were made in inference mode; load the base outside torch.inference_mode()")


def _belongs(name: str, spec: LoraSpec) -> bool:
    plain = name.replace(f"{COMPILED_WRAPPER}.", "")
    return spec.targets(plain) or spec.saves(plain)


def _holders(name: str) -> list[str]:
    """Return the names of the modules that hold a module, from the model ("") to itself."""
    parts = name.split(".")
    return ["", *(".".join(parts[: count + 1]) for count in range(len(parts)))]


def _called(name: str) -> str:
    return f"module {name!r}" if name else "the model"


def _is_compiled(module: nn.Module) -> bool:
    compiled = COMPILED_WRAPPER in module._modules or module._compiled_call_impl is not None
    return compiled or hasattr(vars(module).get("forward"), "_torchdynamo_orig_callable")


def _check_runs_hooks(name: str, module: nn.Module) -> None:
    """Refuse a module that holds adapted ones, and whose code may stand for theirs or move their weights."""
    if _is_compiled(module):
        raise AdapterError(
            f"{_called(name)} is compiled, and compiled code does not see an adapter that is attached later; "
            "attach the adapter to the model as it was loaded, and compile that after it"
        )
    hooks = getattr(getattr(module, "_diffusers_hook", None), "hooks", {})
    if any(getattr(getattr(hook, "group", None), "offload_to_disk_path", None) for hook in hooks.values()):
        raise AdapterError(f"the weights of {_called(name)} are offloaded to a disk by diffusers; {KEPT_IN_MEMORY}")


def _check_weights(name: str, module: nn.Module) -> None:
    """Refuse weights that cannot be read, or that are no plain numbers in floating point."""
    if any(parameter.is_meta for parameter in module.parameters(recurse=False)):
        raise AdapterError(f"the weights of {_called(name)} are not in memory (on 'meta': offloaded, or not loaded yet); {KEPT_IN_MEMORY}")
    weight: Any = getattr(module, "qweight", getattr(module, "weight", None))
    if not isinstance(weight, torch.Tensor):
        quantised = callable(weight)  # torch's own quantised layers unpack it in a method
    else:
        quantised = type(weight) not in (nn.Parameter, torch.Tensor) or not weight.is_floating_point() or weight.itemsize < 2
    if quantised:
        kind = f"{type(weight).__name__} of {weight.dtype}" if isinstance(weight, torch.Tensor) else "packed"
        raise AdapterError(
            f"{_called(name)} is a {type(module).__name__} with quantised weights ({kind}), which cannot be compared with the base that "
            "the adapter was made for; load the base in float32, float16 or bfloat16 (without quantization_config or a storage dtype), "
            "or put the adapter on it with peft"
        )


def _is_fused(parent: nn.Module) -> bool:
    if not getattr(parent, "fused_projections", False):
        return False
    from diffusers.models.attention_processor import Attention

    # diffusers' older attention keeps the mark when it is unfused: there it is the processor that tells.
    return not isinstance(parent, Attention) or "Fused" in type(parent.processor).__name__


class FirstRun:
    """A watch over the first run of a model with an adapter, which sees whether the adapted layers are run at all.

    A layer that stands in a model is not run if its weights are read in another way (as `torch.nn.MultiheadAttention` does with those
    of `out_proj`), or if its caller was replaced. In that run, and no later one, each layer is asked for; a model that has been compiled
    by then is not watched.

    Args:
        model: the model whose run is watched.
        layers: the adapted layers, by name.
    """

    def __init__(self, model: nn.Module, layers: Mapping[str, nn.Module]) -> None:
        self._count, self._waiting, self._begun = len(layers), dict.fromkeys(layers), set[int]()
        self.handles: list[RemovableHandle] = [
            *(layer.register_forward_pre_hook(partial(self._see, name)) for name, layer in layers.items()),
            model.register_forward_pre_hook(self._begin),
            model.register_forward_hook(self._judge),
        ]

    def _see(self, name: str, layer: nn.Module, args: object) -> None:
        if not torch.compiler.is_compiling():
            self._waiting.pop(name, None)

    def _begin(self, model: nn.Module, args: object) -> None:
        if not torch.compiler.is_compiling():
            self._begun.add(threading.get_ident())

    def _judge(self, model: nn.Module, args: object, output: object) -> None:
        """End the watch; raise `AdapterError` if none of the layers was run, and warn if some were not."""
        # Another thread may have been in the middle of a run when the adapter was attached.
        if torch.compiler.is_compiling() or threading.get_ident() not in self._begun:
            return
        handles, self.handles = self.handles, []
        for handle in handles:
            handle.remove()
        if not self._waiting or any(map(_is_compiled, model.modules())):
            return
        names = ", ".join(map(repr, list(self._waiting)[:3])) + (", …" if len(self._waiting) > 3 else "")
        if len(self._waiting) == self._count:
            raise AdapterError(
                f"the model ran, but none of the adapter's {self._count} modules in it ({names}) did, so the adapter has no effect; "
                "has the model been compiled, fused or wrapped since it was loaded? Load it anew, and attach the adapter first"
            )
        warnings.warn(
            f"{len(self._waiting)} of the adapter's {self._count} modules were not run by the model ({names}); "
            "their part of the adapter had no effect",
            stacklevel=2,
        )
