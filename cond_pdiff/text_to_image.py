"""The frozen text-to-image bases of style adapters: loading one, and making pictures with and without adapters."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers.models.auto_model import AutoModel
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from PIL import Image, ImageDraw, ImageFont
from torch import nn

from cond_pdiff.adapter import LoraAdapter
from cond_pdiff.errors import ConditionError, CondPDiffError, HubError
from cond_pdiff.hub import Backbone, find_backbone
from cond_pdiff.image_bases import denoiser_of, image_base_of
from cond_pdiff.locks import LOADING, lock_of
from cond_pdiff.sampling import check_count
from cond_pdiff.weights import loadable

TRANSFORMER_WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"
UNET_WEIGHTS = "unet/diffusion_pytorch_model.safetensors"
PIXART_MINI = Backbone("cond-pdiff/pixart-mini", sha256="5f89b7aa30578d55254cdf1964705987df7043d27aafe1461a6a75db7aaf65cf")


BROKEN_BASE = (OSError, ValueError, TypeError, KeyError, AttributeError, RuntimeError)
"""The errors that diffusers and torch raise on files that are not a base model's."""


def load_denoiser(base: Backbone, weights_file: str = TRANSFORMER_WEIGHTS) -> nn.Module:
    """Load the denoiser alone that adapters are attached to, of the class that its settings name, in the precision of its files.

    Args:
        weights_file: where its weights are in the pipeline's folder.

    Raises:
        HubError: see `load_text_to_image`.
    """
    folder, name = (find_backbone(base, weights_file) / weights_file).parent, Path(weights_file).name
    try:
        settings = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        if method := settings.get("quantization_config"):
            raise HubError(
                f"{folder} is quantised ({method.get('quant_method')}), and adapters act on plain weights only; give the base as it was "
                "published in float32, float16 or bfloat16"
            )
        with LOADING, loadable(folder, name) as named:
            denoiser: nn.Module = AutoModel.from_pretrained(str(named), use_safetensors=True)
    except BROKEN_BASE as error:
        raise HubError(f"{folder} cannot be loaded as a denoiser: {type(error).__name__}: {error}") from error
    return denoiser


def load_text_to_image(
    base: Backbone = PIXART_MINI, weights_file: str = TRANSFORMER_WEIGHTS, dtype: torch.dtype = torch.float32
) -> DiffusionPipeline:
    """Load a diffusers pipeline from safetensors only; the denoiser's weights are checked against `base.sha256`.

    Args:
        weights_file: where the denoiser's weights are in the pipeline's folder: a transformer's, or a U-Net's.
        dtype: of all weights.

    Raises:
        HubError: not to be had, incomplete, or not the expected weights.
    """
    folder, component = find_backbone(base, weights_file), weights_file.partition("/")[0]
    try:
        with LOADING:
            pipe = DiffusionPipeline.from_pretrained(folder, **{component: load_denoiser(base, weights_file)}, use_safetensors=True)
    except BROKEN_BASE as error:
        raise HubError(f"{base.repo_id} cannot be loaded as a diffusers pipeline: {type(error).__name__}: {error}") from error
    for module in pipe.components.values():
        if isinstance(module, nn.Module) and module.dtype != dtype:
            module.to(dtype)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def make_pictures(
    pipe: DiffusionPipeline,
    prompts: Sequence[str],
    adapters: Sequence[tuple[LoraAdapter, float]] = (),
    seed: int | Sequence[int] = 0,
    num_inference_steps: int | None = None,
    guidance_scale: float | None = None,
    side: int | None = None,
) -> list[Image.Image]:
    """Make one picture per prompt, from the noise of its seed, with any pipeline of `cond_pdiff.image_bases`.

    Threads that share a pipeline take turns, as its scheduler and the adapters on it are state.

    Args:
        adapters: (adapter, strength) pairs; attached for this call only, their updates add up.
        seed: one for all pictures, so that only prompt and adapters make a difference; or one for each.
        num_inference_steps: from 2 (PixArt's pipeline cannot do with one) to 1000; None for the base's own number.
        guidance_scale: classifier-free guidance, or what has been distilled from it; None for the base's own.
        side: height and width in pixels; None for the base's own size.

    Raises:
        ConditionError: no prompt, or an empty one.
        CondPDiffError: another argument is out of its range, or the pipeline is not one that makes pictures from texts.
        AdapterError: an adapter is not for this base.
    """
    base = image_base_of(pipe)
    steps = base.steps if num_inference_steps is None else num_inference_steps
    guidance = base.guidance_scale if guidance_scale is None else guidance_scale
    check_picture_settings(prompts, [scale for _, scale in adapters], steps, guidance)
    seeds = list(seed) if isinstance(seed, Sequence) else [seed] * len(prompts)
    if len(seeds) != len(prompts):
        raise CondPDiffError(f"got {len(seeds)} seeds for {len(prompts)} prompts; give one for all, or one each")
    settings: dict[str, Any] = {"num_inference_steps": steps, base.guidance: guidance, "height": side, "width": side}
    settings = {name: value for name, value in settings.items() if value is not None}
    if base.negative is not None:
        settings["negative_prompt"] = [base.negative] * len(prompts)
    call: Any = pipe  # each class of pipelines has a signature of its own
    with ExitStack() as stack:
        stack.enter_context(lock_of(denoiser_of(pipe)))
        for adapter, scale in adapters:
            stack.enter_context(adapter.attached(pipe, scale))
        images: list[Image.Image] = call(
            list(prompts), generator=[torch.Generator().manual_seed(one) for one in seeds], **settings, **base.options
        ).images
    return images


