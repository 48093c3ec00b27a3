"""What a pipeline gives to its denoiser beside noisy latents and a time, taken from the pipeline's own call.

So prompts are encoded, and positions, sizes and guidance are filled in, by diffusers' code alone, whatever the pipeline.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from cond_pdiff.errors import TrainingError
from cond_pdiff.image_bases import denoiser_of, image_base_of

WATCHED_STEPS = 2  # PixArt's pipeline cannot do with one; the call ends before the first is done

DenoiserInputs = dict[str, Any]
"""Arguments of a denoiser's `forward`, by name: tensors, numbers, None, and lists, tuples and dictionaries of these."""


class _Asked(Exception):
    """Ends a pipeline's call where it asks its denoiser for the first time."""


def inputs_for(pipe: Any, caption: str, height: int, width: int, max_length: int) -> DenoiserInputs:
    """Return what a pipeline's denoiser is given for a caption, in a batch of one, beside the latents and the time.

    Args:
        height: of the picture in pixels, as `width`.
        max_length: tokens of the caption, for pipelines whose call takes their number.

    Raises:
        TrainingError: the pipeline makes a picture without asking this denoiser.
    """
    base, denoiser = image_base_of(pipe), denoiser_of(pipe)
    forward, asked = inspect.signature(denoiser.forward), dict[str, Any]()

    def stop(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        asked.update(forward.bind(*args, **kwargs).arguments)
        raise _Asked

    settings = {"height": height, "width": width, "num_inference_steps": WATCHED_STEPS, **base.options, **base.unguided}
    if "max_sequence_length" in inspect.signature(pipe.__call__).parameters:
        settings["max_sequence_length"] = max_length
    handle = denoiser.register_forward_pre_hook(stop, with_kwargs=True)
    try:
        pipe(caption, **settings)
    except _Asked:
        return {name: value for name, value in asked.items() if name not in (noisy_name(denoiser), base.time, "return_dict")}
    finally:
        handle.remove()
    raise TrainingError(f"{type(pipe).__name__} made a picture without asking its {base.denoiser}, so that cannot be trained as it asks")


def noisy_name(denoiser: nn.Module) -> str:
    """Return the name of the argument that takes a denoiser's noisy latents: the first."""
    return next(iter(inspect.signature(denoiser.forward).parameters))


def moved(value: Any, move: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """Return inputs, or one of them, with all tensors changed."""
    if isinstance(value, torch.Tensor):
        return move(value)
    if isinstance(value, Mapping):
        return {name: moved(part, move) for name, part in value.items()}
    return type(value)(moved(part, move) for part in value) if isinstance(value, (list, tuple)) else value


def lengths(value: Any) -> tuple[Any, ...]:
    """Return the shapes of all tensors that would be joined: inputs of equal ones can be asked for in one batch."""
    if isinstance(value, torch.Tensor):
        return tuple(value.shape)
    if isinstance(value, Mapping):
        return tuple(lengths(part) for part in value.values())
    return tuple(map(lengths, value)) if isinstance(value, tuple) else ()


def joined(values: Sequence[Any]) -> Any:
    """Join inputs of batches of one into those of a batch.

    Tensors with a first dimension of one, and lists, have an entry for each picture; everything else is shared.

    Raises:
        TrainingError: what is shared differs: pictures of several sizes.
    """
    first = values[0]
    if isinstance(first, Mapping):
        return {name: joined([value[name] for value in values]) for name in first}
    if isinstance(first, list):
        return [part for value in values for part in value]
    if isinstance(first, tuple):
        return tuple(joined(parts) for parts in zip(*values, strict=True))
    if isinstance(first, torch.Tensor) and first.ndim and len(first) == 1:
        return torch.cat(list(values))
    if any(lengths(first) != lengths(value) or not _equal(first, value) for value in values):
        raise TrainingError("pictures of several sizes cannot be trained on side by side; give styles of one size, or --together 1")
    return first


def _equal(first: Any, other: Any) -> bool:
    return torch.equal(first, other) if isinstance(first, torch.Tensor) else bool(first == other)
