"""Family: what each family of base models has to know, and the register of families."""

from __future__ import annotations

import importlib
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

from torch import nn

from cond_pdiff.errors import AdapterError, CondPDiffError
from cond_pdiff.hub import Backbone
from cond_pdiff.lora import LoraSpec, adapted_module, base_fingerprint

if TYPE_CHECKING:
    from cond_pdiff.adapter import LoraAdapter
    from cond_pdiff.conditions.condition import Condition
    from cond_pdiff.few_shot import Choice, FewShotRequest
    from cond_pdiff.mixed_batch import AdapterPool


class Family(ABC):
    """A family of base models: how one is loaded, what is adapted in it, how adapters for it are trained, judged and used.

    A family is a subclass that `register_family` is given; zoos name it, and adapters and generators say it in their `LoraSpec.family`,
    unless they are known as its own without that (see `claims`).
    """

    name: ClassVar[str]
    """The family's name in recipes and zoos, such as "sentence-encoder"."""
    adapters: ClassVar[str] = ""
    """The word in front of "adapters" for its own (see `Condition.adapters`); empty: what they are asked for by says it."""
    brings_head: ClassVar[bool] = False
    """Whether adapters bring whole modules (`modules_to_save`) beside their updates."""
    has_prototypes: ClassVar[bool] = False
    """Whether a `PrototypeClassifier` works with it: then gains can be predicted (`calibrate`)."""
    cuts_texts: ClassVar[bool] = True
    """Whether its adapters are trained here, on texts cut at a number of tokens, which their cards tell."""
    writes: ClassVar[bool] = False
    """Whether `ask` has it answer texts: `load` gives a `CausalBackbone`."""
    paints: ClassVar[bool] = False
    """Whether `preview` makes pictures with it."""
    file_forms: ClassVar[Mapping[str, tuple[str, bool]]] = {}
    """The tools that read its adapters as one file ("diffusers", "kohya", "comfyui") → what their keys of the denoiser begin with (with an
    underscore at its end: names have underscores for dots), and whether their layers are FLUX's own, fused ones."""
    weights_file: ClassVar[str] = "model.safetensors"
    """The file in the base model's folder that holds the adapted weights."""
    adapter_card: ClassVar[str] = "adapter.md"
    """The template of its adapters' cards."""
    generator_card: ClassVar[str | None] = None
    """The template of an evaluated generator's card, where there is an evaluation."""
    merged_card: ClassVar[tuple[str, str]] = ("feature-extraction", "transformers")
    """The Hub's pipeline tag and library of a base model with an adapter merged in."""
    recipe: ClassVar[str] = ""
    """The shipped recipe that collects adapters for it."""
    fewest_judged: ClassVar[int] = 1
    """The number of candidates from which on `choose` compares them."""

    # --- the base model -----------------------------------------------------------------------------------------

    def claims(self, spec: LoraSpec, modules: Sequence[str]) -> bool:
        """Return whether adapters with this specification and these modules are of this family, though they do not name it.

        Shipped families alone are asked: their first adapters do not name them.
        """
        return False

    def is_certain(self, adapter: LoraAdapter) -> bool:
        """Return whether an adapter says itself that it is of this family, so that its card may say how it is used with it.

        What others trained is claimed by names of modules, or for want of a task type: its base may be one of another kind.
        """
        return adapter.spec.family is not None or isinstance(adapter.metadata.get("base"), Mapping)

    @abstractmethod
    def load(self, base: Backbone, spec: LoraSpec, num_labels: int | None = None) -> Any:
        """Load a frozen base model as it is used, float32, on the CPU; it has `to(device)`.

        Args:
            num_labels: of the head that adapters bring; None: they bring none.

        Raises:
            HubError: not to be had, or not such a model.
        """

    @abstractmethod
    def load_adapted(self, base: Backbone) -> nn.Module:
        """Load the module alone that adapters are attached to, in the precision of its files."""

    def adapted_module(self, model: Any) -> nn.Module:
        """Return the module of a base model, as people pass it, that adapters are attached to."""
        return adapted_module(model)

    def fingerprint(self, model: nn.Module, spec: LoraSpec) -> str:
        """Return the fingerprint that tells a base model from others of its shape."""
        return base_fingerprint(model, spec)

    # --- using adapters -----------------------------------------------------------------------------------------

    def choose(self, base: Any, adapters: Sequence[LoraAdapter], request: FewShotRequest) -> Choice | None:
        """Choose the best of at least `fewest_judged` candidates, or the base model, by labelled examples; None: they tell nothing.

        Args:
            base: from `load`.
        """
        return None

    def pool(self, base: Any) -> AdapterPool[Any, Any]:
        """Return an empty pool of adapters that answer in mixed batches; see `cond_pdiff.mixed_batch`.

        Args:
            base: from `load`.

        Raises:
            AdapterError: adapters of this family do not answer texts, or bring a head.
        """
        raise AdapterError(f"adapters for a {self.name} cannot share a batch: pools are for sentence encoders and causal language models")

    def refine(
        self, base: Any, adapter: LoraAdapter, condition: Condition, steps: int, seed: int = 0, seconds: float | None = None
    ) -> LoraAdapter:
        """Go on from an adapter with a few training steps on what a condition shows.

        Args:
            base: from `load`; nobody else's adapter is on it meanwhile.
            condition: one whose `refined_on` says on what.
            steps: of the optimiser, from 1.
            seed: of all that is drawn.
            seconds: no step is begun after so many; for conditions that are `refined_in_time`.

        Returns:
            The adapter after these steps; its metadata say `refined`.

        Raises:
            CondPDiffError: adapters of this family are not refined here, or `steps` is out of its range.
            AdapterError: the base cannot be trained on in the state in which it is.
        """
        raise CondPDiffError(f"adapters for a {self.name} are not refined here; collect takes more steps, on more data")

    # --- training them ------------------------------------------------------------------------------------------

    @abstractmethod
    def load_tasks(self, folder: str | Path, names: Sequence[str] | None) -> Sequence[Any]:
        """Load the named tasks of a collection, or all: `cond_pdiff.training.tasks.task.ZooTask`."""

    @abstractmethod
    def fine_tuning(self, config: Any, tasks: Sequence[Any]) -> Any:
        """Return how adapters are fine-tuned on tasks: a `cond_pdiff.training.finetuning.fine_tuning.FineTuning` for a `CollectConfig`."""

    def tuning(self) -> Any:
        """Return the class of `TuneStage` that trains a generator on the loss of its tasks; None: not yet."""
        return None

    def evaluation(self) -> tuple[Any, Any] | None:
        """Return how a generator is measured and how that is told: a class of `ZooEvaluator` and an `EvaluationTable`; None: not yet."""
        return None


