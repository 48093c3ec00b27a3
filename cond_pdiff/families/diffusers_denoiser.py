"""Stable Diffusion 1.5, 2, XL and 3, and FLUX: diffusers' pipelines, for adapters that others have trained.

Adapters for them are imported, generated, attached, merged and converted; they are not trained here.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from diffusers.models.auto_model import AutoModel
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from torch import nn

from cond_pdiff.errors import HubError, TrainingError
from cond_pdiff.families.family import Family, register_family
from cond_pdiff.hub import Backbone, find_backbone
from cond_pdiff.locks import LOADING
from cond_pdiff.lora import LoraSpec
from cond_pdiff.text_to_image import BROKEN_BASE


class DiffusersDenoiser(Family):
    """What these families share: a pipeline of which one part, the denoiser, is adapted."""

    merged_card = ("text-to-image", "diffusers")
    cuts_texts = False

    @abstractmethod
    def claims(self, spec: LoraSpec, modules: Sequence[str]) -> bool:
        """Claim adapters by the names of diffusers' modules."""

    def load(self, base: Backbone, spec: LoraSpec, num_labels: int | None = None) -> Any:
        """Load the pipeline in float32."""
        folder = find_backbone(base, self.weights_file)
        try:
            with LOADING:
                pipe = DiffusionPipeline.from_pretrained(folder, use_safetensors=True)
        except BROKEN_BASE as error:
            raise HubError(f"{base.repo_id} cannot be loaded as a diffusers pipeline: {type(error).__name__}: {error}") from error
        return pipe

    def load_adapted(self, base: Backbone) -> nn.Module:
        """Load the denoiser alone, of the class that its settings name."""
        folder = (find_backbone(base, self.weights_file) / self.weights_file).parent
        try:
            with LOADING:
                model: nn.Module = AutoModel.from_pretrained(str(folder), use_safetensors=True)
        except BROKEN_BASE as error:
            raise HubError(f"{folder} cannot be loaded as a denoiser: {type(error).__name__}: {error}") from error
        return model

    def load_tasks(self, folder: str | Path, names: Sequence[str] | None) -> Sequence[Any]:
        """Refuse: there are no tasks to train such adapters on."""
        raise TrainingError(f"adapters for a {self.name} are not trained here; import those that exist: cond-pdiff import-adapters")

    def fine_tuning(self, config: Any, tasks: Sequence[Any]) -> Any:
        """Refuse, as `load_tasks` does."""
        raise TrainingError(f"adapters for a {self.name} are not trained here; import those that exist: cond-pdiff import-adapters")


@register_family
class StableDiffusion(DiffusersDenoiser):
    """The family of Stable Diffusion 1.5, 2 and XL: a U-Net."""

    name = "stable-diffusion"
    weights_file = "unet/diffusion_pytorch_model.safetensors"
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
    weights_file = "transformer/diffusion_pytorch_model.safetensors"
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
    weights_file = "transformer/diffusion_pytorch_model.safetensors"
    file_forms: ClassVar[Mapping[str, tuple[str, bool]]] = {"diffusers": ("transformer.", False), "comfyui": ("transformer.", False)}

    def claims(self, spec: LoraSpec, modules: Sequence[str]) -> bool:
        """Claim adapters of joint attention layers without single blocks."""
        own = [name for name in modules if name.startswith("transformer_blocks.")]
        return any(".attn." in name for name in own) and not any(".attn1." in name for name in modules)
