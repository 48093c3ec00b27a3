"""What a base model is worth: the share of attributes that its pictures of held-out combinations get right."""

from __future__ import annotations

import random
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.pipelines.pixart_alpha.pipeline_pixart_alpha import PixArtAlphaPipeline
from PIL import Image

from cond_pdiff.atomic import dump_json, write_bytes, write_text
from cond_pdiff.text_to_image import encode_png, picture_sheet
from cond_pdiff.training.text_to_image.config import SampleConfig
from cond_pdiff.training.text_to_image.pictures import render_pool, to_input
from cond_pdiff.training.text_to_image.scenes import ATTRIBUTES, Scene
from cond_pdiff.training.text_to_image.train_classifier import NONE, UNKNOWN, SceneClassifier, attribute_labels

EVALUATION_SEED = 1_000_003
"""The seed of the held-out scenes: no stage trains on this stream."""
SHOWN = 10


def evaluate_base(pipeline_folder: Path, classifier: SceneClassifier, config: SampleConfig, file: Path) -> dict[str, Any]:
    """Measure the pipeline in a folder, as stock diffusers loads it; write the result to `file` and pictures to `samples.png`.

    Returns:
        `generated`: share of attributes right, by attribute and their mean; beside it `rendered` (the classifier on renders of
        the same scenes: the ceiling), `reconstructed` (on these after the autoencoder) and `shuffled` (the generated pictures
        against the prompts of others: the floor). `reconstruction_psnr` in dB, of held-out renders. `seconds_of_four_pictures`.
    """
    pipe = PixArtAlphaPipeline.from_pretrained(pipeline_folder, use_safetensors=True)
    pipe.set_progress_bar_config(disable=True)
    scenes, rendered = render_pool(config.scenes, EVALUATION_SEED, held_out=True)
    captions = [scene.caption(random.Random(f"caption/{config.seed}/{index}"), full=True) for index, scene in enumerate(scenes)]
    generated = torch.cat([sample(pipe, captions[start : start + config.batch_size], config, start)
                           for start in range(0, len(captions), config.batch_size)])  # fmt: skip
    reconstructed = reconstruct(pipe.vae, rendered)
    others = [*scenes[1:], scenes[0]]
    result = {
        "settings": asdict(config),
        "generated": shares(classifier, generated, scenes),
        "rendered": shares(classifier, rendered, scenes),
        "reconstructed": shares(classifier, reconstructed, scenes),
        "shuffled": shares(classifier, generated, others),
        "reconstruction_psnr": round(psnr(rendered, reconstructed), 2),
        "seconds_of_four_pictures": round(_seconds(pipe, captions[:4], config), 2),
        "threads": torch.get_num_threads(),
    }
    rows = {"renders": rendered, "generated": generated}
    shown = {title: [Image.fromarray(pixels.permute(1, 2, 0).numpy()) for pixels in pictures[:SHOWN]] for title, pictures in rows.items()}
    write_bytes(file.with_name("samples.png"), encode_png(picture_sheet(shown, captions[:SHOWN], 128)))
    write_text(file, dump_json(result))
    return result


def sample(pipe: PixArtAlphaPipeline, prompts: list[str], config: SampleConfig, first: int = 0) -> torch.Tensor:
    """Draw one picture a prompt, uint8 of shape `(num_prompts, 3, height, width)`; picture i has the seed `config.seed + first + i`."""
    generators = [torch.Generator().manual_seed(config.seed + first + index) for index in range(len(prompts))]
    images = pipe(
        prompts,
        num_inference_steps=config.steps,
        guidance_scale=config.guidance_scale,
        generator=generators,
        output_type="np",
        use_resolution_binning=False,
        clean_caption=False,
    ).images
    return torch.from_numpy(np.asarray(images) * 255).round().to(torch.uint8).permute(0, 3, 1, 2)


@torch.no_grad()
def reconstruct(autoencoder: AutoencoderKL, pictures: torch.Tensor) -> torch.Tensor:
    """Return uint8 pictures after the autoencoder, in its own words: the mean of the latents, decoded."""
    parts = [autoencoder.decode(autoencoder.encode(to_input(part)).latent_dist.mean).sample for part in pictures.split(32)]
    return ((torch.cat(parts) + 1) * 127.5).clamp(0, 255).round().to(torch.uint8)


def psnr(pictures: torch.Tensor, others: torch.Tensor) -> float:
    """Return the mean peak signal-to-noise ratio of uint8 pictures, in dB."""
    errors = (pictures.float() - others.float()).square().mean(dim=(1, 2, 3)).clamp(min=1e-3)
    return float((10 * torch.log10(255**2 / errors)).mean())


def shares(classifier: SceneClassifier, pictures: torch.Tensor, scenes: list[Scene]) -> dict[str, float]:
    """Return the share of pictures whose attribute is that of the scene, by attribute, and the mean over the attributes.

    Only what a full caption names counts: a second object, where the scene has one, and its side, where the caption tells it.
    """
    labels, found = attribute_labels(scenes), classifier.predict(pictures)
    silent = torch.tensor([[getattr(scene, name) in (None, NONE) for name in ATTRIBUTES] for scene in scenes])
    counted = (labels != UNKNOWN) & ~silent
    right = ((labels == found) & counted).sum(0) / counted.sum(0).clamp(min=1)
    by_name = {name: round(float(share), 4) for name, share in zip(ATTRIBUTES, right, strict=True)}
    return {**by_name, "mean": round(float(right.mean()), 4)}


def _seconds(pipe: PixArtAlphaPipeline, prompts: list[str], config: SampleConfig) -> float:
    """Return the seconds of the shortest of three runs."""
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        sample(pipe, prompts, config)
        seconds.append(time.perf_counter() - start)
    return min(seconds)
