"""Experiment: what all reproductions work with: tasks, zoos, generators, and how an adapter is measured. Everything is made once."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from cond_pdiff.adapter import LoraAdapter
from cond_pdiff.conditions.task_prompt import TaskPrompt
from cond_pdiff.pipelines.pipeline_cond_pdiff import CondPDiffPipeline
from cond_pdiff.training.evaluate.baselines import multitask_adapter
from cond_pdiff.training.evaluate.similarity import ZooSpace
from cond_pdiff.training.finetuning.text_fine_tuning import TextFineTuning, task_loss
from cond_pdiff.training.reproduce.cells import Step
from cond_pdiff.training.reproduce.config import Settings
from cond_pdiff.training.stages.train import train
from cond_pdiff.training.tasks.metrics import measure, metric_names, predictions
from cond_pdiff.training.tasks.tasks import Row, Task, load_tasks, sample_rows
from cond_pdiff.training.zoo.collect import CollectWork, collected, one_of, optimise
from cond_pdiff.training.zoo.zoo import Zoo, soup

ROUTING_PROMPTS = 5
ROUTING_EXAMPLES = 4
BISECTIONS = 30


class Experiment:
    """The tasks and the base model of a recipe, and what was made of them below `out`.

    Args:
        tasks_folder: a task collection with the recipe's tasks.
        out: gets `zoos/` and `generators/`.

    Raises:
        TaskDataError: a task is missing.
    """

    def __init__(self, settings: Settings, tasks_folder: Path, out: Path) -> None:
        self.settings, self.config = settings, settings.reproduce
        self.tasks_folder, self.out = tasks_folder, out
        self.collect = settings.collect(self.config.table_zoos[0], self.config.ranks[0])
        self.tasks = {task.name: task for task in load_tasks(tasks_folder, self.collect.tasks)}
        self._rows: dict[tuple[str, int], list[Row]] = {}
        self._trained_on: TrainedZoo | None = None

    @cached_property
    def fine_tuning(self) -> TextFineTuning:
        """The base model, and how it is trained and asked."""
        return TextFineTuning(self.collect)

    # --- measuring ----------------------------------------------------------------------------------------------

    def rows(self, task: Task, limit: int = 0) -> list[Row]:
        """Return the rows of the test split, all or a fixed random choice; nothing is selected on them."""
        limit = limit or self.config.max_rows
        if (task.name, limit) not in self._rows:
            self._rows[task.name, limit] = task.test_rows(limit or None)
        return self._rows[task.name, limit]

    def labels(self, task: Task, limit: int = 0) -> torch.Tensor:
        """Return the labels of `rows`."""
        return torch.tensor([label for _, label in self.rows(task, limit)])

    def predict(self, task: Task, adapter: LoraAdapter | None, limit: int = 0) -> torch.Tensor:
        """Predict class indices or scores of `rows`, shape `(rows,)`; adapter None: by the base model."""
        return predictions(task, self.fine_tuning.outputs(adapter, task, [text for text, _ in self.rows(task, limit)]))

    def score(self, task: Task, predicted: torch.Tensor, limit: int = 0) -> dict[str, float]:
        """Return the task's metrics of predictions for `rows`."""
        return {name: round(measure(name, predicted, self.labels(task, limit)), 4) for name in metric_names(task)}

    def training_loss(self, task: Task, adapter: LoraAdapter) -> float:
        """Return the loss on a few training rows: what the best of several adapters is chosen by."""
        rows = sample_rows(task.rows("train"), self.config.selection_rows, f"{task.name}/selection")
        return float(task_loss(task, self.fine_tuning.outputs(adapter, task, [text for text, _ in rows]), [label for _, label in rows]))

    def full_fine_tuning(self, task: Task) -> dict[str, float]:
        """Return the metrics after all weights of the base model were trained like an adapter: same objective, data and steps."""
        experiment = Experiment(self.settings, self.tasks_folder, self.out)  # its own base model, which is changed here
        parameters = list(experiment.fine_tuning.model.requires_grad_(True).parameters())
        drawn = one_of(experiment.fine_tuning, [task], self.config.seed)
        optimise(experiment.fine_tuning, experiment.collect, parameters, drawn, experiment.collect.steps, self.config.full_learning_rate)
        return experiment.score(task, experiment.predict(task, None))

    # --- making -------------------------------------------------------------------------------------------------

    def zoo(self, name: str, rank: int) -> Zoo:
        """Return one of the recipe's zoos, at one rank; collected if need be."""
        return collected(self.settings.collect(name, rank), self.tasks_folder, self.out / zoo_path(name, rank))

    @property
    def zoos(self) -> list[tuple[str, int]]:
        """The names and ranks of all zoos that there can be."""
        ranks = dict.fromkeys((*self.config.ranks, self.config.figure_rank, self.settings.ablation.rank))
        return [(name, rank) for name in self.config.zoos for rank in ranks]

    def steps(self) -> dict[str, Step]:
        """Return how zoos are completed and generators trained, by path below the reproduction's folder."""
        return {path: step for name, rank in self.zoos for path, step in self._zoo_steps(name, rank).items()}

    def _zoo_steps(self, name: str, rank: int) -> dict[str, Step]:
        manifest = manifest_path(name, rank)
        return {
            manifest: Step(lambda: self.zoo(name, rank).write_manifest()),
            generator_path(name, rank): Step(lambda: self.with_generator(name, rank), (manifest,)),
        }

    def collecting(self, name: str, rank: int) -> CollectWork:
        """Return how one of the recipe's zoos is collected, run by run."""
        return CollectWork(self.settings.collect(name, rank), self.tasks_folder, self.out / zoo_path(name, rank))

    def with_generator(self, name: str, rank: int) -> TrainedZoo:
        """Return a zoo with its generator, trained if need be; only the last one is kept in memory."""
        if self._trained_on is None or (self._trained_on.name, self._trained_on.rank) != (name, rank):
            self._trained_on = None
            zoo, generator = self.zoo(name, rank), self.out / generator_path(name, rank)
            if not (generator / "model_index.json").exists():
                stages = {name: self.settings.recipe.get(name, {}) for name in ("autoencoder", "unet")}
                train(stages, zoo.folder, self.tasks_folder, generator.parent)
            self._trained_on = TrainedZoo(self, name, rank, zoo, CondPDiffPipeline.from_pretrained(generator))
        return self._trained_on


