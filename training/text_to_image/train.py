"""`train-base`: autoencoder, latents, transformer with text encoder, pipeline, classifier, evaluation. Run it again to go on."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from diffusers.pipelines.pixart_alpha.pipeline_pixart_alpha import PixArtAlphaPipeline

from cond_pdiff.atomic import atomic_folder
from cond_pdiff.errors import TrainingError
from cond_pdiff.training.config import parse
from cond_pdiff.training.processes import processes
from cond_pdiff.training.stages.loop import fit
from cond_pdiff.training.text_to_image.card import write_base_card
from cond_pdiff.training.text_to_image.config import ImageAutoencoderConfig, SampleConfig, SceneClassifierConfig, TransformerConfig
from cond_pdiff.training.text_to_image.evaluate import evaluate_base
from cond_pdiff.training.text_to_image.latents import SceneLatents
from cond_pdiff.training.text_to_image.train_autoencoder import ImageAutoencoderStage
from cond_pdiff.training.text_to_image.train_classifier import SceneClassifierStage
from cond_pdiff.training.text_to_image.train_transformer import TransformerStage

STAGES = ("image_autoencoder", "transformer", "scene_classifier")


def train_base(recipe: dict[str, Any], run_folder: str | Path, tensorboard: bool = False) -> Path:
    """Train a base model from nothing but code and random numbers.

    Args:
        recipe: its `name` (for the card) and the sections `image_autoencoder`, `transformer`, `scene_classifier` and `samples` (see
            `ImageAutoencoderConfig`, `TransformerConfig`, `SceneClassifierConfig`, `SampleConfig`).
        run_folder: gets a folder a stage (checkpoints, metrics.jsonl), `latents/`, `pipeline/` and `evaluation.json`.
        tensorboard: also write tensorboard events.

    Returns:
        The pipeline's folder, for `PixArtAlphaPipeline.from_pretrained`; see `save_base`.

    Raises:
        TrainingError: the recipe is of something else, or a run with other settings lies in the folder.
    """
    missing = [name for name in STAGES if name not in recipe]
    if missing:
        raise TrainingError(f"this is no recipe of a base model: it has no section {missing[0]!r}; needed are {list(STAGES)}")
    run_folder = Path(run_folder)
    autoencoder_config = parse(ImageAutoencoderConfig, recipe["image_autoencoder"], "image_autoencoder")
    transformer_config = parse(TransformerConfig, recipe["transformer"], "transformer")
    classifier_config = parse(SceneClassifierConfig, recipe["scene_classifier"], "scene_classifier")
    sample_config = parse(SampleConfig, recipe.get("samples", {}), "samples")

    autoencoder = ImageAutoencoderStage(autoencoder_config)
    fit(autoencoder, autoencoder_config.fit, run_folder / autoencoder.name, tensorboard)
    autoencoder.fit_latent_statistics()
    data = SceneLatents.make(autoencoder.autoencoder, transformer_config.scenes, transformer_config.fit.seed, run_folder / "latents")
    transformer = TransformerStage(data, transformer_config)
    fit(transformer, transformer_config.fit, run_folder / transformer.name, tensorboard)
    folder = run_folder / "pipeline"
    if processes().is_main_process:
        save_base(transformer.pipeline(autoencoder.autoencoder), folder)
    classifier = SceneClassifierStage(classifier_config)
    fit(classifier, classifier_config.fit, run_folder / classifier.name, tensorboard)
    if processes().is_main_process:
        result = evaluate_base(folder, classifier.classifier, sample_config, run_folder / "evaluation.json")
        write_base_card(folder, str(recipe.get("name", run_folder.name)), result)
        print(f"attributes right: {result['generated']['mean']:.1%} (renders {result['rendered']['mean']:.1%}, "
              f"other prompts {result['shuffled']['mean']:.1%})", file=sys.stderr)  # fmt: skip
    return folder


def save_base(pipe: PixArtAlphaPipeline, folder: Path) -> None:
    """Save a base model, complete or not at all, replacing the one of an earlier run of the same command.

    Autoencoder and transformer are stored in half precision and loaded in single. transformers, unlike diffusers, loads what
    it finds, and a pipeline of two precisions cannot run: the small text encoder stays in single.
    """
    networks = (pipe.vae, pipe.transformer)
    for network in networks:
        network.half()
    with atomic_folder(folder, ("model_index.json", "README.md", *pipe.components), overwrite=True) as aside:
        pipe.save_pretrained(aside)
    for network in networks:
        network.float()
