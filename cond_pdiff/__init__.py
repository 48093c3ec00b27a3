"""cond-pdiff: turn a condition (a task prompt, a style image) into a LoRA adapter.

Names are imported on first use, so that `import cond_pdiff` and `cond-pdiff --help` take no time.
"""

import importlib
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from diffusers import ModelMixin

    from cond_pdiff.adapter import LoraAdapter
    from cond_pdiff.classifier import PrototypeClassifier
    from cond_pdiff.codec import AdapterCodec
    from cond_pdiff.conditions.style_image import StyleImage
    from cond_pdiff.conditions.task_prompt import TaskPrompt
    from cond_pdiff.conditions.vector import Vector
    from cond_pdiff.errors import CondPDiffError
    from cond_pdiff.hub import bundled
    from cond_pdiff.layout import ParamLayout
    from cond_pdiff.mixed_batch import AdapterPool, Request, attached_to_rows
    from cond_pdiff.models.adapter_template import AdapterTemplate
    from cond_pdiff.models.condition_index import ConditionIndex
    from cond_pdiff.models.module_basis import ModuleBasis
    from cond_pdiff.models.param_autoencoder import ParamAutoencoder
    from cond_pdiff.models.param_unet_1d import ParamUNet1D
    from cond_pdiff.models.prompt_encoders import ClipConditionEncoder, SentenceConditionEncoder
    from cond_pdiff.models.segment_autoencoder import SegmentAutoencoder
    from cond_pdiff.models.style_encoders import BackboneStyleConditionEncoder, StyleCnnConditionEncoder
    from cond_pdiff.models.token_denoiser import TokenDenoiser
    from cond_pdiff.models.vector_encoder import VectorConditionEncoder
    from cond_pdiff.normalization import ParamNormalizer
    from cond_pdiff.pipelines.pipeline_cond_pdiff import CondPDiffPipeline
    from cond_pdiff.pipelines.pipeline_output import CondPDiffPipelineOutput

__version__ = "0.2.0"

# ModelMixin stands here because diffusers recognises a component's class by its base class's name in the component's module.
_WHERE = {
    "AdapterCodec": "cond_pdiff.codec",
    "AdapterPool": "cond_pdiff.mixed_batch",
    "AdapterTemplate": "cond_pdiff.models.adapter_template",
    "BackboneStyleConditionEncoder": "cond_pdiff.models.style_encoders",
    "ClipConditionEncoder": "cond_pdiff.models.prompt_encoders",
    "CondPDiffError": "cond_pdiff.errors",
    "CondPDiffPipeline": "cond_pdiff.pipelines.pipeline_cond_pdiff",
    "CondPDiffPipelineOutput": "cond_pdiff.pipelines.pipeline_output",
    "ConditionIndex": "cond_pdiff.models.condition_index",
    "LoraAdapter": "cond_pdiff.adapter",
    "LoraSpec": "cond_pdiff.lora",
    "ModelMixin": "diffusers",
    "ModuleBasis": "cond_pdiff.models.module_basis",
    "ParamAutoencoder": "cond_pdiff.models.param_autoencoder",
    "ParamLayout": "cond_pdiff.layout",
    "ParamNormalizer": "cond_pdiff.normalization",
    "ParamUNet1D": "cond_pdiff.models.param_unet_1d",
    "PrototypeClassifier": "cond_pdiff.classifier",
    "Request": "cond_pdiff.mixed_batch",
    "SegmentAutoencoder": "cond_pdiff.models.segment_autoencoder",
    "SentenceConditionEncoder": "cond_pdiff.models.prompt_encoders",
    "StyleCnnConditionEncoder": "cond_pdiff.models.style_encoders",
    "StyleImage": "cond_pdiff.conditions.style_image",
    "TaskPrompt": "cond_pdiff.conditions.task_prompt",
    "TokenDenoiser": "cond_pdiff.models.token_denoiser",
    "Vector": "cond_pdiff.conditions.vector",
    "VectorConditionEncoder": "cond_pdiff.models.vector_encoder",
    "attached_to_rows": "cond_pdiff.mixed_batch",
    "bundled": "cond_pdiff.hub",
}

__all__ = [
    "AdapterCodec",
    "AdapterPool",
    "AdapterTemplate",
    "BackboneStyleConditionEncoder",
    "ClipConditionEncoder",
    "CondPDiffError",
    "CondPDiffPipeline",
    "CondPDiffPipelineOutput",
    "ConditionIndex",
    "LoraAdapter",
    "LoraSpec",
    "ModelMixin",
    "ModuleBasis",
    "ParamAutoencoder",
    "ParamLayout",
    "ParamNormalizer",
    "ParamUNet1D",
    "PrototypeClassifier",
    "Request",
    "SegmentAutoencoder",
    "SentenceConditionEncoder",
    "StyleCnnConditionEncoder",
    "StyleImage",
    "TaskPrompt",
    "TokenDenoiser",
    "Vector",
    "VectorConditionEncoder",
    "attached_to_rows",
    "bundled",
]


def __getattr__(name: str) -> Any:
    registered = getattr(sys.modules.get("cond_pdiff.component"), "COMPONENTS", {})
    if name not in _WHERE and name not in registered:
        raise AttributeError(f"module 'cond_pdiff' has no attribute {name!r}")
    value = getattr(importlib.import_module(_WHERE[name]), name) if name in _WHERE else registered[name]
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
