"""Checkpoints: a folder of safetensors and one JSON file, complete or absent, holding all that exact resuming needs."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save

from cond_pdiff.atomic import atomic_folder, dump_json
from cond_pdiff.errors import TrainingError

STATE_FILE = "state.json"
PREFIX = "checkpoint-"


def save_checkpoint(folder: Path, step: int, tensors: Mapping[str, Mapping[str, torch.Tensor]], state: Mapping[str, Any]) -> None:
    """Write `checkpoint-<step>` below `folder`, then remove older ones.

    Args:
        step: number of finished steps.
        tensors: group (a file) → name → tensor.
        state: JSON-ready rest.
    """
    target = folder / f"{PREFIX}{step:08d}"
    with atomic_folder(target, (STATE_FILE, *(f"{group}.safetensors" for group in tensors)), overwrite=True) as aside:
        for group, values in tensors.items():
            # Copies: a network may hold one tensor under two names (tied embeddings), which safetensors refuses.
            flat = {name: value.detach().to("cpu").clone(memory_format=torch.contiguous_format) for name, value in values.items()}
            (aside / f"{group}.safetensors").write_bytes(save(flat))
        (aside / STATE_FILE).write_text(dump_json({**state, "step": step}), encoding="utf-8")
    for old in _checkpoints(folder):
        if old != target:
            shutil.rmtree(old)


def load_checkpoint(folder: Path) -> tuple[int, dict[str, dict[str, torch.Tensor]], dict[str, Any]] | None:
    """Load the newest checkpoint below `folder` as (step, tensors, state), or return None if there is none.

    Raises:
        TrainingError: the checkpoint was damaged after it was written.
    """
    found = _checkpoints(folder)
    if not found:
        return None
    newest = found[-1]
    try:
        state = json.loads((newest / STATE_FILE).read_text(encoding="utf-8"))
        tensors = {path.stem: load_file(path) for path in sorted(newest.glob("*.safetensors"))}
        return int(state.pop("step")), tensors, state
    except (OSError, ValueError, KeyError, TypeError, AttributeError, SafetensorError) as error:
        raise TrainingError(f"{newest} is damaged ({error}); delete it to start this stage again") from error


def remove_leftovers(folder: Path) -> None:
    """Remove what a killed run left below `folder`: checkpoints that were being written, and superseded ones."""
    for path in (*folder.glob(f".{PREFIX}*"), *_checkpoints(folder)[:-1]):
        shutil.rmtree(path)


def _checkpoints(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob(f"{PREFIX}*") if path.is_dir())
