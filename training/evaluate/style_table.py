"""The evaluation of styles as tables: means, then a row a style."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from cond_pdiff.training.evaluate.measure import mean
from cond_pdiff.training.evaluate.pictures import EXTRACTOR, EXTRACTOR_SHA256

COLUMNS = {
    "base": "no LoRA",
    "trained": "trained",
    "soup": "soup",
    "multitask": "multi-task",
    "retrieval": "retrieval",
    "generated": "generated",
}
METRICS = {"frechet": "Fréchet distance", "look": "colours and textures"}


def summarize(results: Sequence[dict[str, Any]], settings: dict[str, Any]) -> dict[str, Any]:
    """Means over the styles of the zoo and over the unseen ones."""
    return {
        "settings": settings,
        "extractor": {"name": EXTRACTOR, "sha256": EXTRACTOR_SHA256},
        "zoo": _means([result for result in results if result["seen"]]),
        "unseen": _means([result for result in results if not result["seen"]]),
        "tasks": list(results),
    }


def _means(results: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    if not results:
        return None
    routed = [hit for result in results for hit in result["routed"] or ()]
    columns = {metric: {name: mean([result[metric][name] for result in results]) for name in COLUMNS} for metric in METRICS}
    return {
        "styles": len(results),
        "pictures": sum(result["pictures"] for result in results),
        **columns,
        "better_than_both": {metric: _better(results, metric) for metric in METRICS},
        "routing": round(statistics.fmean(routed), 4) if routed else None,
        "routing_samples": len(routed),
        "in_distribution": mean([float(result["in_distribution"]) for result in results]),
        "seconds_per_adapter": round(statistics.median(result["seconds_per_adapter"] for result in results), 3),
        **{name: mean([result[name] for result in results]) for name in ("novelty", "diversity", "between_runs")},
    }


def _better(results: Sequence[dict[str, Any]], metric: str) -> float:
    """Share of the styles on which the generated adapter beats both no LoRA and retrieval."""
    beaten = [result[metric]["generated"] < min(result[metric]["base"], result[metric]["retrieval"]) for result in results]
    return round(statistics.fmean(beaten), 4)


def to_markdown(evaluation: dict[str, Any]) -> str:
    """The whole report."""
    settings = evaluation["settings"]
    lines = [
        "# Evaluation",
        "",
        f"Distances of the pictures that adapters make for up to {settings['max_rows']} held-out captions a style to true pictures in the "
        f"style; less is better. Fréchet distance of features of {EXTRACTOR} (sha256 `{EXTRACTOR_SHA256[:16]}…`), not Inception's: "
        "comparable within this table only. *trained*: a directly trained adapter. *soup*: the mean of the style's trained adapters. "
        "*retrieval*: the soup of the trained style that is nearest to the condition. *multi-task*: one LoRA trained on all styles.",
        "",
        *means_table(evaluation),
        "",
        *facts(evaluation),
        "",
        "## Every style (Fréchet distance)",
        "",
        "| style | seen | " + " | ".join(COLUMNS.values()) + " | retrieved | routed | novelty |",
        "|---|---|" + "---|" * (len(COLUMNS) + 3),
    ]
    for result in evaluation["tasks"]:
        routed = f"{sum(result['routed'])}/{len(result['routed'])}" if result["routed"] else "–"
        cells = [result["task"], "yes" if result["seen"] else "no", *(number(result["frechet"][name]) for name in COLUMNS)]
        cells += [f"{result['retrieved']} {result['similarity']:.2f}", routed, number(result["novelty"])]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def means_table(evaluation: dict[str, Any]) -> list[str]:
    """Mean distances, as lines of a Markdown table."""
    lines = ["| mean over | " + " | ".join(COLUMNS.values()) + " |", "|---|" + "---|" * len(COLUMNS)]
    for part, title in (("zoo", "trained styles"), ("unseen", "unseen styles")):
        means = evaluation[part]
        for metric, name in METRICS.items() if means else ():
            cells = " | ".join(number(means[metric][column]) for column in COLUMNS)
            lines.append(f"| {means['styles']} {title}, {name} | {cells} |")
    return lines


def facts(evaluation: dict[str, Any]) -> list[str]:
    """Routing, novelty, diversity and time, as lines of a Markdown list."""
    lines = []
    for part, title in (("zoo", "Trained styles"), ("unseen", "Unseen styles")):
        means = evaluation[part]
        if not means:
            continue
        routing = "" if means["routing"] is None else f"routing {means['routing']:.1%} of {means['routing_samples']} held-out pictures; "
        better = means["better_than_both"]["frechet"]
        lines.append(
            f"- {title}: {routing}generated nearer to the true pictures than no LoRA and retrieval on {better:.0%}; ΔW distance to the "
            f"nearest zoo adapter {number(means['novelty'])} of its size, between two samples {number(means['diversity'])}, between two "
            f"trained runs {number(means['between_runs'])}; {means['in_distribution']:.0%} called in-distribution; "
            f"{means['seconds_per_adapter']:.2f} s from picture to adapter (median)."
        )
    return lines


def number(value: float | None) -> str:
    """Three digits that count."""
    return "–" if value is None else f"{value:.3g}"
