"""Denoisers: the protocol of a generator's second network, and the register of the classes that recipes may name."""

from __future__ import annotations

import inspect
from typing import Any, Protocol, TypeVar, runtime_checkable

import torch

from cond_pdiff.component import Component, register_component
from cond_pdiff.errors import CondPDiffError
from cond_pdiff.models.param_unet_1d import ParamUNet1D
from cond_pdiff.models.token_denoiser import TokenDenoiser

DEFAULT_DENOISER = ParamUNet1D.__name__
SIZES = ("sample_channels", "sample_length", "condition_dim")
"""The sizes of latents and condition: a denoiser's first arguments, in this order."""
GUIDANCE = ("unconditional", "guidance_scale", "guided_length")
"""The entries of a denoiser's config that training sets and sampling reads."""


@runtime_checkable
class Denoiser(Protocol):
    """A diffusers model that denoises latents, such as `ParamUNet1D` (the paper's); `register_denoiser` makes one known to recipes.

    Its config has, beside the sizes, `unconditional` (was it trained without a condition too?), `guidance_scale` (classifier-free guidance
    unless a call says otherwise; 1 is none) and `guided_length` (guidance acts on so many of the first columns; None: on all).
    """

    @property
    def config(self) -> Any:
        """The arguments that it was made with."""

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of its weights."""

    @property
    def device(self) -> torch.device:
        """The device that its weights are on."""

    @property
    def at_once(self) -> int:
        """The number of samples that should go through it together in training, for memory's sake."""

    def __call__(self, sample: torch.Tensor, timestep: Any, condition: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """Predict what the scheduler's `prediction_type` asks for.

        Args:
            sample: noisy latents, shape `(batch, sample_channels, sample_length)`.
            timestep: one for all, or one a sample, shape `(batch,)`.
            condition: embeddings, shape `(batch, condition_dim)`; zeros for none. For a denoiser that takes tokens, also `(batch, tokens,
                condition_dim)`.
            kwargs: for such a denoiser, `condition_mask`, shape `(batch, tokens)`, true where there is a token.

        Returns:
            an object with `sample`, of the input's shape.
        """


AnyDenoiser = TypeVar("AnyDenoiser", bound=type[Component])
DENOISERS: dict[str, type[Component]] = {DEFAULT_DENOISER: ParamUNet1D, TokenDenoiser.__name__: TokenDenoiser}
"""The registered classes of denoisers, by the name that recipes give as `type`."""


def register_denoiser(denoiser: AnyDenoiser) -> AnyDenoiser:
    """Let recipes name a class of yours as `{"type": …}`, and generators that have it be loaded (see `register_component`); a decorator.

    Args:
        denoiser: a `Component` that is a `Denoiser`. It is made as `denoiser(sample_channels, sample_length, condition_dim, **arguments,
            unconditional=…, guidance_scale=…, guided_length=…)`, with the arguments that the recipe names.

    Raises:
        CondPDiffError: it cannot be made so, or another class has its name.
    """
    name, parameters = denoiser.__name__, [*inspect.signature(denoiser).parameters]
    if tuple(parameters[: len(SIZES)]) != SIZES or not {*GUIDANCE} <= {*parameters}:
        raise CondPDiffError(
            f"a denoiser is made with {', '.join(SIZES)} first, and with {', '.join(GUIDANCE)}; {name} with {', '.join(parameters)}"
        )
    DENOISERS[name] = register_component(denoiser)
    return denoiser
