"""The tables and words of the evaluation of styles."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any, ClassVar

from cond_pdiff.training.evaluate.measure import mean
from cond_pdiff.training.evaluate.pictures import EXTRACTOR, EXTRACTOR_SHA256
from cond_pdiff.training.evaluate.table import EvaluationTable


class StyleTable(EvaluationTable):
    """What an evaluation of styles says, as numbers and as Markdown."""

    noun, counted = "style", "pictures"
    titles: ClassVar[dict[str, str]] = {"zoo": "trained styles", "unseen": "unseen styles"}
    metrics: ClassVar[dict[str, str]] = {"frechet": "Fréchet distance", "kid": "kernel distance", "look": "colours and textures"}
    columns: ClassVar[dict[str, str]] = {
        "base": "no LoRA",
        "trained": "trained",
        "soup": "soup",
        "multitask": "multi-task",
        "retrieval": "retrieval",
        "generated": "generated",
        "base_floor": "no LoRA, floor",
        "trained_floor": "trained, floor",
    }
    seen_columns = ("base", "trained", "soup", "generated", "trained_floor")
    unseen_columns = ("base", "retrieval", "multitask", "generated", "trained", "trained_floor")
    floors = ("base_floor", "trained_floor")
    own_columns = ("generated",)
    task_type = "text-to-image"
    extra_columns = ("retrieved", "novelty")

    def show(self, value: float | None) -> str:
        """Show a value of a metric with three significant digits."""
        return "–" if value is None else f"{value:.3g}"

    def about(self, settings: dict[str, Any]) -> str:
        """Say what the columns mean."""
        return (
            f"Distances of the pictures that adapters make for a style's held-out captions (at most {settings['max_rows']}) to true "
            "pictures in the style; less is better. Fréchet distance and kernel distance (KID, unbiased: 0 for equal distributions) are of "
            f"features of {EXTRACTOR} (sha256 `{EXTRACTOR_SHA256[:16]}…`), not Inception's: comparable within this table only. *trained*: "
            "a directly trained adapter. *soup*: the mean of the style's trained adapters, where there are several. *retrieval*: the "
            "soup of the trained style that is nearest to the condition. *multi-task*: one LoRA trained on all styles. *floor*: between "
            "pictures of one adapter from one noise and from another, so noise alone. The generator is shown the style picture of an "
            "unseen style, and of a trained one a held-out picture in it: nothing that it was trained on. Intervals are over styles, 95 %."
        )

    def own_facts(self) -> dict[str, Any]:
        """Return the name and sha256 of the feature extractor."""
        return {"extractor": {"name": EXTRACTOR, "sha256": EXTRACTOR_SHA256}}

    def own_means(self, results: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """Return the means of styles won, novelty and diversity."""
        return {
            "better_than_both": {metric: _better(results, metric) for metric in self.metrics},
            **{name: mean([result[name] for result in results]) for name in ("novelty", "diversity", "between_runs")},
        }

    def fact(self, means: dict[str, Any], settings: dict[str, Any]) -> str:
        """Tell styles won, novelty and diversity in words."""
        return (
            f"generated nearer to the true pictures than no LoRA and retrieval on {means['better_than_both']['frechet']:.0%}; ΔW distance "
            f"to the nearest zoo adapter {self.show(means['novelty'])} of its size, between two samples {self.show(means['diversity'])}, "
            f"between two trained runs {self.show(means['between_runs'])}"
        )

    def extra_cells(self, result: dict[str, Any]) -> list[str]:
        """Return the cells of the nearest trained style and novelty."""
        return [f"{result['retrieved']} {result['similarity']:.2f}", self.show(result["novelty"])]

    def card_fields(self, evaluation: dict[str, Any]) -> dict[str, str]:
        """Return the fields of the card with the extractor's name and hash."""
        extractor = evaluation["extractor"]
        return {
            **super().card_fields(evaluation),
            "extractor": extractor["name"],
            "extractor_sha256": extractor["sha256"],
            "pictures_each": str(max(result["pictures"] for result in evaluation["tasks"])),
        }


def _better(results: Sequence[dict[str, Any]], metric: str) -> float:
    """Return the share of the styles on which the generated adapter beats both no LoRA and retrieval."""
    beaten = [result[metric]["generated"] < min(result[metric]["base"], result[metric]["retrieval"]) for result in results]
    return round(statistics.fmean(beaten), 4)
