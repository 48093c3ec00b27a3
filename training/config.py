"""Training settings as data: a recipe is a JSON file with one section a stage; unknown or misspelt entries are refused."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from cond_pdiff.errors import TrainingError
from cond_pdiff.hub import MINILM
from cond_pdiff.sampling import DEFAULT_STEPS

RECIPES_FOLDER = Path(__file__).parent / "recipes"
SECTIONS = (
    *("name", "about", "variants", "collect", "autoencoder", "unet", "tune"),
    *("image_autoencoder", "transformer", "scene_classifier", "samples"),
    *("reproduce", "ablation", "quick"),
)

PREDICTION_TYPES = ("epsilon", "v_prediction", "sample")
"""What a diffusers scheduler may have its network predict."""


@dataclass(frozen=True)
class CollectConfig:
    """How adapters are fine-tuned into a zoo."""

    tasks: tuple[str, ...] = ()                     # tasks that the generator is trained on; none named: all but the unseen
    unseen: tuple[str, ...] = ()                    # tasks kept out; one run each, for comparison
    kind: str = "text"                              # of tuning: "text" (class prototypes), "head" (a classification head) or "style"
    base: dict[str, Any] = field(default_factory=MINILM.to_json)  # backbone reference
    rank: int = 4                                   # r of ΔW = alpha / r · B · A
    alpha: float = 16.0
    target_modules: tuple[str, ...] = ("query", "key", "value", "attention.output.dense")
    modules_to_save: tuple[str, ...] = ()           # the heads, trained whole: full names, such as "classifier"
    fan_in_fan_out: bool = False                    # the targets' weights lie as (in, out): GPT-2's
    train_lora_a: bool = False                      # of the runs. True: the paper's way; False: one frozen A for the whole zoo
    runs: int = 3                                   # runs a task (one of a recoloured style), differing in data, order and rate
    steps: int = 100                                # optimiser steps a run
    batch_size: int = 16                            # texts or pictures a step
    max_length: int = 48                            # tokens a text or caption
    max_pictures: int = 256                         # training pictures of a style
    time_shift: float = 0.0                         # for styles on a flow: see `TransformerConfig`; colours are decided in much noise
    learning_rates: tuple[float, ...] = (4e-3, 3e-3, 5e-3)  # of run 0, 1, 2, 0, …
    precision: str = "no"                           # "bf16": autocast, about half the time on a CPU that has it
    warmup: float = 0.1                             # share of the steps
    weight_decay: float = 0.0                       # AdamW's, on all that is trained
    lora_dropout: float = 0.0                       # share of an adapted module's inputs that its update does not see in training
    subset: float = 0.8                             # share of the training rows that a run sees
    last_checkpoints: int = 1                       # adapters kept of a run: the last one, and earlier ones …
    checkpoint_every: int = 5                       # … so many steps apart
    multitask_steps: int = 1500                     # steps of the multi-task baseline, which trains both factors; 0: none
    multitask_learning_rate: float = 0.0            # of the baseline; 0: see `multitask_rate`
    from_multitask: bool = False                    # True: all runs start from the baseline's factors
    metric_rows: int = 200                          # rows of the reported split (or test pictures) for the manifest's metrics
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.learning_rates:
            raise TrainingError("collect: name at least one learning rate")
        if self.precision not in ("no", "bf16"):
            raise TrainingError(f"collect: precision must be 'no' or 'bf16', got {self.precision!r}")
        if self.kind not in ("text", "head", "style"):
            raise TrainingError(f"collect: kind must be 'text', 'head' or 'style', got {self.kind!r}")
        if (self.kind == "head") != bool(self.modules_to_save):
            raise TrainingError(f"collect: modules_to_save names the heads of kind 'head', got {self.modules_to_save!r} for {self.kind!r}")
        if not 0 <= self.lora_dropout < 1 or self.weight_decay < 0:
            raise TrainingError(
                f"collect: lora_dropout must be in [0, 1) and weight_decay not negative, got {self.lora_dropout} and {self.weight_decay}"
            )
        if self.from_multitask and not self.multitask_steps:
            raise TrainingError("collect: from_multitask needs multitask_steps")
        if self.last_checkpoints < 1 or self.checkpoint_every < 1 or (self.last_checkpoints - 1) * self.checkpoint_every >= self.steps:
            raise TrainingError(
                f"collect: a run of {self.steps} steps has no {self.last_checkpoints} checkpoints {self.checkpoint_every} steps apart"
            )

    @property
    def multitask_rate(self) -> float:
        """The baseline's learning rate.

        Not given, it is a quarter of the first of `learning_rates`, which fits a frozen `lora_A`, or that where runs train both factors.
        """
        return self.multitask_learning_rate or self.learning_rates[0] * (1.0 if self.train_lora_a else 0.25)

    def record(self) -> dict[str, Any]:
        """What a zoo keeps of these settings, beside its tasks and base.

        Words that came after the first zoos are left out where they say nothing, so that older zoos can be continued.
        """
        later = ("modules_to_save", "fan_in_fan_out", "weight_decay", "lora_dropout")
        kept = {name: value for name, value in dataclasses.asdict(self).items() if name not in ("tasks", "unseen", "base")}
        return {name: value for name, value in kept.items() if value or name not in later}


@dataclass(frozen=True)
class FitConfig:
    """How one stage is trained by the loop."""

    steps: int = 2000
    batch_size: int = 32
    learning_rate: float = 1e-3     # peak; cosine to zero after the warm-up
    warmup_steps: int = 100
    weight_decay: float = 0.0
    ema_decay: float = 0.995        # of the weights that are kept
    max_grad_norm: float = 1.0
    precision: str = "no"           # "bf16" or "fp16": autocast, where the device is faster with it
    checkpoint_every: int = 200     # steps; a killed run goes on from the last checkpoint
    log_every: int = 20             # steps a line of metrics.jsonl
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "checkpoint_every", "log_every"):
            if isinstance(getattr(self, name), int) and getattr(self, name) < 1:  # `parse` tells what has another type
                raise TrainingError(f"fit, {name}: expected at least 1, got {getattr(self, name)}")


@dataclass(frozen=True)
class AutoencoderConfig:
    """The autoencoder stage (paper, section 3.2 and appendix B)."""

    model: dict[str, Any] = field(default_factory=dict)     # ParamAutoencoder's arguments, without num_params
    fit: FitConfig = FitConfig()
    normalizer: str = "task"        # ParamNormalizer's mode
    input_noise: float = 0.001      # standard deviation, in units of normalised params
    latent_noise: float = 0.1       # standard deviation, in units of the batch's latents (equation 6b)


@dataclass(frozen=True)
class UNetConfig:
    """The diffusion stage (paper, section 3.3 and appendix B)."""

    model: dict[str, Any] = field(default_factory=dict)     # ParamUNet1D's arguments, without sizes
    fit: FitConfig = FitConfig()
    condition_encoder: dict[str, Any] = field(default_factory=lambda: {"type": "SentenceConditionEncoder"})  # and its arguments
    prediction_type: str = "v_prediction"
    num_train_timesteps: int = 1000
    beta_start: float = 1e-4
    beta_end: float = 0.02
    beta_schedule: str = "linear"
    condition_dropout: float = 0.1  # share of samples trained without a condition, for classifier-free guidance
    condition_noise: float = 0.02   # standard deviation added to condition embeddings
    variants_per_task: int = 48     # of each task's condition: prompts with other examples, crops of style pictures
    latent_jitter: float = 0.0      # standard deviation added to training latents (unit variance)
    noise_draws: int = 1            # noise levels at which a step trains each sample; its condition is embedded once for all of them
    mixing: float = 0.0             # share of samples that are mixtures of two tasks, condition and latents alike
    mixing_beyond: float = 0.0      # how far mixtures go past either task, in units of the way between them

    def __post_init__(self) -> None:
        if self.prediction_type not in PREDICTION_TYPES:
            raise TrainingError(f"unet, prediction_type: expected one of {PREDICTION_TYPES}, got {self.prediction_type!r}")


@dataclass(frozen=True)
class TuneConfig:
    """The third stage: task loss. A step's batch is of episodes."""

    fit: FitConfig = FitConfig()
    decoder: bool = False           # is the autoencoder's decoder trained too? It says which adapters there can be
    examples: int = 32              # of an episode, all its classes together
    most_labels: int = 8            # classes of an episode
    whole_tasks: float = 0.6        # share of episodes with as many classes as their task has (up to `most_labels`)
    shown: float = 0.5              # share of an episode's examples that the condition holds; the loss is on the others
    without_examples: float = 0.25  # share of conditions with description and label names only
    max_length: int = 48            # tokens a text
    num_inference_steps: int = DEFAULT_STEPS  # denoising steps, all with gradients: as many as the adapters will be made with

    def __post_init__(self) -> None:
        if self.most_labels < 2 or self.examples < 4 or self.num_inference_steps < 1:
            raise TrainingError("tune: an episode needs two labels and four examples at least, and a denoising step")


