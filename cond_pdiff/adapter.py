"""LoraAdapter: a validated peft LoRA that can be saved, loaded, pushed, attached to a model, detached, and interpolated.

On disk it is what stock peft reads: `adapter_config.json` and `adapter_model.safetensors`, plus `cond_pdiff.json`
with what peft has no place for (the layout, the base model's fingerprint, labels, how the adapter was made), and a card.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import nn
from torch.utils.hooks import RemovableHandle

from cond_pdiff.adapter_card import adapter_card
from cond_pdiff.atomic import atomic_folder, dump_json
from cond_pdiff.errors import AdapterError
from cond_pdiff.hub import MAX_JSON_BYTES, Push, push_folder
from cond_pdiff.layout import ParamLayout, check_values

KEY_PREFIX = "base_model.model."
CONFIG_FILE, WEIGHTS_FILE, METADATA_FILE = "adapter_config.json", "adapter_model.safetensors", "cond_pdiff.json"
ADAPTER_FILES = (CONFIG_FILE, WEIGHTS_FILE, METADATA_FILE, "README.md")
PREVIEW_FILE = "preview.png"
MAX_RANK = 1024
FACTORS = ("lora_A", "lora_B")
UNSUPPORTED_OPTIONS = (
    *("use_dora", "use_rslora", "use_qalora", "lora_bias", "fan_in_fan_out", "modules_to_save", "exclude_modules", "target_parameters"),
    *("rank_pattern", "alpha_pattern", "layers_to_transform", "layer_replication", "trainable_token_indices", "alora_invocation_tokens"),
)
"""Entries of peft's configuration that change what an adapter computes; any of them is refused, never ignored."""


@dataclass(frozen=True)
class LoraSpec:
    """What all adapters of a zoo share, besides shapes.

    Args:
        base_model: Hub id of the base model, or None if unknown.
        rank: r of ΔW = (alpha / rank) · B · A (paper, equation 1).
        alpha: the scale's numerator.
        target_modules: suffixes of the adapted modules' names.
        task_type: peft's task type, or None.
        base_fingerprint: `base_fingerprint` of the base model, or None if unknown (then attaching cannot check it).
    """

    base_model: str | None
    rank: int
    alpha: float
    target_modules: tuple[str, ...]
    task_type: str | None = "FEATURE_EXTRACTION"
    base_fingerprint: str | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.rank, int) or isinstance(self.rank, bool) or not 1 <= self.rank <= MAX_RANK:
            raise AdapterError(f"rank (r) must be a whole number from 1 to {MAX_RANK}, got {self.rank!r}")
        if not isinstance(self.alpha, (int, float)) or not 0 < self.alpha <= sys.float_info.max:
            raise AdapterError(f"lora_alpha must be a positive number, got {self.alpha!r}")
        if not self.target_modules:
            raise AdapterError("target_modules is empty; name at least one module")
        # The order means nothing to peft, so specifications that differ only in it are equal.
        object.__setattr__(self, "target_modules", tuple(sorted(self.target_modules)))

    @property
    def scale(self) -> float:
        """Alpha / rank, the factor in front of B · A."""
        return self.alpha / self.rank

    def targets(self, module_name: str) -> bool:
        """Is the module with this full name one of the adapted ones (peft's suffix rule)?"""
        return any(module_name == target or module_name.endswith("." + target) for target in self.target_modules)

    def to_json(self) -> dict[str, Any]:
        """A JSON-ready description; `from_json` reads it back."""
        return {**self.__dict__, "target_modules": sorted(self.target_modules)}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> LoraSpec:
        """Read what `to_json` wrote."""
        try:
            return cls(**{**data, "target_modules": tuple(data["target_modules"])})
        except (KeyError, TypeError) as error:
            raise AdapterError(f"not a LoRA specification: {error}") from error


