"""An evaluation as tables: means, then a row a task. Kinds of evaluation differ in their columns, metrics and words."""

from __future__ import annotations

import statistics
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

from cond_pdiff.training.card import markdown_table
from cond_pdiff.training.evaluate.measure import difference, mean, mean_interval


class EvaluationTable(ABC):
    """What an evaluation says, as numbers and as Markdown."""

    noun: ClassVar[str]
    """The word for what a row is of, in the singular."""
    counted: ClassVar[str]
    """The key of a row's result that says what is counted for it."""
    titles: ClassVar[dict[str, str]]
    """The titles of the parts `zoo` and `unseen`."""
    metrics: ClassVar[dict[str, str]]
    """The keys of results → what they are called; the first is the main one."""
    columns: ClassVar[dict[str, str]]
    """The keys below each metric → the heads of columns."""
    seen_columns: ClassVar[tuple[str, ...]]
    unseen_columns: ClassVar[tuple[str, ...]]
    """The columns of the card's tables of trained and of unseen tasks."""
    floors: ClassVar[tuple[str, ...]] = ()
    """The columns of what noise alone makes, which nothing is compared with."""
    own_columns: ClassVar[tuple[str, ...]]
    """The columns that are the generator's own results, not a baseline's; these are what the Hub's `model-index` tells."""
    task_type: ClassVar[str]
    """The Hub's word for the job."""
    extra_columns: ClassVar[tuple[str, ...]]
    """The heads of what `extra_cells` gives."""

    @abstractmethod
    def show(self, value: float | None) -> str:
        """Show a value of a metric."""

    @abstractmethod
    def about(self, settings: dict[str, Any]) -> str:
        """Say what the columns mean."""

    @abstractmethod
    def own_facts(self) -> dict[str, Any]:
        """Return facts of the whole evaluation that only this kind has."""

    @abstractmethod
    def own_means(self, results: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """Return means over tasks that only this kind has."""

    @abstractmethod
    def fact(self, means: dict[str, Any], settings: dict[str, Any]) -> str:
        """Tell novelty, diversity and the like in words."""

    @abstractmethod
    def extra_cells(self, result: dict[str, Any]) -> list[str]:
        """Return a row's cells behind the columns."""

    def summarize(self, results: Sequence[dict[str, Any]], settings: dict[str, Any]) -> dict[str, Any]:
        """Return means over the tasks of the zoo and over the unseen ones."""
        parts = {"zoo": part(results, seen=True), "unseen": part(results, seen=False)}
        means = {name: self._means(found) if found else None for name, found in parts.items()}
        return {"settings": settings, **self.own_facts(), **means, "tasks": list(results)}

    def _means(self, results: Sequence[dict[str, Any]]) -> dict[str, Any]:
        routed = [hit for result in results for hit in result["routed"] or ()]
        return {
            f"{self.noun}s": len(results),
            self.counted: sum(result[self.counted] for result in results),
            **{metric: {name: mean([result[metric][name] for result in results]) for name in self.columns} for metric in self.metrics},
            "intervals": {
                metric: {name: mean_interval([result[metric][name] for result in results]) for name in self.columns}
                for metric in self.metrics
            },
            "differences": {metric: self._differences(metric, results) for metric in self.metrics},
            "routing": round(statistics.fmean(routed), 4) if routed else None,
            "routing_samples": len(routed),
            "in_distribution": mean([float(result["in_distribution"]) for result in results]),
            "seconds_per_adapter": round(statistics.median(result["seconds_per_adapter"] for result in results), 3),
            **self.own_means(results),
        }

    def _differences(self, metric: str, results: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """Subtract each other column from the generator's main one, over the tasks that have both."""
        own = self.own_columns[-1]
        others = [name for name in self.columns if name not in (own, *self.floors)]
        values = [result[metric] for result in results]
        return {name: difference([(value[own], value[name]) for value in values]) for name in others}

    def to_markdown(self, evaluation: dict[str, Any]) -> str:
        """Return the whole report as Markdown."""
        main = next(iter(self.metrics))
        rows = []
        for result in evaluation["tasks"]:
            routed = f"{sum(result['routed'])}/{len(result['routed'])}" if result["routed"] else "–"
            cells = [result["task"], "yes" if result["seen"] else "no", *(self.show(result[main][name]) for name in self.columns), routed]
            rows.append(cells + self.extra_cells(result))
        lines = [
            "# Evaluation",
            "",
            self.about(evaluation["settings"]) + _part_of_zoo(evaluation["settings"], self.noun),
            "",
            self.means_table(evaluation),
            "",
            self.facts(evaluation),
            "",
            f"## Every {self.noun} ({self.metrics[main]})",
            "",
            markdown_table([self.noun, "seen", *self.columns.values(), "routed", *self.extra_columns], rows),
        ]
        return "\n".join(lines) + "\n"

    def means_table(self, evaluation: dict[str, Any]) -> str:
        """Return mean values, and by how much the generator's main column differs from each other one, as a Markdown table.

        Both with their intervals over tasks. A metric that was not measured has no row.
        """
        own = self.columns[self.own_columns[-1]]
        rows = []
        for where, title in self.titles.items():
            means = evaluation[where] or {}
            for metric, name in self.metrics.items():
                if not any(value is not None for value in means.get(metric, {}).values()):
                    continue
                words = f"{means[f'{self.noun}s']} {title}" + (f", {name}" if len(self.metrics) > 1 else "")
                rows.append([words, *(self._show(means[metric][name], means["intervals"][metric][name]) for name in self.columns)])
                found = [means["differences"][metric].get(column) for column in self.columns]
                cells = [self._show(row["mean"], row["interval"], signed=True) if row else "" for row in found]
                rows.append([f"… *{own}* minus it", *cells])
        return markdown_table(["mean over (95 % interval)", *self.columns.values()], rows)

    def _show(self, value: float | None, interval: Sequence[float] | None, signed: bool = False) -> str:
        """Show a mean and where it may lie, with true minus signs; a difference says that it is positive."""
        shown = self.show(value) + (f" ({self.show(interval[0])} to {self.show(interval[1])})" if interval else "")
        return ("+" if signed and (value or 0.0) > 0 else "") + shown.replace("-", "−")

    def facts(self, evaluation: dict[str, Any]) -> str:
        """Tell task-identification accuracy (routing), novelty, diversity and time, as a Markdown list."""
        lines = []
        for where, title in self.titles.items():
            means = evaluation[where]
            if not means:
                continue
            routing = "" if means["routing"] is None else f"routing {means['routing']:.1%} of {means['routing_samples']} samples; "
            lines.append(
                f"- {title[0].upper()}{title[1:]}: {routing}{self.fact(means, evaluation['settings'])}; {means['in_distribution']:.0%} "
                f"called in-distribution; {means['seconds_per_adapter']:.2f} s from condition to adapter (median)."
            )
        return "\n".join(lines)

    def model_index(self, evaluation: dict[str, Any], name: str) -> list[dict[str, Any]]:
        """Return the generator's means in the form of the Hub's `model-index`."""
        results = []
        for where, title in self.titles.items():
            means = evaluation[where]
            if means:
                metrics = [
                    {"type": metric, "name": f"{words}, {self.columns[column]}", "value": float(self.show(means[metric][column]))}
                    for metric, words in self.metrics.items()
                    for column in self.own_columns
                    if means[metric][column] is not None
                ]
                dataset = {"type": f"cond-pdiff/{where}", "name": f"{means[f'{self.noun}s']} {title}"}
                results.append({"task": {"type": self.task_type}, "dataset": dataset, "metrics": metrics})
        return [{"name": name, "results": results}]

    def eval_results(self, evaluation: dict[str, Any]) -> list[dict[str, Any]]:
        """Return entries of the Hub's `.eval_results/*.yaml`, one for each task whose data are a data set of the Hub."""
        metric, words = next(iter(self.metrics.items()))
        column = self.own_columns[-1]
        return [
            {
                "dataset": {"id": result["dataset"], "task_id": "default"},
                "value": float(self.show(result[metric][column])),
                "notes": f"{words}, {self.columns[column]}; {result[self.counted]} {self.counted}; {self.noun} {result['task']}, "
                + ("trained" if result["seen"] else "never trained"),
            }
            for result in evaluation["tasks"]
            if result.get("dataset")
        ]

    def card_fields(self, evaluation: dict[str, Any]) -> dict[str, str]:
        """Return what the template of a generator's card needs from an evaluation."""
        main = next(iter(self.metrics))
        seen = [[result["task"], *(self.show(result[main][name]) for name in self.seen_columns), result["licence"].replace("|", "/")]
                for result in part(evaluation["tasks"], seen=True)]  # fmt: skip
        return {
            "means_table": self.means_table(evaluation),
            "facts": self.facts(evaluation),
            "unseen_section": self._unseen_section(evaluation, main),
            "task_table": markdown_table([self.noun, *(self.columns[name] for name in self.seen_columns), "licence"], seen),
        }

    def _unseen_section(self, evaluation: dict[str, Any], main: str) -> str:
        """Return a section with a table, or nothing where there are no unseen tasks."""
        rows = []
        for result in part(evaluation["tasks"], seen=False):
            inside = "in" if result["in_distribution"] else "out"
            nearest = f"{result['retrieved']} ({result['similarity']:.2f}, {inside})"
            rows.append([result["task"], nearest, *(self.show(result[main][name]) for name in self.unseen_columns)])
        if not rows:
            return ""
        return "\n".join([
            f"## {self.titles['unseen'].capitalize()}",
            "",
            f"Kept out of the zoo; {self.metrics[main]}. The nearest trained {self.noun} is given with its similarity, and whether the",
            "condition is called in- or out-of-distribution.",
            "",
            markdown_table([self.noun, f"nearest trained {self.noun}", *(self.columns[name] for name in self.unseen_columns)], rows),
            "",
            "",
        ])  # fmt: skip


def _part_of_zoo(settings: dict[str, Any], noun: str) -> str:
    """Return a sentence for an evaluation beside a part of the generator's tasks."""
    here, whole = settings["zoo_tasks"], settings["generator_tasks"]
    tail = f" The zoo holds {here} of the {whole} {noun}s that the generator was trained on; retrieval, routing and novelty know no others."
    return tail if here < whole else ""


def part(results: Sequence[dict[str, Any]], seen: bool) -> list[dict[str, Any]]:
    """Return the results of trained or of unseen tasks."""
    return [result for result in results if result["seen"] == seen]
