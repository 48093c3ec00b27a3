"""Plain LoRA out of what peft's configurations allow: the tensors name the modules, and every rank and scale is folded into one.

An adapter of peft may have a rank and a scale for each module (`rank_pattern`, `alpha_pattern`, `use_rslora`), and name its modules by
suffixes, by a regular expression or by layer. Here all modules have one rank and one scale, and every ΔW is the same: ranks are padded
with zeros, and what is left of a module's scale goes into its `lora_B`.
"""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from cond_pdiff.errors import AdapterError
from cond_pdiff.layout import tensor_shapes
from cond_pdiff.lora import KEY_PREFIX, MAX_RANK, LoraSpec, name_suffixes

FACTOR_ENDINGS = (".lora_A.weight", ".lora_B.weight")

UNSUPPORTED_OPTIONS = {
    "use_dora": "DoRA, which scales the adapted weights anew",
    "use_qalora": "QA-LoRA, which pools a layer's input",
    "use_bdlora": "block-diagonal LoRA",
    "kasa_config": "KaSA, which changes the base model's own weights",
    "arrow_config": "Arrow, which mixes several adapters",
    "monteclora_config": "Monte Carlo LoRA, which draws its weights",
    "velora_config": "VeLoRA, which keeps projections beside its factors",
    "lora_bias": "LoRA with biases of its own",
    "target_parameters": "LoRA on bare parameters (of mixtures of experts), not on layers",
    "layer_replication": "it repeats layers of the base model",
    "trainable_token_indices": "it trains single rows of an embedding",
    "alora_invocation_tokens": "activated LoRA, which begins at certain tokens",
}
"""The entries of peft's configuration that make an adapter another than LoRA, and what they make it; refused, never ignored."""

UNSUPPORTED_TENSORS = {
    ".lora_embedding_A": "LoRA on an embedding",
    ".lora_embedding_B": "LoRA on an embedding",
    ".lora_magnitude_vector": "DoRA",
    ".lora_B.bias": "LoRA with biases of its own",
}
"""What the names of tensors say that are not plain LoRA's."""

PLAIN_INITIALISATIONS = (True, False, None, "gaussian", "orthogonal", "eva")
"""The ways in which peft begins an adapter that leave the base model as it is."""

PEFT_HEADS = {
    **dict.fromkeys(("SEQ_CLS", "TOKEN_CLS"), frozenset(("classifier", "score"))),
    "QUESTION_ANS": frozenset(("qa_outputs",)),
}
"""Task type → the heads that peft trains and saves of such a model, if it has them; versions before 0.11 did not write them down."""

EMBEDDINGS = ("embed_tokens", "lm_head")
"""The modules that peft saves without naming them, where the vocabulary has grown."""

PLAIN_NAME = re.compile(r"\^?[\w.-]+")
MATCHING_SECONDS = 5.0
MAX_PADDING = 64
"""How many times larger an adapter may become by ranks that are made equal."""

MATCH = r"""
import json, re, sys
patterns, names = json.load(sys.stdin)
print(json.dumps([next((p for p in patterns if re.match(rf"(.*\.)?({p})$", name)), None) for name in names]))
"""


def plain_lora(config: Mapping[str, Any], path: Path, tensors: Mapping[str, torch.Tensor]) -> tuple[LoraSpec, dict[str, torch.Tensor]]:
    """Read peft's configuration and tensors as plain LoRA: one rank and one scale for all modules, and the same ΔW to rounding.

    Args:
        path: of the configuration, for messages.

    Raises:
        AdapterError: it is another method than LoRA, or configuration and tensors contradict each other.
    """
    try:
        for name in ("base_model_name_or_path", "task_type"):
            if not isinstance(config.get(name), (str, type(None))):
                raise AdapterError(f"{name} must be a name or null, got {config[name]!r:.80}")
        _refuse_others(config, tensors)
        heads = _heads(config, tensors)
        modules = sorted({key.removesuffix(end).removeprefix(KEY_PREFIX) for key in tensors for end in FACTOR_ENDINGS if key.endswith(end)})
        spec = LoraSpec(
            config.get("base_model_name_or_path"),
            config["r"],
            config["lora_alpha"],
            _targets(config, modules),
            config.get("task_type"),
            modules_to_save=heads,
            fan_in_fan_out=config.get("fan_in_fan_out") or False,
        )
        patterns = [_pattern(config, name) for name in ("rank_pattern", "alpha_pattern")]
        if not any(patterns) and not config.get("use_rslora"):
            return spec, dict(tensors)
        ranks, alphas = (matched(pattern, modules) for pattern in patterns)
        scales, shapes = {}, tensor_shapes(tensors)
        for name in modules:
            rank, alpha = int(ranks.get(name, spec.rank)), alphas.get(name, spec.alpha)
            check_factors(shapes, name, rank, "r and rank_pattern")
            scales[name] = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
        return fold_scales(spec, tensors, scales)
    except KeyError as error:
        raise AdapterError(f"{path}: the field {error} is missing") from error
    except AdapterError as error:
        raise AdapterError(f"{path}: {error}") from error


