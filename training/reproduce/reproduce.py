"""`reproduce`: one command a table or a set of figures. Run the same command again to go on where it stopped."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cond_pdiff.atomic import dump_json, write_text
from cond_pdiff.errors import CondPDiffError
from cond_pdiff.training.config import as_recorded
from cond_pdiff.training.reproduce import figures, table1, table2, table3
from cond_pdiff.training.reproduce.cells import Plan, open_folder, run_cells
from cond_pdiff.training.reproduce.config import Settings, read_quick
from cond_pdiff.training.reproduce.experiment import Experiment
from cond_pdiff.training.reproduce.pictures import draw_figures, draw_table1, draw_table3

DEFAULT_RECIPE, STYLE_RECIPE = "reproduce-minilm", "pixart-mini-styles"
STYLES = "table2"
"""The reproduction that is of styles: with another recipe, by another way."""

SECTIONS = ("collect", "autoencoder", "unet", "reproduce")
"""The sections of a recipe that all reproductions depend on: they share zoos and generators."""


@dataclass(frozen=True)
class Reproduction:
    """A table, or a set of figures, of the paper.

    Args:
        plan: its cells.
        summarize: their values → the JSON that is published.
        to_markdown: that JSON and a paragraph on how it was made → the document.
        draw: that JSON → pictures in a folder.
        sections: of the recipe, that its cells depend on beside `SECTIONS`.
        partial: whether it can be told before all cells are measured. It takes hours; whatever rows are complete can be read.
    """

    plan: Callable[[Experiment], Plan]
    summarize: Callable[[Experiment, Mapping[str, Any]], dict[str, Any]]
    to_markdown: Callable[[Mapping[str, Any], str], str]
    draw: Callable[[Mapping[str, Any], Path], None]
    sections: tuple[str, ...] = ()
    partial: bool = False


REPRODUCTIONS = {
    "table1": Reproduction(table1.plan, table1.summarize, table1.to_markdown, draw_table1, partial=True),
    "table3": Reproduction(table3.plan, table3.summarize, table3.to_markdown, draw_table3, ("ablation",)),
    "figures": Reproduction(figures.plan, figures.summarize, figures.to_markdown, draw_figures),
}


def reproduce(name: str, tasks_folder: Path, out: Path, recipe: str | Path | None = None, quick: bool = False) -> dict[str, Any]:
    """Measure whatever is missing; write `<out>/<name>.json`, `<out>/<name>.md` and pictures.

    Args:
        name: one of `REPRODUCTIONS`, or `STYLES`. All of them share a folder, with its zoos and generators.
        tasks_folder: a task collection with the recipe's tasks; for `STYLES` a folder of styles.
        out: folder to create or continue.
        recipe: name or path, with the section `reproduce`; default: `DEFAULT_RECIPE`, for `STYLES` `STYLE_RECIPE`.
        quick: the recipe's small form.

    Raises:
        CondPDiffError: no such reproduction.
        TrainingError: the recipe cannot be used, or the folder is of other settings.
    """
    if name not in (*REPRODUCTIONS, STYLES):
        raise CondPDiffError(f"there is no reproduction {name!r}; there are {sorted([*REPRODUCTIONS, STYLES])}")
    line = command(name, recipe, quick)
    if name == STYLES:
        style_recipe = read_quick(recipe or STYLE_RECIPE, quick)
        open_folder(out, {"styles": recorded(style_recipe, SECTIONS)})
        measured = table2.measure(style_recipe, tasks_folder, out)
        result = {"command": line, "quick": quick, **measured}
        write_text(out / f"{name}.json", dump_json(result))
        write_text(out / f"{name}.md", table2.to_markdown(result, line))
        return result
    made = REPRODUCTIONS[name]
    settings = Settings.read(recipe or DEFAULT_RECIPE, quick)
    experiment = Experiment(settings, tasks_folder, out)
    open_folder(out, recorded(settings.recipe, (*SECTIONS, *made.sections)))

    def write(values: Mapping[str, Any]) -> dict[str, Any]:
        result = {"command": line, "quick": quick, **made.summarize(experiment, values)}
        write_text(out / f"{name}.json", dump_json(result))
        write_text(out / f"{name}.md", made.to_markdown(result, about(settings, line)))
        made.draw(result, out)
        return result

    def so_far(values: Mapping[str, Any]) -> None:
        if made.partial and made.summarize(experiment, values)["rows"]:
            write(values)

    return write(run_cells(out / "cells", made.plan(experiment), name, so_far))


def recorded(recipe: Mapping[str, Any], sections: Sequence[str]) -> dict[str, Any]:
    """Return these sections of a recipe, those that it has, as a folder keeps them."""
    kept = {name: recipe[name] for name in sections if name in recipe}
    return {name: as_recorded(section) if name == "unet" else section for name, section in kept.items()}


def command(name: str, recipe: str | Path | None, quick: bool) -> str:
    """Return the command line that makes a result."""
    options = (f" --recipe {Path(recipe).name}" if recipe else "") + (" --quick" if quick else "")
    out = f"results/{Path(recipe).stem}" if recipe else "results"  # a folder is of one recipe
    return f"cond-pdiff reproduce {name} --tasks {'styles' if name == STYLES else 'tasks'} --out {out}{options}"


def about(settings: Settings, line: str) -> str:
    """Say how the numbers were made."""
    config = settings.reproduce
    rows = f"up to {config.max_rows} rows of each" if config.max_rows else "the complete"
    quick = " This is the quick form: few steps, few rows; do not quote it." if settings.quick else ""
    return (
        f"`{line}`\n\nMetrics in percent, one a task in all columns, on {rows} test split; nothing is selected on it. "
        f"*original*: mean over up to {config.reported_samples} of the zoo's trained adapters; *generated*: mean over "
        f"{config.reported_samples} samples, and the best of {config.samples} by its loss on {config.selection_rows} training rows; "
        "*soup*: mean of the task's own trained adapters; *retrieval*: a trained adapter of the task whose condition is nearest; "
        f"*+ noise*: isotropic noise as long as the generated adapter is away.{quick}"
    )
