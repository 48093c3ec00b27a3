"""Adapters written as one file in the keys of diffusers, kohya or ComfyUI, and read back before anything is on disk."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load, save

from cond_pdiff.adapter import LoraAdapter
from cond_pdiff.atomic import write_bytes
from cond_pdiff.attach import factors_of
from cond_pdiff.errors import AdapterError, OutputExistsError
from cond_pdiff.formats.lora_file import LoraFile, Update
from cond_pdiff.formats.module_names import BFL_BLOCKS, BFL_LAYERS, BFL_SINGLE_BLOCK, BFL_SINGLES, ModuleNames, flat
from cond_pdiff.hub import hub_name

TEXT_ENCODERS = ("text_encoder.", "text_encoder_2.", "text_encoder_3.")
MLP_RATIO = 4
"""The outputs of FLUX's `proj_mlp` in units of its inputs."""


def check_plain(adapter: LoraAdapter) -> None:
    """Raise `AdapterError` if the adapter is more than updates."""
    if adapter.head:
        raise AdapterError(
            "adapters with a head, as those of sequence classifiers, cannot be converted; load the adapter with peft "
            "onto an AutoModelForSequenceClassification, then merge_and_unload() and save_pretrained()"
        )


def updates_of(adapter: LoraAdapter) -> dict[str, Update]:
    """Return the adapter's updates, module by module, on the CPU."""
    factors = {module: factors_of(adapter.tensors, module) for module in adapter.modules}
    alpha = float(adapter.spec.alpha)
    return {module: Update(lora_a.detach().cpu(), lora_b.detach().cpu(), alpha) for module, (lora_a, lora_b) in factors.items()}


def lora_file_tensors(adapter: LoraAdapter, form: str) -> dict[str, torch.Tensor]:
    """Return the adapter's tensors in the keys of another tool.

    For kohya and ComfyUI the factors are as they are, with an `.alpha` each. diffusers' files have no alpha that all its versions and
    other tools read, so the scaling is folded into B there; ΔW is the same, up to the rounding of that product.

    Args:
        form: "diffusers", "kohya" or "comfyui".

    Raises:
        AdapterError: the adapter's family has no such form.
    """
    check_plain(adapter)
    updates = updates_of(adapter)
    forms = adapter.family.file_forms if adapter.family else {}
    if form not in forms:
        able = f"it has {', '.join(forms)}" if forms else "no tool's single files are known for it"
        raise AdapterError(f"an adapter for {adapter.spec.base_model!r} cannot be written as a file for {form}: {able}")
    prefix, fused = forms[form]
    named = {_stem(form, prefix, module, adapter.modules): update for module, update in _scaled(updates, form).items()}
    if fused:
        named = _fused(named, prefix)
    return {key: tensor.contiguous() for key, tensor in sorted(_keys(named, form).items())}


def _scaled(updates: Mapping[str, Update], form: str) -> Mapping[str, Update]:
    """Return the updates; for a form without alpha, with the scaling folded into B."""
    if form != "diffusers":
        return updates
    return {
        module: Update(one.lora_a, (one.lora_b.float() * (one.alpha / one.rank)).to(one.lora_b.dtype), float(one.rank))
        for module, one in updates.items()
    }


def _keys(updates: Mapping[str, Update], form: str) -> dict[str, torch.Tensor]:
    if form == "diffusers":
        pairs = [(f"{stem}.lora_A.weight", one.lora_a) for stem, one in updates.items()]
        return dict([*pairs, *((f"{stem}.lora_B.weight", one.lora_b) for stem, one in updates.items())])
    tensors = {}
    for stem, one in updates.items():
        tensors[f"{stem}.lora_down.weight"], tensors[f"{stem}.lora_up.weight"] = one.lora_a, one.lora_b
        tensors[f"{stem}.alpha"] = torch.tensor(one.alpha)
    return tensors


def _stem(form: str, prefix: str, module: str, modules: tuple[str, ...]) -> str:
    """Return the key of a module without its ending; `prefix` is the denoiser's, `modules` are all of the adapter's."""
    part = next((part for part in TEXT_ENCODERS if module.startswith(part)), None)
    if part is None:
        return prefix + (flat(module) if prefix.endswith("_") else module)
    if form == "diffusers":
        return module
    # The first tools, for one text encoder, did not number it; those for Stable Diffusion XL, whose U-Net has deeper blocks, do.
    several = any(name.startswith("text_encoder_") or ".transformer_blocks.1." in name for name in modules)
    return f"lora_te{TEXT_ENCODERS.index(part) + 1 if several else ''}_{flat(module.removeprefix(part))}"


