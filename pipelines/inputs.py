"""Checks of what a call of the pipeline is given, before anything is computed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from cond_pdiff.conditions.condition import Condition
from cond_pdiff.defaults import MAX_REFINE_STEPS
from cond_pdiff.errors import ConditionError, CondPDiffError
from cond_pdiff.sampling import check_count, check_guidance, is_guided

MAX_STEPS = 1000
OUTPUT_TYPES = ("adapter", "params", "pt", "latent")


def only_condition(keyword: str, condition: Any, prompt: Any, image: Any) -> Any:
    """Return the one of the three that was given.

    Args:
        keyword: the one that the generator's kind of condition may come by beside `condition`; empty: none.

    Raises:
        ConditionError: none, or several, or what the generator does not read: a picture's path is a description, too.
    """
    given = {name: value for name, value in (("condition", condition), ("prompt", prompt), ("image", image)) if value is not None}
    if len(given) != 1:
        raise ConditionError(f"give a condition: a prompt or an image, got {len(given) or 'none'} of them")
    ((name, value),) = given.items()
    if name not in ("condition", keyword):
        raise ConditionError(f"this generator reads no {name}; give its condition as {keyword or 'condition'}=")
    return value


def check_schedule(timesteps: Any, sigmas: Any) -> None:
    """Refuse `timesteps` and `sigmas` together, and what is no list of numbers from 0; whether the scheduler takes them, it says itself."""
    if timesteps is not None and sigmas is not None:
        raise CondPDiffError("timesteps and sigmas both say which steps to take; give one of them")
    for name, values in (("timesteps", timesteps), ("sigmas", sigmas)):
        if values is not None and not (
            isinstance(values, Sequence) and 1 <= len(values) <= MAX_STEPS and all(map(_is_level, values))
        ):
            raise CondPDiffError(f"{name} must be a list of 1 to {MAX_STEPS} numbers, none below 0, got {values!r:.80}")


def _is_level(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value) and value >= 0


def check_guided(scale: Any, unconditional: bool) -> None:
    """Refuse what is no guidance scale, and another than 1 for a denoiser that was never trained without a condition."""
    check_guidance(scale)
    if is_guided(scale) and not unconditional:
        raise CondPDiffError(
            f"guidance_scale is {scale:g}, but this generator was never trained without a condition (cond_drop_prob 0), so there is "
            "nothing to guide away from; leave it out, or say 1"
        )


def check_generators(generator: Any, num_adapters: int) -> None:
    """Refuse what is neither None, nor a `torch.Generator`, nor a sequence of as many as there are adapters."""
    generators = list(generator) if isinstance(generator, Sequence) else [generator] * (generator is not None)
    if not all(isinstance(rng, torch.Generator) for rng in generators):
        raise CondPDiffError(f"generator must be a torch.Generator, or a list of them, got {generator!r:.80}")
    if isinstance(generator, Sequence) and len(generator) != num_adapters:
        raise CondPDiffError(f"got {len(generator)} generators for {num_adapters} adapters; give one each")


def check_output(output_type: Any, callback_tensors: Sequence[str], known_tensors: Sequence[str]) -> None:
    """Refuse another output than `OUTPUT_TYPES`, and names of tensors that callbacks cannot have."""
    if output_type not in OUTPUT_TYPES:
        raise CondPDiffError(f"output_type must be 'adapter', 'params' (or 'pt') or 'latent', got {output_type!r}")
    unknown = [name for name in callback_tensors if name not in known_tensors]
    if unknown:
        raise CondPDiffError(f"callbacks can have {list(known_tensors)}, not {unknown[0]!r}")


def check_refinement(condition: Condition, steps: Any, seed: Any, seconds: float | None, output_type: str = "adapter") -> None:
    """Refuse steps, seeds and seconds of training that are out of their range, and any on a condition that shows nothing for them."""
    check_count("refine_steps", steps, MAX_REFINE_STEPS, least=0)
    check_count("refine_seed", seed, 2**63 - 1, least=0)
    if seconds is not None and not seconds > 0:
        raise CondPDiffError(f"refine_seconds must be more than 0, got {seconds}")
    if seconds is not None and not condition.refined_in_time:
        raise CondPDiffError(f"refine_seconds is not for a {condition.noun}; say refine_steps")
    if steps or seconds is not None:
        condition.refined_on()
        if output_type != "adapter":
            raise CondPDiffError(f"refine_steps are taken from an adapter, and output_type is {output_type!r}; leave one of the two out")
