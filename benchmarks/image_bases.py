"""What styles on bases of real sizes take: adapters, memory and time, computed from the bases' own settings. Nothing here is measured.

Denoisers are built without weights (on torch's meta device) with the settings that their publishers give, and a batch as the recipe has
it is put through them with nothing computed: parameters, the tensors that are kept for the way back, and multiplications are counted.

    python benchmarks/image_bases.py docs/styles_on_real_bases.md     # replaces the tables there
"""

from __future__ import annotations

import argparse
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import FluxTransformer2DModel, PixArtTransformer2DModel, SD3Transformer2DModel, UNet2DConditionModel
from peft import LoraConfig, inject_adapter_in_model
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode
from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

from cond_pdiff.lora import LoraSpec, target_linears, update_shape
from cond_pdiff.training.config import CollectConfig, parse
from cond_pdiff.training.recipe import read_recipe

RECIPE = "diffusers-styles"
GPUS = {"RTX 4090 (24 GB)": (24, 165e12), "A100 (80 GB)": (80, 312e12), "H100 (80 GB)": (80, 989e12)}
"""Gigabytes, and dense bfloat16 operations a second, as NVIDIA's data sheets give them."""
ROOM = 1.2
"""What is not counted (see the page) is taken to be a fifth more."""
SHARE = 0.4
"""The share of these that a training step is taken to reach."""
STYLES = 100
AUTOENCODER_GB = 0.34 + 2.2
"""Diffusers' image autoencoders in float32 (84 million), and what encoding a million pixels takes: four tensors of 128 channels."""
MARKS = ("<!-- computed by benchmarks/image_bases.py -->", "<!-- end -->")
BLOCK = re.compile(r"(^|\.)(transformer_blocks|single_transformer_blocks|resnets)\.\d+$")
"""The modules whose activations `enable_gradient_checkpointing` has computed again, one at a time."""

CLIP_L = CLIPTextConfig(hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12, projection_dim=768)
CLIP_G = CLIPTextConfig(hidden_size=1280, intermediate_size=5120, num_hidden_layers=32, num_attention_heads=20, projection_dim=1280)
T5_XXL = T5Config(d_model=4096, d_kv=64, d_ff=10240, num_layers=24, num_heads=64, feed_forward_proj="gated-gelu", vocab_size=32128)
SDXL = {
    "block_out_channels": (320, 640, 1280), "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"), "attention_head_dim": (5, 10, 20),
    "cross_attention_dim": 2048, "transformer_layers_per_block": (1, 2, 10), "use_linear_projection": True, "sample_size": 128,
    "addition_embed_type": "text_time", "addition_time_embed_dim": 256, "projection_class_embeddings_input_dim": 2816,
}  # fmt: skip


@dataclass(frozen=True)
class RealBase:
    """A base model as it is published, and a batch for its denoiser.

    Args:
        recipe: that collects adapters for it.
        denoiser: makes it.
        inputs: number of pictures → arguments of its `forward`.
        texts: settings of its text encoders.
        side: of a training picture, in pixels.
    """

    recipe: str
    denoiser: Callable[[], nn.Module]
    inputs: Callable[[int], dict[str, Any]]
    texts: tuple[Any, ...]
    side: int


def empty(*shape: int) -> torch.Tensor:
    return torch.empty(shape, dtype=torch.bfloat16, device="meta")


def unet_inputs(side: int, width: int, **added: int) -> Callable[[int], dict[str, Any]]:
    def inputs(count: int) -> dict[str, Any]:
        extra = {name: empty(count, size) for name, size in added.items()}
        given = {"sample": empty(count, 4, side, side), "timestep": empty(count), "encoder_hidden_states": empty(count, 77, width)}
        return {**given, "added_cond_kwargs": extra or None}

    return inputs


def pixart_inputs(count: int) -> dict[str, Any]:
    sizes = {"resolution": None, "aspect_ratio": None}
    return {
        "hidden_states": empty(count, 4, 64, 64), "encoder_hidden_states": empty(count, 120, 4096), "timestep": empty(count),
        "added_cond_kwargs": sizes,
    }  # fmt: skip


def sd3_inputs(count: int) -> dict[str, Any]:
    return {
        "hidden_states": empty(count, 16, 128, 128), "encoder_hidden_states": empty(count, 77 + 256, 4096),
        "pooled_projections": empty(count, 2048), "timestep": empty(count),
    }  # fmt: skip