def check_factors(shapes: Mapping[str, tuple[int, ...]], module: str, rank: int, why: str) -> None:
    """Raise `AdapterError` unless both factors of a module are among these tensors' shapes, of this rank; `why` says who wants it."""
    for ending, axis in zip(FACTOR_ENDINGS, (0, 1), strict=True):
        key = f"{KEY_PREFIX}{module}{ending}"
        if key not in shapes:
            raise AdapterError(f"missing tensor {key!r}")
        shape = shapes[key]
        # Of a convolution, A has its kernel, and B is 1 × 1.
        if len(shape) not in (2, 4) or shape[axis] != rank or (axis == 1 and shape[2:] not in ((), (1, 1))):
            raise AdapterError(f"tensor {key!r} has shape {shape}, which does not fit rank {rank} ({why})")


def fold_scales(
    spec: LoraSpec, tensors: Mapping[str, torch.Tensor], scales: Mapping[str, float]
) -> tuple[LoraSpec, dict[str, torch.Tensor]]:
    """Give all modules one rank, the largest, and one scale; every ΔW stays what it is: `scales[module]` · B · A.

    Where all scales are equal, alpha takes them up and no number changes. Else `lora_B` does; in half precision it becomes float32.

    Raises:
        AdapterError: the ranks are so different that padding would make the adapter more than `MAX_PADDING` times larger.
    """
    factors = {name: [f"{KEY_PREFIX}{name}{ending}" for ending in FACTOR_ENDINGS] for name in scales}
    rank = max(len(tensors[key_a]) for key_a, _ in factors.values())
    sizes = {name: tensors[key_a].shape[1] + tensors[key_b].shape[0] for name, (key_a, key_b) in factors.items()}
    held = sum(size * len(tensors[factors[name][0]]) for name, size in sizes.items())
    if rank * sum(sizes.values()) > MAX_PADDING * held:
        raise AdapterError(f"ranks up to {rank} would make the adapter more than {MAX_PADDING} times larger if all modules had them")
    first = next(iter(scales.values()))
    spec = replace(spec, rank=rank, alpha=first * rank if len(set(scales.values())) == 1 else spec.alpha)
    folded = dict(tensors)
    for name, (key_a, key_b) in factors.items():
        share = scales[name] / spec.scaling
        if not math.isclose(share, 1, rel_tol=1e-12):
            folded[key_b] = folded[key_b].float() * share
        missing = rank - len(folded[key_a])
        if missing:
            folded[key_a] = torch.nn.functional.pad(folded[key_a], (0, 0) * (folded[key_a].ndim - 1) + (0, missing))
            folded[key_b] = torch.nn.functional.pad(folded[key_b], (0, 0) * (folded[key_b].ndim - 2) + (0, missing))
    return spec, folded


def matched(patterns: Mapping[str, float], modules: Sequence[str]) -> dict[str, float]:
    """Return for each module the value of the first pattern that matches its name or a suffix of it, by peft's rule.

    A pattern is a name, or a regular expression; these come with strangers' files and may take for ever, so they are run in a process of
    its own, for `MATCHING_SECONDS` at most.

    Raises:
        AdapterError: they take longer, or one is no regular expression.
    """
    if all(PLAIN_NAME.fullmatch(pattern) for pattern in patterns):
        named = [next((pattern for pattern in patterns if _names(pattern, module)), None) for module in modules]
        return {module: patterns[name] for module, name in zip(modules, named, strict=True) if name is not None}
    asked = json.dumps([list(patterns), list(modules)])
    command = [sys.executable, "-I", "-S", "-c", MATCH]
    try:
        done = subprocess.run(command, input=asked, capture_output=True, text=True, timeout=MATCHING_SECONDS, check=True)
    except subprocess.TimeoutExpired as error:
        raise AdapterError(f"the patterns {list(patterns)!r:.200} take longer than {MATCHING_SECONDS:g} s; name the modules") from error
    except subprocess.CalledProcessError as error:
        why = error.stderr.strip().rpartition("\n")[2]
        raise AdapterError(f"the patterns {list(patterns)!r:.200} are no regular expressions: {why:.100}") from error
    return {module: patterns[name] for module, name in zip(modules, json.loads(done.stdout), strict=True) if name is not None}


def _names(pattern: str, module: str) -> bool:
    return pattern[1:] == module if pattern.startswith("^") else pattern in name_suffixes(module)


def _pattern(config: Mapping[str, Any], name: str) -> dict[str, float]:
    """Return a `rank_pattern` or `alpha_pattern` after checking its numbers."""
    pattern = config.get(name) or {}
    if not isinstance(pattern, dict):
        raise AdapterError(f"{name} must map names of modules to numbers, got {pattern!r:.80}")
    for key, value in pattern.items():
        whole = isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= MAX_RANK
        if not (whole if name == "rank_pattern" else isinstance(value, (int, float)) and 0 < value <= sys.float_info.max):
            expected = f"a whole number from 1 to {MAX_RANK}" if name == "rank_pattern" else "a positive number"
            raise AdapterError(f"{name}: {key!r} is {value!r:.80}, expected {expected}")
    return pattern


