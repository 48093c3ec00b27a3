"""What all evaluations share: a generator beside its zoo, task after task, resumable and in shards."""

from __future__ import annotations

import hashlib
import json
import statistics
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import Field
from pydantic.dataclasses import dataclass

from cond_pdiff.adapter import LoraAdapter
from cond_pdiff.defaults import DEFAULT_STEPS, EVALUATED_ROWS, EVALUATED_SAMPLES
from cond_pdiff.errors import TaskDataError
from cond_pdiff.models.condition_index import Neighbour
from cond_pdiff.pipelines.pipeline_cond_pdiff import MAX_ADAPTERS, CondPDiffPipeline
from cond_pdiff.pipelines.pipeline_output import CondPDiffPipelineOutput
from cond_pdiff.training.config import STRICT, Count, GuidanceScale, InferenceSteps, Seed
from cond_pdiff.training.evaluate.baselines import multitask_adapter
from cond_pdiff.training.evaluate.similarity import ZooSpace
from cond_pdiff.training.zoo.zoo import Zoo, soup

RESAMPLED = 10_000
"""The number of resampled sets of tasks that an interval of a mean is of."""


@dataclass(frozen=True, config=STRICT)
class EvaluateConfig:
    """The settings of `evaluate`: how much is measured."""

    samples: Annotated[int, Field(ge=1, le=MAX_ADAPTERS)] = Field(default=EVALUATED_SAMPLES, description="adapters generated a task")
    max_rows: Count = Field(
        default=EVALUATED_ROWS, description="rows of the test split a task, a fixed random choice; for styles, held-out pictures"
    )
    num_inference_steps: InferenceSteps = Field(default=DEFAULT_STEPS, description="denoising steps")
    guidance_scale: GuidanceScale | None = Field(default=None, description="classifier-free guidance; none: the generator's own")
    seed: Seed = Field(default=0, description="of generated adapters")


class ZooEvaluator(ABC):
    """The evaluation of a generator beside the zoo that it was trained on, or beside a zoo of a part of its tasks.

    Args:
        generator: bundled name, folder, or Hub repository.
        zoo: complete. Retrieval, task-identification accuracy (routing) and novelty know its tasks only.
        out: the evaluation's folder.

    Raises:
        TaskDataError: the zoo is not complete; or the generator was not trained on its tasks, or was trained on its unseen ones.
    """

    def __init__(self, generator: str | Path, zoo: Zoo, config: EvaluateConfig, out: Path) -> None:
        self.zoo, self.config, self.out = zoo, config, out
        zoo.check_complete()
        self.pipe = CondPDiffPipeline.from_pretrained(generator)
        self.pipe.set_progress_bar_config(disable=True)
        known = self.pipe.condition_index.names
        if not set(zoo.task_names) <= set(known) or set(zoo.unseen_names) & set(known):
            raise TaskDataError(f"the generator was trained on other tasks than those of {zoo.folder}; give the zoo that it was made from")
        self.trained = {name: [run.adapter() for run in zoo.runs(name)] for name in (*zoo.task_names, *zoo.unseen_names)}
        self._soups: dict[str, LoraAdapter] = {}
        self.multitask = multitask_adapter(zoo)
        self.space = ZooSpace(
            [adapter for name in zoo.task_names for adapter in self.trained[name]],
            [name for name in zoo.task_names for _ in self.trained[name]],
        )
        guidance = self.pipe.unet.config.guidance_scale if config.guidance_scale is None else config.guidance_scale
        self.settings: dict[str, Any] = {
            **asdict(config),
            "guidance_scale": guidance,
            "zoo_tasks": len(zoo.task_names),
            "zoo_runs": len(self.space.tasks),
            "multitask": multitask.facts["sha256"] if (multitask := zoo.multitask()) else None,
            "generator": weights_sha256(self.pipe),
            "generator_tasks": len(known),
        }

    @abstractmethod
    def load_tasks(self, folder: Any) -> Sequence[Any]:
        """Load the zoo's tasks and the unseen ones."""

    @abstractmethod
    def condition(self, task: Any) -> Any:
        """Return what the task's adapters are generated from."""

    @abstractmethod
    def other_conditions(self, task: Any) -> Sequence[Any]:
        """Return held-out conditions of the same task, for task-identification accuracy (routing)."""

    @abstractmethod
    def compare(self, task: Any, output: CondPDiffPipelineOutput, retrieved: str) -> dict[str, Any]:
        """Compare the generated adapters with all baselines; `retrieved` is the trained task that is nearest to the condition."""

    def measure(self, task: Any) -> dict[str, Any]:
        """Measure all numbers of one task."""
        condition = self.condition(task)
        output = self.generate(condition, self.config.samples, 0)
        nearest = self._retrieve(condition)
        seen = task.name in self.zoo.task_names
        return {
            "task": task.name,
            "group": task.group,
            "licence": task.licence,
            "seen": seen,
            **self.compare(task, output, nearest.task),
            "retrieved": nearest.task,
            "similarity": nearest.similarity,
            "in_distribution": output.report.in_distribution,
            "routed": self._routed(task) if seen else None,
            "seconds_per_adapter": self._seconds(condition),
            "settings": self.settings,
        }

    def _retrieve(self, condition: Any) -> Neighbour:
        """Return the zoo's trained task that is nearest to a condition."""
        index, (embedding,) = self.pipe.condition_index, self.pipe.condition_encoder.encode([condition])[0]
        return next(near for near in index.nearest(embedding, len(index.names)) if near.task in self.zoo.task_names)

    def _routed(self, task: Any) -> list[bool]:
        """Tell for each held-out condition whether the adapter is nearest, in ΔW, to an adapter of this task."""
        conditions = self.other_conditions(task)
        params = [self.generate(condition, 1, 1000 + index, output_type="params")[0] for index, condition in enumerate(conditions)]
        adapters = [self.pipe.codec.to_adapter(row) for row in params]
        return [self.space.tasks[index] == task.name for index, _ in self.space.nearest(adapters)]

    def soup(self, name: str) -> LoraAdapter:
        """Return the mean of a task's trained adapters."""
        if name not in self._soups:
            self._soups[name] = soup(self.trained[name])
        return self._soups[name]

    def generate(self, condition: Any, count: int, offset: int, **options: Any) -> Any:
        """Run the pipeline for one condition; the seed of the i-th adapter depends on the settings' seed and `offset` + i."""
        generators = [torch.Generator().manual_seed(self.config.seed * 1_000_003 + offset + index) for index in range(count)]
        return self.pipe(
            condition,
            num_adapters=count,
            generator=generators,
            num_inference_steps=self.config.num_inference_steps,
            guidance_scale=self.config.guidance_scale,
            **options,
        )

    def _seconds(self, condition: Any) -> float:
        """Return the seconds from condition to adapter, warm, one adapter."""
        started = time.perf_counter()
        self.generate(condition, 1, 2000)
        return round(time.perf_counter() - started, 3)


