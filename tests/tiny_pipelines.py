"""Tiny random pipelines of the models that people make pictures with, through diffusers' and transformers' own classes."""

from __future__ import annotations

import string
from typing import Any

import torch
from diffusers import (
    AuraFlowPipeline,
    AuraFlowTransformer2DModel,
    AutoencoderDC,
    AutoencoderKL,
    AutoencoderKLQwenImage,
    ChromaPipeline,
    ChromaTransformer2DModel,
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    Lumina2Pipeline,
    Lumina2Transformer2DModel,
    PixArtAlphaPipeline,
    PixArtSigmaPipeline,
    PixArtTransformer2DModel,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
    SanaPipeline,
    SanaTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
    ZImagePipeline,
    ZImageTransformer2DModel,
)
from tokenizers.pre_tokenizers import ByteLevel
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    Gemma2Config,
    Gemma2Model,
    GemmaTokenizer,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Tokenizer,
    Qwen3Config,
    Qwen3Model,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
    UMT5Config,
    UMT5EncoderModel,
)

WIDTH = 16


def text_encoder(kind: Any = CLIPTextModel) -> Any:
    sizes = {"hidden_size": WIDTH, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 60}
    return kind(CLIPTextConfig(**sizes, projection_dim=WIDTH, max_position_embeddings=16, bos_token_id=0, eos_token_id=1)).eval()


def tokenizer() -> CLIPTokenizer:
    """Every letter is a token, at the end of a word another."""
    pieces = ["<|startoftext|>", "<|endoftext|>", *string.ascii_lowercase, *(f"{letter}</w>" for letter in string.ascii_lowercase)]
    return CLIPTokenizer({piece: place for place, piece in enumerate(pieces)}, [], model_max_length=16)


def t5(width: int = WIDTH, kind: Any = T5EncoderModel, config: Any = T5Config) -> dict[str, Any]:
    """A T5 encoder and its tokenizer, of letters."""
    sizes = {"d_model": width, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2, "vocab_size": 40}
    pieces = [(piece, 0.0) for piece in ("<pad>", "</s>", "<unk>")] + [(piece, -1.0) for piece in ("▁", *string.ascii_lowercase)]
    return {"encoder": kind(config(**sizes)).eval(), "tokenizer": T5Tokenizer(pieces, extra_ids=0, model_max_length=16)}


def autoencoder(channels: int = 4, **statistics: float) -> AutoencoderKL:
    """One whose latents are an eighth as high and wide as pictures."""
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
    return AutoencoderKL(block_out_channels=(4,) * 4, norm_num_groups=2, latent_channels=channels, **blocks, **statistics).eval()


def pixart(kind: Any = PixArtAlphaPipeline) -> Any:
    torch.manual_seed(0)
    transformer = PixArtTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=8, num_layers=2, cross_attention_dim=16, sample_size=8,
        patch_size=2, caption_channels=WIDTH, norm_num_groups=1,
    ).eval()  # fmt: skip
    text = t5()
    return kind(text["tokenizer"], text["encoder"], autoencoder(), transformer, DPMSolverMultistepScheduler())


def pixart_sigma() -> Any:
    return pixart(PixArtSigmaPipeline)


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
        sample_size=8, layers_per_block=2, norm_num_groups=4, attention_head_dim=4,
        cross_attention_dim=2 * WIDTH if xl else WIDTH, **(deeper if xl else flat),
    ).eval()  # fmt: skip
    scheduler = DDIMScheduler(clip_sample=False, steps_offset=1)
    parts: dict[str, Any] = {
        "vae": autoencoder(), "text_encoder": text_encoder(), "tokenizer": tokenizer(), "unet": unet, "scheduler": scheduler
    }  # fmt: skip
    if xl:
        return StableDiffusionXLPipeline(**parts, text_encoder_2=text_encoder(CLIPTextModelWithProjection), tokenizer_2=tokenizer())
    return StableDiffusionPipeline(**parts, safety_checker=None, feature_extractor=None, requires_safety_checker=False)


def stable_diffusion_v() -> Any:
    """Stable Diffusion 2's kind, which predicts velocities."""
    pipe = stable_diffusion()
    pipe.scheduler = DDIMScheduler(clip_sample=False, steps_offset=1, prediction_type="v_prediction")
    return pipe


