"""The evaluation as one table: means, then a row a task."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from cond_pdiff.training.evaluate.measure import mean

COLUMNS = {
    "base": "base",
    "trained": "trained",
    "soup": "soup",
    "multitask": "multi-task",
    "retrieval": "retrieval",
    "generated_mean": "generated, mean",
    "generated_best": "generated, best",
}


def summarize(results: Sequence[dict[str, Any]], settings: dict[str, Any]) -> dict[str, Any]:
    """Means over the tasks of the zoo and over the unseen ones."""
    return {
        "settings": settings,
        "zoo": _means([result for result in results if result["seen"]]),
        "unseen": _means([result for result in results if not result["seen"]]),
        "tasks": list(results),
    }


def _means(results: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    if not results:
        return None
    routed = [hit for result in results for hit in result["routed"] or ()]
    return {
        "tasks": len(results),
        "rows": sum(result["rows"] for result in results),
        "accuracy": {name: mean([result["accuracy"][name] for result in results]) for name in COLUMNS},
        "routing": round(statistics.fmean(routed), 4) if routed else None,
        "routing_samples": len(routed),
        "distinct_mean": mean([result["distinct"] for result in results]),
        "distinct_least": min(result["distinct"] for result in results),
        "in_distribution": mean([float(result["in_distribution"]) for result in results]),
        "seconds_per_adapter": round(statistics.median(result["seconds_per_adapter"] for result in results), 3),
        **{f"novelty_{name}": mean([result["novelty"][name] for result in results]) for name in results[0]["novelty"]},
    }


def to_markdown(evaluation: dict[str, Any]) -> str:
    """The whole report."""
    settings = evaluation["settings"]
    lines = [
        "# Evaluation",
        "",
        f"Accuracy in percent, one metric in all columns, on up to {settings['max_rows']} rows of each task's test split (validation "
        f"where there is no test). *generated*: mean of {settings['samples']} adapters, and the best of them chosen on at most 32 training "
        "rows. *soup*: the mean of the task's own trained adapters. *retrieval*: the soup of the nearest trained task. *multi-task*: one "
        "LoRA trained on all tasks of the zoo.",
        "",
        *accuracy_table(evaluation),
        "",
        *facts(evaluation),
        "",
        "## Every task",
        "",
        "| task | seen | " + " | ".join(COLUMNS.values()) + " | routed | distinct | ΔW novelty | common errors |",
        "|---|---|" + "---|" * (len(COLUMNS) + 4),
    ]
    for result in evaluation["tasks"]:
        routed = f"{sum(result['routed'])}/{len(result['routed'])}" if result["routed"] else "–"
        cells = [result["task"], "yes" if result["seen"] else "no", *(percent(result["accuracy"][name]) for name in COLUMNS)]
        cells += [routed, str(result["distinct"]), f"{result['novelty']['distance']:.2f}", percent(result["novelty"]["common_errors"])]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def accuracy_table(evaluation: dict[str, Any]) -> list[str]:
    """Mean accuracies, as lines of a Markdown table."""
    lines = ["| mean over | " + " | ".join(COLUMNS.values()) + " |", "|---|" + "---|" * len(COLUMNS)]
    for part, title in (("zoo", "tasks of the zoo"), ("unseen", "unseen tasks")):
        means = evaluation[part]
        if means:
            cells = " | ".join(percent(means["accuracy"][name]) for name in COLUMNS)
            lines.append(f"| {means['tasks']} {title} | {cells} |")
    return lines


def facts(evaluation: dict[str, Any]) -> list[str]:
    """Routing, novelty, diversity and time, as lines of a Markdown list."""
    lines = []
    for part, title in (("zoo", "Tasks of the zoo"), ("unseen", "Unseen tasks")):
        means = evaluation[part]
        if not means:
            continue
        routing = "" if means["routing"] is None else f"routing {means['routing']:.1%} of {means['routing_samples']} samples; "
        between = means["novelty_common_errors_between_runs"]
        reference = "" if between is None else f" (two trained runs of a task share {between:.0%})"
        shared = means["novelty_common_errors"]
        errors = "no errors to share with it" if shared is None else f"{shared:.0%} of errors shared with it{reference}"
        lines.append(
            f"- {title}: {routing}ΔW distance to the nearest zoo adapter {means['novelty_distance']:.2f} of its size; "
            f"{errors}; distinct predictions among "
            f"{evaluation['settings']['samples']} samples: {means['distinct_mean']:.1f} on average, {means['distinct_least']} at least; "
            f"{means['in_distribution']:.0%} of the prompts called in-distribution; "
            f"{means['seconds_per_adapter']:.2f} s from condition to adapter (median)."
        )
    return lines


def percent(value: float | None) -> str:
    """0.5 → 50.0."""
    return "–" if value is None else f"{100 * value:.1f}"
