"""The two sides of classifier-free guidance, as a denoiser is asked for them: with the prompt, and without it or with a negative one.

ε = ε(negative) + s · (ε(positive) − ε(negative)) (Ho and Salimans, "Classifier-free diffusion guidance", 2022, equation 6). An adapter that
acts on the positive side alone is in ε(positive) only, so that guidance leads towards it.
"""

from __future__ import annotations

import functools
import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
from torch import nn

from cond_pdiff.errors import AdapterError

if TYPE_CHECKING:
    from torch.utils.hooks import RemovableHandle


class PositiveSide(ABC):
    """What knows, while a denoiser runs, which rows of its batch are the positive side of guidance.

    Args:
        pipe: the pipeline, which asks its denoiser for both sides.
        denoiser: what adapters are attached to.
    """

    def __init__(self, pipe: Any, denoiser: nn.Module) -> None:
        self.pipe, self.denoiser = pipe, denoiser

    @abstractmethod
    def watch(self) -> list[RemovableHandle | Watched]:
        """Begin to follow the pipeline; return what ends that by `remove()`."""

    @abstractmethod
    def merge(self, plain: torch.Tensor, adapted: torch.Tensor) -> torch.Tensor:
        """Return the plain output of a layer on the negative side, and the adapted one on the positive."""


class BothHalves(PositiveSide):
    """The positive side of pipelines that ask for both at once: the second half of the batch, [negative, positive]."""

    def __init__(self, pipe: Any, denoiser: nn.Module) -> None:
        super().__init__(pipe, denoiser)
        self._told, self._half = False, 0
        self._signature = inspect.signature(type(pipe).encode_prompt)

    def watch(self) -> list[RemovableHandle | Watched]:
        """Follow what the pipeline tells `encode_prompt` of guidance, and every batch."""
        return [Watched(self.pipe, "encode_prompt", self._listen), self.denoiser.register_forward_pre_hook(self._look, with_kwargs=True)]

    def _listen(self, *args: Any, **kwargs: Any) -> None:
        given = self._signature.bind(self.pipe, *args, **kwargs)
        given.apply_defaults()
        self._told = bool(given.arguments["do_classifier_free_guidance"])

    def _look(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        # Not every pipeline has the property; where there is one, it follows a callback that ends guidance half way.
        guided = bool(getattr(self.pipe, "do_classifier_free_guidance", self._told))
        noisy = args[0] if args else kwargs[next(iter(inspect.signature(module.forward).parameters))]
        half = len(noisy) // 2
        if guided and (len(noisy) % 2 or not torch.equal(noisy[:half], noisy[half:])):
            raise AdapterError(
                f"{type(self.pipe).__name__} asked its denoiser for {len(noisy)} rows that are no two halves of guidance (as with skipped "
                "layers, say), so it cannot be told which are the positive side; attach the adapter without positive_only"
            )
        self._half = half if guided else 0

    def merge(self, plain: torch.Tensor, adapted: torch.Tensor) -> torch.Tensor:
        """Return the plain first half and the adapted second one; a layer's first dimension is that of the batch."""
        if not self._half:
            return adapted
        if len(plain) != 2 * self._half:
            raise AdapterError(
                f"a layer runs {len(plain)} rows for a batch of {2 * self._half}, so its sides of guidance cannot be told apart; "
                "attach the adapter without positive_only"
            )
        return torch.cat([plain[: self._half], adapted[self._half :]])


class TwoCalls(PositiveSide):
    """The positive side of pipelines that call their denoiser twice: every call but those that they announce as "uncond"."""

    _is_negative = False

    def watch(self) -> list[RemovableHandle | Watched]:
        """Follow the names that the pipeline gives to its calls, each until it is done."""
        ended = self.denoiser.register_forward_hook(lambda *_: self._listen(""), always_call=True)
        return [Watched(self.denoiser, "cache_context", self._listen), ended]

    def _listen(self, name: str, *args: Any, **kwargs: Any) -> None:
        self._is_negative = name == "uncond"

    def merge(self, plain: torch.Tensor, adapted: torch.Tensor) -> torch.Tensor:
        """Return all of one or the other."""
        return plain if self._is_negative else adapted


HALVES = (
    *("StableDiffusionPipeline", "StableDiffusionImg2ImgPipeline", "StableDiffusionInpaintPipeline"),
    *("StableDiffusionXLPipeline", "StableDiffusionXLImg2ImgPipeline", "StableDiffusionXLInpaintPipeline"),
    *("StableDiffusion3Pipeline", "StableDiffusion3Img2ImgPipeline", "StableDiffusion3InpaintPipeline"),
    *("PixArtAlphaPipeline", "PixArtSigmaPipeline"),
)
CALLS = (
    *("FluxPipeline", "CogView4Pipeline", "LongCatImagePipeline"),
    *("QwenImagePipeline", "QwenImageImg2ImgPipeline", "QwenImageInpaintPipeline"),
)
SIDES: dict[str, type[PositiveSide]] = {**dict.fromkeys(HALVES, BothHalves), **dict.fromkeys(CALLS, TwoCalls)}
"""How diffusers' pipelines ask for the two sides, by the name of their class; `tests/test_guidance.py` compares each with its code."""


def positive_side(pipe: Any, denoiser: nn.Module) -> PositiveSide:
    """Return what tells the positive side of a pipeline's guidance.

    Raises:
        AdapterError: it is no pipeline, or none that is known; or its guidance is distilled into the denoiser, which is asked once.
    """
    names = [kind.__name__ for kind in type(pipe).__mro__]
    kind = next((SIDES[name] for name in names if name in SIDES), None)
    if kind is None:
        raise AdapterError(
            f"positive_only needs a diffusers pipeline whose guidance is known here ({', '.join(SIDES)}), got a {names[0]}: a denoiser "
            "does not say which of its rows are the positive side"
        )
    config: Any = getattr(denoiser, "config", {})
    if config.get("guidance_embeds") or config.get("time_cond_proj_dim") is not None:
        entry = "guidance_embeds" if config.get("guidance_embeds") else "time_cond_proj_dim"
        raise AdapterError(
            f"the guidance of this {names[0]} is distilled into its denoiser ({entry}), which is asked once, for both sides; "
            "attach the adapter without positive_only"
        )
    return kind(pipe, denoiser)


_LISTENERS: WeakKeyDictionary[Any, dict[str, list[Callable[..., None]]]] = WeakKeyDictionary()


@dataclass(frozen=True, eq=False)
class Watched:
    """A listener that is told the arguments of every call of a method of one object, before the call.

    The object gets a method of its own while it has listeners, and its class's back after the last.
    """

    owner: Any
    method: str
    listener: Callable[..., None]

    def __post_init__(self) -> None:
        listeners = _LISTENERS.setdefault(self.owner, {}).setdefault(self.method, [])
        listeners.append(self.listener)
        if len(listeners) == 1:
            vars(self.owner)[self.method] = _telling(getattr(self.owner, self.method), listeners)

    def remove(self) -> None:
        """Listen no more."""
        listeners = _LISTENERS[self.owner][self.method]
        listeners.remove(self.listener)
        if not listeners:
            del vars(self.owner)[self.method]


def _telling(method: Callable[..., Any], listeners: list[Callable[..., None]]) -> Callable[..., Any]:
    @functools.wraps(method)
    def told(*args: Any, **kwargs: Any) -> Any:
        for listener in listeners:
            listener(*args, **kwargs)
        return method(*args, **kwargs)

    return told
