"""Fine-tuning on styles: a text-to-image denoiser learns to make its scenes in a style (paper, appendix B.1)."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
from torch import nn

from cond_pdiff.adapter import LoraAdapter
from cond_pdiff.errors import TrainingError
from cond_pdiff.families.family import family_named
from cond_pdiff.hub import Backbone
from cond_pdiff.image_bases import denoiser_of, image_base_of, scaled_latents
from cond_pdiff.text_to_image import load_text_to_image
from cond_pdiff.training.config import CollectConfig
from cond_pdiff.training.finetuning.denoiser_inputs import DenoiserInputs, inputs_for, joined, lengths, moved, noisy_name
from cond_pdiff.training.objectives import denoising_loss, diffusion_target, draw_noise_levels, flow_pair
from cond_pdiff.training.precision import training_device
from cond_pdiff.training.tasks.styles import Style
from cond_pdiff.training.text_to_image.pictures import to_input

ENCODED_PIXELS = 2**20
"""The pixels of pictures that are encoded at once: one of 1024 by 1024, which takes some two gigabytes."""


class EncodedPictures(NamedTuple):
    """Clean latents on the CPU, shape `(count, channels, height, width)`, and what the denoiser is given for each caption."""

    latents: torch.Tensor
    inputs: list[DenoiserInputs]


class StyleBatch(NamedTuple):
    """Encoded pictures, and for each a noise and a time: a noise level from 0 to 1, or a timestep of a scheduler over betas."""

    pictures: EncodedPictures
    noise: torch.Tensor
    times: torch.Tensor


class StyleFineTuning:
    """Fine-tuning of a pipeline's denoiser on styles; see `cond_pdiff.training.finetuning.fine_tuning.FineTuning`.

    What differs between pipelines stands in `cond_pdiff.image_bases`, and in what they give their denoiser themselves. Encoders are on the
    device that trains only while they encode.

    Args:
        pipe: the base model, where it is loaded already; it stays on its device and in its precision.

    Raises:
        TrainingError: the pipeline's scheduler has noise of another kind, or its denoiser no gradient checkpointing.
    """

    task_type = None

    def __init__(self, config: CollectConfig, pipe: Any = None) -> None:
        self.config = config
        self._moves = pipe is None
        if pipe is None:
            dtype = torch.bfloat16 if config.half_precision_base else torch.float32
            pipe = load_text_to_image(Backbone.from_json(config.base), family_named(config.family).weights_file, dtype)
            denoiser_of(pipe).to(training_device())
            if dtype != torch.float32:
                pipe.vae.to(torch.float32)  # in half precision those of SDXL and its relatives overflow
        self.pipe: Any = pipe
        self.base, self.model = image_base_of(pipe), denoiser_of(pipe)
        self.scheduler: Any = noise_schedule(pipe.scheduler)
        if config.gradient_checkpointing:
            _checkpoint_gradients(self.model)
        self._latents: dict[tuple[Path, str], EncodedPictures] = {}
        self._inputs: dict[tuple[str, int, int], DenoiserInputs] = {}

    def batches(self, task: Style, rng: random.Random) -> Iterator[StyleBatch]:
        """Yield batches of a random subset of the training pictures, encoded once, without end."""
        whole = self._encode(task, "train", self.config.max_pictures)
        count = len(whole.latents)
        kept = rng.sample(range(count), max(1, round(self.config.subset * count)))
        noise = torch.Generator().manual_seed(rng.getrandbits(63))
        while True:
            picks = [rng.choice(kept) for _ in range(self.config.batch_size)]
            yield self._with_noise(EncodedPictures(whole.latents[picks], [whole.inputs[pick] for pick in picks]), noise)

    def losses(self, batches: Sequence[StyleBatch], tasks: Sequence[Style]) -> torch.Tensor:
        """Return the base model's own objective (equation 3): flow matching, or what its scheduler's prediction type says."""
        pictures, noise, times = zip(*batches, strict=True)
        sizes = {one.latents.shape[1:] for one in pictures}
        inputs = [one for part in pictures for one in part.inputs]
        if len(batches) > 1 and (len(sizes) > 1 or len(set(map(lengths, inputs))) > 1):
            raise TrainingError(
                "these pictures or captions differ in size, so adapters cannot be trained on them side by side; use --together 1"
            )
        clean = torch.cat([one.latents for one in pictures])
        target, predicted = self._predict(StyleBatch(EncodedPictures(clean, inputs), torch.cat(noise), torch.cat(times)))
        pairs = zip(target.chunk(len(batches)), predicted.chunk(len(batches)), strict=True)
        return torch.stack([denoising_loss(*pair) for pair in pairs])

    @torch.no_grad()
    def metrics(self, adapter: LoraAdapter, task: Style) -> dict[str, Any]:
        """Measure the objective on held-out pictures, with the same noise for the base and for the adapter."""
        batch = self._with_noise(self._encode(task, "test", self.config.metric_rows), torch.Generator().manual_seed(0))
        base = self._loss_in_parts(batch)
        with adapter.attached(self.pipe, check=False):
            adapted = self._loss_in_parts(batch)
        return {"test_loss": round(adapted, 5), "test_loss_base": round(base, 5)}

    def _loss_in_parts(self, batch: StyleBatch) -> float:
        """Return the mean loss of many pictures, of which no more are asked for at once than in training."""
        (clean, inputs), noise, times = batch
        total, size = 0.0, self.config.batch_size
        for start in range(0, len(inputs), size):
            part = slice(start, start + size)
            target, predicted = self._predict(StyleBatch(EncodedPictures(clean[part], inputs[part]), noise[part], times[part]))
            total += float(denoising_loss(target, predicted)) * len(inputs[part])
        return total / len(inputs)

    def _with_noise(self, pictures: EncodedPictures, rng: torch.Generator) -> StyleBatch:
        """Draw noises and times on the CPU, so that a seed means the same everywhere."""
        clean, size = pictures.latents, len(pictures.latents)
        noise = torch.randn(clean.shape, generator=rng)
        if self.scheduler is None:
            times = draw_noise_levels(size, self.config.time_shift, rng)
        else:
            times = torch.randint(self.scheduler.config.num_train_timesteps, (size,), generator=rng)
        return StyleBatch(pictures, noise, times)

    def _predict(self, batch: StyleBatch) -> tuple[torch.Tensor, torch.Tensor]:
        """Return what the denoiser is to predict, and what it predicts, both as it lays latents out."""
        (clean, inputs), noise, times = batch
        if self.scheduler is None:
            noisy, target = flow_pair(clean, noise, times)
            times = times * self.pipe.scheduler.config.num_train_timesteps
        else:
            noisy, target = self.scheduler.add_noise(clean, noise, times), diffusion_target(self.scheduler, clean, noise, times)
        if self.base.packed:
            noisy, target = self._packed(noisy), self._packed(target)
        places: dict[Any, list[int]] = {}  # captions of one length are asked for together
        for place, one in enumerate(inputs):
            places.setdefault(lengths(one), []).append(place)
        parts = [self._ask(noisy[rows], times[rows], joined([inputs[row] for row in rows])) for rows in places.values()]
        order = torch.tensor([row for rows in places.values() for row in rows]).argsort()
        predicted = torch.cat(parts)[order.to(parts[0].device)]
        return target.to(predicted.device), predicted

    def _packed(self, latents: torch.Tensor) -> torch.Tensor:
        packed: torch.Tensor = self.pipe._pack_latents(latents, *latents.shape)
        return packed

    def _ask(self, noisy: torch.Tensor, times: torch.Tensor, inputs: DenoiserInputs) -> torch.Tensor:
        """Ask the denoiser as its pipeline does, shape of `noisy`; `times` are the scheduler's timesteps."""
        device, dtype = next(self.model.parameters()).device, next(self.model.parameters()).dtype

        def place(tensor: torch.Tensor) -> torch.Tensor:
            return tensor.to(device, dtype if tensor.is_floating_point() else None)

        scale = self.base.time_scale * getattr(self.model.config, "timestep_scale", 1.0)
        if self.base.backwards:
            times = self.pipe.scheduler.config.num_train_timesteps - times
        times = times if scale == 1.0 else times * scale
        asked: Any = place(noisy)
        if self.base.listed:
            asked = list(asked.unsqueeze(2).unbind(0))
        given = {noisy_name(self.model): asked, self.base.time: times.to(device), "return_dict": False}
        answer = self.model(**given, **moved(inputs, place))[0]
        predicted: torch.Tensor = torch.stack(answer).squeeze(2) if self.base.listed else answer
        predicted = -predicted if self.base.backwards else predicted
        return predicted[:, : noisy.shape[1]]  # PixArt-XL also predicts a variance, which is not trained

    def _encode(self, style: Style, split: str, limit: int) -> EncodedPictures:
        """Encode the first pictures of a split, once for all runs, and keep them on the CPU."""
        key = (style.folder, split)
        if key not in self._latents:
            pixels, captions = style.pictures(split)
            self._check_size(style, pixels)
            with self._encoders():
                self._latents[key] = self._encode_pictures(pixels[:limit], captions[:limit])
        return self._latents[key]

    def _check_size(self, style: Style, pixels: torch.Tensor) -> None:
        height, width = pixels.shape[1:3]
        patch = getattr(self.model.config, "patch_size", 1)
        unit = self.pipe.vae_scale_factor * max(2 if self.base.packed or self.base.listed else 1, patch if isinstance(patch, int) else 1)
        if height % unit or width % unit:
            raise TrainingError(
                f"the pictures of {style.folder} are {width} by {height} pixels; for this {type(self.pipe).__name__} both must be "
                f"multiples of {unit}"
            )

    @contextmanager
    def _encoders(self) -> Iterator[None]:
        """Keep all of the pipeline where training runs inside the block, and its encoders on the CPU after it, unless it was given."""
        if self._moves:
            self.pipe.to(training_device())
        with torch.no_grad():
            yield
        for module in self.pipe.components.values():
            if self._moves and isinstance(module, nn.Module) and module is not self.model:
                module.to("cpu")

    def _encode_pictures(self, pixels: torch.Tensor, captions: list[str]) -> EncodedPictures:
        height, width = pixels.shape[1:3]
        at_once = max(1, ENCODED_PIXELS // (height * width))
        latents = torch.cat([self._encode_pixels(part) for part in pixels.split(at_once)])
        for caption in captions:
            if (caption, height, width) not in self._inputs:
                found = inputs_for(self.pipe, caption, height, width, self.config.max_length)
                self._inputs[caption, height, width] = moved(found, lambda tensor: tensor.cpu())
        return EncodedPictures(latents, [self._inputs[caption, height, width] for caption in captions])

    def _encode_pixels(self, pixels: torch.Tensor) -> torch.Tensor:
        """Encode uint8 pictures, shape `(count, height, width, 3)`; of a distribution, its mean is taken."""
        pictures = to_input(pixels.permute(0, 3, 1, 2)).to(self.pipe.vae.device)
        encoded = self.pipe.vae.encode(pictures.unsqueeze(2) if self.base.frames else pictures)
        latents = encoded.latent_dist.mode() if "latent_dist" in encoded else encoded.latent
        latents = scaled_latents(self.pipe.vae, latents).cpu()
        return latents.squeeze(2) if self.base.frames else latents


def noise_schedule(scheduler: Any) -> DDPMScheduler | None:
    """Return a pipeline's noise schedule over betas, as it is trained with; None for a flow, whose noise levels are the times themselves.

    Raises:
        TrainingError: neither.
    """
    if hasattr(scheduler, "scale_noise") or scheduler.config.get("prediction_type") == "flow_prediction":
        return None
    if "beta_schedule" not in scheduler.config:
        raise TrainingError(
            f"the base's {type(scheduler).__name__} has no betas and is no flow, and adapters are trained on those only; "
            "give the base's folder the scheduler that it was trained with"
        )
    schedule: DDPMScheduler = DDPMScheduler.from_config(scheduler.config)
    return schedule


def _checkpoint_gradients(model: Any) -> None:
    try:
        model.enable_gradient_checkpointing()
    except ValueError as error:
        raise TrainingError(f"{type(model).__name__} has no gradient checkpointing ({error}); set it to false") from error