OTHER_BASE = "other-base"
"""The name of the family of base models that no code here loads; it claims nothing, adapters record it."""

BUILT_IN = {
    "sequence-classifier": "cond_pdiff.families.sequence_classifier",
    "causal-lm": "cond_pdiff.families.causal_lm",
    "text-to-image": "cond_pdiff.families.text_to_image",
    "stable-diffusion": "cond_pdiff.families.diffusers_denoiser",
    "flux": "cond_pdiff.families.diffusers_denoiser",
    "stable-diffusion-3": "cond_pdiff.families.diffusers_denoiser",
    "diffusion-transformer": "cond_pdiff.families.diffusers_denoiser",
    "sentence-encoder": "cond_pdiff.families.sentence_encoder",
    OTHER_BASE: "cond_pdiff.families.any_base",
}
"""The modules of the shipped families; imported when families are asked for, in the order in which they claim adapters."""

FAMILIES: dict[str, Family] = {}
"""The families that `register_family` was given, by name."""

Kind = TypeVar("Kind", bound=type[Family])


def register_family(kind: Kind) -> Kind:
    """Make a family known by its name; a class decorator.

    Raises:
        CondPDiffError: another class has its name; adapters that are there would be of another family.
    """
    shipped = BUILT_IN.get(kind.name, kind.__module__)  # perhaps not imported yet
    if type(FAMILIES.get(kind.name, kind())) is not kind or kind.__module__ != shipped:
        raise CondPDiffError(f"there is a family {kind.name!r} already; give that of {kind.__module__} another name")
    FAMILIES[kind.name] = kind()
    return kind


def families() -> dict[str, Family]:
    """Return all families that are known, by name."""
    for module in BUILT_IN.values():
        importlib.import_module(module)
    return FAMILIES


def family_named(name: str) -> Family:
    """Return a family by its name.

    Raises:
        CondPDiffError: there is none of that name.
    """
    known = families()
    if name not in known:
        raise CondPDiffError(f"there is no family of base models {name!r}; known are {', '.join(sorted(known))}")
    return known[name]


def family_of(spec: LoraSpec, modules: Iterable[str]) -> Family | None:
    """Return the family that adapters are for, by what they record or by what they look like; None if that says nothing.

    Args:
        modules: names of the adapted modules.

    Raises:
        CondPDiffError: they name a family that is not known.
    """
    if spec.family is not None:
        return family_named(spec.family)
    known, names = families(), list(modules)
    return next((known[name] for name in BUILT_IN if known[name].claims(spec, names)), None)