def flux_inputs(count: int) -> dict[str, Any]:
    return {
        "hidden_states": empty(count, 4096, 64), "encoder_hidden_states": empty(count, 512, 4096), "pooled_projections": empty(count, 768),
        "timestep": empty(count), "img_ids": empty(4096, 3), "txt_ids": empty(512, 3), "guidance": empty(count),
    }  # fmt: skip


BASES = {
    "SD 1.5": RealBase(
        RECIPE, lambda: UNet2DConditionModel(sample_size=64, cross_attention_dim=768), unet_inputs(64, 768), (CLIP_L,), 512
    ),
    "SDXL": RealBase(
        f"{RECIPE}+sdxl", lambda: UNet2DConditionModel(**SDXL), unet_inputs(128, 2048, text_embeds=1280, time_ids=6), (CLIP_L, CLIP_G), 1024
    ),
    "PixArt-XL": RealBase(
        f"{RECIPE}+pixart-xl", lambda: PixArtTransformer2DModel(sample_size=64, cross_attention_dim=1152, caption_channels=4096),
        pixart_inputs, (T5_XXL,), 512,
    ),
    "SD 3 medium": RealBase(
        f"{RECIPE}+sd3",
        lambda: SD3Transformer2DModel(num_layers=24, num_attention_heads=24, caption_projection_dim=1536, pos_embed_max_size=192),
        sd3_inputs, (CLIP_L, CLIP_G, T5_XXL), 1024,
    ),
    "FLUX.1": RealBase(f"{RECIPE}+flux", lambda: FluxTransformer2DModel(guidance_embeds=True), flux_inputs, (CLIP_L, T5_XXL), 1024),
}  # fmt: skip


@dataclass(frozen=True)
class Cost:
    """What is counted for a base: parameters, numbers of an adapter, and of a training step."""

    denoiser: int
    texts: int
    modules: int
    numbers: int
    modelled: int
    step_bytes: float = 0.0
    step_operations: float = 0.0


def collect_of(base: RealBase) -> CollectConfig:
    return parse(CollectConfig, read_recipe(base.recipe)["collect"], "collect")


def sizes(base: RealBase) -> tuple[nn.Module, Cost]:
    """The denoiser without weights, and its sizes and those of an adapter."""
    config = collect_of(base)
    with torch.device("meta"):
        model = base.denoiser().to("meta", torch.bfloat16)
        texts = [(T5EncoderModel if isinstance(text, T5Config) else CLIPTextModel)(text) for text in base.texts]
    linears = target_linears(model, LoraSpec("base", config.rank, config.alpha, config.target_modules))
    shapes = [update_shape(linear) for linear in linears.values()]
    numbers = config.rank * sum(rows + columns for rows, columns in shapes)
    modelled = config.rank * sum(rows for rows, _ in shapes)  # `lora_A` is shared by the zoo
    return model, Cost(parameters(model), sum(map(parameters, texts)), len(shapes), numbers, modelled)


def parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


