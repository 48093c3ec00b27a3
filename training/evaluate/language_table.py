"""The tables and words of the evaluation of adapters for language models."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any, ClassVar

from cond_pdiff.training.evaluate.languages import SELECTION_ROWS, SHOTS
from cond_pdiff.training.evaluate.measure import difference, mean
from cond_pdiff.training.evaluate.table import EvaluationTable
from cond_pdiff.training.evaluate.text_table import BASELINES


class LanguageTable(EvaluationTable):
    """What an evaluation of language tasks says, as numbers and as Markdown."""

    noun, counted = "task", "rows"
    titles: ClassVar[dict[str, str]] = {"zoo": "tasks of the zoo", "unseen": "unseen tasks"}
    metrics: ClassVar[dict[str, str]] = {"exact_match": "exact match in percent"}
    columns: ClassVar[dict[str, str]] = {
        "base": "base, zero-shot",
        "in_context": f"base, {SHOTS} in context",
        "trained": "trained",
        "soup": "soup",
        "multitask": "multi-task",
        "zoo_mean": "mean of the zoo",
        "kernel_regression": "kernel regression",
        "retrieval": "retrieval",
        "shuffled": "generated for another task",
        "generated_zero_shot": "generated, zero-shot",
        "generated_best": f"generated, best on {SELECTION_ROWS}",
    }
    seen_columns = ("base", "in_context", "multitask", "zoo_mean", "shuffled", "generated_zero_shot", "generated_best", "trained")
    unseen_columns = (
        *("base", "in_context", "multitask", "retrieval", "zoo_mean"),
        *("shuffled", "generated_zero_shot", "generated_best", "trained"),
    )
    own_columns = ("generated_zero_shot", "generated_best")
    task_type = "text-generation"
    extra_columns = ("ΔW novelty",)

    def show(self, value: float | None) -> str:
        """Show a value of a metric in percent: 0.5 → 50.0."""
        return "–" if value is None else f"{100 * value:.1f}"

    def about(self, settings: dict[str, Any]) -> str:
        """Say what the columns mean."""
        return (
            "Exact match in percent, letter case and outer spaces aside, one metric in all columns: of what the model writes, the "
            "likeliest token each time; of a task with label names, of the likeliest one of them, its end included. On up to "
            f"{settings['max_rows']} rows of each task's test split (validation where there is no test), with the same prompt in every "
            f"column. *in context*: {SHOTS} training rows stand before it. *generated, zero-shot*: one adapter from the description and "
            "label names alone; *for another task*: from those of another task, drawn at random; *best*: of "
            f"{settings['samples']} adapters, chosen on {SELECTION_ROWS} training rows. {BASELINES}"
        )

    def card_fields(self, evaluation: dict[str, Any]) -> dict[str, str]:
        """Return the fields of the card with the columns in words."""
        return {**super().card_fields(evaluation), "about": self.about(evaluation["settings"])}

    def own_facts(self) -> dict[str, Any]:
        """Return no facts: language tasks have none of their own."""
        return {}

    def own_means(self, results: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """Return the mean novelty, the time to a saved adapter, and what the zero-shot adapter is better or worse by than each column."""
        values = [result["exact_match"] for result in results]
        others = [name for name in self.columns if name != "generated_zero_shot"]
        differences = {name: difference([(value["generated_zero_shot"], value[name]) for value in values]) for name in others}
        return {
            "novelty": mean([result["novelty"] for result in results]),
            "seconds_to_saved": round(statistics.median(result["seconds_to_saved"] for result in results), 3),
            "zero_shot_differences": differences,
        }

    def fact(self, means: dict[str, Any], settings: dict[str, Any]) -> str:
        """Tell novelty and time in words."""
        return (
            f"ΔW distance to the nearest zoo adapter {means['novelty']:.2f} of its size, "
            f"{means['seconds_to_saved']:.2f} s from description to saved adapter"
        )

    def extra_cells(self, result: dict[str, Any]) -> list[str]:
        """Return the cell of novelty."""
        return [f"{result['novelty']:.2f}"]