Config = TypeVar("Config")
Network = TypeVar("Network")


def read_recipe(name: str | Path) -> dict[str, Any]:
    """A recipe by name (one of the shipped ones) or by path, as a dict of sections.

    Its section `variants` names entries that replace some of its own: `paper-language-half+roberta+rank4` is the recipe with two of
    its variants, one after the other.
    """
    path, variants = Path(name), []
    if "+" in path.name and not path.is_file():
        stem, *variants = path.name.split("+")
        path = path.with_name(stem or "+")
    if not path.suffix:
        path = RECIPES_FOLDER / f"{path}.json"
    try:
        recipe = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        known = sorted(entry.stem for entry in RECIPES_FOLDER.glob("*.json"))
        raise TrainingError(f"no recipe {str(name)!r}; there are {known}, or give the path of a JSON file") from error
    except ValueError as error:
        raise TrainingError(f"{path} is not valid JSON: {error}") from error
    _check_sections(recipe, f"{path}")
    known = recipe.pop("variants", {})
    if not isinstance(known, dict):
        raise TrainingError(f"{path}: variants must be a JSON object")
    for variant in variants:
        if variant not in known:
            raise TrainingError(f"{path} has no variant {variant!r}; there are {sorted(known)}")
        _check_sections(known[variant], f"{path}, variant {variant!r}")
        for section, entries in known[variant].items():
            if not isinstance(entries, dict) or not isinstance(recipe.get(section, {}), dict):
                raise TrainingError(f"{path}, variant {variant!r}: {section} must be a JSON object, to replace entries of another")
            recipe[section] = {**recipe.get(section, {}), **entries}
    return recipe


