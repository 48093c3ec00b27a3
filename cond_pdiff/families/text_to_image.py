"""Text-to-image transformers (PixArt): adapters paint in a style."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from torch import nn

from cond_pdiff.families.family import Family, register_family
from cond_pdiff.hub import Backbone
from cond_pdiff.lora import LoraSpec
from cond_pdiff.text_to_image import TRANSFORMER_WEIGHTS, load_text_to_image, load_transformer

if TYPE_CHECKING:
    from cond_pdiff.adapter import LoraAdapter
    from cond_pdiff.conditions.condition import Condition
    from cond_pdiff.training.config import CollectConfig
    from cond_pdiff.training.finetuning.style_fine_tuning import StyleFineTuning
    from cond_pdiff.training.tasks.styles import Style


@register_family
class TextToImage(Family):
    """The family of diffusers' PixArt pipelines, adapted in the attention layers of their transformer."""

    name = "text-to-image"
    paints = True
    file_forms: ClassVar[Mapping[str, tuple[str, bool]]] = {"comfyui": ("transformer.", False)}  # diffusers loads none for a PixArt
    weights_file = TRANSFORMER_WEIGHTS
    adapter_card = "style_adapter.md"
    generator_card = "style_generator.md"
    merged_card = ("text-to-image", "diffusers")
    recipe = "pixart-mini-styles"

    def claims(self, spec: LoraSpec, modules: Sequence[str]) -> bool:
        """Claim adapters by the names of diffusers' attention layers; LTX has the same ones, U-Nets and Wan have them elsewhere."""
        if "ltx" in str(spec.base_model).rpartition("/")[2].lower():
            return False
        return all(module.startswith("transformer_blocks.") and (".attn1." in module or ".attn2." in module) for module in modules)

    def load(self, base: Backbone, spec: LoraSpec, num_labels: int | None = None) -> Any:
        """Load the pipeline; see `load_text_to_image`."""
        return load_text_to_image(base)

    def load_adapted(self, base: Backbone) -> nn.Module:
        """Load the transformer alone."""
        return load_transformer(base)

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
