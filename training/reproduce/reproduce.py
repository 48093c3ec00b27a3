"""`reproduce`: one command a table or a set of figures. Run the same command again to go on where it stopped."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from cond_pdiff.atomic import dump_json, write_text
from cond_pdiff.errors import CondPDiffError
from cond_pdiff.training.config import as_recorded
from cond_pdiff.training.jobs.run import Execution, run_jobs
from cond_pdiff.training.jobs.work import Work
from cond_pdiff.training.reproduce import figures, table1, table2, table3
from cond_pdiff.training.reproduce.cells import Cell, Plan, Step, open_folder, read_json
from cond_pdiff.training.reproduce.config import Settings, read_quick
from cond_pdiff.training.reproduce.experiment import Experiment, zoo_path
from cond_pdiff.training.reproduce.pictures import draw_figures, draw_table1, draw_table3
from cond_pdiff.training.zoo.collect import CollectWork
from cond_pdiff.training.zoo.zoo import Zoo

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


def reproduce(
    name: str, tasks_folder: Path, out: Path, recipe: str | Path | None = None, quick: bool = False, execution: Execution | None = None
) -> dict[str, Any]:
    """Measure whatever is missing; write `<out>/<name>.json`, `<out>/<name>.md` and pictures.

    Args:
        name: one of `REPRODUCTIONS`, or `STYLES`. All of them share a folder, with its zoos and generators.
        tasks_folder: a task collection with the recipe's tasks; for `STYLES` a folder of styles.
        out: folder to create or continue.
        recipe: name or path, with the section `reproduce`; default: `DEFAULT_RECIPE`, for `STYLES` `STYLE_RECIPE`.
        quick: the recipe's small form.
        execution: where; default: in this process.

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
        measured = table2.measure(style_recipe, tasks_folder, out, execution)
        result = {"command": line, "quick": quick, **measured}
        write_text(out / f"{name}.json", dump_json(result))
        write_text(out / f"{name}.md", table2.to_markdown(result, line))
        return result
    made, work = REPRODUCTIONS[name], ReproduceWork(name, tasks_folder, out, str(recipe or DEFAULT_RECIPE), quick)
    experiment = work.experiment
    settings = experiment.settings
    open_folder(out, recorded(settings.recipe, (*SECTIONS, *made.sections)))

    def write(values: Mapping[str, Any]) -> dict[str, Any]:
        result = {"command": line, "quick": quick, **made.summarize(experiment, values)}
        write_text(out / f"{name}.json", dump_json(result))
        write_text(out / f"{name}.md", made.to_markdown(result, about(settings, line)))
        made.draw(result, out)
        return result

    def so_far(job: str) -> None:
        if made.partial and job in work.cells and made.summarize(experiment, values := work.values(job))["rows"]:
            write(values)

    run_jobs(work, execution, on_done=so_far).check()
    return write(work.values())


@dataclass
class ReproduceWork(Work):
    """The cells of a table or of figures, and the steps before them, each a job; the runs of zoos, too."""

    label = "reproduce"
    unit = "part"

    name: str
    tasks_folder: Path
    folder: Path
    recipe: str
    quick: bool

    @cached_property
    def experiment(self) -> Experiment:
        """What all parts work with."""
        return Experiment(Settings.read(self.recipe, self.quick), self.tasks_folder, self.folder)

    @cached_property
    def _plan(self) -> Plan:
        return REPRODUCTIONS[self.name].plan(self.experiment)

    @cached_property
    def cells(self) -> dict[str, str]:
        """The file of each cell → its name."""
        return {f"cells/{name}.json": name for name, part in self._plan.items() if isinstance(part, Cell)}

    @cached_property
    def _parts(self) -> Plan:
        return {**self.experiment.steps(), **self._plan, **{path: self._plan[name] for path, name in self.cells.items()}}

    @cached_property
    def _zoos(self) -> dict[str, CollectWork]:
        """Where each zoo is → how it is collected; nothing is loaded yet."""
        return {zoo_path(name, rank): self.experiment.collecting(name, rank) for name, rank in self.experiment.zoos}

    def _collecting(self, zoo: str) -> CollectWork:
        """Return how a zoo is collected; only one keeps its base model in memory."""
        for other, work in self._zoos.items():
            if other != zoo:
                work.close()
        return self._zoos[zoo]

    def _run_of(self, job: str) -> tuple[str, CollectWork, str] | None:
        """Return the zoo that a job is a run of, how it is collected, and the run; None: it is of none."""
        zoo = "/".join(job.split("/")[:2])
        if zoo not in self._zoos or job in self._parts:
            return None
        return zoo, self._collecting(zoo), job.removeprefix(f"{zoo}/")

    def jobs(self) -> list[str]:
        """Return the files of all cells."""
        return list(self.cells)

    def needs(self, job: str) -> list[str]:
        """Return the steps before a cell or a step; before the manifest of a zoo, its runs."""
        zoo = job.removesuffix("/manifest.json")
        if zoo in self._zoos:
            return [f"{zoo}/{run}" for run in self._collecting(zoo).jobs()]
        if (found := self._run_of(job)) is not None:
            zoo, work, run = found
            return [f"{zoo}/{need}" for need in work.needs(run)]
        return list(self._parts[job].needs)

    def adopts(self, job: str) -> bool:
        """Return whether a result counts without a receipt; the manifest of a zoo is there before all its runs are."""
        return not job.endswith("/manifest.json") or not Zoo((self.folder / job).parent).missing

    def run_job(self, job: str) -> None:
        """Measure a cell, make a step, or train an adapter of a zoo."""
        if (found := self._run_of(job)) is not None:
            _, work, run = found
            work.run_job(run)
            return
        part = self._parts[job]
        if isinstance(part, Step):
            part.make()
        else:
            write_text(self.folder / job, dump_json(part.measure()))

    def values(self, last: str | None = None) -> dict[str, Any]:
        """Return the values of all cells; of those that are there, up to the one that was the last to be measured."""
        found: dict[str, Any] = {}
        for path, name in self.cells.items():
            if last is None or (self.folder / path).exists():
                found[name] = read_json(self.folder / path)
            if path == last:
                break
        return found


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