def base_fingerprint(model: nn.Module, spec: LoraSpec) -> str:
    """sha256 over the shape-giving entries of `model.config` and the targeted weights.

    Weights are hashed after rounding to float16, so the same base has one fingerprint in float32 and in float16.
    """
    config = getattr(model, "config", {})
    named = ("model_type", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "vocab_size")
    digest = hashlib.sha256(json.dumps({name: getattr(config, name, None) for name in named}).encode())
    for name, module in target_linears(model, spec).items():
        digest.update(name.encode())
        digest.update(module.weight.detach().to("cpu", torch.float16).contiguous().numpy().tobytes())
    return digest.hexdigest()


def target_linears(model: nn.Module, spec: LoraSpec) -> dict[str, nn.Linear]:
    """The linear modules of `model` that `spec` targets, sorted by name; `AdapterError` if there are none."""
    found = {name: module for name, module in model.named_modules() if spec.targets(name)}
    if not found:
        raise AdapterError(
            f"the model ({type(model).__name__}) has no module named {sorted(spec.target_modules)}; "
            f"these adapters are for {spec.base_model or 'another base model'}"
        )
    for name, module in found.items():
        if not isinstance(module, nn.Linear):
            raise AdapterError(f"module {name!r} is a {type(module).__name__}, expected a Linear (is an adapter already merged in?)")
    return {name: module for name, module in sorted(found.items()) if isinstance(module, nn.Linear)}


def adapted_module(model: Any) -> nn.Module:
    """`model` itself, or the denoiser (`transformer` or `unet`) of a diffusers pipeline, which is where LoRAs go."""
    for candidate in (model, getattr(model, "transformer", None), getattr(model, "unet", None)):
        if isinstance(candidate, nn.Module):
            return candidate
    raise AdapterError(f"expected a model or a diffusers pipeline with a transformer or unet, got {type(model).__name__}")


class Attachment:
    """A live attachment; `detach` removes it. The base model's weights are never written to."""

    def __init__(self, handles: list[RemovableHandle]) -> None:
        self._handles = handles

    def detach(self) -> None:
        """Remove the adapter from the model; calling it again does nothing."""
        while self._handles:
            self._handles.pop().remove()