def _refuse_others(config: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> None:
    """Raise `AdapterError` for what is another method than LoRA on linear layers; the message names it."""
    for name, what in UNSUPPORTED_OPTIONS.items():
        if config.get(name):
            raise AdapterError(f"{name} is {config[name]!r:.80}: {what}; only plain LoRA is supported")
    if config.get("init_lora_weights", True) not in PLAIN_INITIALISATIONS:
        raise AdapterError(
            f"init_lora_weights is {config['init_lora_weights']!r}: peft changes the base model's own weights for it; "
            "convert it to plain LoRA (peft: save_pretrained with path_initial_model_for_weight_conversion)"
        )
    if config.get("bias", "none") != "none":
        raise AdapterError(f"bias is {config['bias']!r}, expected 'none'")
    for key, tensor in tensors.items():
        for part, what in UNSUPPORTED_TENSORS.items():
            if part in key:
                raise AdapterError(f"tensor {key!r} is of {what}; only plain LoRA on linear layers is supported")
        if key.endswith(FACTOR_ENDINGS) and tensor.ndim == 5:
            raise AdapterError(f"tensor {key!r} has {tensor.ndim} dimensions: LoRA on a 3-D convolution is not supported")


def _listed(config: Mapping[str, Any], name: str) -> list[str]:
    modules = config.get(name) or []
    if not isinstance(modules, list) or not all(isinstance(module, str) and module for module in modules):
        raise AdapterError(f"{name} must be a list of module names, got {modules!r:.80}")
    return modules


def _targets(config: Mapping[str, Any], modules: Sequence[str]) -> tuple[str, ...]:
    """Return names that mean these modules and no others of the base model.

    That are the listed suffixes as far as tensors belong to them, where the list is the whole rule; else the modules' full names.

    Raises:
        AdapterError: the list is malformed, or there are tensors of modules that further rules leave out.
    """
    if config.get("target_modules") is None or isinstance(config["target_modules"], str):  # "all-linear", or a regular expression
        return tuple(modules)
    listed = _listed(config, "target_modules")
    if not listed:
        raise AdapterError("target_modules is empty; name at least one module")
    excluded = config.get("exclude_modules") or []
    excluded = [] if isinstance(excluded, str) else _listed(config, "exclude_modules")  # a string is a regular expression
    layers = config.get("layers_to_transform")
    layers = [layers] if isinstance(layers, int) else layers or []
    if not isinstance(layers, list) or not all(isinstance(layer, int) for layer in layers):
        raise AdapterError(f"layers_to_transform must be whole numbers, got {layers!r:.80}")
    if not config.get("exclude_modules") and not layers:
        confirmed = {suffix for name in modules for suffix in name_suffixes(name)}
        return tuple(name for name in listed if name in confirmed) or tuple(listed)
    for name in modules:
        key = f"{KEY_PREFIX}{name}.lora_A.weight"
        if not any(suffix in listed for suffix in name_suffixes(name)):
            raise AdapterError(f"tensor {key} is outside target_modules {sorted(listed)}")
        if any(suffix in excluded for suffix in name_suffixes(name)):
            raise AdapterError(f"tensor {key} is of a module in exclude_modules {excluded}")
        if layers and name not in listed and not {str(layer) for layer in layers} & set(name.split(".")):
            raise AdapterError(f"tensor {key} is of none of the layers in layers_to_transform {layers}")
    return tuple(modules)


def _heads(config: Mapping[str, Any], tensors: Iterable[str]) -> tuple[str, ...]:
    """Return the full names of the modules that the adapter brings whole: those of its tensors that are no factors.

    peft takes every module for named whose name ends as one in `modules_to_save`, as DistilBERT's `pre_classifier` does.
    """
    names = set(_listed(config, "modules_to_save"))
    rest = [key.removeprefix(KEY_PREFIX) for key in tensors if key.startswith(KEY_PREFIX) and not key.endswith(FACTOR_ENDINGS)]
    own = PEFT_HEADS.get(config.get("task_type") or "", frozenset())
    found = {module for key in rest if (module := _module_named(key, names))} or {
        module for key in rest if (module := _module_named(key, own))
    }
    absent = {name for name in names if not any(module.endswith(name) for module in found)}
    if found or own <= names:  # peft names them all, whether or not the model has them
        absent -= own
    loose = {module for key in rest if (module := key.rpartition(".")[0]).rpartition(".")[2] in EMBEDDINGS}
    loose = {module for module in loose if not any(module.startswith(f"{name}.") for name in found)}
    return tuple(found | loose | absent)


def _module_named(key: str, names: Iterable[str]) -> str | None:
    """Return the outermost module of a tensor whose name ends with one of `names`; None if there is none."""
    parts = key.split(".")
    modules = (".".join(parts[:count]) for count in range(1, len(parts)))
    return next((module for module in modules if module.endswith(tuple(names))), None)
