"""The stages that give a codec its autoencoder, by the name that recipes give as `type`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import torch

from cond_pdiff.codec import AdapterCodec
from cond_pdiff.errors import CondPDiffError, TrainingError
from cond_pdiff.models.module_basis import ModuleBasis
from cond_pdiff.models.param_autoencoder import ParamAutoencoder
from cond_pdiff.models.segment_autoencoder import SegmentAutoencoder
from cond_pdiff.training.config import AutoencoderConfig
from cond_pdiff.training.stages.autoencoder import AutoencoderStage
from cond_pdiff.training.stages.basis import BasisStage
from cond_pdiff.training.stages.segments import SegmentStage
from cond_pdiff.training.zoo.params import ZooParams


class CodecStage(Protocol):
    """What makes a zoo's codec; when it is trained, that only lacks the latents' scale."""

    codec: AdapterCodec
    identity: dict[str, Any]
    """JSON-ready facts (settings, hash of the data) that must be equal for its work to be continued."""

    def train(self, folder: Path, tensorboard: bool = False) -> None:
        """Train the codec, or go on where that stopped; what is made goes to `folder`."""

    def latents(self) -> torch.Tensor:
        """Return the latents of the whole zoo, on the CPU."""

    def lost(self) -> float:
        """Return the share of the zoo's energy, in normalised params, that the code loses."""


MakeStage = Callable[[ZooParams, AutoencoderConfig], CodecStage]
CODEC_STAGES: dict[str, MakeStage] = {
    ParamAutoencoder.__name__: AutoencoderStage,
    ModuleBasis.__name__: BasisStage,
    SegmentAutoencoder.__name__: SegmentStage,
}
"""The class of an autoencoder, by name → what makes the stage that trains one."""


def register_codec_stage(name: str, make: MakeStage) -> None:
    """Let recipes name an autoencoder of yours as `{"type": name}`: `make(data, config)` gives the stage that trains it.

    Raises:
        CondPDiffError: another one has this name.
    """
    if CODEC_STAGES.setdefault(name, make) is not make:
        raise CondPDiffError(f"there is an autoencoder {name} already; choose another name")


def codec_stage(data: ZooParams, config: AutoencoderConfig) -> CodecStage:
    """Return the stage for the autoencoder that a recipe names; `TrainingError` if there is none of this name."""
    name = config.model.get("type", ParamAutoencoder.__name__)
    if not isinstance(name, str) or name not in CODEC_STAGES:
        raise TrainingError(f"autoencoder, model: type must be one of {sorted(CODEC_STAGES)}, got {name!r}")
    return CODEC_STAGES[name](data, config)