@dataclass(frozen=True, eq=False)
class LoraAdapter:
    """A LoRA adapter in memory.

    Args:
        spec: rank, alpha, target modules, base model.
        tensors: peft key (`base_model.model.<module>.lora_A.weight`, …) → tensor; A is (rank, in), B is (out, rank).
        metadata: JSON-ready facts kept in `cond_pdiff.json` (labels, condition, seed, …).

    Raises:
        AdapterError: a tensor or field is missing, extra, misshapen, not finite, or contradicts the rest.
    """

    spec: LoraSpec
    tensors: Mapping[str, torch.Tensor]
    metadata: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        modules = self.modules
        for name in modules:
            for factor, axis in zip(FACTORS, (0, 1), strict=True):
                key = f"{KEY_PREFIX}{name}.{factor}.weight"
                if key not in self.tensors:
                    raise AdapterError(f"missing tensor {key!r}")
                shape = tuple(self.tensors[key].shape)
                if len(shape) != 2 or shape[axis] != self.spec.rank:
                    raise AdapterError(f"tensor {key!r} has shape {shape}, which does not fit rank {self.spec.rank}")
            if not self.spec.targets(name):
                raise AdapterError(f"tensor {KEY_PREFIX}{name}.lora_A.weight is outside target_modules {sorted(self.spec.target_modules)}")
        for target in self.spec.target_modules:
            if not any(name == target or name.endswith("." + target) for name in modules):
                raise AdapterError(f"target_modules names {target!r}, but no tensor belongs to it")
        check_values(self.tensors)

    @property
    def modules(self) -> tuple[str, ...]:
        """Names of the adapted modules, sorted."""
        names = set()
        for key in self.tensors:
            stem, _, factor = key.removesuffix(".weight").rpartition(".")
            if not key.startswith(KEY_PREFIX) or not key.endswith(".weight") or factor not in FACTORS:
                raise AdapterError(f"unexpected tensor {key!r}; expected {KEY_PREFIX}<module>.lora_A.weight or .lora_B.weight")
            names.add(stem.removeprefix(KEY_PREFIX))
        if not names:
            raise AdapterError("the adapter holds no tensors")
        return tuple(sorted(names))

    @property
    def layout(self) -> ParamLayout:
        """Keys and shapes, sorted by key."""
        return ParamLayout.from_tensors(self.tensors)

    def factors(self, module: str) -> tuple[torch.Tensor, torch.Tensor]:
        """(A, B) of one module."""
        return self.tensors[f"{KEY_PREFIX}{module}.lora_A.weight"], self.tensors[f"{KEY_PREFIX}{module}.lora_B.weight"]

    def delta(self, module: str) -> torch.Tensor:
        """ΔW = (alpha / rank) · B · A of one module, float32, shape (out, in) (paper, equation 1)."""
        lora_a, lora_b = self.factors(module)
        return self.spec.scale * (lora_b.float() @ lora_a.float())

    # --- disk ---------------------------------------------------------------------------------------------------

    def save(self, folder: str | Path, overwrite: bool = False, preview: bytes | None = None) -> Path:
        """Write the adapter folder, complete or not at all; the same adapter gives the same bytes in every process.

        Args:
            preview: a PNG file for the card to show, such as `encode_png` makes of what the adapter paints.

        Raises:
            OutputExistsError: `folder` is not empty (with `overwrite`: holds files that are not an adapter's).
        """
        target = Path(folder)
        with atomic_folder(target, (*ADAPTER_FILES, PREVIEW_FILE), overwrite) as aside:
            (aside / CONFIG_FILE).write_text(dump_json(self._peft_config()), encoding="utf-8")
            tensors = {key: self.tensors[key].detach().to("cpu").contiguous() for key in sorted(self.tensors)}
            (aside / WEIGHTS_FILE).write_bytes(save(tensors, metadata={"format": "pt"}))
            facts = {**self.metadata, "layout": self.layout.to_json(), "lora": self.spec.to_json()}
            (aside / METADATA_FILE).write_text(dump_json(facts), encoding="utf-8")
            card = adapter_card(self.spec.to_json(), self.layout.num_adapter_params, self.metadata, PREVIEW_FILE if preview else None)
            (aside / "README.md").write_text(card, encoding="utf-8")
            if preview:
                (aside / PREVIEW_FILE).write_bytes(preview)
        return target

    def push_to_hub(self, repo_id: str, preview: bytes | None = None, **options: Any) -> Push:
        """Push the adapter folder to a Hub repository, which is created if there is none.

        Args:
            preview: see `save`.
            options: as for `cond_pdiff.hub.push_folder`: `private`, `revision`, `token`, `commit_message`, `create_pr`, `dry_run`.

        Raises:
            HubError: see `push_folder`.
        """
        with tempfile.TemporaryDirectory() as folder:
            return push_folder(self.save(folder, preview=preview), repo_id, **{"commit_message": "Push a LoRA adapter", **options})

    def _peft_config(self) -> dict[str, Any]:
        # Every field that stock peft needs to rebuild this adapter, and only fields that all its versions know.
        return {
            "peft_type": "LORA",
            "task_type": self.spec.task_type,
            "base_model_name_or_path": self.spec.base_model,
            "r": self.spec.rank,
            "lora_alpha": self.spec.alpha,
            "lora_dropout": 0.0,
            "target_modules": sorted(self.spec.target_modules),
            "bias": "none",
            "fan_in_fan_out": False,
            "init_lora_weights": True,
            "inference_mode": True,
            "modules_to_save": None,
        }

    @classmethod
    def load(cls, folder: str | Path, layout: ParamLayout | None = None) -> LoraAdapter:
        """Read an adapter folder strictly.

        Args:
            folder: holds `adapter_config.json` and `adapter_model.safetensors`, as saved by this package or by peft.
            layout: if given, the tensors must fit it exactly.

        Raises:
            AdapterError: anything missing, extra, malformed or contradictory; the message names the file and the field.
        """
        folder = Path(folder)
        if not (folder / CONFIG_FILE).is_file():
            raise AdapterError(f"no adapter folder at {folder}; expected {CONFIG_FILE} and {WEIGHTS_FILE} in it")
        config = _read_json(folder / CONFIG_FILE)
        spec = _spec_from_peft(config, folder / CONFIG_FILE)
        tensors = _read_tensors(folder / WEIGHTS_FILE)
        metadata = _read_json(folder / METADATA_FILE) if (folder / METADATA_FILE).exists() else {}
        if "lora" in metadata:
            recorded = LoraSpec.from_json(metadata.pop("lora"))
            for name, value in recorded.to_json().items():
                if name != "base_fingerprint" and spec.to_json()[name] != value:
                    raise AdapterError(f"{folder / CONFIG_FILE}: {name} is {spec.to_json()[name]!r}, but {METADATA_FILE} records {value!r}")
            spec = recorded
        reference = metadata.get("base")
        if isinstance(reference, dict) and reference.get("repo_id") != spec.base_model:
            raise AdapterError(
                f"{folder / METADATA_FILE}: base is {reference.get('repo_id')!r}, but {CONFIG_FILE} names {spec.base_model!r}"
            )
        if "layout" in metadata:
            ParamLayout.from_json(metadata.pop("layout")).validate(tensors)
        if layout is not None:
            layout.validate(tensors)
        return cls(spec, tensors, metadata)

    # --- models -------------------------------------------------------------------------------------------------

    def check_base(self, model: Any) -> None:
        """Raise `AdapterError` unless `model` (or a diffusers pipeline's denoiser) is this adapter's base; it is only read."""
        module = adapted_module(model)
        linears = target_linears(module, self.spec)
        for name in sorted(set(linears) ^ set(self.modules)):
            where = "the model but not in the adapter" if name in linears else "the adapter but not in the model"
            raise AdapterError(f"module {name!r} is in {where}; is this the base {self.spec.base_model!r}?")
        for name, linear in linears.items():
            lora_a, lora_b = self.factors(name)
            if (lora_b.shape[0], lora_a.shape[1]) != (linear.out_features, linear.in_features):
                raise AdapterError(
                    f"module {name!r} is {linear.out_features}×{linear.in_features}, "
                    f"but the adapter's update is {lora_b.shape[0]}×{lora_a.shape[1]}"
                )
        if self.spec.base_fingerprint is not None and base_fingerprint(module, self.spec) != self.spec.base_fingerprint:
            raise AdapterError(
                f"the model's weights are not those of {self.spec.base_model!r} that this adapter was made for "
                "(fingerprints differ); load that base model unchanged, in float32 or float16"
            )

    def attach(self, model: Any, scale: float = 1.0, check: bool = True) -> Attachment:
        """Add scale · ΔW to the model's targeted linear layers, without touching their weights.

        Several adapters may be attached to one model; their updates add up.

        Args:
            model: the base model (for sentence-transformers: `model[0].auto_model`), or a diffusers pipeline.
            scale: 0 is the base model, 1 the adapter at full strength.
            check: verify the base model first (see `check_base`); switch off only where it has just been verified.

        Returns:
            An `Attachment`; call its `detach()` to get the base model back, bit for bit.
        """
        if check:
            self.check_base(model)
        module = adapted_module(model)
        hooks = []
        for name in self.modules:
            linear = module.get_submodule(name)
            weight = linear.weight
            lora_a, lora_b = (factor.to(weight.device, weight.dtype) for factor in self.factors(name))  # type: ignore[arg-type]
            hooks.append((linear, _lora_hook(lora_a, lora_b * (scale * self.spec.scale))))
        return Attachment([linear.register_forward_hook(hook) for linear, hook in hooks])

    @contextlib.contextmanager
    def attached(self, model: Any, scale: float = 1.0, check: bool = True) -> Iterator[Any]:
        """`with adapter.attached(model): …` — attached inside the block, detached after it, also on errors."""
        attachment = self.attach(model, scale, check)
        try:
            yield model
        finally:
            attachment.detach()

    # --- arithmetic ---------------------------------------------------------------------------------------------

    def scaled(self, strength: float) -> LoraAdapter:
        """The adapter with ΔW times `strength`, by its `lora_B`."""
        tensors = {key: tensor * strength if ".lora_B." in key else tensor for key, tensor in self.tensors.items()}
        return replace(self, tensors=tensors)

    def interpolate(self, other: LoraAdapter, weight: float, space: Literal["factors", "delta"] = "delta") -> LoraAdapter:
        """The adapter at `weight` on the way from this one (0) to `other` (1).

        Args:
            space: "delta" interpolates ΔW = B · A: exactly where both share `lora_A`, else by the best approximation of
                the same rank (truncated SVD). "factors" interpolates A and B separately, as averaging checkpoints does.
        """
        same_dtypes = all(other.tensors[key].dtype == tensor.dtype for key, tensor in self.tensors.items() if key in other.tensors)
        if self.layout != other.layout or self.spec != other.spec or not same_dtypes:
            raise AdapterError("only adapters of the same layout, rank, alpha and base model, in the same dtype, can be interpolated")
        if space not in ("factors", "delta"):
            raise AdapterError(f"space must be 'factors' or 'delta', got {space!r}")
        shared_a = all(torch.equal(self.factors(name)[0], other.factors(name)[0]) for name in self.modules)
        if space == "factors" or shared_a:
            tensors = {key: torch.lerp(tensor, other.tensors[key], weight) for key, tensor in self.tensors.items()}
        else:
            tensors = {}
            for name in self.modules:
                delta = torch.lerp(self.delta(name), other.delta(name), weight) / self.spec.scale
                left, values, right = torch.linalg.svd(delta, full_matrices=False)
                root = values[: self.spec.rank].sqrt()
                lora_a, lora_b = self.factors(name)
                tensors[f"{KEY_PREFIX}{name}.lora_A.weight"] = (root[:, None] * right[: self.spec.rank]).to(lora_a.dtype)
                tensors[f"{KEY_PREFIX}{name}.lora_B.weight"] = (left[:, : self.spec.rank] * root).to(lora_b.dtype)
        return replace(self, tensors=tensors, metadata={})


