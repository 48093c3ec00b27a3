"""Stage two of the base model: the transformer over latents, together with the text encoder, by flow matching."""

from __future__ import annotations

import random
from typing import Any, NamedTuple

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.transformers.pixart_transformer_2d import PixArtTransformer2DModel
from diffusers.pipelines.pixart_alpha.pipeline_pixart_alpha import PixArtAlphaPipeline
from diffusers.schedulers.scheduling_dpmsolver_multistep import DPMSolverMultistepScheduler
from torch import nn
from transformers import T5Config, T5EncoderModel

from cond_pdiff.training.config import build, recorded
from cond_pdiff.training.objectives import denoising_loss, draw_noise_levels, flow_pair
from cond_pdiff.training.text_to_image.config import TransformerConfig
from cond_pdiff.training.text_to_image.latents import SceneLatents
from cond_pdiff.training.text_to_image.scenes import caption_words
from cond_pdiff.training.text_to_image.tokenizer import build_tokenizer

TRAIN_TIMESTEPS = 1000
UNKNOWN_WORD = "?unknown?"


class CaptionedBatch(NamedTuple):
    """Clean latents and the tokens of their captions."""

    latents: torch.Tensor
    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    captions: list[str]


class TextToVelocity(nn.Module):
    """Text encoder and transformer as training sees them: noisy latents and tokens in, the velocity out."""

    def __init__(self, transformer: PixArtTransformer2DModel, text_encoder: T5EncoderModel) -> None:
        super().__init__()
        self.transformer, self.text_encoder = transformer, text_encoder

    def forward(self, noisy: torch.Tensor, levels: torch.Tensor, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        """Predict the velocity at `noisy`, shape `(batch, channels, side, side)`; noise levels from 0 to 1, shape `(batch,)`."""
        embeddings = self.text_encoder(input_ids, attention_mask=attention_mask)[0]
        return self.transformer(
            noisy,
            encoder_hidden_states=embeddings,
            encoder_attention_mask=attention_mask,
            timestep=levels * TRAIN_TIMESTEPS,
            added_cond_kwargs={"resolution": None, "aspect_ratio": None},
            return_dict=False,
        )[0]


@torch.no_grad()
def _look_around(text_encoder: T5EncoderModel) -> None:
    """Let a fourth of the heads each begin by looking at the word before, the word after, all words before, all words after.

    T5 begins without any sense of order, and one as small as this stays so: after 8,000 steps the loss was the same with the
    colours of two objects exchanged in the caption.
    """
    # Of all layers; shape (buckets, heads).
    bias = text_encoder.get_parameter("encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight")
    after = len(bias) // 2  # the first bucket of words that follow; words before begin at 1
    views = (slice(1, 2), slice(after + 1, after + 2), slice(1, after), slice(after + 1, None))
    bias.zero_()
    for head in range(bias.shape[1]):
        bias[views[head % len(views)], head] = 4.0


class TransformerStage:
    """The stage (see `cond_pdiff.training.stages.loop`) that trains transformer and text encoder on the latents of scenes."""

    name = "transformer"
    at_once = None

    def __init__(self, data: SceneLatents, config: TransformerConfig) -> None:
        self.data, self.config = data, config
        self.tokenizer = build_tokenizer(caption_words())
        torch.manual_seed(config.fit.seed)
        t5 = {"vocab_size": len(self.tokenizer), "pad_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 0, "dropout_rate": 0.0}
        self.text_encoder = T5EncoderModel(build(T5Config, "transformer, text_encoder", **config.text_encoder, **t5))
        _look_around(self.text_encoder)
        channels, side = data.latents.shape[1:3]
        sizes = {"in_channels": channels, "out_channels": channels, "sample_size": side}
        sizes["caption_channels"] = self.text_encoder.config.d_model
        self.transformer = build(PixArtTransformer2DModel, "transformer, model", **config.model, **sizes)
        nn.init.zeros_(self.transformer.proj_out.weight)
        self.module: nn.Module = TextToVelocity(self.transformer, self.text_encoder)
        self.identity: dict[str, Any] = {"config": recorded(config), "latents": data.sha256, "words": len(self.tokenizer)}

    def draw(self, batch_size: int, rng: torch.Generator) -> CaptionedBatch:
        """Draw scenes, each with a wording of its own."""
        picks = torch.randint(len(self.data.scenes), (batch_size,), generator=rng)
        words = random.Random(int(torch.randint(2**62, (1,), generator=rng)))
        captions = [self._caption(index, words) for index in picks.tolist()]
        tokens = self.tokenizer(captions, padding=True, truncation=True, max_length=self.config.max_length, return_tensors="pt")
        return CaptionedBatch(self.data.latents[picks], tokens["input_ids"], tokens["attention_mask"], captions)

    def _caption(self, index: int, rng: random.Random) -> str:
        if rng.random() < self.config.caption_dropout:
            return ""
        words = self.data.scenes[index].caption(rng).split()
        if rng.random() < self.config.unknown_words:
            words.insert(rng.randint(0, len(words)), UNKNOWN_WORD)
        return " ".join(words)

    def loss(self, module: nn.Module, batch: CaptionedBatch, rng: torch.Generator) -> torch.Tensor:
        """Return the loss of conditional flow matching along straight lines from latents to noise."""
        device = next(module.parameters()).device
        levels = draw_noise_levels(len(batch.latents), self.config.time_shift, rng)
        noisy, velocity = flow_pair(batch.latents, torch.randn(batch.latents.shape, generator=rng), levels)
        predicted = module(noisy.to(device), levels.to(device), batch.input_ids.to(device), batch.attention_mask.to(device))
        return denoising_loss(velocity.to(device), predicted)

    def describe(self, batch: CaptionedBatch) -> str:
        """Return the captions."""
        return "; ".join(batch.captions)

    def pipeline(self, autoencoder: AutoencoderKL) -> PixArtAlphaPipeline:
        """Return the base model: diffusers' own pipeline with a few-step solver for flows."""
        scheduler = DPMSolverMultistepScheduler(
            num_train_timesteps=TRAIN_TIMESTEPS,
            prediction_type="flow_prediction",
            use_flow_sigmas=True,
            flow_shift=3.0,  # what is where is decided while there is much noise: most of the few steps are taken there
            algorithm_type="dpmsolver++",
            solver_order=2,
        )
        tokenizer = build_tokenizer(caption_words())  # one that was never used: use leaves traces in what is saved
        return PixArtAlphaPipeline(tokenizer, self.text_encoder, autoencoder, self.transformer, scheduler)
