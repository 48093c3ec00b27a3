"""Adapters in other forms: the one file that ComfyUI and kohya's tools read, and the base model with an adapter merged in."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load, save

from cond_pdiff.adapter import LoraAdapter
from cond_pdiff.adapter_card import CARD_FILE, merged_card
from cond_pdiff.atomic import atomic_folder, write_bytes
from cond_pdiff.errors import AdapterError, CondPDiffError, OutputExistsError
from cond_pdiff.hub import ALLOWED_PATTERNS, Backbone, find_backbone
from cond_pdiff.lora import KEY_PREFIX, is_transposed
from cond_pdiff.weights import weights_files

COMFYUI_PREFIX = "transformer."
"""The prefix that ComfyUI expects in front of a PixArt module's name."""


def to_comfyui(adapter: LoraAdapter) -> dict[str, torch.Tensor]:
    """Return the adapter's tensors as `transformer.<module>.lora_down.weight`, `.lora_up.weight` and `.alpha`.

    The update that these tools apply is alpha / rank · up · down, as peft's (equation 1).
    """
    tensors = {}
    for module in adapter.modules:
        lora_a, lora_b = adapter.factors(module)
        stem = COMFYUI_PREFIX + module
        tensors[f"{stem}.lora_down.weight"], tensors[f"{stem}.lora_up.weight"] = lora_a, lora_b
        tensors[f"{stem}.alpha"] = torch.tensor(float(adapter.spec.alpha))
    return tensors


def from_comfyui(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return tensors with peft's names again; alphas are left out.

    Raises:
        AdapterError: a tensor has another name.
    """
    names = {".lora_down.weight": ".lora_A.weight", ".lora_up.weight": ".lora_B.weight"}
    found = {}
    for key, tensor in tensors.items():
        ending = next((ending for ending in (*names, ".alpha") if key.endswith(ending)), None)
        if ending is None or not key.startswith(COMFYUI_PREFIX):
            raise AdapterError(f"unexpected tensor {key!r}; expected {COMFYUI_PREFIX}<module>.lora_down.weight, .lora_up.weight or .alpha")
        if ending in names:
            found[KEY_PREFIX + key.removeprefix(COMFYUI_PREFIX).removesuffix(ending) + names[ending]] = tensor
    return found


def save_comfyui(adapter: LoraAdapter, file: str | Path, overwrite: bool = False) -> Path:
    """Write one safetensors file for ComfyUI's LoRA loader, after converting it back and comparing every bit.

    Raises:
        OutputExistsError: there is such a file.
        AdapterError: the adapter is not for a PixArt.
    """
    _refuse_heads(adapter)
    file = Path(file)
    if file.exists() and not overwrite:
        raise OutputExistsError(f"{file} is already there; choose another name, or replace it (overwrite=True, --force)")
    if not (adapter.family and adapter.family.paints):
        raise AdapterError(f"only adapters of PixArt's attention layers can be converted, this one is for {adapter.spec.base_model!r}")
    tensors = {key: tensor.detach().to("cpu").contiguous() for key, tensor in sorted(to_comfyui(adapter).items())}
    data = save(tensors, metadata={"format": "pt", "base_model": str(adapter.spec.base_model)})
    back = from_comfyui(load(data))
    if set(back) != set(adapter.tensors) or not all(_same_bits(back[key], tensor) for key, tensor in adapter.tensors.items()):
        raise AdapterError("the converted file does not give back the same adapter; nothing was written")
    write_bytes(file, data)
    return file


def _refuse_heads(adapter: LoraAdapter) -> None:
    if adapter.spec.modules_to_save:
        raise AdapterError(
            "adapters with a head, as those of sequence classifiers, cannot be converted; load the adapter with peft "
            "onto an AutoModelForSequenceClassification, then merge_and_unload() and save_pretrained()"
        )


def _same_bits(first: torch.Tensor, second: torch.Tensor) -> bool:
    return first.dtype == second.dtype and torch.equal(first, second.detach().to("cpu"))


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
    _refuse_heads(adapter)
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
        tensors[key] = (tensors[key].float() + delta).to(tensors[key].dtype)
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
