"""ImageBase: what differs between diffusers' text-to-image pipelines, as a table.

What a pipeline tells itself is read off it where it is needed: its latents' scale and shift (of its autoencoder's settings), what its
denoiser predicts (of its scheduler's), how prompts are encoded, and what else the denoiser is given (its own call is watched, see
`cond_pdiff.training.finetuning.denoiser_inputs`). The table holds the rest, a row for each class of pipeline.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from cond_pdiff.errors import CondPDiffError


@dataclass(frozen=True)
class ImageBase:
    """What has to be known of a class of text-to-image pipelines to train its denoiser, and to make pictures with it.

    Args:
        denoiser: the component that is adapted.
        time: the argument of the denoiser's `forward` that says how much noise there is.
        time_scale: the denoiser's time for each of the scheduler's timesteps.
        backwards: whether the denoiser's time runs from noise to picture, and its velocity with it.
        packed: whether squares of 2 × 2 latents are one token of the denoiser's input; the pipeline has `_pack_latents` then.
        frames: whether the autoencoder is one of videos, of which pictures are the first frame.
        listed: whether the denoiser takes a list of latents, each with a frame, and returns one.
        guidance: the argument of the pipeline's call for classifier-free guidance, or what has been distilled from it.
        unguided: arguments of the call with which the denoiser is asked once a step, with the prompt.
        negative: what is asked for on guidance's other side, where the pipeline guides only if it is told.
        options: further arguments of every call.
        steps: of a picture; None for the pipeline's own default.
        guidance_scale: of a picture; None for the pipeline's own default.
    """

    denoiser: str
    time: str = "timestep"
    time_scale: float = 1.0
    backwards: bool = False
    packed: bool = False
    frames: bool = False
    listed: bool = False
    guidance: str = "guidance_scale"
    unguided: Mapping[str, Any] = field(default_factory=lambda: {"guidance_scale": 1.0})
    negative: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    steps: int | None = None
    guidance_scale: float | None = None


# The bins are for PixArt's own three sizes; every base makes its native size without them.
PIXART = ImageBase(
    "transformer", options={"use_resolution_binning": False, "clean_caption": False}, steps=10, guidance_scale=2.0
)  # fmt: skip
FLUX = ImageBase("transformer", time_scale=1e-3, packed=True, unguided={})  # its guidance is distilled: one call, whatever the scale

IMAGE_BASES: dict[str, ImageBase] = {
    "StableDiffusionPipeline": ImageBase("unet"),
    "StableDiffusionXLPipeline": ImageBase("unet"),
    "PixArtAlphaPipeline": PIXART,
    "PixArtSigmaPipeline": PIXART,
    "StableDiffusion3Pipeline": ImageBase("transformer"),
    "FluxPipeline": FLUX,
    "SanaPipeline": ImageBase("transformer", options={"use_resolution_binning": False}),
    "AuraFlowPipeline": ImageBase("transformer", time_scale=1e-3),
    "Lumina2Pipeline": ImageBase("transformer", time_scale=1e-3, backwards=True),
    "ChromaPipeline": ImageBase("transformer", time_scale=1e-3, packed=True),
    "QwenImagePipeline": ImageBase(
        "transformer", time_scale=1e-3, packed=True, frames=True, guidance="true_cfg_scale", unguided={"true_cfg_scale": 1.0}, negative=" "
    ),
    "ZImagePipeline": ImageBase(
        "transformer", time="t", time_scale=1e-3, backwards=True, listed=True, unguided={"guidance_scale": 0.0}
    ),
}  # fmt: skip
"""The pipelines that are known here, by class name; each is tried in `tests/test_image_bases.py`."""


def image_base_of(pipe: Any) -> ImageBase:
    """Return what differs in a pipeline.

    Raises:
        CondPDiffError: its class is not in the table: it is no text-to-image pipeline (of videos, of audio, from pictures …), or not known.
    """
    name = type(pipe).__name__
    if name not in IMAGE_BASES:
        raise CondPDiffError(
            f"{name} is none of the text-to-image pipelines that are known here ({', '.join(sorted(IMAGE_BASES))}); "
            "adapters for it can be imported, generated and attached (cond-pdiff import-adapters)"
        )
    return IMAGE_BASES[name]


def denoiser_of(pipe: Any) -> nn.Module:
    """Return the module of a pipeline that adapters are for; see `image_base_of`."""
    denoiser: nn.Module = getattr(pipe, image_base_of(pipe).denoiser)
    return denoiser


def scaled_latents(vae: nn.Module, latents: torch.Tensor) -> torch.Tensor:
    """Return an autoencoder's latents as its pipeline's denoiser knows them: (z − mean − shift) · scale / std.

    What an autoencoder's settings lack is left out.

    Args:
        latents: what it encodes, shape `(batch, channels, …)`.
    """
    config: Any = vae.config

    def statistic(name: str, neutral: float) -> torch.Tensor:
        value = torch.tensor(neutral if config.get(name) is None else config[name])
        return value.to(latents).reshape(-1, *(1,) * (latents.ndim - 2))

    centred = latents - statistic("latents_mean", 0.0) - statistic("shift_factor", 0.0)
    return centred * statistic("scaling_factor", 1.0) / statistic("latents_std", 1.0)
