"""Generators of text adapters: accuracy in all columns, the generated adapters beside all baselines.

Rows are of the test split where a task has one, else of the validation split; nothing is selected on them. The best of the
generated adapters is chosen on at most 32 training rows, which are also the examples of the prompt. Class prototypes are of label
names alone, in every column and for that choice.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from cond_pdiff.adapter import LoraAdapter
from cond_pdiff.classifier import PrototypeClassifier
from cond_pdiff.conditions.task_prompt import TaskPrompt
from cond_pdiff.errors import TaskDataError
from cond_pdiff.few_shot import ExampleScore
from cond_pdiff.pipelines.pipeline_output import CondPDiffPipelineOutput
from cond_pdiff.training.evaluate.baselines import ZooBaselines
from cond_pdiff.training.evaluate.measure import EvaluateConfig, ZooEvaluator, mean
from cond_pdiff.training.evaluate.similarity import common_errors
from cond_pdiff.training.tasks.tasks import Task, load_tasks
from cond_pdiff.training.zoo.zoo import Zoo

SELECTION_ROWS = 32
ROUTING_PROMPTS = 5
ROUTING_EXAMPLES = 4


class TextEvaluator(ZooEvaluator):
    """The evaluation of a generator of text adapters; see `ZooEvaluator`."""

    def __init__(self, generator: str | Path, zoo: Zoo, config: EvaluateConfig, out: Path) -> None:
        super().__init__(generator, zoo, config, out)
        self.baselines = ZooBaselines(self.pipe, zoo, self.trained)
        self.settings["ridge"] = self.baselines.regression.ridge

    def load_tasks(self, folder: str | Path) -> list[Task]:
        """Load the zoo's tasks and the unseen ones."""
        tasks = load_tasks(folder, [*self.zoo.task_names, *self.zoo.unseen_names])
        if scored := [task.name for task in tasks if task.label_range is not None]:
            raise TaskDataError(f"{scored[0]} is a regression task, which has no accuracy; `cond-pdiff reproduce` measures such tasks")
        return tasks

    def condition(self, task: Task) -> TaskPrompt:
        """Return a prompt with the rows that the best adapter is chosen on."""
        return task.prompt(f"evaluate/{self.config.seed}", SELECTION_ROWS)

    def other_conditions(self, task: Task) -> list[TaskPrompt]:
        """Return five prompts with other examples."""
        return [task.prompt(f"routing/{index}", ROUTING_EXAMPLES) for index in range(ROUTING_PROMPTS)]

    def compare(self, task: Task, output: CondPDiffPipelineOutput, retrieved: str) -> dict[str, Any]:
        """Measure accuracy by column, novelty, and how many different predictions the samples make."""
        rows = task.test_rows(self.config.max_rows)
        texts, targets = [text for text, _ in rows], torch.tensor([label for _, label in rows])
        max_length = self.pipe.template.config.max_length
        classifier = PrototypeClassifier(self.pipe.base_model(), task.labels, self.trained[task.name][0], max_length)

        def predict(adapter: LoraAdapter | None) -> torch.Tensor:
            return classifier.with_adapter(adapter).logits(texts).argmax(1)

        def accuracy(predicted: torch.Tensor) -> float:
            return round(float((predicted == targets).float().mean()), 4)

        generated = [predict(adapter) for adapter in output.adapters]
        trained = [predict(adapter) for adapter in self.trained[task.name]]
        souped = predict(self.soup(task.name))
        columns: dict[str, float | None] = {
            "base": accuracy(predict(None)),
            "trained": round(statistics.fmean(map(accuracy, trained)), 4),
            "soup": accuracy(souped) if len(trained) > 1 else None,
            "multitask": accuracy(predict(self.multitask)) if self.multitask else None,
            "zoo_mean": accuracy(predict(self.baselines.mean)),
            "kernel_regression": accuracy(predict(self.baselines.regressed(self.condition(task)))),
            "retrieval": accuracy(souped if retrieved == task.name else predict(self.soup(retrieved))),
            "generated_mean": round(statistics.fmean(map(accuracy, generated)), 4),
            "generated_best": accuracy(generated[self._best(task, output.adapters)]),
        }
        return {
            "dataset": task.dataset,
            "split": task.test_split,
            "rows": len(rows),
            "accuracy": columns,
            "novelty": self._novelty(task, output.adapters, generated, trained, targets, texts, classifier),
            "distinct": len({tuple(predicted.tolist()) for predicted in generated}),
        }

    def _best(self, task: Task, adapters: Sequence[LoraAdapter]) -> int:
        """Return the index of the adapter that does best on the prompt's examples with the prototypes of all columns."""
        max_length, examples = self.pipe.template.config.max_length, self.condition(task).examples
        classifier = PrototypeClassifier(self.pipe.base_model(), task.labels, adapters[0], max_length, examples)
        losses = [ExampleScore.measure(classifier.with_adapter(adapter), with_examples=False).loss for adapter in adapters]
        return losses.index(min(losses))

    def _novelty(
        self,
        task: Task,
        adapters: Sequence[LoraAdapter],
        generated: Sequence[torch.Tensor],
        trained: Sequence[torch.Tensor],
        targets: torch.Tensor,
        texts: Sequence[Any],
        classifier: PrototypeClassifier,
    ) -> dict[str, float | None]:
        """Measure the distance to the nearest zoo adapter, and shared errors with it; beside them, the same between two trained runs."""
        nearest = self.space.nearest(adapters)
        own = [index for index, name in enumerate(self.space.tasks) if name == task.name]
        predictions = dict(zip(own, trained, strict=False))
        for index in {index for index, _ in nearest} - set(own):
            predictions[index] = classifier.with_adapter(self.space.adapters[index]).logits(texts).argmax(1)
        shared = [common_errors(mine, predictions[index], targets) for mine, (index, _) in zip(generated, nearest, strict=True)]
        between = [common_errors(first, second, targets) for position, first in enumerate(trained) for second in trained[:position]]
        return {
            "distance": mean([distance for _, distance in nearest]),
            "common_errors": mean(shared),
            "common_errors_between_runs": mean(between),
        }
