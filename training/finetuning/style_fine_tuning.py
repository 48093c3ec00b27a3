"""Fine-tuning on styles: a text-to-image transformer learns to make its scenes in a style (paper, appendix B.1)."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from diffusers.pipelines.pixart_alpha.pipeline_pixart_alpha import PixArtAlphaPipeline
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
from torch import nn

from cond_pdiff.adapter import LoraAdapter
from cond_pdiff.hub import Backbone
from cond_pdiff.text_to_image import load_text_to_image
from cond_pdiff.training.config import CollectConfig
from cond_pdiff.training.objectives import denoising_loss, diffusion_target, draw_noise_levels, flow_pair
from cond_pdiff.training.precision import training_device
from cond_pdiff.training.tasks.styles import Style
from cond_pdiff.training.text_to_image.pictures import to_input

ENCODE_BATCH = 32


class EncodedPictures(NamedTuple):
    """Clean latents, and embeddings and masks of their captions, on the device that trains."""

    latents: torch.Tensor
    captions: torch.Tensor
    masks: torch.Tensor


class StyleBatch(NamedTuple):
    """Encoded pictures, and for each a noise and a time: a noise level from 0 to 1, or a timestep of a scheduler over betas."""

    pictures: EncodedPictures
    noise: torch.Tensor
    times: torch.Tensor


class StyleFineTuning:
    """Fine-tuning of a text-to-image transformer on styles; see `cond_pdiff.training.finetuning.fine_tuning.FineTuning`.

    Args:
        pipe: the base model, where it is loaded already.
    """

    task_type = None

    def __init__(self, config: CollectConfig, pipe: PixArtAlphaPipeline | None = None) -> None:
        self.config = config
        self.pipe = pipe or load_text_to_image(Backbone.from_json(config.base)).to(training_device())
        self.model: nn.Module = self.pipe.transformer
        self.flow = self.pipe.scheduler.config.prediction_type == "flow_prediction"
        self.scheduler = None if self.flow else DDPMScheduler.from_config(self.pipe.scheduler.config)
        self._encoded: dict[tuple[Path, str], EncodedPictures] = {}

    def batches(self, task: Style, rng: random.Random) -> Iterator[StyleBatch]:
        """Yield batches of a random subset of the training pictures, encoded once, without end."""
        whole = self._encode(task, "train", self.config.max_pictures)
        count = len(whole.latents)
        kept = rng.sample(range(count), max(1, round(self.config.subset * count)))
        noise = torch.Generator().manual_seed(rng.getrandbits(63))
        while True:
            picks = torch.tensor([rng.choice(kept) for _ in range(self.config.batch_size)])
            yield self._with_noise(EncodedPictures(*(tensor[picks] for tensor in whole)), noise)

    def losses(self, batches: Sequence[StyleBatch], tasks: Sequence[Style]) -> torch.Tensor:
        """Return the base model's own objective (equation 3): flow matching, or what its scheduler's prediction type says."""
        pictures, noise, times = zip(*batches, strict=True)
        clean, captions, masks = (torch.cat(part) for part in zip(*pictures, strict=True))
        target, predicted = self._predict(StyleBatch(EncodedPictures(clean, captions, masks), torch.cat(noise), torch.cat(times)))
        pairs = zip(target.chunk(len(batches)), predicted.chunk(len(batches)), strict=True)
        return torch.stack([denoising_loss(*pair) for pair in pairs])

    @torch.no_grad()
    def metrics(self, adapter: LoraAdapter, task: Style) -> dict[str, Any]:
        """Measure the objective on held-out pictures, with the same noise for the base and for the adapter."""
        batch = self._with_noise(self._encode(task, "test", self.config.metric_rows), torch.Generator().manual_seed(0))
        base = float(denoising_loss(*self._predict(batch)))
        with adapter.attached(self.pipe, check=False):
            adapted = float(denoising_loss(*self._predict(batch)))
        return {"test_loss": round(adapted, 5), "test_loss_base": round(base, 5)}

    def _with_noise(self, pictures: EncodedPictures, rng: torch.Generator) -> StyleBatch:
        """Draw noises and times on the CPU, so that a seed means the same everywhere."""
        clean, size = pictures.latents, len(pictures.latents)
        noise = torch.randn(clean.shape, generator=rng)
        if self.scheduler is None:
            times = draw_noise_levels(size, self.config.time_shift, rng)
        else:
            times = torch.randint(self.scheduler.config.num_train_timesteps, (size,), generator=rng)
        return StyleBatch(pictures, noise.to(clean), times.to(clean.device))

    def _predict(self, batch: StyleBatch) -> tuple[torch.Tensor, torch.Tensor]:
        """Return what the transformer is to predict, and what it predicts, shape of the latents."""
        (clean, captions, masks), noise, times = batch
        if self.scheduler is None:
            noisy, target = flow_pair(clean, noise, times)
            times = times * self.pipe.scheduler.config.num_train_timesteps
        else:
            noisy, target = self.scheduler.add_noise(clean, noise, times), diffusion_target(self.scheduler, clean, noise, times)
        predicted = self.model(
            noisy,
            encoder_hidden_states=captions,
            encoder_attention_mask=masks,
            timestep=times,
            added_cond_kwargs={"resolution": None, "aspect_ratio": None},
            return_dict=False,
        )[0]
        return target, predicted[:, : clean.shape[1]]  # PixArt-XL also predicts a variance, which is not trained

    def _encode(self, style: Style, split: str, limit: int) -> EncodedPictures:
        """Encode the first pictures of a split, once for all runs: that takes as long as a dozen training steps."""
        key = (style.folder, split)
        if key not in self._encoded:
            self._encoded[key] = self._encode_pictures(*style.pictures(split), limit)
        return self._encoded[key]

    @torch.no_grad()
    def _encode_pictures(self, pixels: torch.Tensor, captions: list[str], limit: int) -> EncodedPictures:
        pixels, captions = pixels[:limit], captions[:limit]
        latents, embeddings, masks = [], [], []
        for start in range(0, len(captions), ENCODE_BATCH):
            pictures = to_input(pixels[start : start + ENCODE_BATCH].permute(0, 3, 1, 2)).to(self.pipe.device)
            latents.append(self.pipe.vae.encode(pictures).latent_dist.mean * self.pipe.vae.config.scaling_factor)
            text, mask, _, _ = self.pipe.encode_prompt(
                captions[start : start + ENCODE_BATCH], do_classifier_free_guidance=False, max_sequence_length=self.config.max_length
            )
            embeddings.append(text)
            masks.append(mask)
        return EncodedPictures(torch.cat(latents), torch.cat(embeddings), torch.cat(masks))
