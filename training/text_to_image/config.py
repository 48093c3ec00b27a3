"""Settings of the base model's stages; the recipe's sections `image_autoencoder`, `transformer`, `scene_classifier` and `samples`."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field
from pydantic.dataclasses import dataclass

from cond_pdiff.training.config import STRICT, Count, FitConfig, GuidanceScale, InferenceSteps, JsonObject, NotNegative, Number, Seed, Share


@dataclass(frozen=True, config=STRICT)
class ImageAutoencoderConfig:
    """The variational autoencoder between pictures and latents."""

    model: JsonObject = Field(default_factory=dict, description="AutoencoderKL's arguments")
    fit: FitConfig = Field(default=FitConfig(), description="how it is trained")
    scenes: Count = Field(default=4000, description="rendered scenes that it learns from")
    plain_share: Share = Field(
        default=0.45, description="share of pictures that are shown as rendered; the others are changed by `effects`"
    )
    pattern_share: Share = Field(default=0.1, description="share of pictures that show no scene, only coloured noise")
    scales: Count = Field(default=4, description="the error of pixels is taken at full size, half, a quarter …")
    edge_weight: NotNegative = Field(
        default=0.5, description="of the error in differences of neighbouring pixels, beside the error of pixels"
    )
    initial_logvar: Number = Field(
        default=-6.0, description="of the latents' distribution; from 0 on, training would begin with nothing but noise"
    )
    kl_weight: NotNegative = Field(
        default=1e-4, description="of the mean divergence of a latent from a standard normal variable"
    )


@dataclass(frozen=True, config=STRICT)
class TransformerConfig:
    """The transformer over latents, trained together with the text encoder."""

    model: JsonObject = Field(
        default_factory=dict, description="PixArtTransformer2DModel's arguments, without those that must fit others"
    )
    text_encoder: JsonObject = Field(
        default_factory=dict, description="T5Config's arguments, without those of the vocabulary"
    )
    fit: FitConfig = Field(default=FitConfig(), description="how it is trained")
    scenes: Count = Field(default=40_000, description="rendered scenes, encoded once")
    max_length: Count = Field(default=32, description="tokens of a caption in training")
    caption_dropout: Share = Field(
        default=0.1, description="share of samples with the empty caption, for classifier-free guidance"
    )
    unknown_words: Share = Field(
        default=0.05, description="share of captions with a word that the vocabulary lacks, put in anywhere"
    )
    time_shift: Number = Field(
        default=0.0, description="mean of the normal variable whose sigmoid is the noise level; above 0 for more noise"
    )


@dataclass(frozen=True, config=STRICT)
class SceneClassifierConfig:
    """The classifier that reads a scene's attributes from a picture; only for the evaluation."""

    fit: FitConfig = Field(default=FitConfig(), description="how it is trained")
    channels: Annotated[tuple[Count, ...], Field(min_length=1)] = Field(
        default=(24, 48, 96, 128), description="of the convolutions, each halving the picture"
    )
    scenes: Count = Field(default=20_000, description="rendered scenes that it learns from")


@dataclass(frozen=True, config=STRICT)
class SampleConfig:
    """How the evaluation makes its pictures."""

    scenes: Count = Field(default=256, description="held-out scenes")
    steps: InferenceSteps = Field(default=10, description="of the sampler")
    guidance_scale: GuidanceScale = Field(default=2.0, description="classifier-free guidance")
    batch_size: Count = Field(default=32, description="pictures at once")
    seed: Seed = Field(default=0, description="of the noise")
