"""Generators of adapters for language models: exact match in all columns, the generated adapters beside all baselines.

Rows are of the test split where a task has one, else of the validation split; nothing is selected on them. The prompt is the same in
every column but one, in which examples stand before it. The best of the generated adapters is chosen on eight training rows, which are
also the examples of its condition; the zero-shot one is made from the description and the label names alone.
"""

from __future__ import annotations

import contextlib
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cond_pdiff.adapter import LoraAdapter
from cond_pdiff.conditions.instruction import Instruction
from cond_pdiff.conditions.task_prompt import TaskPrompt
from cond_pdiff.few_shot import FewShotRequest, choose_by_answers
from cond_pdiff.pipelines.pipeline_output import CondPDiffPipelineOutput
from cond_pdiff.training.evaluate.baselines import ZooBaselines
from cond_pdiff.training.evaluate.measure import EvaluateConfig, ZooEvaluator, mean
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

    def load_tasks(self, folder: str | Path) -> list[LanguageTask]:
        """Load the zoo's tasks and the unseen ones."""
        return load_language_tasks(folder, [*self.zoo.task_names, *self.zoo.unseen_names])

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
        zero_shot = self.generate(task.prompt("zero-shot", 0), 1, ZERO_SHOT_OFFSET).adapters[0]

        def share(adapter: LoraAdapter | None, shots: Sequence[Exchange] = ()) -> float:
            return round(self._accuracy(task, adapter, exchanges, shots), 4)

        souped = share(self.soup(task.name))
        columns: dict[str, float | None] = {
            "base": share(None),
            "in_context": share(None, self._shots(task)),
            "trained": round(statistics.fmean(map(share, self.trained[task.name])), 4),
            "soup": souped if len(self.trained[task.name]) > 1 else None,
            "multitask": share(self.multitask) if self.multitask else None,
            "zoo_mean": share(self.baselines.mean),
            "kernel_regression": share(self.baselines.regressed(condition)),
            "retrieval": souped if retrieved == task.name else share(self.soup(retrieved)),
            "generated_zero_shot": share(zero_shot),
            "generated_best": share(output.adapters[self._best(task, condition, output.adapters)]),
        }
        return {
            "split": task.reported_split,
            "rows": len(exchanges),
            "exact_match": columns,
            "novelty": mean([distance for _, distance in self.space.nearest(output.adapters)]),
        }

    def _accuracy(self, task: LanguageTask, adapter: LoraAdapter | None, exchanges: Sequence[Exchange], shots: Sequence[Exchange]) -> float:
        base = self.pipe.base_model()
        with adapter.attached(base, check=False) if adapter else contextlib.nullcontext():
            return accuracy(predict(base, task, exchanges, self.pipe.template.config.max_length, shots), exchanges)

    def _shots(self, task: LanguageTask) -> list[Exchange]:
        """Return the first of the condition's examples as the model is shown them in context."""
        shown = task.prompt(f"evaluate/{self.config.seed}", SHOTS).examples
        answers = dict(zip(task.instruction.labels, task.instruction.answers, strict=True))
        return [Exchange(text, (answers.get(answer, answer),)) for text, answer in shown]

    def _best(self, task: LanguageTask, condition: TaskPrompt, adapters: Sequence[LoraAdapter]) -> int:
        """Return the index of the adapter under which the condition's examples have the likeliest answers."""
        request = FewShotRequest(condition.labels, condition.examples, self.pipe.template.config.max_length)
        return choose_by_answers(self.pipe.base_model(), adapters, request, Instruction(task.description, condition.labels)).index
