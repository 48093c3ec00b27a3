"""Tiny random pipelines of the models that LoRA files are made for, through diffusers' own classes; without tokenizers."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

WIDTH = 16


def text_encoder(kind: Any = CLIPTextModel) -> Any:
    sizes = {"hidden_size": WIDTH, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 50}
    return kind(CLIPTextConfig(**sizes, projection_dim=WIDTH, max_position_embeddings=16, bos_token_id=0, eos_token_id=1)).eval()


def autoencoder(channels: int = 4) -> AutoencoderKL:
    return AutoencoderKL(block_out_channels=(4,), norm_num_groups=2, latent_channels=channels)


def stable_diffusion(xl: bool = False) -> Any:
    torch.manual_seed(0)
    # Of XL the three blocks and the depths of the second and third are as in the original: its own names count on them.
    deeper = {
        "block_out_channels": (8, 16, 16), "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"), "transformer_layers_per_block": (1, 1, 2),
        "use_linear_projection": True, "addition_embed_type": "text_time", "addition_time_embed_dim": 2,
        "projection_class_embeddings_input_dim": WIDTH + 12,
    }  # fmt: skip
    flat = {
        "block_out_channels": (8, 16), "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    }  # fmt: skip
    unet = UNet2DConditionModel(
        sample_size=8, layers_per_block=2, norm_num_groups=4, attention_head_dim=4, cross_attention_dim=WIDTH, **(deeper if xl else flat)
    ).eval()
    scheduler = DDIMScheduler(clip_sample=False, steps_offset=1)
    parts: dict[str, Any] = {
        "vae": autoencoder(), "text_encoder": text_encoder(), "tokenizer": None, "unet": unet, "scheduler": scheduler
    }  # fmt: skip
    if xl:
        return StableDiffusionXLPipeline(**parts, text_encoder_2=text_encoder(CLIPTextModelWithProjection), tokenizer_2=None)
    return StableDiffusionPipeline(**parts, safety_checker=None, feature_extractor=None, requires_safety_checker=False)


def stable_diffusion_xl() -> Any:
    return stable_diffusion(xl=True)


def stable_diffusion_3() -> StableDiffusion3Pipeline:
    torch.manual_seed(0)
    transformer = SD3Transformer2DModel(
        sample_size=8, patch_size=1, in_channels=4, num_layers=2, attention_head_dim=8, num_attention_heads=2, joint_attention_dim=WIDTH,
        caption_projection_dim=16, pooled_projection_dim=WIDTH, out_channels=4, pos_embed_max_size=8,
    ).eval()  # fmt: skip
    encoders = {f"text_encoder{place}": text_encoder(CLIPTextModelWithProjection) for place in ("", "_2")}
    none = dict.fromkeys(("tokenizer", "tokenizer_2", "text_encoder_3", "tokenizer_3"))
    return StableDiffusion3Pipeline(
        transformer=transformer, scheduler=FlowMatchEulerDiscreteScheduler(), vae=autoencoder(), **encoders, **none
    )


def flux() -> FluxPipeline:
    torch.manual_seed(0)
    transformer = FluxTransformer2DModel(
        patch_size=1, in_channels=4, num_layers=2, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=WIDTH, pooled_projection_dim=WIDTH, axes_dims_rope=(4, 4, 8),
    ).eval()  # fmt: skip
    none = dict.fromkeys(("tokenizer", "text_encoder_2", "tokenizer_2"))
    return FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(), vae=autoencoder(1), text_encoder=text_encoder(), transformer=transformer, **none
    )


def denoised(pipe: Any) -> torch.Tensor:
    """One prediction of the pipeline's denoiser."""
    rng = torch.Generator().manual_seed(0)

    def drawn(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=rng)

    step = torch.tensor([500.0])
    with torch.no_grad():
        if isinstance(pipe, FluxPipeline):
            options = {"pooled_projections": drawn(1, WIDTH), "img_ids": torch.zeros(9, 3), "txt_ids": torch.zeros(5, 3)}
            return pipe.transformer(drawn(1, 9, 4), encoder_hidden_states=drawn(1, 5, WIDTH), timestep=step / 1000, **options).sample
        noisy, text = drawn(1, 4, 8, 8), drawn(1, 5, WIDTH)
        if isinstance(pipe, StableDiffusion3Pipeline):
            return pipe.transformer(noisy, text, pooled_projections=drawn(1, WIDTH), timestep=step).sample
        added = {"text_embeds": drawn(1, WIDTH), "time_ids": torch.zeros(1, 6)} if isinstance(pipe, StableDiffusionXLPipeline) else None
        return pipe.unet(noisy, step, text, added_cond_kwargs=added).sample