def check_picture_settings(
    prompts: Sequence[str], scales: Sequence[float], num_inference_steps: int | None, guidance_scale: float | None
) -> None:
    """Refuse what `make_pictures` would refuse, before anything is loaded; `scales` are the adapters' strengths."""
    if not prompts or not all(isinstance(prompt, str) and prompt.strip() for prompt in prompts):
        raise ConditionError("give at least one prompt, none of them empty")
    if num_inference_steps is not None:
        check_count("num_inference_steps", num_inference_steps, 1000, least=2)
    if not all(map(math.isfinite, (guidance_scale or 0.0, *scales))):
        raise CondPDiffError("guidance_scale and the adapters' strengths must be finite numbers")


def unknown_words(pipe: DiffusionPipeline, prompt: str) -> list[str]:
    """Return the words of a prompt that the base model's tokenizer has never seen: they make no difference to the picture."""
    tokenizer = pipe.tokenizer
    with lock_of(denoiser_of(pipe)):
        return [word for word in prompt.split() if tokenizer.unk_token_id in tokenizer(word, add_special_tokens=False)["input_ids"]]


def picture_sheet(rows: Mapping[str, Sequence[Image.Image]], captions: Sequence[str] = (), side: int = 192) -> Image.Image:
    """Lay out rows of pictures, each with its title above it, and a caption below every column.

    Args:
        rows: title → pictures, as many in every row.
        captions: one for each column.
        side: of a picture on the sheet, in pixels; smaller ones are enlarged without smoothing.
    """
    gap, line = 8, 20
    font = ImageFont.load_default(13)
    columns = max(len(pictures) for pictures in rows.values())
    sheet = Image.new("RGB", (gap + columns * (side + gap), gap + len(rows) * (side + gap + line) + (line if captions else 0)), "white")
    draw = ImageDraw.Draw(sheet)
    y = gap
    for title, pictures in rows.items():
        draw.text((gap, y), title, fill="black", font=font)
        for column, picture in enumerate(pictures):
            resample = Image.Resampling.NEAREST if picture.width < side else Image.Resampling.LANCZOS
            sheet.paste(picture.resize((side, side), resample), (gap + column * (side + gap), y + line))
        y += side + gap + line
    for column, caption in enumerate(captions):
        while draw.textlength(caption, font=font) > side and len(caption) > 2:
            caption = caption[:-2].rstrip() + "…"
        draw.text((gap + column * (side + gap), y), caption, fill="black", font=font)
    return sheet


def stack_pictures(pictures: Sequence[Image.Image]) -> torch.Tensor:
    """Stack pictures of one size as uint8 of shape `(count, height, width, 3)`."""
    return torch.from_numpy(np.stack([np.asarray(picture) for picture in pictures]))


def encode_png(picture: Image.Image) -> bytes:
    """Return the bytes of a picture as a PNG file."""
    encoded = io.BytesIO()
    picture.save(encoded, "PNG")
    return encoded.getvalue()