def stable_diffusion_xl() -> Any:
    return stable_diffusion(xl=True)


def stable_diffusion_3() -> StableDiffusion3Pipeline:
    torch.manual_seed(0)
    transformer = SD3Transformer2DModel(
        sample_size=8, patch_size=1, in_channels=4, num_layers=2, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=2 * WIDTH, caption_projection_dim=16, pooled_projection_dim=2 * WIDTH, out_channels=4, pos_embed_max_size=8,
    ).eval()  # fmt: skip
    texts: dict[str, Any] = {f"text_encoder{place}": text_encoder(CLIPTextModelWithProjection) for place in ("", "_2")}
    third = t5(2 * WIDTH)
    texts |= {"tokenizer": tokenizer(), "tokenizer_2": tokenizer(), "text_encoder_3": third["encoder"], "tokenizer_3": third["tokenizer"]}
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    return StableDiffusion3Pipeline(
        transformer=transformer, scheduler=scheduler, vae=autoencoder(scaling_factor=1.5, shift_factor=0.06), **texts
    )


def flux(distilled: bool = True) -> FluxPipeline:
    torch.manual_seed(0)
    transformer = FluxTransformer2DModel(
        patch_size=1, in_channels=4, num_layers=2, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=WIDTH, pooled_projection_dim=WIDTH, axes_dims_rope=(4, 4, 8), guidance_embeds=distilled,
    ).eval()  # fmt: skip
    text, vae = t5(), autoencoder(1, scaling_factor=0.36, shift_factor=0.11)
    return FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True), vae=vae, text_encoder=text_encoder(), tokenizer=tokenizer(),
        text_encoder_2=text["encoder"], tokenizer_2=text["tokenizer"], transformer=transformer,
    )  # fmt: skip


def flow(**settings: Any) -> FlowMatchEulerDiscreteScheduler:
    return FlowMatchEulerDiscreteScheduler(**settings)


def chroma() -> ChromaPipeline:
    torch.manual_seed(0)
    transformer = ChromaTransformer2DModel(
        patch_size=1, in_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=WIDTH, axes_dims_rope=(4, 4, 8), approximator_num_channels=8, approximator_hidden_dim=16, approximator_layers=1,
    ).eval()  # fmt: skip
    text, vae = t5(), autoencoder(1, scaling_factor=0.36, shift_factor=0.11)
    return ChromaPipeline(flow(use_dynamic_shifting=True), vae, text["encoder"], text["tokenizer"], transformer)


def aura_flow() -> AuraFlowPipeline:
    torch.manual_seed(0)
    transformer = AuraFlowTransformer2DModel(
        sample_size=8, patch_size=1, in_channels=4, num_mmdit_layers=1, num_single_dit_layers=1, attention_head_dim=8,
        num_attention_heads=2, joint_attention_dim=WIDTH, caption_projection_dim=16, pos_embed_max_size=64,
    ).eval()  # fmt: skip
    text = t5(WIDTH, UMT5EncoderModel, UMT5Config)
    return AuraFlowPipeline(text["tokenizer"], text["encoder"], autoencoder(), transformer, flow(shift=1.73))


def letters() -> dict[str, int]:
    """A byte-level vocabulary in which every letter is a token."""
    special = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<pad>", "<eos>", "<bos>", "<unk>")
    return {piece: place for place, piece in enumerate((*special, *sorted(ByteLevel.alphabet())))}


def gemma() -> dict[str, Any]:
    sizes = {"hidden_size": WIDTH, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1}
    pieces = {piece: place for place, piece in enumerate(("<pad>", "<eos>", "<bos>", "<unk>", "▁", *string.ascii_letters))}
    encoder = Gemma2Model(Gemma2Config(**sizes, head_dim=8, vocab_size=len(pieces))).eval()
    return {"text_encoder": encoder, "tokenizer": GemmaTokenizer(pieces, [])}


def lumina2() -> Lumina2Pipeline:
    torch.manual_seed(0)
    transformer = Lumina2Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, hidden_size=16, num_layers=1, num_refiner_layers=1, num_attention_heads=2,
        num_kv_heads=1, multiple_of=2, axes_dim_rope=(4, 2, 2), axes_lens=(300, 32, 32), cap_feat_dim=WIDTH,
    ).eval()  # fmt: skip
    vae = autoencoder(scaling_factor=0.36, shift_factor=0.11)
    return Lumina2Pipeline(transformer=transformer, scheduler=flow(shift=6.0), vae=vae, **gemma())


