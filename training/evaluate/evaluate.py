"""`evaluate`: one table with a generator's adapters beside all baselines, one metric (accuracy) in all columns.

Rows are of the test split where a task has one, else of the validation split; nothing is selected on them. The best of the
generated adapters is chosen on at most 32 training rows, which are also the examples of the prompt.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

from cond_pdiff.adapter import LoraAdapter
from cond_pdiff.atomic import dump_json, write_text
from cond_pdiff.classifier import PrototypeClassifier
from cond_pdiff.errors import CondPDiffError, TaskDataError
from cond_pdiff.models.sentence_backbone import SentenceBackbone
from cond_pdiff.pipelines.pipeline_cond_pdiff import CondPDiffPipeline
from cond_pdiff.training.evaluate.similarity import ZooSpace, common_errors
from cond_pdiff.training.tasks import Task, load_tasks
from cond_pdiff.training.zoo import Zoo, soup

SELECTION_ROWS = 32
ROUTING_PROMPTS = 5
ROUTING_EXAMPLES = 4


@dataclass(frozen=True)
class EvaluateConfig:
    """How much is measured."""

    samples: int = 20  # adapters generated a task
    max_rows: int = 200  # rows of the reported split a task; a fixed random choice
    num_inference_steps: int = 10
    guidance_scale: float = 1.5
    seed: int = 0

    def __post_init__(self) -> None:
        if self.max_rows < 1:
            raise CondPDiffError(f"max_rows must be at least 1, got {self.max_rows}")


def evaluate(
    generator: str | Path,
    zoo_folder: str | Path,
    tasks_folder: str | Path,
    out: str | Path,
    config: EvaluateConfig,
    shard: tuple[int, int] = (0, 1),
) -> dict[str, Any] | None:
    """Measure every task of the zoo and every unseen one; write `<out>/tasks/*.json`, `evaluation.json` and `evaluation.md`.

    A task that has been measured with the same settings is not measured again. With `shard` (i, n), only every n-th task is,
    and the tables are written by the process that finds all tasks done.

    Returns:
        The evaluation, or None while tasks of other shards are missing.
    """
    out = Path(out)
    evaluator = _Evaluator(generator, Zoo(zoo_folder), config)
    zoo = evaluator.zoo
    tasks = load_tasks(tasks_folder, [*zoo.task_names, *zoo.unseen_names])
    for task in tqdm(tasks[shard[0] :: shard[1]], desc="evaluate", unit="task"):
        path = out / "tasks" / f"{task.name}.json"
        if not path.exists() or json.loads(path.read_text(encoding="utf-8"))["settings"] != evaluator.settings:
            write_text(path, dump_json(evaluator.measure(task)))
    results = []
    for task in tasks:
        path = out / "tasks" / f"{task.name}.json"
        result = json.loads(path.read_text(encoding="utf-8")) if path.exists() else None
        if result is None or result["settings"] != evaluator.settings:
            return None
        results.append(result)
    from cond_pdiff.training.evaluate.table import summarize, to_markdown

    evaluation = summarize(results, evaluator.settings)
    write_text(out / "evaluation.json", dump_json(evaluation))
    write_text(out / "evaluation.md", to_markdown(evaluation))
    return evaluation


class _Evaluator:
    def __init__(self, generator: str | Path, zoo: Zoo, config: EvaluateConfig) -> None:
        self.zoo, self.config = zoo, config
        self.pipe = CondPDiffPipeline.from_pretrained(generator)
        self.pipe.set_progress_bar_config(disable=True)
        if set(self.pipe.condition_index.names) != set(zoo.task_names):
            raise TaskDataError(f"the generator was trained on other tasks than those of {zoo.folder}; give the zoo that it was made from")
        self.base: SentenceBackbone = self.pipe.base_model()
        self.trained = {name: [run.adapter() for run in zoo.runs(name)] for name in (*zoo.task_names, *zoo.unseen_names)}
        multitask = zoo.multitask()
        self.multitask = multitask.adapter() if multitask else None
        self.space = ZooSpace(
            [adapter for name in zoo.task_names for adapter in self.trained[name]],
            [name for name in zoo.task_names for _ in self.trained[name]],
        )
        self.settings = {**config.__dict__, "zoo_runs": len(self.space.tasks), "generator": _weights_sha256(self.pipe)}

    def measure(self, task: Task) -> dict[str, Any]:
        """All numbers of one task."""
        if not self.trained[task.name]:
            raise TaskDataError(f"the zoo has no directly trained adapter of {task.name}; run `cond-pdiff collect` to the end")
        rows = task.report_rows(self.config.max_rows)
        texts, targets = [text for text, _ in rows], torch.tensor([label for _, label in rows])
        classifier = PrototypeClassifier(self.base, task.labels, self.trained[task.name][0], self.pipe.template.config.max_length)

        def predict(adapter: LoraAdapter | None) -> torch.Tensor:
            return classifier.with_adapter(adapter).logits(texts).argmax(1)

        def accuracy(predicted: torch.Tensor) -> float:
            return round(float((predicted == targets).float().mean()), 4)

        prompt = task.prompt(f"evaluate/{self.config.seed}", SELECTION_ROWS)
        output = self._generate(prompt, self.config.samples, 0)
        generated = [predict(adapter) for adapter in output.adapters]
        trained = [predict(adapter) for adapter in self.trained[task.name]]
        retrieved = output.report.nearest[0].task
        souped = predict(soup(self.trained[task.name]))
        columns: dict[str, float | None] = {
            "base": accuracy(predict(None)),
            "trained": round(statistics.fmean(map(accuracy, trained)), 4),
            "soup": accuracy(souped) if len(trained) > 1 else None,
            "multitask": accuracy(predict(self.multitask)) if self.multitask else None,
            "retrieval": accuracy(souped if retrieved == task.name else predict(soup(self.trained[retrieved]))),
            "generated_mean": round(statistics.fmean(map(accuracy, generated)), 4),
            "generated_best": accuracy(generated[output.chosen]),
        }
        seen = task.name in self.zoo.task_names
        return {
            "task": task.name,
            "group": task.group,
            "licence": task.licence,
            "seen": seen,
            "split": task.report_split,
            "rows": len(rows),
            "accuracy": columns,
            "retrieved": retrieved,
            "similarity": output.report.nearest[0].similarity,
            "in_distribution": output.report.in_distribution,
            "routed": self._routed(task) if seen else None,
            "novelty": self._novelty(task, output.adapters, generated, trained, targets, texts, classifier),
            "distinct": len({tuple(predicted.tolist()) for predicted in generated}),
            "seconds_per_adapter": self._seconds(prompt),
            "settings": self.settings,
        }

    def _generate(self, prompt: Any, count: int, offset: int) -> Any:
        generators = [torch.Generator().manual_seed(self.config.seed * 1_000_003 + offset + index) for index in range(count)]
        return self.pipe(
            prompt,
            num_adapters=count,
            generator=generators,
            num_inference_steps=self.config.num_inference_steps,
            guidance_scale=self.config.guidance_scale,
        )

    def _routed(self, task: Task) -> list[bool]:
        """For each of five prompts with other examples: is the adapter nearest, in ΔW, to an adapter of this task?"""
        adapters = [
            self._generate(task.prompt(f"routing/{index}", ROUTING_EXAMPLES), 1, 1000 + index).adapter for index in range(ROUTING_PROMPTS)
        ]
        return [self.space.tasks[index] == task.name for index, _ in self.space.nearest(adapters)]

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
        """Distance to the nearest zoo adapter, and shared errors with it; beside them, the same between two trained runs."""
        nearest = self.space.nearest(adapters)
        own = [index for index, name in enumerate(self.space.tasks) if name == task.name]
        predictions = dict(zip(own, trained, strict=False))
        for index in {index for index, _ in nearest} - set(own):
            predictions[index] = classifier.with_adapter(self.space.adapters[index]).logits(texts).argmax(1)
        shared = [common_errors(mine, predictions[index], targets) for mine, (index, _) in zip(generated, nearest, strict=True)]
        between = [common_errors(first, second, targets) for position, first in enumerate(trained) for second in trained[:position]]
        return {
            "distance": _mean([distance for _, distance in nearest]),
            "common_errors": _mean(shared),
            "common_errors_between_runs": _mean(between),
        }

    def _seconds(self, prompt: Any) -> float:
        """Seconds from condition to adapter, warm, one adapter."""
        started = time.perf_counter()
        self._generate(prompt, 1, 2000)
        return round(time.perf_counter() - started, 3)


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return round(statistics.fmean(known), 4) if known else None


def _weights_sha256(pipe: CondPDiffPipeline) -> str:
    import hashlib

    digest = hashlib.sha256()
    for name, module in sorted(pipe.components.items()):
        settings = {key: value for key, value in module.config.items() if not key.startswith("_")}
        digest.update(f"{name} {json.dumps(settings, sort_keys=True, default=str)}".encode())
        if isinstance(module, torch.nn.Module):
            for key, value in sorted(module.state_dict().items()):
                digest.update(f"{name}.{key}".encode())
                digest.update(value.contiguous().numpy().tobytes())
    return digest.hexdigest()
