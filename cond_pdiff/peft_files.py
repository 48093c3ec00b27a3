"""peft's files of an adapter: its configuration and tensors, read strictly and written for all its versions."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from cond_pdiff.errors import AdapterError
from cond_pdiff.hub import MAX_JSON_BYTES, Backbone
from cond_pdiff.lora import LoraSpec
from cond_pdiff.plain_lora import plain_lora

CONFIG_FILE, WEIGHTS_FILE, METADATA_FILE = "adapter_config.json", "adapter_model.safetensors", "cond_pdiff.json"
MLX_FILE = "adapters.safetensors"
PICKLES = (".bin", ".pt", ".pth", ".ckpt")

LFS_POINTER = b"version https://git-lfs.github.com/spec/"
"""How the text file begins that Git leaves in the place of a large one."""

CONVERT_PICKLE = (
    "python -c \"import torch, safetensors.torch as s; s.save_file({k: v.clone() for k, v in "
    "torch.load('adapter_model.bin', map_location='cpu', weights_only=True).items()}, 'adapter_model.safetensors')\""
)
"""The command that makes a safetensors file of peft's old pickles; it loads tensors only, and runs no code of theirs."""

_PICKLE = f"pickles can run code and are never read here; a command that is safe converts it, in its folder: {CONVERT_PICKLE}"

MAX_NAMED = 5
"""The number of sub-folders that a message names."""


def peft_config(spec: LoraSpec) -> dict[str, Any]:
    """Return every field that stock peft needs to rebuild an adapter, and only fields that all its versions know."""
    return {
        "peft_type": "LORA",
        "task_type": spec.task_type,
        "base_model_name_or_path": spec.base_model,
        "r": spec.rank,
        "lora_alpha": spec.alpha,
        "lora_dropout": 0.0,
        "target_modules": sorted(spec.target_modules),
        "bias": "none",
        "fan_in_fan_out": spec.fan_in_fan_out,
        "init_lora_weights": True,
        "inference_mode": True,
        "modules_to_save": list(spec.modules_to_save) or None,
    }


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object from a file of an adapter; `AdapterError` names the file."""
    try:
        if path.stat().st_size > MAX_JSON_BYTES:
            raise AdapterError(f"{path} has {path.stat().st_size} bytes; at most {MAX_JSON_BYTES} are accepted")
        refuse_pointer(path)
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise AdapterError(f"{path} is missing") from error
    except (ValueError, RecursionError) as error:
        raise AdapterError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(data, dict):
        raise AdapterError(f"{path} must hold a JSON object, got {type(data).__name__}")
    return data


def read_adapter(folder: Path) -> tuple[LoraSpec, dict[str, torch.Tensor], dict[str, Any]]:
    """Read an adapter folder as plain LoRA (see `plain_lora`): specification, tensors, and what `cond_pdiff.json` holds beside them.

    Raises:
        AdapterError: anything missing, malformed or contradictory; the message names the file and the field, or what is there instead.
    """
    path = folder / CONFIG_FILE
    if not path.is_file():
        raise AdapterError(f"no adapter folder at {folder}: {_what_is_there(folder)}; expected {CONFIG_FILE} and {WEIGHTS_FILE} in it")
    config = read_json(path)
    if config.get("peft_type") != "LORA":
        raise AdapterError(f"{path}: peft_type is {config.get('peft_type')!r}, expected 'LORA'{_other_method(config, folder)}")
    spec, tensors = plain_lora(config, path, read_tensors(folder / WEIGHTS_FILE))
    metadata = read_json(folder / METADATA_FILE) if (folder / METADATA_FILE).exists() else {}
    if "lora" in metadata:
        recorded = LoraSpec.from_json(metadata.pop("lora"))
        for name, value in recorded.__dict__.items():
            found = getattr(spec, name)
            if name not in ("base_fingerprint", "family") and found != value:
                raise AdapterError(f"{path}: {name} is {found!r}, but {METADATA_FILE} records {value!r}")
        spec = recorded
    reference = metadata.get("base")
    if isinstance(reference, dict) and reference.get("repo_id") != spec.base_model:
        raise AdapterError(f"{folder / METADATA_FILE}: base is {reference.get('repo_id')!r}, but {CONFIG_FILE} names {spec.base_model!r}")
    revision = config.get("revision")
    if not isinstance(revision, (str, type(None))):
        raise AdapterError(f"{path}: revision must be the base model's branch, tag or commit, got {revision!r:.80}")
    if reference is None and spec.base_model and revision:
        metadata["base"] = Backbone(spec.base_model, revision).to_json()
    return spec, tensors, metadata


def _other_method(config: Mapping[str, Any], folder: Path) -> str:
    """Say what an adapter is that is none of peft's LoRAs, after a message's first half."""
    if config.get("peft_type"):
        return "; it is an adapter of another method of peft's"
    if isinstance(config.get("config"), dict):
        return "; this looks like an adapter of the AdapterHub library, not of peft"
    if "lora_parameters" in config or "fine_tune_type" in config or (folder / MLX_FILE).exists():
        return "; this looks like an adapter of MLX, not of peft"
    return ""


def _what_is_there(folder: Path) -> str:
    """Say what is in the place where an adapter folder was expected."""
    if folder.is_file():
        return f"it is a single file ({folder.suffix or 'no suffix'})" + (f", a pickle? {_PICKLE}" if folder.suffix in PICKLES else "")
    if not folder.is_dir():
        return "there is no such folder"
    inside = sorted(path.parent.relative_to(folder).as_posix() for deep in ("*", "*/*") for path in folder.glob(f"{deep}/{CONFIG_FILE}"))
    if inside:
        more = f" and {len(inside) - MAX_NAMED} more" if len(inside) > MAX_NAMED else ""
        return f"adapters lie in its sub-folders {', '.join(inside[:MAX_NAMED])}{more}, give one of these"
    files = {path.name for path in folder.iterdir()}
    known = {
        MLX_FILE: "it holds an adapter of MLX, not of peft",
        "pytorch_lora_weights.safetensors": "it holds a LoRA in diffusers' own form, not in peft's (`cond-pdiff convert` changes that)",
        "model_index.json": "it holds a pipeline, such as a generator or a whole text-to-image model",
        "config.json": "it holds a whole model, no adapter",
    }
    single = [f"it holds {name} alone" for name in sorted(files) if name.endswith(".safetensors")]
    return next((what for name, what in known.items() if name in files), [*single, "it holds nothing of one"][0])


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    """Read the tensors of a safetensors file; `AdapterError` names the file."""
    try:
        refuse_pointer(path)
        return load_file(path)
    except FileNotFoundError as error:
        pickled = sorted(found.name for found in path.parent.iterdir() if found.suffix in PICKLES)
        raise AdapterError(f"{path} is missing{f'; there is {pickled[0]}, a pickle: {_PICKLE}' if pickled else ''}") from error
    except (SafetensorError, OSError, ValueError) as error:
        raise AdapterError(f"{path} is not a complete safetensors file: {error}") from error


def refuse_pointer(path: Path) -> None:
    """Raise `AdapterError` if a file is what Git has in the place of a large one."""
    with path.open("rb") as file:
        if file.read(len(LFS_POINTER)) == LFS_POINTER:
            raise AdapterError(f"{path} is a Git LFS pointer, not the file itself; run `git lfs pull` in {path.parent}")