class TrainedZoo:
    """A zoo beside its generator."""

    def __init__(self, experiment: Experiment, name: str, rank: int, zoo: Zoo, pipe: CondPDiffPipeline) -> None:
        self.experiment, self.name, self.rank, self.pipe = experiment, name, rank, pipe
        pipe.set_progress_bar_config(disable=True)
        self.trained = {name: [adapter for run in zoo.runs(name) for adapter in run.adapters()] for name in zoo.task_names}
        self.soups = {name: soup(adapters) for name, adapters in self.trained.items()}
        self.multitask = multitask_adapter(zoo)
        self.space = ZooSpace(
            [adapter for adapters in self.trained.values() for adapter in adapters],
            [name for name, adapters in self.trained.items() for _ in adapters],
        )

    def prompt(self, task: Task) -> TaskPrompt:
        """Return what the task's adapters are generated from: a description and examples that the generator has not been trained with."""
        return task.prompt(f"reproduce/{self.experiment.config.seed}", self.experiment.config.selection_rows)

    def generate(self, prompt: TaskPrompt, count: int, offset: int = 0, **options: Any) -> list[LoraAdapter]:
        """Generate adapters from one prompt; the seed of the i-th depends on the settings' seed and `offset` + i."""
        config = self.experiment.config
        seeds = [torch.Generator().manual_seed(config.seed * 1_000_003 + offset + index) for index in range(count)]
        params = self.pipe(
            prompt,
            num_adapters=count,
            generator=seeds,
            num_inference_steps=config.num_inference_steps,
            guidance_scale=config.guidance_scale,
            output_type="params",
            **options,
        )
        return [self.pipe.codec.to_adapter(row) for row in params]

    def retrieved(self, task: Task) -> str:
        """Return the zoo's task whose condition is nearest to the task's prompt."""
        embedding = self.pipe.encode_condition(self.prompt(task), 1)[0][0]
        return self.pipe.condition_index.nearest(embedding.float(), 1)[0].task

    def routed(self, task: Task) -> list[bool]:
        """Tell for prompts with other examples whether the generated adapter is nearest, in ΔW, to an adapter of this task."""
        prompts = [task.prompt(f"routing/{index}", ROUTING_EXAMPLES) for index in range(ROUTING_PROMPTS)]
        adapters = [self.generate(prompt, 1, 1000 + index)[0] for index, prompt in enumerate(prompts)]
        return [self.space.tasks[index] == task.name for index, _ in self.space.nearest(adapters)]

    def params(self, adapters: Sequence[LoraAdapter]) -> torch.Tensor:
        """Return the modelled params of adapters, shape `(len(adapters), num_params)`."""
        return torch.stack([self.pipe.codec.to_params(adapter) for adapter in adapters])

    def with_noise(self, adapter: LoraAdapter, distance: float, seed: int) -> LoraAdapter:
        """Return the adapter plus isotropic Gaussian noise in params, as much as takes its ΔW this far away.

        Lengths in params say little of that where both factors are modelled: equal updates have many factors.
        """
        params, space = self.params([adapter])[0], ZooSpace([adapter], [self.name])
        noise = torch.randn(params.shape, generator=torch.Generator().manual_seed(seed))

        def noisy(size: float) -> LoraAdapter:
            return self.pipe.codec.to_adapter(params + size * noise / noise.norm())

        low, high = 0.0, float(params.norm())
        while float(space.distances([noisy(high)])) < distance:
            low, high = high, 2 * high
        for _ in range(BISECTIONS if distance else 0):
            middle = (low + high) / 2
            low, high = (middle, high) if float(space.distances([noisy(middle)])) < distance else (low, middle)
        return noisy(high if distance else 0.0)


def zoo_path(name: str, rank: int) -> str:
    """Return where one of the recipe's zoos is, below the reproduction's folder."""
    return f"zoos/{name}-{rank}"


def manifest_path(name: str, rank: int) -> str:
    """Return what is written when one of the recipe's zoos is complete, below the reproduction's folder."""
    return f"{zoo_path(name, rank)}/manifest.json"


def generator_path(name: str, rank: int) -> str:
    """Return where the generator of one of the recipe's zoos is, below the reproduction's folder."""
    return f"generators/{name}-{rank}/generator"


def spread(items: Sequence[Any], count: int) -> list[Any]:
    """Return at most `count` items, evenly spread over all, the first and the last among them."""
    if len(items) <= count:
        return list(items)
    return [items[round(index * (len(items) - 1) / max(1, count - 1))] for index in range(count)]


def rounded(values: torch.Tensor, digits: int = 4) -> Any:
    """Return a rounded tensor as JSON-ready lists."""
    return json.loads(json.dumps(values.double().tolist()), parse_float=lambda text: round(float(text), digits))


