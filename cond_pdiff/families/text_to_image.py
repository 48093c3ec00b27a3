"""Text-to-image transformers (PixArt): adapters paint in a style."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

from cond_pdiff.families.diffusers_denoiser import DiffusersDenoiser
from cond_pdiff.families.family import register_family
from cond_pdiff.lora import LoraSpec


@register_family
class TextToImage(DiffusersDenoiser):
    """The family of diffusers' PixArt pipelines, adapted in the attention layers of their transformer."""

    name = "text-to-image"
    cuts_texts = True
    file_forms: ClassVar[Mapping[str, tuple[str, bool]]] = {"comfyui": ("transformer.", False)}  # diffusers loads none for a PixArt
    adapter_card = "style_adapter.md"
    generator_card = "style_generator.md"
    recipe = "pixart-mini-styles"

    def claims(self, spec: LoraSpec, modules: Sequence[str]) -> bool:
        """Claim adapters by the names of diffusers' attention layers; LTX has the same ones, U-Nets and Wan have them elsewhere."""
        if "ltx" in str(spec.base_model).rpartition("/")[2].lower():
            return False
        return all(module.startswith("transformer_blocks.") and (".attn1." in module or ".attn2." in module) for module in modules)
