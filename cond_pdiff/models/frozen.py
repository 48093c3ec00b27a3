"""Loading of frozen transformers models, from safetensors only."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn
from transformers.utils import logging as transformers_logging

from cond_pdiff.errors import HubError
from cond_pdiff.hub import Backbone, find_backbone
from cond_pdiff.locks import LOADING
from cond_pdiff.weights import loadable

WEIGHTS_NAME = "model.safetensors"
BROKEN_MODEL = (OSError, ValueError, RuntimeError, SafetensorError)
"""The errors that transformers and torch raise on files that make no sense."""


def load_frozen(backbone: Backbone, auto_model: Any, **options: Any) -> tuple[nn.Module, Path, set[str]]:
    """Load a model in evaluation mode, float32, on the CPU, and return it, its folder, and the names of weights that the files lack.

    Args:
        auto_model: one of transformers' `AutoModel…`.
        options: for its `from_pretrained`.

    Raises:
        HubError: not to be had, or not such a model.
    """
    folder = find_backbone(backbone, WEIGHTS_NAME)
    with LOADING:
        bars = transformers_logging.is_progress_bar_enabled()
        transformers_logging.disable_progress_bar()
        try:
            with loadable(folder, WEIGHTS_NAME) as named:
                model, info = auto_model.from_pretrained(
                    named,
                    dtype=torch.float32,
                    use_safetensors=True,
                    local_files_only=True,
                    trust_remote_code=False,
                    output_loading_info=True,
                    **options,
                )
        except BROKEN_MODEL as error:
            raise HubError(f"{folder} cannot be loaded as {backbone.repo_id}: {error}") from error
        finally:
            if bars:
                transformers_logging.enable_progress_bar()
    return model.requires_grad_(False).eval(), folder, set(info["missing_keys"])
