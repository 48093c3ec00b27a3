"""Settings of the base model's stages; the recipe's sections `image_autoencoder`, `transformer` and `scene_classifier`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from cond_pdiff.training.config import FitConfig


@dataclass(frozen=True)
class ImageAutoencoderConfig:
    """The variational autoencoder between pictures and latents."""

    model: dict[str, Any] = field(default_factory=dict)     # AutoencoderKL's arguments
    fit: FitConfig = field(default_factory=FitConfig)
    scenes: int = 4000              # rendered scenes that it learns from
    plain_share: float = 0.45       # share of pictures that are shown as rendered; the others are changed by `effects`
    pattern_share: float = 0.1     # share of pictures that show no scene, only coloured noise
    scales: int = 4                 # the error of pixels is taken at full size, half, a quarter …
    edge_weight: float = 0.5        # of the error in differences of neighbouring pixels, beside the error of pixels
    initial_logvar: float = -6.0    # of the latents' distribution; from 0 on, training would begin with nothing but noise
    kl_weight: float = 1e-4         # of the mean divergence of a latent from a standard normal variable


@dataclass(frozen=True)
class TransformerConfig:
    """The transformer over latents, trained together with the text encoder."""

    model: dict[str, Any] = field(default_factory=dict)         # PixArtTransformer2DModel's arguments, without those that must fit others
    text_encoder: dict[str, Any] = field(default_factory=dict)  # T5Config's arguments, without those of the vocabulary
    fit: FitConfig = field(default_factory=FitConfig)
    scenes: int = 40_000            # rendered scenes, encoded once
    max_length: int = 32            # tokens of a caption in training
    caption_dropout: float = 0.1    # share of samples with the empty caption, for classifier-free guidance
    unknown_words: float = 0.05     # share of captions with a word that the vocabulary lacks, put in anywhere
    time_shift: float = 0.0         # mean of the normal variable whose sigmoid is the noise level; above 0 for more noise


@dataclass(frozen=True)
class SceneClassifierConfig:
    """The classifier that reads a scene's attributes from a picture; only for the evaluation."""

    fit: FitConfig = field(default_factory=FitConfig)
    channels: tuple[int, ...] = (24, 48, 96, 128)   # of the convolutions, each halving the picture
    scenes: int = 20_000


@dataclass(frozen=True)
class SampleConfig:
    """How the evaluation makes its pictures."""

    scenes: int = 256               # held-out scenes
    steps: int = 10                 # of the sampler
    guidance_scale: float = 2.0
    batch_size: int = 32
    seed: int = 0