def sana() -> SanaPipeline:
    torch.manual_seed(0)
    vae = AutoencoderDC(
        latent_channels=4, attention_head_dim=2, encoder_block_types=("ResBlock",) * 4, decoder_block_types=("ResBlock",) * 4,
        encoder_block_out_channels=(4,) * 4, decoder_block_out_channels=(4,) * 4, encoder_layers_per_block=(1,) * 4,
        decoder_layers_per_block=(1,) * 4, encoder_qkv_multiscales=((),) * 4, decoder_qkv_multiscales=((),) * 4, scaling_factor=0.41,
    ).eval()  # fmt: skip
    transformer = SanaTransformer2DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=8, num_layers=1, num_cross_attention_heads=2,
        cross_attention_head_dim=8, cross_attention_dim=16, caption_channels=WIDTH, sample_size=8,
    ).eval()  # fmt: skip
    scheduler = DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
    return SanaPipeline(vae=vae, transformer=transformer, scheduler=scheduler, **gemma())


def qwen_image() -> QwenImagePipeline:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2}
    vocabulary = letters()
    text = {**sizes, "vocab_size": len(vocabulary), "rope_scaling": {"type": "mrope", "mrope_section": [1, 1, 2]}}
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 16}
    encoder = Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(text_config=text, vision_config=vision)).eval()
    vae = AutoencoderKLQwenImage(
        base_dim=4, z_dim=2, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True], latents_mean=[0.2, -0.1],
        latents_std=[1.5, 0.7],
    ).eval()  # fmt: skip
    transformer = QwenImageTransformer2DModel(
        in_channels=8, out_channels=2, num_layers=1, attention_head_dim=16, num_attention_heads=2, joint_attention_dim=16,
        axes_dims_rope=(8, 4, 4),
    ).eval()  # fmt: skip
    return QwenImagePipeline(flow(use_dynamic_shifting=True), vae, encoder, Qwen2Tokenizer(vocabulary, []), transformer)


def z_image() -> ZImagePipeline:
    torch.manual_seed(0)
    sizes = {"hidden_size": WIDTH, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2}
    words = Qwen2Tokenizer(letters(), [])
    words.chat_template = "{% for message in messages %}<|im_start|>{{ message['content'] }}<|im_end|>{% endfor %}"
    encoder = Qwen3Model(Qwen3Config(**sizes, head_dim=8, vocab_size=len(words))).eval()
    transformer = ZImageTransformer2DModel(
        in_channels=4, dim=32, n_layers=1, n_refiner_layers=1, n_heads=2, n_kv_heads=2, cap_feat_dim=WIDTH, axes_dims=[8, 4, 4],
        axes_lens=[256, 32, 32],
    ).eval()  # fmt: skip
    return ZImagePipeline(flow(shift=3.0), autoencoder(scaling_factor=0.36, shift_factor=0.11), encoder, words, transformer)


def denoised(pipe: Any) -> torch.Tensor:
    """One prediction of the pipeline's denoiser."""
    rng = torch.Generator().manual_seed(0)

    def drawn(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=rng)

    step = torch.tensor([500.0])
    with torch.no_grad():
        if isinstance(pipe, FluxPipeline):
            options = {"pooled_projections": drawn(1, WIDTH), "img_ids": torch.zeros(9, 3), "txt_ids": torch.zeros(5, 3)}
            options["guidance"] = torch.ones(1)
            return pipe.transformer(drawn(1, 9, 4), encoder_hidden_states=drawn(1, 5, WIDTH), timestep=step / 1000, **options).sample
        noisy = drawn(1, 4, 8, 8)
        if isinstance(pipe, StableDiffusion3Pipeline):
            return pipe.transformer(noisy, drawn(1, 5, 2 * WIDTH), pooled_projections=drawn(1, 2 * WIDTH), timestep=step).sample
        text = drawn(1, 5, pipe.unet.config.cross_attention_dim)
        added = {"text_embeds": drawn(1, WIDTH), "time_ids": torch.zeros(1, 6)} if isinstance(pipe, StableDiffusionXLPipeline) else None
        return pipe.unet(noisy, step, text, added_cond_kwargs=added).sample