def _check_sections(recipe: object, where: str) -> None:
    if not isinstance(recipe, dict):
        raise TrainingError(f"{where} must hold a JSON object of sections")
    unknown = sorted(set(recipe) - set(SECTIONS))
    if unknown:
        raise TrainingError(f"{where}: unknown section {unknown[0]!r}; known are {list(SECTIONS)}")


def parse(config_class: type[Config], section: Mapping[str, Any], where: str) -> Config:
    """A config dataclass from a recipe's section; `TrainingError` names unknown, missing or mistyped entries."""
    if not isinstance(section, Mapping):
        raise TrainingError(f"{where} must be a JSON object, got {section!r:.80}")
    known = {entry.name: entry for entry in dataclasses.fields(config_class)}  # type: ignore[arg-type]
    unknown = sorted(set(section) - set(known))
    if unknown:
        raise TrainingError(f"{where}: unknown entry {unknown[0]!r}; known are {sorted(known)}")
    values: dict[str, Any] = {name: tuple(value) if isinstance(value, list) else value for name, value in section.items()}
    if known.get("fit") and "fit" in values:
        values["fit"] = parse(FitConfig, values["fit"], f"{where}, fit")
    try:
        config = config_class(**values)
    except TypeError as error:
        raise TrainingError(f"{where}: {error}") from error
    for name, entry in known.items():
        _check_type(getattr(config, name), str(entry.type), f"{where}: {name}")
    return config


def build(network: Callable[..., Network], where: str, /, *arguments: Any, **settings: Any) -> Network:
    """`network(*arguments, **settings)`; `TrainingError` if the recipe's settings name an argument that it does not have."""
    try:
        return network(*arguments, **settings)
    except TypeError as error:
        raise TrainingError(f"{where}: {error}") from error


def _check_type(value: object, declared: str, what: str) -> None:
    expected: dict[str, tuple[type, ...]] = {"int": (int,), "float": (int, float), "str": (str,), "bool": (bool,)}
    expected |= {"tuple": (tuple,), "dict": (dict,)}
    allowed = expected.get(declared.partition("[")[0])
    if allowed and (not isinstance(value, allowed) or (isinstance(value, bool) and declared != "bool")):
        raise TrainingError(f"{what} must be {declared.replace('tuple', 'a list: ').replace('dict', 'an object: ')}, got {value!r}")
