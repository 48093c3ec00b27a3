"""Sheets of pictures that show what style adapters do."""

from __future__ import annotations

from collections.abc import Sequence

from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from PIL import Image

from cond_pdiff.adapter import LoraAdapter
from cond_pdiff.errors import CondPDiffError
from cond_pdiff.hub import Backbone
from cond_pdiff.text_to_image import make_pictures, picture_sheet

INTERPOLATION_STEPS = 6


def load_base(adapter: LoraAdapter, folder: str | None = None) -> DiffusionPipeline:
    """Load the base model that an adapter records, or the one in a folder, in float32 (see `Family.load`).

    Raises:
        CondPDiffError: the adapter is for no base that makes pictures.
        HubError: see `load_text_to_image`.
    """
    if adapter.family is None or not adapter.family.paints:
        raise CondPDiffError(f"{adapter.spec.base_model!r} is no base model that makes pictures here")
    pipe: DiffusionPipeline = adapter.family.load(Backbone(folder) if folder else adapter.base, adapter.spec)
    return pipe


def comparison_sheet(
    pipe: DiffusionPipeline,
    prompts: Sequence[str],
    adapters: Sequence[tuple[str, LoraAdapter, float]],
    seed: int,
    num_inference_steps: int | None,
    guidance_scale: float | None,
    side: int | None = None,
) -> Image.Image:
    """Make two rows of pictures from the same noise, of the base model and with the adapters; a column per prompt.

    Args:
        adapters: (name, adapter, strength); their updates add up.

    Raises:
        CondPDiffError: see `make_pictures`.
    """
    title = "with " + " and ".join(f"{name} at strength {scale:g}" for name, _, scale in adapters)
    settings = (seed, num_inference_steps, guidance_scale, side)
    rows = {
        "base": make_pictures(pipe, prompts, (), *settings),
        title: make_pictures(pipe, prompts, [(adapter, scale) for _, adapter, scale in adapters], *settings),
    }
    return picture_sheet(rows, prompts)


def interpolation_sheet(
    pipe: DiffusionPipeline,
    prompts: Sequence[str],
    start: LoraAdapter,
    end: LoraAdapter,
    scale: float,
    seed: int,
    num_inference_steps: int | None,
    guidance_scale: float | None,
    side: int | None = None,
) -> Image.Image:
    """Show the way from one adapter to another in six steps (see `LoraAdapter.interpolate`), a column each; a row per prompt.

    Args:
        scale: strength of all of them.

    Raises:
        CondPDiffError: see `make_pictures`.
    """
    shares = [step / (INTERPOLATION_STEPS - 1) for step in range(INTERPOLATION_STEPS)]
    mixtures = [[(start.interpolate(end, share), scale)] for share in shares]
    settings = (seed, num_inference_steps, guidance_scale, side)
    rows = {prompt: [make_pictures(pipe, [prompt], mixture, *settings)[0] for mixture in mixtures] for prompt in prompts}
    return picture_sheet(rows, [f"{share:.0%}" for share in shares])
