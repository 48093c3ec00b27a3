"""LoraAdapter: a validated peft LoRA that can be saved, loaded, pushed, attached to a model, detached, and interpolated.

On disk it is what stock peft reads: `adapter_config.json` and `adapter_model.safetensors`, plus `cond_pdiff.json`
with what peft has no place for (the layout, the base model's fingerprint, labels, how the adapter was made), and a card.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from cond_pdiff.adapter_card import CARD_FILE, adapter_card
from cond_pdiff.atomic import atomic_folder, dump_json
from cond_pdiff.attach import Attachment, attach, check_shapes, factors_of
from cond_pdiff.base_state import check_state
from cond_pdiff.errors import AdapterError
from cond_pdiff.families.family import Family, family_of
from cond_pdiff.guidance import positive_side
from cond_pdiff.hub import Backbone, Push, find_adapter, hub_name, push_folder
from cond_pdiff.layout import ParamLayout, check_values, tensor_entries, tensor_shapes
from cond_pdiff.locks import lock_of
from cond_pdiff.lora import KEY_PREFIX, LoraSpec, adapted_module, base_fingerprint, name_suffixes, same_base
from cond_pdiff.low_rank import weighted_product, weighted_sum
from cond_pdiff.peft_files import CONFIG_FILE, METADATA_FILE, WEIGHTS_FILE, peft_config, read_adapter
from cond_pdiff.plain_lora import check_factors
from cond_pdiff.tensor_file import in_file_order, write_tensors

ADAPTER_FILES = (CONFIG_FILE, WEIGHTS_FILE, METADATA_FILE, CARD_FILE)
PREVIEW_FILE = "preview.png"
FACTORS = ("lora_A", "lora_B")

@dataclass(frozen=True, eq=False)
class LoraAdapter:
    """A validated LoRA adapter in memory: its specification, its tensors, and the facts that are kept with it.

    Args:
        spec: rank, alpha, target modules, base model.
        tensors: peft key (`base_model.model.<module>.lora_A.weight`, …) → tensor; A is (rank, in), B is (out, rank); of a convolution
            A is (rank, in, height, width), B is (out, rank, 1, 1). Heads, if the specification names any, stand beside them with the
            model's own names (`base_model.model.classifier.weight`, …).
        metadata: JSON-ready facts kept in `cond_pdiff.json` (labels, condition, seed, …).

    Raises:
        AdapterError: a tensor or field is missing, extra, misshapen, not finite, or contradicts the rest.
    """

    spec: LoraSpec
    tensors: Mapping[str, torch.Tensor]
    metadata: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        modules, shapes = self.modules, tensor_shapes(self.tensors)
        for name in modules:
            check_factors(shapes, name, self.spec.rank, "r")
            if not self.spec.targets(name):
                raise AdapterError(f"tensor {KEY_PREFIX}{name}.lora_A.weight is outside target_modules {sorted(self.spec.target_modules)}")
        for target in sorted(set(self.spec.target_modules) - {suffix for name in modules for suffix in name_suffixes(name)}):
            raise AdapterError(f"target_modules names {target!r}, but no tensor belongs to it")
        for head in self.spec.modules_to_save:
            if not any(key.startswith(f"{KEY_PREFIX}{head}.") for key in self.head):
                raise AdapterError(f"modules_to_save names {head!r}, but there is no tensor {KEY_PREFIX}{head}.…")
        check_values(self.tensors)

    @property
    def modules(self) -> tuple[str, ...]:
        """The names of the adapted modules, sorted."""
        names = set()
        for key in self.tensors:
            if self.spec.saves(key.removeprefix(KEY_PREFIX)):
                continue
            stem, _, factor = key.removesuffix(".weight").rpartition(".")
            if not key.startswith(KEY_PREFIX) or not key.endswith(".weight") or factor not in FACTORS:
                raise AdapterError(f"unexpected tensor {key!r}; expected {KEY_PREFIX}<module>.lora_A.weight or .lora_B.weight")
            names.add(stem.removeprefix(KEY_PREFIX))
        if not names:
            raise AdapterError("the adapter holds no tensors")
        return tuple(sorted(names))

    @property
    def head(self) -> dict[str, torch.Tensor]:
        """The tensors of the heads; empty for an adapter without one."""
        return {key: tensor for key, tensor in self.tensors.items() if self.spec.saves(key.removeprefix(KEY_PREFIX))}

    @property
    def family(self) -> Family | None:
        """The family of base models that the adapter is for; None if that cannot be told.

        Raises:
            CondPDiffError: it names one that is not known here.
        """
        return family_of(self.spec, self.modules)

    @property
    def base(self) -> Backbone:
        """The base model, as far as the adapter records where it is."""
        return Backbone.from_json(self.metadata.get("base") or {"repo_id": self.spec.base_model})

    @property
    def layout(self) -> ParamLayout:
        """The keys and shapes of all tensors, sorted by key."""
        return ParamLayout.from_tensors(self.tensors)

    def factors(self, module: str) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the factors (A, B) of one module as matrices; a convolution's kernel is unrolled, `(rank, in · height · width)`."""
        lora_a, lora_b = factors_of(self.tensors, module)
        return lora_a.flatten(1), lora_b.flatten(1)

    def delta(self, module: str) -> torch.Tensor:
        """Return ΔW = (alpha / rank) · B · A of one module, float32, shape (out, in), kernels unrolled (paper, equation 1)."""
        lora_a, lora_b = self.factors(module)
        return self.spec.scaling * (lora_b.float() @ lora_a.float())

    def __repr__(self) -> str:
        """Return one line that describes the adapter, without its numbers."""
        known = {name: self.metadata.get(name) for name in ("task", "labels", "seed")}
        facts = "".join(f", {name}={value!r:.60}" for name, value in known.items() if value is not None)
        return f"LoraAdapter({self.spec.base_model!r}, rank={self.spec.rank}, {self.layout.num_adapter_params:,} parameters{facts})"

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
            (aside / CONFIG_FILE).write_text(dump_json(peft_config(self.spec)), encoding="utf-8")
            entries = tensor_entries(self.tensors)
            with (aside / WEIGHTS_FILE).open("wb") as file:
                write_tensors(file, entries, (self.tensors[key].to("cpu") for key in in_file_order(entries)), {"format": "pt"})
            facts = {**self.metadata, "layout": self.layout.to_json(), "lora": self.spec.to_json()}
            (aside / METADATA_FILE).write_text(dump_json(facts), encoding="utf-8")
            (aside / CARD_FILE).write_text(adapter_card(self, PREVIEW_FILE if preview else None), encoding="utf-8")
            if preview:
                (aside / PREVIEW_FILE).write_bytes(preview)
        return target

    def push_to_hub(self, repo_id: str, preview: bytes | None = None, **options: Any) -> Push:
        """Push the adapter folder, `shareable`, to a Hub repository, which is created if there is none.

        Args:
            preview: see `save`.
            options: as for `cond_pdiff.hub.push_folder`: `private`, `revision`, `token`, `commit_message`, `create_pr`, `dry_run`.

        Raises:
            HubError: see `push_folder`.
        """
        with tempfile.TemporaryDirectory() as folder:
            place = self.shareable().save(folder, preview=preview)
            # The card of this adapter tells all but the path.
            (place / CARD_FILE).write_text(adapter_card(self, PREVIEW_FILE if preview else None), encoding="utf-8")
            return push_folder(place, repo_id, **{"commit_message": "Push a LoRA adapter", **options})

    def shareable(self) -> LoraAdapter:
        """Return the adapter as it is published: without the place of its base model, if that is a path of this machine.

        `PeftModel.from_pretrained(model, …)`, which is given the base model, reads it as before; peft's `AutoPeftModel…`, which looks for
        the base by its name, finds none. The base model's fingerprint stays.
        """
        if hub_name(self.spec.base_model):
            return self
        metadata = {name: fact for name, fact in self.metadata.items() if name != "base"}
        return replace(self, spec=replace(self.spec, base_model=None), metadata=metadata)

    @classmethod
    def load(cls, name: str | Path, layout: ParamLayout | None = None, *, revision: str | None = None) -> LoraAdapter:
        """Read an adapter strictly: a folder, or a repository on the Hub, of which the adapter's own files alone are fetched.

        It holds `adapter_config.json` and `adapter_model.safetensors`, as saved by this package or by peft. Ranks and scales that
        differ between peft's modules are folded into one, and every ΔW stays what it is (see `cond_pdiff.plain_lora`).

        Args:
            name: the folder, or "owner/name" where there is no such folder.
            layout: if given, the tensors must fit it exactly.
            revision: branch, tag or commit of a repository.

        Raises:
            AdapterError: anything missing, extra, malformed or contradictory; the message names the file and the field, or says what is
                there instead.
            HubError: no such repository or revision, or no network and nothing in the cache.
        """
        spec, tensors, metadata = read_adapter(find_adapter(name, revision))
        if "layout" in metadata:
            ParamLayout.from_json(metadata.pop("layout")).validate(tensors)
        if layout is not None:
            layout.validate(tensors)
        return cls(spec, tensors, metadata)

    # --- models -------------------------------------------------------------------------------------------------

    def check_base(self, model: Any) -> None:
        """Raise `AdapterError` unless `model` (or a diffusers pipeline's denoiser) is this adapter's base; it is only read."""
        module = self._adapted_module(model)
        check_state(module, self.spec)
        check_shapes(self.spec, self.tensors, module)
        fingerprint = self.family.fingerprint if self.family else base_fingerprint
        if self.spec.base_fingerprint is not None and not same_base(self.spec.base_fingerprint, fingerprint(module, self.spec)):
            raise AdapterError(
                f"the model's weights are not those of {self.spec.base_model!r} that this adapter was made for "
                "(fingerprints differ); load that base model unchanged, in float32 or in the precision of its files"
            )

    def is_like(self, other: LoraAdapter) -> bool:
        """Return whether both have equal tensor names and shapes, specifications and, as far as they record it, base models."""
        prints = (self.spec.base_fingerprint, other.spec.base_fingerprint)
        one_base = None in prints or same_base(*map(str, prints))
        return one_base and (self.layout, self.spec) == (other.layout, other.spec)

    def _adapted_module(self, model: Any) -> nn.Module:
        return self.family.adapted_module(model) if self.family else adapted_module(model)

    def attach(self, model: Any, scale: float = 1.0, check: bool = True, positive_only: bool = False) -> Attachment:
        """Add scale · ΔW to the model's targeted linear layers, without touching their weights.

        Several adapters may be attached to one model; their updates add up. A head is the adapter's own at every strength: it
        replaces the model's, which in a base that was not trained for the task is random, so there is nothing to go back to.
        At scale 0 the adapter's head reads what the base model sees. A model has one head, so a second one is refused.

        It stays for all threads; attaching and detaching wait until no other thread is inside `attached` of this model.

        A model in which it would not act is refused: compiled, fused or quantised, its weights not in memory, or with an adapter of peft
        or diffusers on it. In its first run, the model raises `AdapterError` if it runs none of the adapted layers, and warns of some.

        Args:
            model: the base model (for sentence-transformers: `model[0].auto_model`), or a diffusers pipeline.
            scale: of ΔW. 0 is the base model (with the adapter's head, if it has one), 1 the adapter at full strength.
            check: verify the base model first (see `check_base`); switch off only where it has just been verified.
            positive_only: of a diffusers pipeline, attach to the positive side of classifier-free guidance alone: the negative pass
                is the base model's. `AdapterError` where the sides cannot be told apart (see `cond_pdiff.guidance`).

        Returns:
            An `Attachment`; call its `detach()` to get the base model back, bit for bit.
        """
        if check:
            self.check_base(model)
        module = self._adapted_module(model)
        return attach(self.spec, self.tensors, module, scale, positive_side(model, module) if positive_only else None)

    @contextlib.contextmanager
    def attached(self, model: Any, scale: float = 1.0, check: bool = True, positive_only: bool = False) -> Iterator[Any]:
        """Attach the adapter inside a block and detach it after that, also on errors: `with adapter.attached(model): …`.

        The thread has the model to itself inside the block: another one that comes to such a block of the same model, or runs the
        model through this package, waits. Code that calls a shared model itself takes `cond_pdiff.locks.lock_of(model)` for that.
        """
        if check:  # before others have to wait: it only reads
            self.check_base(model)
        with lock_of(self._adapted_module(model)):
            attachment = self.attach(model, scale, check=False, positive_only=positive_only)
            try:
                yield model
            finally:
                attachment.detach()

    # --- arithmetic ---------------------------------------------------------------------------------------------

    def scaled(self, strength: float) -> LoraAdapter:
        """Return the adapter with ΔW multiplied by `strength`, by way of its `lora_B`; itself where that is 1."""
        if strength == 1:
            return self
        tensors = {key: tensor * strength if ".lora_B." in key else tensor for key, tensor in self.tensors.items()}
        return replace(self, tensors=tensors)

    @classmethod
    def mean(
        cls, adapters: Sequence[LoraAdapter], weights: Sequence[float] | None = None, space: Literal["factors", "delta"] = "delta"
    ) -> LoraAdapter:
        """Return the adapter whose ΔW is the weighted mean of those of `adapters`.

        It keeps the metadata that are the same in all of them, but for the seed: no single seed makes it.

        Args:
            weights: of each, with the sum 1; default: equal ones.
            space: "delta" takes the mean of ΔW = B · A: exactly for modules in which all share `lora_A`, else by the best
                approximation of the same rank (truncated SVD). "factors" takes that of A and B separately, as averaging checkpoints
                does. Of heads it is always that of their tensors: their layers are linear in their weights.

        Raises:
            AdapterError: the adapters are of different layouts, specifications or dtypes.
        """
        first = adapters[0]
        dtypes = [{key: tensor.dtype for key, tensor in adapter.tensors.items()} for adapter in adapters]
        if not all(first.is_like(adapter) for adapter in adapters) or dtypes != dtypes[:1] * len(dtypes):
            raise AdapterError("only adapters of the same layout, rank, alpha and base model, in the same dtype, can be interpolated")
        if space not in ("factors", "delta"):
            raise AdapterError(f"space must be 'factors' or 'delta', got {space!r}")
        shares = weights or [1 / len(adapters)] * len(adapters)
        tensors = {key: weighted_sum([adapter.tensors[key] for adapter in adapters], shares) for key in first.tensors}
        for name in first.modules if space == "delta" else ():
            factors = [adapter.factors(name) for adapter in adapters]
            if not all(torch.equal(lora_a, factors[0][0]) for lora_a, _ in factors):
                found = weighted_product(factors, shares, first.spec.rank)
                keys = [f"{KEY_PREFIX}{name}.{factor}.weight" for factor in FACTORS]
                tensors |= {key: tensor.reshape(first.tensors[key].shape) for key, tensor in zip(keys, found, strict=True)}
        shared = dict(first.metadata)
        for other in (adapter.metadata for adapter in adapters):
            shared = {name: fact for name, fact in shared.items() if name != "seed" and name in other and other[name] == fact}
        return cls(first.spec, tensors, shared)

    def interpolate(self, other: LoraAdapter, weight: float, space: Literal["factors", "delta"] = "delta") -> LoraAdapter:
        """Return the adapter at `weight` on the way from this one (0) to `other` (1): the `mean` with weights 1 - `weight` and `weight`."""
        return self.mean([self, other], [1 - weight, weight], space)
