"""Training settings as data: a recipe is a JSON file with one section a stage, which is checked when it is read.

Every section is a frozen dataclass that pydantic checks, also where one is made or changed in code: entries that are unknown, of
another type, out of their range or not finite are refused.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Annotated, Any, Literal, TypeVar

from pydantic import AfterValidator, AliasChoices, ConfigDict, Field, TypeAdapter, ValidationError, WrapValidator
from pydantic.dataclasses import dataclass

from cond_pdiff.defaults import DEFAULT_STEPS
from cond_pdiff.errors import CondPDiffError, HubError, TrainingError
from cond_pdiff.families.family import family_named
from cond_pdiff.hub import MINILM, Backbone
from cond_pdiff.lora import MAX_RANK
from cond_pdiff.models.denoisers import DEFAULT_DENOISER
from cond_pdiff.normalization import Mode

STRICT = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)
"""The pydantic settings of every section: nothing is converted, and nothing is ignored."""


def _as_given(value: Any, check: Callable[[Any], Any]) -> Any:
    check(value)
    return value  # 8 stays 8, which is not written as 8.0 into zoos and adapters


def _finite(settings: dict[str, Any]) -> dict[str, Any]:
    try:
        json.dumps(settings, allow_nan=False)
    except ValueError as error:
        raise ValueError("its numbers must be finite") from error
    return settings


def _typed(denoiser: dict[str, Any]) -> dict[str, Any]:
    return {"type": DEFAULT_DENOISER, **denoiser}


def _reference(base: dict[str, Any]) -> dict[str, Any]:
    try:
        Backbone.from_json(base)
    except HubError as error:
        raise ValueError(str(error)) from error
    return base


def _known_family(name: str) -> str:
    try:
        family_named(name)
    except CondPDiffError as error:
        raise ValueError(str(error)) from error
    return name


PAIRS = {
    "text": ("task-prompt", "sentence-encoder"),
    "head": ("task-prompt", "sequence-classifier"),
    "style": ("style-image", "text-to-image"),
}
"""The `kind` of recipes and zoos of 0.1.0 → its kind of condition and family of base models."""


FORMER_WORDS = {"cond_drop_prob": "condition_dropout", "conditions_per_task": "variants_per_task"}
"""The entries of the section `unet` → what recipes of 0.1.0 call them."""


def modern_collect(section: Mapping[str, Any]) -> dict[str, Any]:
    """Return a recipe's or zoo's section `collect` with a `family` in the place of the `kind` that those of 0.1.0 have, or leave out."""
    kind = section.get("kind", "text")
    if not isinstance(kind, str) or kind not in PAIRS or "family" in section:
        return dict(section)
    return {**{name: value for name, value in section.items() if name != "kind"}, "family": PAIRS[kind][1]}


Count = Annotated[int, Field(ge=1)]
Amount = Annotated[int, Field(ge=0)]
Seed = Annotated[int, Field(ge=0, lt=2**32)]
Rank = Annotated[int, Field(ge=1, le=MAX_RANK)]
InferenceSteps = Annotated[int, Field(ge=1, le=1000)]
AS_GIVEN = WrapValidator(_as_given)
Number = Annotated[float, AS_GIVEN]
Positive = Annotated[float, Field(gt=0), AS_GIVEN]
NotNegative = Annotated[float, Field(ge=0), AS_GIVEN]
Share = Annotated[float, Field(ge=0, le=1), AS_GIVEN]
GuidanceScale = Annotated[float, Field(ge=0, le=100), AS_GIVEN]
Names = tuple[str, ...]
JsonObject = Annotated[dict[str, Any], AfterValidator(_finite)]
"""The arguments of something else, which checks them when it is made."""


@dataclass(frozen=True, config=STRICT)
class CollectConfig:
    """How adapters are fine-tuned into a zoo."""

    tasks: Names = Field(default=(), description="tasks that the generator is trained on; none named: all but the unseen")
    unseen: Names = Field(default=(), description="tasks kept out; one run each, for comparison")
    family: Annotated[str, AfterValidator(_known_family)] = Field(
        default="sentence-encoder",
        description="of the base model: 'sentence-encoder', 'sequence-classifier', 'causal-lm', 'text-to-image' (PixArt), "
        "'stable-diffusion', 'stable-diffusion-3', 'flux', 'diffusion-transformer' (diffusers' others), or another of yours",
    )
    base: Annotated[dict[str, str | None], AfterValidator(_reference)] = Field(
        default_factory=MINILM.to_json, description="the base model: repo_id, revision, sha256"
    )
    rank: Rank = Field(default=4, description="r of ΔW = alpha / r · B · A")
    alpha: Positive = Field(default=16.0, description="alpha of ΔW = alpha / r · B · A")
    target_modules: Annotated[Names, Field(min_length=1)] = Field(
        default=("query", "key", "value", "attention.output.dense"), description="suffixes of the adapted modules' names"
    )
    modules_to_save: Names = Field(default=(), description="the heads, trained whole: full names, such as 'classifier'")
    fan_in_fan_out: bool = Field(default=False, description="the targets' weights lie as (in, out): GPT-2's")
    train_lora_a: bool = Field(default=False, description="of the runs; true: the paper's way; false: one frozen A for the whole zoo")
    runs: Count = Field(default=3, description="runs a task (one of a recoloured style), differing in data, order and rate")
    steps: Count = Field(default=100, description="optimiser steps a run")
    batch_size: Count = Field(default=16, description="texts or pictures a step")
    max_length: Count = Field(default=48, description="tokens a text or caption; of a language model, a prompt with its answer")
    max_pictures: Count = Field(default=256, description="training pictures of a style")
    time_shift: Number = Field(
        default=0.0, description="for styles on a flow: see the section 'transformer'; colours are decided in much noise"
    )
    learning_rates: Annotated[tuple[Positive, ...], Field(min_length=1)] = Field(
        default=(4e-3, 3e-3, 5e-3), description="of run 0, 1, 2, 0, …"
    )
    precision: Literal["no", "bf16"] = Field(
        default="no", description="'bf16': autocast, about half the time on a CPU that has it"
    )
    half_precision_base: bool = Field(
        default=False, description="for styles: the base model's frozen weights are bfloat16, half the memory; with precision 'bf16'"
    )
    gradient_checkpointing: bool = Field(
        default=False, description="for styles: activations are computed again on the way back, a third more time for far less memory"
    )
    warmup: Share = Field(default=0.1, description="share of the steps")
    weight_decay: NotNegative = Field(default=0.0, description="AdamW's, on all that is trained")
    lora_dropout: Annotated[float, Field(ge=0, lt=1), AS_GIVEN] = Field(
        default=0.0, description="share of an adapted module's inputs that its update does not see in training"
    )
    subset: Annotated[float, Field(gt=0, le=1), AS_GIVEN] = Field(default=0.8, description="share of the training rows that a run sees")
    last_checkpoints: Count = Field(default=1, description="adapters kept of a run: the last one, and earlier ones …")
    checkpoint_every: Count = Field(default=5, description="… so many steps apart")
    multitask_steps: Amount = Field(default=1500, description="steps of the multi-task baseline, which trains both factors; 0: none")
    multitask_learning_rate: NotNegative = Field(default=0.0, description="of the baseline; 0: see `multitask_rate`")
    from_multitask: bool = Field(default=False, description="true: all runs start from the baseline's factors")
    metric_rows: Count = Field(default=200, description="rows of the test split (or test pictures) for the manifest's metrics")
    seed: Seed = Field(default=0, description="of everything that is drawn")

    def __post_init__(self) -> None:
        if family_named(self.family).brings_head != bool(self.modules_to_save):
            raise ValueError(f"modules_to_save names the heads of a family that has some, got {self.modules_to_save!r} for {self.family!r}")
        if self.half_precision_base and self.precision != "bf16":
            raise ValueError("half_precision_base needs the precision 'bf16', as what is trained stays float32")
        if self.from_multitask and not self.multitask_steps:
            raise ValueError("from_multitask needs multitask_steps")
        if (self.last_checkpoints - 1) * self.checkpoint_every >= self.steps:
            raise ValueError(
                f"a run of {self.steps} steps has no {self.last_checkpoints} checkpoints {self.checkpoint_every} steps apart"
            )

    @property
    def multitask_rate(self) -> float:
        """The baseline's learning rate.

        Not given, it is a quarter of the first of `learning_rates`, which fits a frozen `lora_A`, or that where runs train both factors.
        """
        return self.multitask_learning_rate or self.learning_rates[0] * (1.0 if self.train_lora_a else 0.25)

    def record(self) -> dict[str, Any]:
        """Return what a zoo keeps of these settings, beside its tasks and base.

        Words that came after the first zoos are left out where they say nothing, so that older zoos can be continued.
        """
        later = ("modules_to_save", "fan_in_fan_out", "weight_decay", "lora_dropout", "half_precision_base", "gradient_checkpointing")
        kept = {name: value for name, value in asdict(self).items() if name not in ("tasks", "unseen", "base")}
        return {name: value for name, value in kept.items() if value or name not in later}


@dataclass(frozen=True, config=STRICT)
class FitConfig:
    """How one stage is trained by the loop."""

    steps: Count = Field(default=2000, description="optimiser steps")
    batch_size: Count = Field(default=32, description="samples a step")
    learning_rate: Positive = Field(default=1e-3, description="peak; cosine to zero after the warm-up")
    warmup_steps: Amount = Field(default=100, description="steps in which the learning rate rises")
    weight_decay: NotNegative = Field(default=0.0, description="AdamW's")
    ema_decay: Annotated[float, Field(ge=0, lt=1), AS_GIVEN] = Field(default=0.995, description="of the weights that are kept")
    max_grad_norm: Positive = Field(default=1.0, description="longer gradients are shortened to it")
    precision: Literal["no", "bf16", "fp16"] = Field(
        default="no", description="'bf16' or 'fp16': autocast, where the device is faster with it"
    )
    checkpoint_every: Count = Field(default=200, description="steps; a killed run goes on from the last checkpoint")
    log_every: Count = Field(default=20, description="steps a line of metrics.jsonl")
    seed: Seed = Field(default=0, description="of everything that is drawn")
    sharded: bool = Field(
        default=False,
        description="true: weights, gradients, AdamW's moments and averages are divided among the processes (FSDP); one process has all",
    )

    def __post_init__(self) -> None:
        if self.sharded and self.precision == "fp16":
            raise ValueError("sharded training has the precision 'bf16' or 'no'; fp16's gradient scaler has not been tried with it")


@dataclass(frozen=True, config=STRICT)
class AutoencoderConfig:
    """The autoencoder stage (paper, section 3.2 and appendix B)."""

    model: JsonObject = Field(default_factory=dict, description="its type (default: ParamAutoencoder), and its arguments, without sizes")
    fit: FitConfig = Field(default=FitConfig(), description="how it is trained")
    normalizer: Mode = Field(default="task", description="ParamNormalizer's mode")
    input_noise: NotNegative = Field(default=0.001, description="standard deviation, in units of normalised params")
    latent_noise: NotNegative = Field(
        default=0.1, description="standard deviation, in units of the batch's latents (equation 6b)"
    )


@dataclass(frozen=True, config=STRICT)
class UNetConfig:
    """The diffusion stage (paper, section 3.3 and appendix B)."""

    denoiser: Annotated[JsonObject, AfterValidator(_typed)] = Field(
        default_factory=lambda: {"type": DEFAULT_DENOISER},
        validation_alias=AliasChoices("denoiser", "model"),  # "model" in recipes of 0.1.0
        description="its type (default: ParamUNet1D), and its arguments, without sizes and guidance",
    )
    fit: FitConfig = Field(default=FitConfig(), description="how it is trained")
    condition_encoder: JsonObject = Field(
        default_factory=lambda: {"type": "SentenceConditionEncoder"}, description="its type, and its arguments"
    )
    prediction_type: Literal["epsilon", "v_prediction", "sample"] = Field(
        default="v_prediction", description="what the network predicts (diffusers' names)"
    )
    num_train_timesteps: Count = Field(default=1000, description="noise levels")
    beta_start: Annotated[float, Field(gt=0, lt=1), AS_GIVEN] = Field(default=1e-4, description="variance that the first noise level adds")
    beta_end: Annotated[float, Field(gt=0, lt=1), AS_GIVEN] = Field(default=0.02, description="variance that the last noise level adds")
    beta_schedule: Literal["linear", "scaled_linear", "squaredcos_cap_v2"] = Field(
        default="linear", description="the way from one to the other (diffusers' names)"
    )
    cond_drop_prob: Share = Field(
        default=0.1,
        validation_alias=AliasChoices("cond_drop_prob", "condition_dropout"),
        description="share of samples trained without a condition, for classifier-free guidance",
    )
    condition_noise: NotNegative = Field(default=0.02, description="standard deviation added to condition embeddings")
    conditions_per_task: Count = Field(
        default=48,
        validation_alias=AliasChoices("conditions_per_task", "variants_per_task"),
        description="ways to ask for each task: prompts with other examples, crops of style pictures",
    )
    latent_jitter: NotNegative = Field(default=0.0, description="standard deviation added to training latents (unit variance)")
    noise_draws: Count = Field(
        default=1, description="noise levels at which a step trains each sample; its condition is embedded once for all of them"
    )
    mixing: Share = Field(default=0.0, description="share of samples that are mixtures of two tasks, condition and latents alike")
    mixing_beyond: NotNegative = Field(
        default=0.0, description="how far mixtures go past either task, in units of the way between them"
    )

    def record(self) -> dict[str, Any]:
        """Return what a run keeps of these settings, to be continued with the same ones."""
        return as_recorded(recorded(self))


@dataclass(frozen=True, config=STRICT)
class TuneConfig:
    """The third stage: task loss. A step's batch is of episodes."""

    fit: FitConfig = Field(default=FitConfig(), description="how it is trained")
    decoder: bool = Field(
        default=False, description="is the autoencoder's decoder trained too? It says which adapters there can be"
    )
    examples: Annotated[int, Field(ge=4)] = Field(default=32, description="of an episode, all its classes together")
    most_labels: Annotated[int, Field(ge=2)] = Field(default=8, description="classes of an episode; all, for a language model")
    whole_tasks: Share = Field(
        default=0.6, description="share of episodes with as many classes as their task has (up to `most_labels`)"
    )
    shown: Share = Field(
        default=0.5, description="share of an episode's examples that the condition holds; the loss is on the others"
    )
    without_examples: Share = Field(
        default=0.25, description="share of conditions with description and label names only"
    )
    refine_steps: Annotated[int, Field(ge=0)] = Field(
        default=0, description="steps that an adapter takes on the examples of its condition before it is judged, as `refine` takes them"
    )
    max_length: Count = Field(default=48, description="tokens a text; of a language model, a prompt with its answer")
    num_inference_steps: InferenceSteps = Field(
        default=DEFAULT_STEPS, description="denoising steps, all with gradients: as many as the adapters will be made with"
    )

    def __post_init__(self) -> None:
        if self.fit.sharded:
            raise ValueError("this stage trains parts of a generator whose other parts work beside them; it is not sharded")


