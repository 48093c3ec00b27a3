"""Generators of imported adapters: how near generated ones are, in ΔW, to those that were imported. Nothing is asked of the base model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

from cond_pdiff.adapter import LoraAdapter
from cond_pdiff.conditions.condition import Condition
from cond_pdiff.pipelines.pipeline_output import CondPDiffPipelineOutput
from cond_pdiff.training.evaluate.measure import EvaluateConfig, ZooEvaluator, mean
from cond_pdiff.training.evaluate.similarity import ZooSpace
from cond_pdiff.training.evaluate.table import EvaluationTable
from cond_pdiff.training.tasks.imported import ImportedTask
from cond_pdiff.training.zoo.zoo import Zoo, soup

ROUTING_SAMPLES = 5


class AdapterEvaluator(ZooEvaluator):
    """The evaluation of a generator by the updates that it makes; see `ZooEvaluator`."""

    def __init__(self, generator: str | Path, zoo: Zoo, config: EvaluateConfig, out: Path) -> None:
        super().__init__(generator, zoo, config, out)
        self.mean = soup([run for name in zoo.task_names for run in self.trained[name]])

    def load_tasks(self, folder: str | Path | None) -> Sequence[Any]:
        """Read the conditions that the zoo holds."""
        return self.zoo.load_tasks(folder, self.zoo.task_names)

    def condition(self, task: ImportedTask) -> Condition:
        """Return the first of its conditions."""
        return task.shown[0]

    def other_conditions(self, task: ImportedTask) -> Sequence[Condition]:
        """Return its conditions, views of them, and these again: each is asked from another noise."""
        return task.conditions(ROUTING_SAMPLES)

    def compare(self, task: ImportedTask, output: CondPDiffPipelineOutput, retrieved: str) -> dict[str, Any]:
        """Measure ‖ΔW − ΔW_own‖ / ‖ΔW_own‖ by column, novelty, and how much samples differ."""
        own = ZooSpace([self.trained[task.name][0]], [task.name])

        def error(adapters: Sequence[LoraAdapter]) -> float | None:
            return mean((own.distances(adapters) / own.norms).flatten().tolist())

        codec = self.pipe.codec
        decoded = codec.to_adapter(codec.decode(codec.encode(codec.to_params(own.adapters[0])[None]))[0])
        others = [adapter for adapter in self.space.adapters if adapter is not own.adapters[0]]
        nearest = self.space.nearest(output.adapters)
        samples = ZooSpace(output.adapters, [task.name] * len(output.adapters))
        between = samples.distances(output.adapters) / samples.norms
        count = len(output.adapters)
        return {
            "adapters_generated": count,
            "error": {
                "base": 1.0,
                "mean": error([self.mean]),
                "retrieval": error([self.soup(retrieved)]),
                "neighbour": round(float((own.distances(others) / own.norms).min()), 4) if others else None,
                "decoded": error([decoded]),
                "generated": error(output.adapters),
            },
            "novelty": mean([distance for _, distance in nearest]),
            "diversity": round(float(between.sum()) / (count * (count - 1)), 4) if count > 1 else None,
        }


class AdapterTable(EvaluationTable):
    """What such an evaluation says, as numbers and as Markdown."""

    noun, counted = "adapter", "adapters_generated"
    titles: ClassVar[dict[str, str]] = {"zoo": "imported adapters", "unseen": "unseen adapters"}
    metrics: ClassVar[dict[str, str]] = {"error": "distance in ΔW"}
    columns: ClassVar[dict[str, str]] = {
        "base": "no LoRA", "mean": "mean of the zoo", "neighbour": "nearest other", "retrieval": "retrieval",
        "decoded": "reconstructed", "generated": "generated",
    }  # fmt: skip
    seen_columns = ("base", "mean", "neighbour", "decoded", "generated")
    unseen_columns = ("base", "mean", "retrieval", "generated")
    own_columns = ("generated",)
    task_type = "other"
    extra_columns = ("retrieved", "novelty")

    def show(self, value: float | None) -> str:
        """Show a value of a metric with three significant digits."""
        return "–" if value is None else f"{value:.3g}"

    def about(self, settings: dict[str, Any]) -> str:
        """Say what the columns mean."""
        return (
            "Distance in ΔW to the imported adapter, in units of its own ‖ΔW‖; less is better, and 1 is what no LoRA has. *mean of the "
            "zoo*: of all imported adapters. *nearest other*: the adapter of another task that is nearest to it. *retrieval*: the adapter "
            "whose condition is nearest to the request, for trained conditions itself. *reconstructed*: the adapter through the "
            "autoencoder and back. *generated*: from a condition that the generator was trained on: there are no others. Routing asks "
            f"for each {ROUTING_SAMPLES} times, each time from another noise. What the adapters do with the base model is not measured. "
            "Intervals are over adapters, 95 %."
        )

    def own_facts(self) -> dict[str, Any]:
        """Return nothing."""
        return {}

    def own_means(self, results: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """Return the means of novelty and diversity."""
        return {name: mean([result[name] for result in results]) for name in ("novelty", "diversity")}

    def fact(self, means: dict[str, Any], settings: dict[str, Any]) -> str:
        """Tell novelty and diversity in words."""
        return (
            f"ΔW distance to the nearest adapter of the zoo {self.show(means['novelty'])} of its size, between two samples "
            f"{self.show(means['diversity'])}"
        )

    def extra_cells(self, result: dict[str, Any]) -> list[str]:
        """Return the cells of the nearest condition and novelty."""
        return [f"{result['retrieved']} {result['similarity']:.2f}", self.show(result["novelty"])]
