"""Adapters in other forms: the files of other tools, a peft folder, and the base model with an adapter merged in."""

from __future__ import annotations

import math
from pathlib import Path

from safetensors.torch import load, save

from cond_pdiff.adapter import LoraAdapter
from cond_pdiff.adapter_card import CARD_FILE, merged_card
from cond_pdiff.atomic import atomic_folder
from cond_pdiff.errors import AdapterError, CondPDiffError
from cond_pdiff.formats.lora_writer import TEXT_ENCODERS, check_plain
from cond_pdiff.hub import ALLOWED_PATTERNS, Backbone, find_backbone
from cond_pdiff.lora import is_transposed
from cond_pdiff.weights import weights_files


def save_peft(adapter: LoraAdapter, folder: str | Path, overwrite: bool = False) -> Path:
    """Write a peft folder.

    Raises:
        AdapterError: the adapter is for several models: peft's folders are of one.
        OutputExistsError: see `LoraAdapter.save`.
    """
    if parts := sorted(part for part in TEXT_ENCODERS if any(module.startswith(part) for module in adapter.modules)):
        raise AdapterError(f"the adapter is for {parts[0][:-1]} too, and a peft folder is for one model; convert it to diffusers instead")
    return adapter.save(folder, overwrite)


def save_merged(
    adapter: LoraAdapter, folder: str | Path, base: Backbone | None = None, scale: float = 1.0, overwrite: bool = False
) -> Path:
    """Write a copy of the base model whose weights are W + scale · ΔW, in the base's own precision and layout of files.

    Its card is a new one: it is another model than its base.

    Args:
        base: None for the one that the adapter records.

    Raises:
        CondPDiffError: `scale` is not finite.
        HubError: the base is not to be had.
        AdapterError: the adapter is not for it, or brings a head.
        OutputExistsError: `folder` is not empty (with `overwrite`: holds what is not of this base model).
    """
    check_plain(adapter)
    if not math.isfinite(scale):
        raise CondPDiffError(f"the strength must be a finite number, got {scale}")
    reference = base or adapter.base
    if adapter.family is None:
        raise AdapterError(f"{adapter.spec.base_model!r} is of no family of base models that is known here; merge with peft instead")
    weights = adapter.family.weights_file
    source, folder = find_backbone(reference, weights), Path(folder)
    model = adapter.family.load_adapted(reference)
    adapter.check_base(model)
    shards = {path: load(path.read_bytes()) for path in weights_files(source, weights)}
    for module in adapter.modules:
        delta, key = scale * adapter.delta(module), f"{module}.weight"
        delta = delta.T if is_transposed(model.get_submodule(module)) else delta
        tensors = next((tensors for tensors in shards.values() if key in tensors), None)
        if tensors is None:
            raise AdapterError(f"{source / weights} has no {key}: it is not saved as the model that the adapter is attached to")
        tensors[key] = (tensors[key].float() + delta.reshape(tensors[key].shape)).to(tensors[key].dtype)
    card = merged_card(adapter, scale)
    files = [path.relative_to(source) for pattern in ALLOWED_PATTERNS for path in source.rglob(pattern)]
    with atomic_folder(folder, {CARD_FILE, *(file.parts[0] for file in files)}, overwrite) as aside:
        for file in files:
            (aside / file).parent.mkdir(parents=True, exist_ok=True)
            (aside / file).write_bytes((source / file).read_bytes())
        for path, tensors in shards.items():
            (aside / path.relative_to(source)).write_bytes(save(tensors, metadata={"format": "pt"}))
        (aside / CARD_FILE).write_text(card, encoding="utf-8")
    return folder