def _fused(updates: Mapping[str, Update], prefix: str) -> dict[str, Update]:
    """Put FLUX's layers that diffusers splits together again, with the names of its own repository."""
    singles = {theirs: mine for mine, theirs in BFL_SINGLES.items()}
    fused: dict[str, Update] = {}
    groups: dict[str, dict[str, Update]] = {}
    for stem, update in updates.items():
        name = stem.removeprefix(prefix)
        block = next((mine for mine, theirs in BFL_BLOCKS.items() if name.startswith(theirs + "_")), None)
        if stem == name:  # a text encoder's
            fused[stem] = update
        elif name in singles:
            fused[prefix + singles[name]] = update
        elif block is None:
            raise AdapterError(f"FLUX's own repository has no layer {name}; convert to diffusers or comfyui instead")
        else:
            number, _, part = name.removeprefix(BFL_BLOCKS[block] + "_").partition("_")
            groups.setdefault(f"{prefix}{block}_{number}_{_layer(block, part)}", {})[part] = update
    return fused | {stem: _joined(stem, parts) for stem, parts in groups.items()}


def _layer(block: str, part: str) -> str:
    """Return the layer of a FLUX block that holds one of diffusers' layers; single blocks have queries, keys, values and MLP in one."""
    layers = [layer for layer in BFL_LAYERS if (layer in BFL_SINGLE_BLOCK) == (block == "single_blocks")]
    own = [layer for layer in layers if part in BFL_LAYERS[layer]]
    if not own:
        raise AdapterError(f"FLUX's own repository has no layer {part} in its {block}; convert to diffusers or comfyui instead")
    return own[0]


def _joined(stem: str, found: Mapping[str, Update]) -> Update:
    """Return one update for a fused layer: rows of A below each other, B block by block; layers without an update get zeros."""
    parts = next(parts for layer, parts in BFL_LAYERS.items() if stem.endswith("_" + layer))
    first = next(iter(found.values()))
    if len(parts) == 1:
        return first
    width = first.lora_a.shape[1]
    rows = [found[part].lora_b if part in found else first.lora_b.new_zeros(_outputs(part, width), first.rank) for part in parts]
    downs = [found[part].lora_a if part in found else torch.zeros_like(first.lora_a) for part in parts]
    return Update(torch.cat(downs), torch.block_diag(*rows), len(parts) * first.alpha)


def _outputs(part: str, width: int) -> int:
    return MLP_RATIO * width if part == "proj_mlp" else width


def save_lora_file(adapter: LoraAdapter, file: str | Path, form: str, overwrite: bool = False) -> Path:
    """Write one safetensors file for another tool, after reading it back and comparing every bit.

    Args:
        form: see `lora_file_tensors`.

    Raises:
        OutputExistsError: there is such a file (with `overwrite`: a folder).
        AdapterError: the adapter's family has no such form.
    """
    file = Path(file)
    if file.is_dir():
        raise OutputExistsError(f"{file} is a folder; name the file to write, such as {file / 'lora.safetensors'}")
    if file.exists() and not overwrite:
        raise OutputExistsError(f"{file} is already there; choose another name, or replace it (overwrite=True, --force)")
    named = hub_name(adapter.spec.base_model)  # a path is nothing to give away
    data = save(lora_file_tensors(adapter, form), metadata={"format": "pt", **({"base_model": named} if named else {})})
    back = dict(LoraFile.of_tensors(load(data), {}, ModuleNames.of(adapter.modules)).updates)
    for module, update in _scaled(updates_of(adapter), form).items():
        found = back.pop(module, None)
        if found is None or not _same(found, update):
            raise AdapterError(f"the converted file does not give back the same update of {module!r}; nothing was written")
    if strange := [module for module, update in back.items() if bool(update.lora_b.any())]:
        raise AdapterError(f"the converted file gives back an update of {strange[0]!r}, which the adapter does not have")
    write_bytes(file, data)
    return file


def _same(first: Update, second: Update) -> bool:
    pairs = ((first.lora_a, second.lora_a), (first.lora_b, second.lora_b))
    return first.alpha == second.alpha and all(one.dtype == other.dtype and torch.equal(one, other) for one, other in pairs)
