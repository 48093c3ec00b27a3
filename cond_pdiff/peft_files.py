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
from cond_pdiff.hub import MAX_JSON_BYTES
from cond_pdiff.lora import KEY_PREFIX, LoraSpec

CONFIG_FILE, WEIGHTS_FILE, METADATA_FILE = "adapter_config.json", "adapter_model.safetensors", "cond_pdiff.json"
UNSUPPORTED_OPTIONS = (
    *("use_dora", "use_rslora", "use_qalora", "lora_bias", "exclude_modules", "target_parameters"),
    *("rank_pattern", "alpha_pattern", "layers_to_transform", "layer_replication", "trainable_token_indices", "alora_invocation_tokens"),
)
"""The entries of peft's configuration that change what an adapter computes; any of them is refused, never ignored."""

PLAIN_INITIALISATIONS = (True, False, None, "gaussian", "orthogonal", "eva")
"""The ways in which peft begins an adapter that leave the base model as it is."""

PEFT_HEADS = ("classifier", "score")
"""The names that peft adds to `modules_to_save` of every sequence classifier, whether or not the model has them."""


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
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise AdapterError(f"{path} is missing") from error
    except (ValueError, RecursionError) as error:
        raise AdapterError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(data, dict):
        raise AdapterError(f"{path} must hold a JSON object, got {type(data).__name__}")
    return data


def spec_from_peft(config: Mapping[str, Any], path: Path, tensors: Mapping[str, torch.Tensor]) -> LoraSpec:
    """Read from peft's configuration the specification of an adapter with these tensors.

    Raises:
        AdapterError: something in it would make the adapter another than plain LoRA.
    """
    if config.get("peft_type") != "LORA":
        raise AdapterError(f"{path}: peft_type is {config.get('peft_type')!r}, expected 'LORA'")
    for name in UNSUPPORTED_OPTIONS:
        if config.get(name):
            raise AdapterError(f"{path}: {name} is {config[name]!r}; only plain LoRA is supported")
    if config.get("init_lora_weights", True) not in PLAIN_INITIALISATIONS:
        raise AdapterError(
            f"{path}: init_lora_weights is {config['init_lora_weights']!r}: peft changes the base model's own weights for it; "
            "convert it to plain LoRA (peft: save_pretrained with path_initial_model_for_weight_conversion)"
        )
    if config.get("bias", "none") != "none":
        raise AdapterError(f"{path}: bias is {config['bias']!r}, expected 'none'")
    named = {name: config.get(name) or [] for name in ("target_modules", "modules_to_save")}
    for name, modules in named.items():
        if not isinstance(modules, list) or not all(isinstance(module, str) and module for module in modules):
            raise AdapterError(f"{path}: {name} must be a list of module names, got {modules!r:.80}")
    heads = set(named["modules_to_save"])
    found = {head for head in heads if any(key.startswith(f"{KEY_PREFIX}{head}.") for key in tensors)}
    try:
        return LoraSpec(
            config.get("base_model_name_or_path"),
            config["r"],
            config["lora_alpha"],
            tuple(named["target_modules"]),
            config.get("task_type"),
            modules_to_save=tuple(heads - set(PEFT_HEADS) | found or heads),
            fan_in_fan_out=config.get("fan_in_fan_out") or False,
        )
    except KeyError as error:
        raise AdapterError(f"{path}: the field {error} is missing") from error
    except AdapterError as error:
        raise AdapterError(f"{path}: {error}") from error


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    """Read the tensors of a safetensors file; `AdapterError` names the file."""
    try:
        return load_file(path)
    except FileNotFoundError as error:
        raise AdapterError(f"{path} is missing") from error
    except (SafetensorError, OSError, ValueError) as error:
        raise AdapterError(f"{path} is not a complete safetensors file: {error}") from error
