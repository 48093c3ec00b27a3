"""LoraFile: what one LoRA file of another tool holds, module by module, and the adapter that it is."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from cond_pdiff.adapter import FACTORS, LoraAdapter
from cond_pdiff.canonical import padded
from cond_pdiff.errors import AdapterError
from cond_pdiff.families.family import OTHER_BASE, family_of
from cond_pdiff.formats.keys import Key, parse_key
from cond_pdiff.formats.module_names import ModuleNames
from cond_pdiff.lora import KEY_PREFIX, LoraSpec
from cond_pdiff.peft_files import CONFIG_FILE, refuse_pointer

PICKLED = (".bin", ".pt", ".pth", ".ckpt")
HEADER_SETTINGS = "lora_adapter_metadata"
"""Where diffusers keeps peft's settings of each part, as JSON, in a file's header."""


@dataclass(frozen=True)
class Update:
    """The update of one module, ΔW = alpha / r · B · A.

    Args:
        lora_a: shape `(r, in)`, of a convolution `(r, in, height, width)`.
        lora_b: shape `(out, r)`, of a convolution `(out, r, 1, 1)`.
        alpha: the scale's numerator; r where a file does not say it.
    """

    lora_a: torch.Tensor
    lora_b: torch.Tensor
    alpha: float

    @property
    def rank(self) -> int:
        """R."""
        return len(self.lora_a)


@dataclass(frozen=True)
class LoraFile:
    """The updates in one file, by the modules' names in diffusers and transformers, those of text encoders under `text_encoder.` and so on.

    Args:
        updates: module → its update.
        base_model: which the file's header names, or None.
    """

    updates: Mapping[str, Update]
    base_model: str | None = None

    @classmethod
    def read(cls, file: str | Path, names: ModuleNames | None = None) -> LoraFile:
        """Read a safetensors file in the keys of diffusers (today's and older ones), kohya or ComfyUI.

        Args:
            names: of the base model's modules, for keys with underscores; None: told by the parts of the usual models' names.

        Raises:
            AdapterError: not such a file, another kind of adapter (DoRA, LoHa, LoKr …), or one that is broken; the message names the
                tensor. For a pickle it says how to convert it.
        """
        file = Path(file)
        if file.suffix.lower() in PICKLED:
            raise AdapterError(f"{file} is a pickle, which can run code when it is read; convert it with\n    {conversion_command(file)}")
        try:
            refuse_pointer(file)
            with safe_open(file, framework="pt") as opened:
                header: dict[str, str] = opened.metadata() or {}
                tensors = {key: opened.get_tensor(key) for key in sorted(opened.keys())}
        except (OSError, SafetensorError) as error:
            raise AdapterError(f"{file} is not a complete safetensors file: {error}") from error
        try:
            return cls.of_tensors(tensors, header, names or ModuleNames())
        except AdapterError as error:
            raise AdapterError(f"{file}: {error}") from error

    @classmethod
    def of_tensors(cls, tensors: Mapping[str, torch.Tensor], header: Mapping[str, str], names: ModuleNames) -> LoraFile:
        """Sort a file's tensors by module; see `read`."""
        keys: dict[str, Key] = {}
        found: dict[str, dict[str, torch.Tensor]] = {}
        for name, tensor in tensors.items():
            key = parse_key(name, names)
            if key.role in found.setdefault(key.stem, {}):
                raise AdapterError(f"{name!r}: there are two tensors of {key.role} for {key.stem}")
            found[key.stem][key.role], keys[key.stem] = tensor, key
        settings = _settings(header)
        updates: dict[str, Update] = {}
        for stem, parts in found.items():
            for module, update in _split(keys[stem].modules, _update(stem, keys[stem].modules, parts, settings)).items():
                if module in updates:
                    raise AdapterError(f"{stem!r}: there are two updates for module {module!r}")
                updates[module] = update
        if not updates:
            raise AdapterError("the file holds no tensors")
        return cls(dict(sorted(updates.items())), header.get("base_model") or None)

    def adapter(self, base_model: str | None = None) -> LoraAdapter:
        """Return the adapter, bit for bit where all modules share rank and alpha.

        Else the scale is folded into B, in float32 so that ΔW is kept to 1e-6, and smaller ranks are filled up with zeros.

        Args:
            base_model: Hub id of the base model; None: what the file says.

        Raises:
            AdapterError: a tensor is misshapen, not finite, or absurdly large.
        """
        rank = max(update.rank for update in self.updates.values())
        alphas = {update.alpha for update in self.updates.values()}
        alike = len(alphas) == 1 and all(update.rank == rank for update in self.updates.values())
        tensors: dict[str, torch.Tensor] = {}
        for module, update in self.updates.items():
            factors = update.lora_a, update.lora_b
            if not alike:
                factors = padded((update.lora_a, update.lora_b.float() * (update.alpha / update.rank)), rank)
            tensors |= {f"{KEY_PREFIX}{module}.{name}.weight": factor.contiguous() for name, factor in zip(FACTORS, factors, strict=True)}
        spec = LoraSpec(base_model or self.base_model, rank, alphas.pop() if alike else float(rank), tuple(self.updates), None)
        family = family_of(spec, tuple(self.updates))
        if not (family and family.file_forms):  # such files are of diffusers' models, or of one that nobody here knows
            spec = replace(spec, family=OTHER_BASE)
        return LoraAdapter(spec, tensors, {"base": {"repo_id": spec.base_model}} if spec.base_model else {})


def read_adapter(path: str | Path, names: ModuleNames | None = None, base_model: str | None = None) -> LoraAdapter:
    """Read an adapter wherever it is: a peft folder, a repository on the Hub, or another tool's file.

    Raises:
        AdapterError: see `LoraAdapter.load` and `LoraFile.read`.
    """
    path = Path(path)
    if path.is_dir() and not (path / CONFIG_FILE).exists() and (pickles := [one for one in path.iterdir() if one.suffix in PICKLED]):
        return LoraFile.read(pickles[0]).adapter()  # which says how to convert it
    if not path.is_file():
        return LoraAdapter.load(path)
    found = LoraFile.read(path, names)
    try:
        return found.adapter(base_model)
    except AdapterError as error:
        raise AdapterError(f"{path}: {error}") from error


def conversion_command(file: Path) -> str:
    """Return the command line that converts a pickle of tensors into safetensors, without running code from it."""
    target = file.with_suffix(".safetensors")
    program = (
        "import sys, torch; from safetensors.torch import save_file; "
        "found = torch.load(sys.argv[1], map_location='cpu', weights_only=True); "
        "save_file({k: v.contiguous() for k, v in found.get('state_dict', found).items()}, sys.argv[2])"
    )
    return shlex.join(["python", "-c", program, str(file), str(target)])


def _settings(header: Mapping[str, str]) -> dict[str, Any]:
    """Return peft's settings as diffusers keeps them in a header, `unet.r` and so on; refuse those that are not of plain LoRA."""
    try:
        found = json.loads(header.get(HEADER_SETTINGS) or "{}")
    except ValueError as error:
        raise AdapterError(f"{HEADER_SETTINGS} in the header is not valid JSON: {error}") from error
    if not isinstance(found, dict):
        raise AdapterError(f"{HEADER_SETTINGS} in the header must be a JSON object, got {type(found).__name__}")
    for name, value in found.items():
        if name.rpartition(".")[2] in ("use_dora", "lora_bias", "use_qalora") and value:
            raise AdapterError(f"{name} is set in the header; only plain LoRA is read")
        numbers = {"lora_alpha": [value], "alpha_pattern": value.values() if isinstance(value, dict) else [value]}
        if value is not None and any(not isinstance(one, (int, float)) for one in numbers.get(name.rpartition(".")[2], ())):
            raise AdapterError(f"{name} in the header must be numbers, got {value!r:.80}")
    return found


def _alpha(module: str, rank: int, settings: Mapping[str, Any]) -> float:
    """Return the alpha of a module for which a file has no tensor of it: that of the header's settings, or the rank."""
    part = module.partition(".")[0] if module.startswith("text_encoder") else None
    name = module.partition(".")[2] if part else module
    for prefix in [part] if part else ["unet", "transformer"]:
        if (general := settings.get(f"{prefix}.lora_alpha")) is not None:
            patterns = settings.get(f"{prefix}.alpha_pattern") or {}
            own = next((value for pattern, value in patterns.items() if name == pattern or name.endswith("." + pattern)), general)
            return float(own) * (rank**0.5 if settings.get(f"{prefix}.use_rslora") else 1.0)
    return float(rank)


def _update(stem: str, modules: tuple[str, ...], parts: Mapping[str, torch.Tensor], settings: Mapping[str, Any]) -> Update:
    """Return the update of a module's tensors, checked."""
    for role in FACTORS:
        if role not in parts:
            raise AdapterError(f"{stem!r} has no {'lora_down (lora_A)' if role == 'lora_A' else 'lora_up (lora_B)'}")
    lora_a, lora_b = parts["lora_A"], parts["lora_B"]
    if lora_a.ndim not in (2, 4) or lora_b.ndim != lora_a.ndim or lora_b.shape[1] != lora_a.shape[0] or set(lora_b.shape[2:]) - {1}:
        raise AdapterError(f"{stem!r} has factors of shapes {tuple(lora_a.shape)} and {tuple(lora_b.shape)}, which do not fit each other")
    if "alpha" in parts and parts["alpha"].numel() != 1:
        raise AdapterError(f"the alpha of {stem!r} has shape {tuple(parts['alpha'].shape)}, expected one number")
    alpha = float(parts["alpha"]) if "alpha" in parts else _alpha(modules[0], len(lora_a), settings)
    return Update(lora_a, lora_b, alpha)


def _split(modules: tuple[str, ...], update: Update) -> dict[str, Update]:
    """Share a fused layer's rows among the modules that diffusers has in its place; a last one that is larger takes what is left.

    Where each module's rows of B use their own columns alone, as of LoRAs that were fused, each gets these with their rows of A.
    """
    if len(modules) == 1:
        return {modules[0]: update}
    total, width = len(update.lora_b), update.lora_a.shape[1]
    first = total // 3 if len(modules) == 3 else width
    sizes = [first] * (len(modules) - 1)
    sizes.append(total - sum(sizes))
    if sizes[-1] < 1:
        raise AdapterError(f"{total} rows cannot be shared among {', '.join(modules)}")
    rows, own = update.lora_b.split(sizes), update.rank // len(modules)
    mine = [slice(place * own, (place + 1) * own) for place in range(len(modules))]
    used = torch.zeros_like(update.lora_b, dtype=torch.bool)
    for part, columns in zip(used.split(sizes), mine, strict=True):
        part[:, columns] = True
    if update.rank % len(modules) or bool(update.lora_b[~used].any()):
        return {module: Update(update.lora_a, part, update.alpha) for module, part in zip(modules, rows, strict=True)}
    return {
        module: Update(update.lora_a[columns], part[:, columns], update.alpha / len(modules))
        for module, part, columns in zip(modules, rows, mine, strict=True)
    }