Config = TypeVar("Config")
Network = TypeVar("Network")


def parse(config_class: type[Config], section: Mapping[str, Any], where: str) -> Config:
    """Check a section of a recipe; `TrainingError` names the section, the entry, what was expected of it and what came."""
    if config_class is CollectConfig and isinstance(section, Mapping):
        section = modern_collect(section)
    try:
        return TypeAdapter(config_class).validate_json(json.dumps(section))
    except ValidationError as error:
        raise TrainingError(_explained(config_class, error, where)) from error


def _explained(config_class: Any, error: ValidationError, where: str) -> str:
    """Return the first of pydantic's complaints, in one line."""
    first = error.errors(include_url=False)[0]
    path = [f"entry {part}" if isinstance(part, int) else part for part in first["loc"]]
    place = ", ".join([where, *path[:-1]])
    if first["type"] == "unexpected_keyword_argument":
        for name in path[:-1]:
            config_class = config_class.__pydantic_fields__[name].annotation
        return f"{place}: unknown entry {path[-1]!r}; known are {sorted(config_class.__pydantic_fields__)}"
    what = f"{place}: {path[-1]}" if path else where
    if first["type"] == "missing":
        return f"{what} is missing"
    if first["type"] == "value_error":
        return f"{what}: {first['ctx']['error']}"
    return f"{what} must {first['msg'].partition(' should ')[2]}, got {first['input']!r:.80}"


