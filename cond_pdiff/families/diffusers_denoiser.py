"""Stable Diffusion 1.5, 2, XL and 3, FLUX and other diffusers pipelines: a part of each, the denoiser, is adapted."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from torch import nn

from cond_pdiff.families.family import Family, register_family
from cond_pdiff.hub import Backbone
from cond_pdiff.lora import LoraSpec
from cond_pdiff.text_to_image import TRANSFORMER_WEIGHTS, UNET_WEIGHTS, load_denoiser, load_text_to_image

if TYPE_CHECKING:
    from cond_pdiff.adapter import LoraAdapter
    from cond_pdiff.conditions.condition import Condition
    from cond_pdiff.training.config import CollectConfig
    from cond_pdiff.training.finetuning.style_fine_tuning import StyleFineTuning
    from cond_pdiff.training.tasks.styles import Style


class DiffusersDenoiser(Family):
    """What these families share: the denoiser of a pipeline is adapted, and paints in a style.

    What differs between pipelines stands in `cond_pdiff.image_bases`; a family is of those whose adapters look alike.
    """

    paints = True
    cuts_texts = False
    merged_card = ("text-to-image", "diffusers")
    weights_file = TRANSFORMER_WEIGHTS
    recipe = "diffusers-styles"

    @abstractmethod
    def claims(self, spec: LoraSpec, modules: Sequence[str]) -> bool:
        """Claim adapters by the names of diffusers' modules."""

    def load(self, base: Backbone, spec: LoraSpec, num_labels: int | None = None) -> Any:
        """Load the pipeline in float32; see `load_text_to_image`."""
        return load_text_to_image(base, self.weights_file)

    def load_adapted(self, base: Backbone) -> nn.Module:
        """Load the denoiser alone."""
        return load_denoiser(base, self.weights_file)

    def refine(
        self, base: Any, adapter: LoraAdapter, condition: Condition, steps: int, seed: int = 0, seconds: float | None = None
    ) -> LoraAdapter:
        """Take steps on the shown pictures, by the base model's own objective."""
        from cond_pdiff.training.finetuning.style_refinement import refine_style

        return refine_style(base, adapter, condition, steps, seed)

    def load_tasks(self, folder: str | Path, names: Sequence[str] | None) -> list[Style]:
        """Load styles from a folder."""
        from cond_pdiff.training.tasks.styles import load_styles

        return load_styles(folder, names)

    def fine_tuning(self, config: CollectConfig, tasks: Sequence[Style]) -> StyleFineTuning:
        """Return the fine-tuning by the base model's own objective, on pictures in a style."""
        from cond_pdiff.training.finetuning.style_fine_tuning import StyleFineTuning

        return StyleFineTuning(config)

    def evaluation(self) -> tuple[Any, Any]:
        """Return the evaluation by distances of pictures to held-out ones in the style."""
        from cond_pdiff.training.evaluate.style_table import StyleTable
        from cond_pdiff.training.evaluate.styles import StyleEvaluator

        return StyleEvaluator, StyleTable()


@register_family
class StableDiffusion(DiffusersDenoiser):
    """The family of Stable Diffusion 1.5, 2 and XL: a U-Net."""

    name = "stable-diffusion"
    weights_file = UNET_WEIGHTS
    file_forms: ClassVar[Mapping[str, tuple[str, bool]]] = {
        "diffusers": ("unet.", False), "kohya": ("lora_unet_", False), "comfyui": ("lora_unet_", False),
    }  # fmt: skip

    def claims(self, spec: LoraSpec, modules: Sequence[str]) -> bool:
        """Claim adapters with modules in the U-Net's blocks."""
        return any(name.startswith(("down_blocks.", "mid_block.", "up_blocks.")) for name in modules)


@register_family
class Flux(DiffusersDenoiser):
    """The family of FLUX: a transformer with double and single blocks."""

    name = "flux"
    file_forms: ClassVar[Mapping[str, tuple[str, bool]]] = {
        "diffusers": ("transformer.", False), "kohya": ("lora_unet_", True), "comfyui": ("transformer.", False),
    }  # fmt: skip

    def claims(self, spec: LoraSpec, modules: Sequence[str]) -> bool:
        """Claim adapters with modules in single blocks."""
        return any(name.startswith("single_transformer_blocks.") for name in modules)


@register_family
class StableDiffusion3(DiffusersDenoiser):
    """The family of Stable Diffusion 3: a transformer with joint attention, for which kohya's tools have no form that others read."""

    name = "stable-diffusion-3"
    file_forms: ClassVar[Mapping[str, tuple[str, bool]]] = {"diffusers": ("transformer.", False), "comfyui": ("transformer.", False)}

    def claims(self, spec: LoraSpec, modules: Sequence[str]) -> bool:
        """Claim adapters of joint attention layers without single blocks."""
        own = [name for name in modules if name.startswith("transformer_blocks.")]
        return any(".attn." in name for name in own) and not any(".attn1." in name for name in modules)


@register_family
class DiffusionTransformer(DiffusersDenoiser):
    """The family of diffusers' other text-to-image transformers (Qwen-Image, Z-Image, Sana …), which adapters have to name."""

    name = "diffusion-transformer"
    file_forms: ClassVar[Mapping[str, tuple[str, bool]]] = {"diffusers": ("transformer.", False), "comfyui": ("transformer.", False)}

    def claims(self, spec: LoraSpec, modules: Sequence[str]) -> bool:
        """Claim none: their modules are named as many others' are."""
        return False