def _lora_hook(lora_a: torch.Tensor, lora_b: torch.Tensor) -> Any:
    def add_update(module: nn.Module, args: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
        return output + nn.functional.linear(nn.functional.linear(args[0], lora_a), lora_b)

    return add_update


def _read_json(path: Path) -> dict[str, Any]:
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


def _spec_from_peft(config: Mapping[str, Any], path: Path) -> LoraSpec:
    if config.get("peft_type") != "LORA":
        raise AdapterError(f"{path}: peft_type is {config.get('peft_type')!r}, expected 'LORA'")
    for name in UNSUPPORTED_OPTIONS:
        if config.get(name):
            raise AdapterError(f"{path}: {name} is {config[name]!r}; only plain LoRA is supported")
    if config.get("bias", "none") != "none":
        raise AdapterError(f"{path}: bias is {config['bias']!r}, expected 'none'")
    targets = config.get("target_modules")
    if not isinstance(targets, list) or not all(isinstance(target, str) and target for target in targets):
        raise AdapterError(f"{path}: target_modules must be a list of module names, got {targets!r:.80}")
    try:
        return LoraSpec(
            config.get("base_model_name_or_path"), config["r"], config["lora_alpha"], tuple(sorted(targets)), config.get("task_type")
        )
    except KeyError as error:
        raise AdapterError(f"{path}: the field {error} is missing") from error
    except AdapterError as error:
        raise AdapterError(f"{path}: {error}") from error


def _read_tensors(path: Path) -> dict[str, torch.Tensor]:
    try:
        return load_file(path)
    except FileNotFoundError as error:
        raise AdapterError(f"{path} is missing") from error
    except (SafetensorError, OSError, ValueError) as error:
        raise AdapterError(f"{path} is not a complete safetensors file: {error}") from error