LATER_WORDS = ("sharded", "refine_steps")


def recorded(config: Any) -> dict[str, Any]:
    """Return what a run keeps of a section.

    Words that came after the first runs are left out where they say nothing, so that older runs can be continued.
    """
    return asdict(config, dict_factory=lambda words: {name: value for name, value in words if value or name not in LATER_WORDS})


def as_recorded(unet: Mapping[str, Any]) -> dict[str, Any]:
    """Return a section `unet` in words of 0.1.0, in which runs record it: they can be continued, whichever words the recipe uses now."""
    section = {FORMER_WORDS.get(name, name): value for name, value in unet.items()}
    if "denoiser" in section:
        settings = _typed(section.pop("denoiser"))
        if settings["type"] == DEFAULT_DENOISER:
            del settings["type"]
        section["model"] = settings
    return section


def build_typed(
    classes: Mapping[str, Callable[..., Network]], where: str, settings: Mapping[str, Any], /, *arguments: Any, **more: Any
) -> Network:
    """`build` the class that the settings name as `type`, with their other entries, too; raise `TrainingError` if there is none."""
    others = dict(settings)
    name = others.pop("type", None)
    if not isinstance(name, str) or name not in classes:
        raise TrainingError(f"{where}: type must be one of {sorted(classes)}, got {name!r}")
    if given := sorted(others.keys() & more.keys()):
        raise TrainingError(f"{where}: {given[0]} follows from the rest of the recipe; leave it out")
    return build(classes[name], where, *arguments, **others, **more)


def build(network: Callable[..., Network], where: str, /, *arguments: Any, **settings: Any) -> Network:
    """Return `network(*arguments, **settings)`; raise `TrainingError` if it has no such argument, or cannot be made with such a value."""
    try:
        return network(*arguments, **settings)
    except (TypeError, ValueError, ArithmeticError, RuntimeError) as error:
        raise TrainingError(f"{where}: {error}") from error
