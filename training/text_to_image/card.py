"""The base model's card, filled with what was measured."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from diffusers.pipelines.pixart_alpha.pipeline_pixart_alpha import PixArtAlphaPipeline

from cond_pdiff.training.card import markdown_table, millions, write_card
from cond_pdiff.training.text_to_image.scenes import ATTRIBUTES, COLOURS, OBJECTS, PLACES, RELATIONS, TIMES
from cond_pdiff.weights import weights_megabytes

COLUMNS = {"generated": "generated", "reconstructed": "renders after the autoencoder", "rendered": "renders", "shuffled": "other prompts"}


def write_base_card(folder: Path, name: str, evaluation: dict[str, Any]) -> Path:
    """Write `README.md` into a base model's folder.

    Args:
        evaluation: what `evaluate_base` returned.
    """
    pipe = PixArtAlphaPipeline.from_pretrained(folder, use_safetensors=True)
    latents = pipe.transformer.config
    rows = [[words.replace("_", " "), *(f"{100 * evaluation[column][words]:.1f}" for column in COLUMNS)] for words in (*ATTRIBUTES, "mean")]
    fields = {
        "name": name,
        "side": latents.sample_size * pipe.vae_scale_factor,
        "steps": evaluation["settings"]["steps"],
        "guidance_scale": f"{evaluation['settings']['guidance_scale']:g}",
        "scenes": evaluation["settings"]["scenes"],
        "objects": ", ".join(OBJECTS),
        "colours": ", ".join(COLOURS),
        "places": ", ".join(PLACES),
        "times": ", ".join(TIMES),
        "relations": ", ".join(RELATIONS),
        "words": len(pipe.tokenizer),
        "transformer_size": millions(pipe.transformer),
        "text_encoder_size": millions(pipe.text_encoder),
        "autoencoder_size": millions(pipe.vae),
        "latent_shape": f"{latents.in_channels}×{latents.sample_size}×{latents.sample_size}",
        "disk": f"{weights_megabytes(folder):.1f}",
        "attribute_table": markdown_table(["percent right", *COLUMNS.values()], rows),
        "psnr": evaluation["reconstruction_psnr"],
        "seconds": evaluation["seconds_of_four_pictures"],
        "threads": evaluation["threads"],
    }
    return write_card(folder, "text_to_image.md", fields)
