"""Many conditions at once: their adapters go through the denoiser together, and each is the same, bit for bit, in whatever company."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from cond_pdiff.defaults import DEFAULT_STEPS
from cond_pdiff.locks import lock_of
from cond_pdiff.pipelines.provenance import generation_settings
from cond_pdiff.sampling import denoise

if TYPE_CHECKING:
    from cond_pdiff.conditions.condition import Condition
    from cond_pdiff.models.condition_encoder import EncoderReport
    from cond_pdiff.pipelines.pipeline_cond_pdiff import CondPDiffPipeline
    from cond_pdiff.pipelines.pipeline_output import CondPDiffPipelineOutput

ROWS_AT_ONCE = 32
"""The number of latents in every call of the denoiser: where there are fewer, the last is repeated. Matrix products of another shape round
differently, so an adapter that is made with three others would not be the one that is made alone."""

DECODED_AT_ONCE = 8
"""The number that the decoder makes together, for the same reason; more take no less time."""


@dataclass(frozen=True)
class Request:
    """A condition, and the seed of each adapter that is wanted for it.

    Args:
        condition: as for the pipeline.
        seeds: one an adapter.
    """

    condition: Any
    seeds: tuple[int, ...] = (0,)


@dataclass(frozen=True)
class Denoised:
    """What was made of a request.

    Args:
        condition: as it was read.
        embedding: of the condition, shape `(condition_dim,)`.
        report: of the condition encoder.
        latents: shape `(adapters, channels, length)`.
    """

    condition: Condition
    embedding: torch.Tensor
    report: EncoderReport
    latents: torch.Tensor


def generate_many(
    pipe: CondPDiffPipeline,
    requests: Sequence[Request],
    num_inference_steps: int = DEFAULT_STEPS,
    guidance_scale: float | None = None,
) -> list[CondPDiffPipelineOutput]:
    """Generate adapters for many conditions, as the pipeline does for one.

    An adapter does not depend on the other requests. It is the one that `pipe(condition, generator=…)` makes of the same seed but for
    rounding: a call for one has matrix products of other shapes.

    Args:
        pipe: the generator.
        requests: any number; what they need of memory is that of their params.
        num_inference_steps: denoising steps.
        guidance_scale: classifier-free guidance; default: the generator's own.

    Returns:
        an output for each request.

    Raises:
        ConditionError: a condition cannot be used.
        CondPDiffError: another argument is out of its range.
    """
    made = denoise_many(pipe, requests, num_inference_steps, guidance_scale)
    scale = pipe.unet.config.guidance_scale if guidance_scale is None else guidance_scale
    asked = {"num_inference_steps": num_inference_steps, "guidance_scale": scale, "rows_at_once": ROWS_AT_ONCE}
    asked |= generation_settings(pipe.scheduler, pipe.unet.dtype, pipe._execution_device, [], pipe._source)
    counts = [len(one.latents) for one in made]
    decoded = iter(decode_apart(pipe, [row for one in made for row in one.latents]))
    tensors = [list(itertools.islice(decoded, count)) for count in counts]
    outputs = []
    for request, one, rows in zip(requests, made, tensors, strict=True):
        own = {**asked, "num_adapters": len(request.seeds)}
        facts = [{**own, "candidate": index, "seed": seed} for index, seed in enumerate(request.seeds)]
        outputs.append(pipe._to_output(one.condition, rows, facts, one.latents, one.embedding, one.report))
    return outputs


@torch.no_grad()
def decode_apart(pipe: CondPDiffPipeline, latents: Sequence[torch.Tensor]) -> Iterator[Mapping[str, torch.Tensor]]:
    """Decode latents, each of shape `(channels, length)`, into the tensors of an adapter each; see `DECODED_AT_ONCE`."""
    for start in range(0, len(latents), DECODED_AT_ONCE):
        part = latents[start : start + DECODED_AT_ONCE]
        filled = torch.stack([*part, *[part[-1]] * (DECODED_AT_ONCE - len(part))])
        yield from pipe.codec.decode_tensors(filled)[: len(part)]


@torch.no_grad()
def denoise_many(
    pipe: CondPDiffPipeline, requests: Sequence[Request], num_inference_steps: int, guidance_scale: float | None
) -> list[Denoised]:
    """Make the latents of many requests; see `generate_many`."""
    if not requests:
        return []
    generators = [[torch.Generator().manual_seed(seed) for seed in request.seeds] for request in requests]
    conditions = [
        pipe._check_inputs(request.condition, len(own), num_inference_steps, guidance_scale, own, None, None)
        for request, own in zip(requests, generators, strict=True)
    ]
    scale = pipe.unet.config.guidance_scale if guidance_scale is None else guidance_scale
    with lock_of(pipe.unet):  # the scheduler, and offloading, have state
        encoded, reports = pipe.condition_encoder.encode_apart(conditions)
        rows: list[_Row] = []
        shapes = []  # of each request: adapters, views
        for condition, embedding, own in zip(conditions, encoded, generators, strict=True):
            views = () if pipe.nearest(embedding)[1] else condition.views()
            embeddings = torch.cat([embedding[None], pipe.condition_encoder.encode_apart(views)[0]]) if views else embedding[None]
            noise = pipe.prepare_latents(len(own), own, None)
            rows += [_Row(start, view, _copy(rng)) for start, rng in zip(noise, own, strict=True) for view in embeddings]
            shapes.append((len(own), len(embeddings)))
        parts = [rows[start : start + ROWS_AT_ONCE] for start in range(0, len(rows), ROWS_AT_ONCE)]
        latents = torch.cat([_denoise(pipe, part, num_inference_steps, scale) for part in parts])
        pipe.maybe_free_model_hooks()
    each = latents.split([adapters * views for adapters, views in shapes])
    means = [own.unflatten(0, shape).mean(1) for own, shape in zip(each, shapes, strict=True)]
    return [Denoised(*one) for one in zip(conditions, encoded, reports, means, strict=True)]


@dataclass(frozen=True)
class _Row:
    """A row of the denoiser's batch: where it starts, what is asked for, and the random numbers of schedulers that draw some."""

    noise: torch.Tensor
    embedding: torch.Tensor
    generator: torch.Generator


def _copy(rng: torch.Generator) -> torch.Generator:
    copied = torch.Generator(rng.device)
    copied.set_state(rng.get_state())
    return copied


def _denoise(pipe: CondPDiffPipeline, rows: list[_Row], num_inference_steps: int, guidance_scale: float) -> torch.Tensor:
    filled = [*rows, *[rows[-1]] * (ROWS_AT_ONCE - len(rows))]
    generators = [row.generator for row in rows] + [_copy(rows[-1].generator) for _ in range(ROWS_AT_ONCE - len(rows))]
    noise = torch.stack([row.noise for row in filled])
    embeddings = torch.stack([row.embedding for row in filled]).to(noise)
    return denoise(pipe.unet, pipe.scheduler, noise, embeddings, num_inference_steps, guidance_scale, generators)[: len(rows)]