class FusedAttention(torch.autograd.Function):
    """Attention as GPUs' fused kernels do it: it keeps its inputs and output for the way back, and no matrix of scores."""

    operations = 0

    @staticmethod
    def forward(ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        FusedAttention.operations += 4 * math.prod(query.shape) * key.shape[-2]
        out = torch.empty_like(query)
        ctx.save_for_backward(query, key, value, out)
        return out


def count_step(base: RealBase, model: Any) -> tuple[float, float]:
    """Bytes beyond weights, and operations, of a training step with gradient checkpointing.

    Kept are the blocks' inputs, and of one block at a time all that it computes (counted at its largest); the trained numbers have
    gradients and AdamW's moments, in float32. On the way back a block is computed again, and then its gradients, which cost as much:
    frozen weights have none.
    """
    config = collect_of(base)
    with torch.device("meta"):
        inject_adapter_in_model(LoraConfig(r=config.rank, target_modules=list(config.target_modules)), model).to(torch.bfloat16)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(".lora_B." in name)
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    largest, _, operations = _forward(base, model, config.batch_size)
    model.enable_gradient_checkpointing()
    _, kept, _ = _forward(base, model, config.batch_size)
    return kept + largest + 16 * trained, 3 * operations


def _forward(base: RealBase, model: nn.Module, count: int) -> tuple[float, float, float]:
    """Bytes kept by the block that keeps most, bytes kept by all, and operations."""
    own = {id_of(tensor) for tensor in (*model.parameters(), *model.buffers())}
    kept: dict[int, int] = {}
    alive, blocks, starts = [], [0.0], dict[str, int]()

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if id_of(tensor) not in own:
            alive.append(tensor)  # so that no other takes its place
            kept[id_of(tensor)] = tensor.untyped_storage().nbytes()
        return tensor

    handles = []
    for name, block in model.named_modules():
        if BLOCK.search(name):
            handles.append(block.register_forward_pre_hook(lambda *_, name=name: starts.update({name: sum(kept.values())})))
            handles.append(block.register_forward_hook(lambda *_, name=name: blocks.append(sum(kept.values()) - starts[name])))
    FusedAttention.operations = 0
    original = nn.functional.scaled_dot_product_attention
    nn.functional.scaled_dot_product_attention = lambda query, key, value, *_, **__: FusedAttention.apply(query, key, value)
    try:
        with FlopCounterMode(display=False) as counter, saved_tensors_hooks(keep, lambda tensor: tensor):
            model(**base.inputs(count), return_dict=False)
    finally:
        nn.functional.scaled_dot_product_attention = original
        for handle in handles:
            handle.remove()
    return max(blocks), sum(kept.values()), counter.get_total_flops() + FusedAttention.operations


def id_of(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage()._cdata


def size_row(name: str, cost: Cost) -> list[str]:
    width = read_recipe(BASES[name].recipe)["autoencoder"]["model"]["width"]
    generator = cost.modelled * (2 * width + 4) / 1e6
    rank = collect_of(BASES[name]).rank
    return [
        name, f"`{BASES[name].recipe}`", f"{cost.denoiser / 1e6:,.0f} + {cost.texts / 1e6:,.0f}", str(cost.modules),
        f"{cost.numbers // rank:,} · {rank} = {cost.numbers:,}", f"{cost.modelled:,}", f"{4 * cost.numbers / 1e6:,.0f} MB",
        f"{generator:,.0f} MB",
    ]  # fmt: skip


def cost_row(name: str, cost: Cost) -> list[str]:
    base = BASES[name]
    config = collect_of(base)
    steps = STYLES * config.runs * config.steps + config.multitask_steps
    encoding = 2 * (cost.denoiser + cost.texts) / 1e9 + AUTOENCODER_GB
    training = (2 * cost.denoiser + cost.step_bytes) / 1e9
    hours = []
    for memory, speed in GPUS.values():
        fits = ROOM * max(encoding, training) <= memory
        hours.append(f"{steps * cost.step_operations / (SHARE * speed) / 3600:,.1f} h" if fits else "does not fit")
    return [
        name, f"{config.batch_size} of {base.side}²", f"{2 * cost.denoiser / 1e9:.1f} GB", f"{cost.step_bytes / 1e9:.1f} GB",
        f"**{training:.1f} GB**", f"{encoding:.1f} GB", f"{cost.step_operations / 1e12:.0f}", *hours,
    ]  # fmt: skip


def table(titles: list[str], rows: list[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (titles, ["---"] * len(titles), *rows))


SIZE_TITLES = [
    "base", "recipe", "millions: denoiser + text encoders", "modules", "numbers of an adapter", "generated",
    "adapter on disk", "generator's basis",
]  # fmt: skip
COST_TITLES = ["base", "pictures a step", "weights", "of a step", "training", "encoding", "10¹² operations a step", *GPUS]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("page", type=Path)
    page = parser.parse_args().page
    size_rows, cost_rows = [], []
    for name, base in BASES.items():
        model, cost = sizes(base)
        size_rows.append(size_row(name, cost))
        step_bytes, operations = count_step(base, model)
        cost_rows.append(cost_row(name, Cost(**{**cost.__dict__, "step_bytes": step_bytes, "step_operations": operations})))
        print(size_rows[-1], cost_rows[-1], flush=True)
    tables = iter((table(SIZE_TITLES, size_rows), table(COST_TITLES, cost_rows)))
    start, end = map(re.escape, MARKS)
    text = page.read_text(encoding="utf-8")
    text = re.sub(f"{start}.*?{end}", lambda _: f"{MARKS[0]}\n{next(tables)}\n{MARKS[1]}", text, flags=re.DOTALL)
    page.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
