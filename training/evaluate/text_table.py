"""The tables and words of the evaluation of text tasks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from cond_pdiff.training.evaluate.measure import mean
from cond_pdiff.training.evaluate.table import EvaluationTable

BASELINES = (
    "*soup*: the mean of the task's own trained adapters. *multi-task*: one LoRA trained on all tasks of the zoo, both factors of it. "
    "*mean of the zoo*: of all its adapters, one for everything. *kernel regression*: kernel ridge regression from condition embeddings "
    "to the soups of the zoo's tasks, its ridge chosen by leaving out one of them after the other. *retrieval*: the soup of the nearest "
    "trained task."
)
"""The columns that are not a generator's, in words."""


class TextTable(EvaluationTable):
    """What an evaluation of text tasks says, as numbers and as Markdown."""

    noun, counted = "task", "rows"
    titles: ClassVar[dict[str, str]] = {"zoo": "tasks of the zoo", "unseen": "unseen tasks"}
    metrics: ClassVar[dict[str, str]] = {"accuracy": "accuracy in percent"}
    columns: ClassVar[dict[str, str]] = {
        "base": "base",
        "trained": "trained",
        "soup": "soup",
        "multitask": "multi-task",
        "zoo_mean": "mean of the zoo",
        "kernel_regression": "kernel regression",
        "retrieval": "retrieval",
        "generated_mean": "generated, mean",
        "generated_best": "generated, best",
    }
    seen_columns = ("base", "trained", "soup", "generated_mean", "generated_best")
    unseen_columns = ("base", "retrieval", "zoo_mean", "kernel_regression", "multitask", "generated_best", "trained")
    own_columns = ("generated_mean", "generated_best")
    task_type = "text-classification"
    extra_columns = ("distinct", "ΔW novelty", "common errors")

    def show(self, value: float | None) -> str:
        """Show a value of a metric in percent: 0.5 → 50.0."""
        return "–" if value is None else f"{100 * value:.1f}"

    def about(self, settings: dict[str, Any]) -> str:
        """Say what the columns mean."""
        return (
            f"Accuracy in percent, one metric in all columns, on up to {settings['max_rows']} rows of each task's test split (validation "
            f"where there is no test). *generated*: mean of {settings['samples']} adapters, and the best of them chosen on at most 32 "
            f"training rows. {BASELINES}"
        )

    def card_fields(self, evaluation: dict[str, Any]) -> dict[str, str]:
        """Return the fields of the card with the baselines in words."""
        return {**super().card_fields(evaluation), "baselines": BASELINES}

    def own_facts(self) -> dict[str, Any]:
        """Return no facts: text tasks have none of their own."""
        return {}

    def own_means(self, results: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """Return the means of distinct predictions and novelty."""
        return {
            "distinct_mean": mean([result["distinct"] for result in results]),
            "distinct_least": min(result["distinct"] for result in results),
            **{f"novelty_{name}": mean([result["novelty"][name] for result in results]) for name in results[0]["novelty"]},
        }

    def fact(self, means: dict[str, Any], settings: dict[str, Any]) -> str:
        """Tell novelty in weights and in errors, and distinct predictions."""
        between, shared = means["novelty_common_errors_between_runs"], means["novelty_common_errors"]
        reference = "" if between is None else f" (two trained runs of a task share {between:.0%})"
        errors = "no errors to share with it" if shared is None else f"{shared:.0%} of errors shared with it{reference}"
        return (
            f"ΔW distance to the nearest zoo adapter {means['novelty_distance']:.2f} of its size; {errors}; distinct predictions among "
            f"{settings['samples']} samples: {means['distinct_mean']:.1f} on average, {means['distinct_least']} at least"
        )

    def extra_cells(self, result: dict[str, Any]) -> list[str]:
        """Return the cells of distinct predictions and novelty."""
        novelty = result["novelty"]
        return [str(result["distinct"]), f"{novelty['distance']:.2f}", self.show(novelty["common_errors"])]
