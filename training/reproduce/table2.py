"""Table 2: styles. A zoo, its generator and their evaluation, one after the other; each goes on where it stopped."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from cond_pdiff.training.config import CollectConfig, parse
from cond_pdiff.training.evaluate.evaluate import evaluate
from cond_pdiff.training.evaluate.measure import EvaluateConfig
from cond_pdiff.training.evaluate.style_table import StyleTable
from cond_pdiff.training.jobs.run import Execution
from cond_pdiff.training.reproduce.config import ReproduceConfig
from cond_pdiff.training.stages.train import train
from cond_pdiff.training.zoo.collect import collected

KEPT = ("style", "seen", "frechet", "kid", "look", "routed", "retrieved", "novelty")
"""The entries that are kept of each style's result."""


def measure(recipe: Mapping[str, Any], styles_folder: Path, out: Path, execution: Execution | None = None) -> dict[str, Any]:
    """Collect, train and evaluate below `out`: means over trained and unseen styles, and a row a style.

    Args:
        recipe: of a style generator; its section `reproduce` says how much is measured.
        styles_folder: made by `make-styles`.
        execution: of the adapters and of the evaluation; default: in this process.
    """
    config = parse(ReproduceConfig, recipe.get("reproduce", {}), "reproduce")
    zoo = out / "style-zoo"
    collected(parse(CollectConfig, recipe.get("collect", {}), "collect"), styles_folder, zoo, execution)
    generator = out / "style-run" / "generator"
    if not (generator / "model_index.json").exists():
        train(dict(recipe), zoo, styles_folder, out / "style-run")
    sizes = parse(EvaluateConfig, {entry.name: getattr(config, entry.name) for entry in fields(EvaluateConfig)}, "reproduce")
    evaluation = evaluate(generator, zoo, styles_folder, out / "style-evaluation", sizes, execution=execution)
    assert evaluation is not None  # one process does all styles
    rows = [{"style": result["task"], **{name: result[name] for name in KEPT if name in result}} for result in evaluation["tasks"]]
    return {**{name: evaluation[name] for name in ("settings", "extractor", "zoo", "unseen")}, "rows": rows}


def to_markdown(result: Mapping[str, Any], line: str) -> str:
    """Return the means and what is said of them as Markdown; the table of all styles is the evaluation's own."""
    table = StyleTable()
    parts = ["# Table 2", f"`{line}`", table.about(result["settings"]), table.means_table(dict(result)), table.facts(dict(result))]
    return "\n\n".join(parts) + "\n"
