"""The frozen text-to-image base of style adapters: loading it, and making pictures with and without adapters."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import torch
from diffusers.models.transformers.pixart_transformer_2d import PixArtTransformer2DModel
from diffusers.pipelines.pixart_alpha.pipeline_pixart_alpha import PixArtAlphaPipeline
from PIL import Image, ImageDraw, ImageFont

from cond_pdiff.adapter import LoraAdapter
from cond_pdiff.defaults import PICTURE_GUIDANCE, PICTURE_STEPS
from cond_pdiff.errors import ConditionError, CondPDiffError, HubError
from cond_pdiff.hub import Backbone, find_backbone
from cond_pdiff.locks import LOADING, lock_of
from cond_pdiff.lora import adapted_module
from cond_pdiff.sampling import check_count
from cond_pdiff.weights import loadable

TRANSFORMER_WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"
PIXART_MINI = Backbone("cond-pdiff/pixart-mini", sha256="5f89b7aa30578d55254cdf1964705987df7043d27aafe1461a6a75db7aaf65cf")


BROKEN_BASE = (OSError, ValueError, TypeError, KeyError, AttributeError, RuntimeError)
"""The errors that diffusers and torch raise on files that are not a base model's."""


def load_transformer(base: Backbone) -> PixArtTransformer2DModel:
    """Load the transformer that adapters are attached to, without the rest of the pipeline, in the precision of its files.

    Raises:
        HubError: see `load_text_to_image`.
    """
    folder, name = (find_backbone(base, TRANSFORMER_WEIGHTS) / TRANSFORMER_WEIGHTS).parent, Path(TRANSFORMER_WEIGHTS).name
    try:
        with LOADING, loadable(folder, name) as named:
            transformer: PixArtTransformer2DModel = PixArtTransformer2DModel.from_pretrained(named, use_safetensors=True)
    except BROKEN_BASE as error:
        raise HubError(f"{folder} cannot be loaded as a PixArt transformer: {type(error).__name__}: {error}") from error
    return transformer


def load_text_to_image(base: Backbone = PIXART_MINI) -> PixArtAlphaPipeline:
    """Load a PixArt pipeline in float32, from safetensors only; the transformer's weights are checked against `base.sha256`.

    Raises:
        HubError: not to be had, incomplete, or not the expected weights.
    """
    folder = find_backbone(base, TRANSFORMER_WEIGHTS)
    try:
        with LOADING:
            pipe = PixArtAlphaPipeline.from_pretrained(folder, transformer=load_transformer(base), use_safetensors=True)
    except BROKEN_BASE as error:
        raise HubError(f"{base.repo_id} cannot be loaded as a PixArt pipeline: {type(error).__name__}: {error}") from error
    for module in (pipe.text_encoder, pipe.transformer, pipe.vae):
        if module.dtype != torch.float32:
            module.to(torch.float32)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def make_pictures(
    pipe: PixArtAlphaPipeline,
    prompts: Sequence[str],
    adapters: Sequence[tuple[LoraAdapter, float]] = (),
    seed: int | Sequence[int] = 0,
    num_inference_steps: int = PICTURE_STEPS,
    guidance_scale: float = PICTURE_GUIDANCE,
) -> list[Image.Image]:
    """Make one picture per prompt, at the base's own size, from the noise of its seed.

    Threads that share a pipeline take turns, as its scheduler and the adapters on it are state.

    Args:
        adapters: (adapter, strength) pairs; attached for this call only, their updates add up.
        seed: one for all pictures, so that only prompt and adapters make a difference; or one for each.
        num_inference_steps: from 2 (PixArt's pipeline cannot do with one) to 1000.

    Raises:
        ConditionError: no prompt, or an empty one.
        CondPDiffError: another argument is out of its range.
        AdapterError: an adapter is not for this base.
    """
    check_picture_settings(prompts, [scale for _, scale in adapters], num_inference_steps, guidance_scale)
    seeds = list(seed) if isinstance(seed, Sequence) else [seed] * len(prompts)
    if len(seeds) != len(prompts):
        raise CondPDiffError(f"got {len(seeds)} seeds for {len(prompts)} prompts; give one for all, or one each")
    with ExitStack() as stack:
        stack.enter_context(lock_of(adapted_module(pipe)))
        for adapter, scale in adapters:
            stack.enter_context(adapter.attached(pipe, scale))
        images: list[Image.Image] = pipe(
            list(prompts),
            generator=[torch.Generator().manual_seed(one) for one in seeds],
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
            # The bins are for PixArt's own three sizes; every base makes its native size without them.
            use_resolution_binning=False,
            clean_caption=False,
        ).images
    return images


def check_picture_settings(prompts: Sequence[str], scales: Sequence[float], num_inference_steps: int, guidance_scale: float) -> None:
    """Refuse what `make_pictures` would refuse, before anything is loaded; `scales` are the adapters' strengths."""
    if not prompts or not all(isinstance(prompt, str) and prompt.strip() for prompt in prompts):
        raise ConditionError("give at least one prompt, none of them empty")
    check_count("num_inference_steps", num_inference_steps, 1000, least=2)
    if not all(map(math.isfinite, (guidance_scale, *scales))):
        raise CondPDiffError("guidance_scale and the adapters' strengths must be finite numbers")


def unknown_words(pipe: PixArtAlphaPipeline, prompt: str) -> list[str]:
    """Return the words of a prompt that the base model's tokenizer has never seen: they make no difference to the picture."""
    tokenizer = pipe.tokenizer
    with lock_of(adapted_module(pipe)):
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
