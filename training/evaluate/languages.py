"""Generators of adapters for language models: exact match in all columns, the generated adapters beside all baselines.

Rows are of the test split where a task has one, else of the validation split; nothing is selected on them. The prompt is the same in
every column but one, in which examples stand before it. The best of the generated adapters is the one that the pipeline chooses on eight
training rows, the examples of its condition (never the base model in its place). The zero-shot one is made from the description and the
label names alone, and so is that of another task, drawn at random, which shows whether the description matters. Answers are computed in
the precision that the zoo was trained in, for all adapters of a task side by side in one batch. All of this is deterministic: the base
model against itself differs by nothing.
"""

from __future__ import annotations

import random
import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from cond_pdiff.adapter import LoraAdapter
from cond_pdiff.attach import attached_to_groups
from cond_pdiff.conditions.task_prompt import TaskPrompt
from cond_pdiff.lora import LoraSpec
from cond_pdiff.pipelines.pipeline_output import CondPDiffPipelineOutput
from cond_pdiff.training.evaluate.baselines import ZooBaselines
from cond_pdiff.training.evaluate.measure import EvaluateConfig, ZooEvaluator, mean
from cond_pdiff.training.precision import mixed_precision
from cond_pdiff.training.tasks.answers import accuracy, predict
from cond_pdiff.training.tasks.language import Exchange, LanguageTask, load_language_tasks
from cond_pdiff.training.zoo.zoo import Zoo

SELECTION_ROWS = 8
SHOTS = 3
ROUTING_PROMPTS = 5
ROUTING_EXAMPLES = 4
ZERO_SHOT_OFFSET = 3000
"""The seed of the zero-shot adapter, counted from the settings' seed."""


class LanguageEvaluator(ZooEvaluator):
    """The evaluation of a generator of adapters for language models; see `ZooEvaluator`."""

    def __init__(self, generator: str | Path, zoo: Zoo, config: EvaluateConfig, out: Path) -> None:
        super().__init__(generator, zoo, config, out)
        self.baselines = ZooBaselines(self.pipe, zoo, self.trained)
        self.settings["ridge"] = self.baselines.regression.ridge
        self.settings["precision"] = self.precision = str(zoo.facts["collect"]["precision"])

    def load_tasks(self, folder: str | Path) -> list[LanguageTask]:
        """Load the zoo's tasks and the unseen ones."""
        self.tasks = load_language_tasks(folder, [*self.zoo.task_names, *self.zoo.unseen_names])
        return self.tasks

    def condition(self, task: LanguageTask) -> TaskPrompt:
        """Return a prompt with the rows that the best adapter is chosen on."""
        return task.prompt(f"evaluate/{self.config.seed}", SELECTION_ROWS)

    def other_conditions(self, task: LanguageTask) -> list[TaskPrompt]:
        """Return five prompts with other examples."""
        return [task.prompt(f"routing/{index}", ROUTING_EXAMPLES) for index in range(ROUTING_PROMPTS)]

    def compare(self, task: LanguageTask, output: CondPDiffPipelineOutput, retrieved: str) -> dict[str, Any]:
        """Measure exact match by column, and novelty."""
        exchanges = task.test_exchanges(self.config.max_rows)
        condition = self.condition(task)
        started = time.perf_counter()
        zero_shot = self.generate(task.prompt("zero-shot", 0), 1, ZERO_SHOT_OFFSET)
        with tempfile.TemporaryDirectory() as folder:
            zero_shot.save_adapter(Path(folder) / "adapter")
        seconds = time.perf_counter() - started
        adapters = {
            **{f"trained {run}": adapter for run, adapter in enumerate(self.trained[task.name])},
            "zoo_mean": self.baselines.mean,
            "kernel_regression": self.baselines.regressed(condition),
            "shuffled": self.generate(self._another(task).prompt("zero-shot", 0), 1, ZERO_SHOT_OFFSET).adapters[0],
            "generated_zero_shot": zero_shot.adapters[0],
            "generated_best": output.adapters[output.chosen],
            **({"multitask": self.multitask} if self.multitask else {}),
            **({"soup": self.soup(task.name)} if len(self.trained[task.name]) > 1 else {}),
            **({"retrieval": self.soup(retrieved)} if retrieved != task.name else {}),
        }
        found = self._accuracies(task, adapters, exchanges)
        trained = [found.pop(f"trained {run}") for run in range(len(self.trained[task.name]))]
        columns: dict[str, float | None] = {
            "multitask": None,
            "soup": None,
            **found,
            "base": self._accuracy(task, exchanges),
            "in_context": self._accuracy(task, exchanges, self._shots(task)),
            "trained": round(statistics.fmean(trained), 4),
        }
        if retrieved == task.name:
            columns["retrieval"] = trained[0] if len(trained) == 1 else columns["soup"]
        return {
            "split": task.reported_split,
            "rows": len(exchanges),
            "exact_match": columns,
            "novelty": mean([distance for _, distance in self.space.nearest(output.adapters)]),
            "seconds_to_saved": round(seconds, 3),
        }

    def _accuracy(self, task: LanguageTask, exchanges: Sequence[Exchange], shots: Sequence[Exchange] = ()) -> float:
        """Return the base model's share of right answers."""
        base = self.pipe.base_model()
        with mixed_precision(self.precision, base.model.device):
            predicted = predict(base, task, exchanges, self.pipe.template.config.max_length, shots)
        return round(accuracy(predicted, exchanges), 4)

    def _accuracies(
        self, task: LanguageTask, adapters: Mapping[str, LoraAdapter], exchanges: Sequence[Exchange]
    ) -> dict[str, float]:
        """Return the share of right answers under each adapter; those of one specification are attached side by side."""
        base, length = self.pipe.base_model(), self.pipe.template.config.max_length
        by_spec: dict[LoraSpec, list[str]] = {}
        for name, adapter in adapters.items():
            by_spec.setdefault(adapter.spec, []).append(name)
        found: dict[str, float] = {}
        for spec, names in by_spec.items():
            stacked = {key: torch.stack([adapters[name].tensors[key].float() for name in names]) for key in adapters[names[0]].tensors}
            with attached_to_groups(base.model, spec, stacked), mixed_precision(self.precision, base.model.device):
                predicted = predict(base, task, exchanges, length, groups=len(names))
            rows = len(exchanges)
            for place, name in enumerate(names):
                found[name] = round(accuracy(predicted[place * rows : (place + 1) * rows], exchanges), 4)
        return found

    def _another(self, task: LanguageTask) -> LanguageTask:
        """Return a task at random, always the same one, whose description is not this task's."""
        others = sorted((other for other in self.tasks if other.description != task.description), key=lambda other: other.name)
        return random.Random(f"{task.name}/shuffled").choice(others)

    def _shots(self, task: LanguageTask) -> list[Exchange]:
        """Return the first of the condition's examples as the model is shown them in context."""
        shown = task.prompt(f"evaluate/{self.config.seed}", SHOTS).examples
        answers = dict(zip(task.instruction.labels, task.instruction.answers, strict=True))
        return [Exchange(text, (answers.get(answer, answer),)) for text, answer in shown]

    def _seconds(self, condition: TaskPrompt) -> float:
        """Return the seconds from the description alone: to choose by examples takes the base model's time."""
        return super()._seconds(replace(condition, examples=()))