def mean(values: Sequence[float | None]) -> float | None:
    """Return the mean of the values that are there."""
    known = [value for value in values if value is not None]
    return round(statistics.fmean(known), 4) if known else None


def mean_interval(values: Sequence[float | None], level: float = 0.95) -> list[float] | None:
    """Return where the mean over tasks may lie: the percentile bootstrap over the values that are there, the same for the same values.

    Args:
        values: one a task, or of each task the difference between two columns.
        level: share of the resampled means that lie inside.

    Returns:
        Lower and upper end; None for fewer than two values, which tell nothing of their spread.
    """
    known = torch.tensor([value for value in values if value is not None], dtype=torch.float64)
    if len(known) < 2:
        return None
    rng = torch.Generator().manual_seed(0)
    means = known[torch.randint(len(known), (RESAMPLED, len(known)), generator=rng)].mean(1)
    low, high = means.quantile(torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=torch.float64)).tolist()
    return [round(low, 4), round(high, 4)]


def difference(pairs: Sequence[tuple[float | None, float | None]]) -> dict[str, Any] | None:
    """Return the first minus the second, where both are there: `mean`, its `standard_error` and `interval` (None of a single pair)."""
    found = [first - second for first, second in pairs if first is not None and second is not None]
    if not found:
        return None
    error = round(statistics.stdev(found) / len(found) ** 0.5, 4) if len(found) > 1 else None
    return {"mean": mean(found), "standard_error": error, "interval": mean_interval(found)}


def weights_sha256(pipe: CondPDiffPipeline) -> str:
    """Return the sha256 of a generator's weights and settings that decide what it makes; what it predicts of it (`gain_model`) does not."""
    digest = hashlib.sha256()
    for name, module in sorted(pipe.components.items()):
        settings = {key: value for key, value in module.config.items() if not key.startswith("_") and key != "gain_model"}
        digest.update(f"{name} {json.dumps(settings, sort_keys=True, default=str)}".encode())
        if isinstance(module, torch.nn.Module):
            for key, value in sorted(module.state_dict().items()):
                digest.update(f"{name}.{key}".encode())
                digest.update(value.contiguous().numpy().tobytes())
    return digest.hexdigest()
