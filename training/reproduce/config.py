"""What a reproduction measures, as data: the sections `reproduce`, `ablation` and `quick` of a recipe."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import pydantic.dataclasses
from pydantic import AliasChoices, Field

from cond_pdiff.defaults import DEFAULT_STEPS
from cond_pdiff.errors import TrainingError
from cond_pdiff.training.config import (
    STRICT,
    Amount,
    AutoencoderConfig,
    CollectConfig,
    Count,
    GuidanceScale,
    InferenceSteps,
    JsonObject,
    Names,
    NotNegative,
    Positive,
    Rank,
    Seed,
    UNetConfig,
    parse,
)
from cond_pdiff.training.recipe import read_recipe


@pydantic.dataclasses.dataclass(frozen=True, config=STRICT)
class ReproduceConfig:
    """What is measured, and on how much."""

    ranks: Annotated[tuple[Rank, ...], Field(min_length=1)] = Field(
        default=(4,), description="of table 1, in the order in which they are measured"
    )
    alphas: dict[str, Positive] = Field(default_factory=lambda: {"4": 16.0}, description="r → alpha")
    zoos: dict[str, JsonObject] = Field(
        default_factory=lambda: dict[str, dict[str, Any]](runs={}),
        validation_alias=AliasChoices("zoos", "ways"),  # here and below, the second name is that of 0.1.0
        description="of collecting: name → other entries of `collect`",
    )
    table_zoos: Annotated[Names, Field(min_length=1)] = Field(
        default=("runs",), validation_alias=AliasChoices("table_zoos", "table_ways"), description="those of table 1"
    )
    full_learning_rate: Positive = Field(default=1e-4, description="of fine-tuning all weights")
    max_rows: Amount = Field(default=0, description="rows of the test split a task; 0: all")
    samples: Count = Field(default=20, description="adapters generated a task (paper: 20)")
    reported_samples: Count = Field(
        default=3, description="of which so many, and the best, are measured on the test split"
    )
    selection_rows: Count = Field(default=32, description="training rows that the best is chosen on")
    num_inference_steps: InferenceSteps = Field(default=DEFAULT_STEPS, description="denoising steps")
    guidance_scale: GuidanceScale | None = Field(default=None, description="classifier-free guidance; none: the generator's own")
    seed: Seed = Field(default=0, description="of generated adapters and of what is chosen at random")
    figure_rank: Rank = Field(default=4, description="of the figures' zoos")
    distribution_zoo: str = Field(
        default="checkpoints",
        validation_alias=AliasChoices("distribution_zoo", "distribution_way"),
        description="of the zoo of figures 3(e) and 4(a) …",
    )
    distribution_tasks: Names = Field(default=(), description="… and their tasks")
    performance_zoo: str = Field(
        default="runs",
        validation_alias=AliasChoices("performance_zoo", "performance_way"),
        description="of figure 3(f), errors and noise …",
    )
    performance_tasks: Names = Field(default=(), description="… and their tasks")
    noise_sizes: tuple[NotNegative, ...] = Field(
        default=(0.0, 1.0), description="of isotropic noise, in units of the update"
    )


@pydantic.dataclasses.dataclass(frozen=True, config=STRICT)
class AblationConfig:
    """Table 3: each ablation trains the generator anew and is measured on a part of the tasks."""

    tasks: Names = Field(default=(), description="those that are measured")
    rank: Rank = Field(default=1, description="of the zoos")
    seeds: Count = Field(default=3, description="trainings an ablation")
    samples: Count = Field(default=3, description="generated a task and seed")
    max_rows: Amount = Field(default=400, description="rows of the test split a task; 0: all")
    autoencoder: JsonObject = Field(default_factory=dict, description="changes of the stage, of all ablations")
    unet: JsonObject = Field(default_factory=dict, description="changes of the stage, of all ablations")
    ablations: tuple[JsonObject, ...] = Field(
        default=(),
        validation_alias=AliasChoices("ablations", "variants"),
        description="see `cond_pdiff.training.reproduce.ablations.Ablation`",
    )


@dataclass(frozen=True)
class Settings:
    """A recipe for `reproduce`, checked.

    Args:
        recipe: the whole of it, as JSON, after `quick` was worked in.
        quick: the small form of it: few steps and rows, for a look and for tests.
    """

    recipe: dict[str, Any]
    quick: bool
    reproduce: ReproduceConfig
    ablation: AblationConfig

    @classmethod
    def read(cls, name: str | Path, quick: bool) -> Settings:
        """Read a recipe by name or path; `TrainingError` says what is wrong with it."""
        recipe = read_quick(name, quick)
        settings = cls(
            recipe,
            quick,
            parse(ReproduceConfig, recipe["reproduce"], "reproduce"),
            parse(AblationConfig, recipe.get("ablation", {}), "ablation"),
        )
        settings.check()
        return settings

    def collect(self, zoo: str, rank: int) -> CollectConfig:
        """Return how adapters of a rank are collected for one of the zoos; raise `TrainingError` if there is no such zoo."""
        if zoo not in self.reproduce.zoos:
            raise TrainingError(f"there is no zoo {zoo!r}; there are {sorted(self.reproduce.zoos)}")
        lora = {"rank": rank, "alpha": self.reproduce.alphas[str(rank)]}
        return parse(CollectConfig, {**self.recipe.get("collect", {}), **lora, **self.reproduce.zoos[zoo]}, f"reproduce, zoos, {zoo}")

    def autoencoder(self, *changes: Mapping[str, Any]) -> AutoencoderConfig:
        """Return the settings of the autoencoder stage, with changes worked in."""
        return parse(AutoencoderConfig, merge(self.recipe.get("autoencoder", {}), *changes), "autoencoder")

    def unet(self, *changes: Mapping[str, Any]) -> UNetConfig:
        """Return the settings of the diffusion stage, with changes worked in."""
        return parse(UNetConfig, merge(self.recipe.get("unet", {}), *changes), "unet")

    def check(self) -> None:
        """Refuse what would only fail after hours."""
        config, tasks = self.reproduce, self.recipe.get("collect", {}).get("tasks", [])
        asked = (*config.distribution_tasks, *config.performance_tasks, *self.ablation.tasks)
        if strange := [name for name in asked if name not in tasks]:
            raise TrainingError(f"{strange[0]!r} is to be measured, but it is not among the tasks of `collect`: {tasks}")
        if not 1 <= config.reported_samples <= config.samples:
            raise TrainingError(f"reproduce: reported_samples must be from 1 to samples ({config.samples}), got {config.reported_samples}")
        for rank in (*config.ranks, config.figure_rank, self.ablation.rank):
            if str(rank) not in config.alphas:
                raise TrainingError(f"reproduce: alphas must name every rank; {rank} is missing of {sorted(config.alphas)}")
        for zoo in (*config.zoos, *config.table_zoos, config.distribution_zoo, config.performance_zoo):
            for rank in config.ranks:
                self.collect(zoo, rank)
        self.autoencoder(), self.unet()


def read_quick(name: str | Path, quick: bool) -> dict[str, Any]:
    """Read a recipe, in its small form if that is wanted; `TrainingError` if it is not one to reproduce something with."""
    recipe = read_recipe(name)
    overrides = recipe.pop("quick", {})
    if "reproduce" not in recipe:
        raise TrainingError(f"the recipe {str(name)!r} has no section 'reproduce'; 'reproduce-minilm' and 'pixart-mini-styles' have one")
    return merge(recipe, overrides) if quick else recipe


def merge(base: Mapping[str, Any], *changes: Mapping[str, Any]) -> dict[str, Any]:
    """Return `base` with entries replaced, objects inside objects entry by entry."""
    merged = dict(base)
    for change in changes:
        for name, value in change.items():
            inner = isinstance(value, Mapping) and isinstance(merged.get(name), Mapping)
            merged[name] = merge(merged[name], value) if inner else value
    return merged
