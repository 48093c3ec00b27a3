"""Fine-tuning on styles: a text-to-image transformer learns to make its scenes in a style (paper, appendix B.1)."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
from torch import nn

from cond_pdiff.adapter import LoraAdapter
from cond_pdiff.hub import Backbone
from cond_pdiff.text_to_image import load_text_to_image
from cond_pdiff.training.config import CollectConfig
from cond_pdiff.training.objectives import denoising_loss, diffusion_target, draw_noise_levels, flow_pair
from cond_pdiff.training.precision import training_device
from cond_pdiff.training.styles import Style, load_styles
from cond_pdiff.training.text_to_image.pictures import to_input

ENCODE_BATCH = 32


class StyleBatch(NamedTuple):
    """Clean latents, and embeddings and masks of their captions, on the device that trains."""

    latents: torch.Tensor
    captions: torch.Tensor
    masks: torch.Tensor


class StyleTuning:
    """See `cond_pdiff.training.collect.Tuning`."""

    task_type = None

    def __init__(self, config: CollectConfig) -> None:
        self.config = config
        self.pipe = load_text_to_image(Backbone.from_json(config.base)).to(training_device())
        self.model: nn.Module = self.pipe.transformer
        self.flow = self.pipe.scheduler.config.prediction_type == "flow_prediction"
        self.scheduler = None if self.flow else DDPMScheduler.from_config(self.pipe.scheduler.config)
        self._encoded: dict[tuple[Path, str], StyleBatch] = {}

    def load_tasks(self, folder: str | Path, names: Sequence[str] | None) -> list[Style]:
        """The named styles, or all."""
        return load_styles(folder, names)

    def facts(self, task: Style) -> dict[str, Any]:
        """What the zoo records of a style."""
        return {"group": task.group, "licence": task.licence, **({"source": task.source} if task.source else {})}

    def metadata(self, task: Style) -> dict[str, Any]:
        """What an adapter records of its style, beside its name."""
        return {}

    def batches(self, task: Style, rng: random.Random) -> Iterator[StyleBatch]:
        """Endless batches of a random subset of the training pictures, encoded once."""
        whole = self._encode(task, "train", self.config.max_pictures)
        count = len(whole.latents)
        kept = rng.sample(range(count), max(1, round(self.config.subset * count)))
        while True:
            picks = torch.tensor([rng.choice(kept) for _ in range(self.config.batch_size)])
            yield StyleBatch(*(tensor[picks] for tensor in whole))

    def loss(self, batch: StyleBatch, task: Style) -> torch.Tensor:
        """The base model's own objective (equation 3): flow matching, or what its scheduler's prediction type says."""
        return self._loss(batch, None)

    @torch.no_grad()
    def metrics(self, adapter: LoraAdapter, task: Style) -> dict[str, Any]:
        """The objective on held-out pictures, with the same noise for the base and for the adapter."""
        batch = self._encode(task, "test", self.config.metric_rows)
        base = float(self._loss(batch, torch.Generator().manual_seed(0)))
        with adapter.attached(self.pipe, check=False):
            adapted = float(self._loss(batch, torch.Generator().manual_seed(0)))
        return {"test_loss": round(adapted, 5), "test_loss_base": round(base, 5)}

    def _loss(self, batch: StyleBatch, rng: torch.Generator | None) -> torch.Tensor:
        """`rng` None draws from torch's own generator, which `collect` seeds for each adapter; either draws on the CPU."""
        clean, size = batch.latents, len(batch.latents)
        noise = torch.randn(clean.shape, generator=rng).to(clean)
        if self.scheduler is None:
            levels = draw_noise_levels(size, self.config.time_shift, rng).to(clean)
            noisy, target = flow_pair(clean, noise, levels)
            timesteps = levels * self.pipe.scheduler.config.num_train_timesteps
        else:
            timesteps = torch.randint(self.scheduler.config.num_train_timesteps, (size,), generator=rng).to(clean.device)
            noisy, target = self.scheduler.add_noise(clean, noise, timesteps), diffusion_target(self.scheduler, clean, noise, timesteps)
        predicted = self.model(
            noisy,
            encoder_hidden_states=batch.captions,
            encoder_attention_mask=batch.masks,
            timestep=timesteps,
            added_cond_kwargs={"resolution": None, "aspect_ratio": None},
            return_dict=False,
        )[0]
        return denoising_loss(target, predicted[:, : clean.shape[1]])  # PixArt-XL also predicts a variance, which is not trained

    def _encode(self, style: Style, split: str, limit: int) -> StyleBatch:
        """The first pictures of a split, encoded once for all runs: that takes as long as a dozen training steps."""
        key = (style.folder, split)
        if key not in self._encoded:
            self._encoded[key] = self._encode_pictures(*style.pictures(split), limit)
        return self._encoded[key]

    @torch.no_grad()
    def _encode_pictures(self, pixels: torch.Tensor, captions: list[str], limit: int) -> StyleBatch:
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
        return StyleBatch(torch.cat(latents), torch.cat(embeddings), torch.cat(masks))
