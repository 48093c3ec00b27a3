"""Commands that make generators: `collect`, `import-adapters`, `train`, `tune`, `train-base`, `make-styles`, `import-task`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from cond_pdiff.cli.options import (
    DEFAULT_RECIPE,
    Address,
    AsJson,
    Executor,
    GeneratorName,
    LabelColumn,
    OwnTasks,
    PerJobOption,
    Recipe,
    RunFolder,
    Seed,
    ShardOption,
    StoreOption,
    Tasks,
    Tensorboard,
    TextColumns,
    Workers,
    ZooFolder,
    execution,
)
from cond_pdiff.cli.output import hide_loading_bars, hide_peft_warning, note, report
from cond_pdiff.defaults import STYLE_TEST_PICTURES, STYLE_TRAIN_PICTURES

commands = typer.Typer()


@commands.command()
def collect(
    *,
    recipe: Recipe = DEFAULT_RECIPE,
    tasks: Tasks,
    zoo: Annotated[Path, typer.Option(metavar="FOLDER", help="Folder to create or continue.")],
    shard: ShardOption = None,
    together: Annotated[int, typer.Option(metavar="N", help="Adapters trained side by side in one batch: many on a GPU.")] = 1,
    executor: Executor = "local",
    workers: Workers = 0,
    address: Address = None,
    per_job: PerJobOption = None,
    store: StoreOption = None,
    as_json: AsJson = False,
) -> None:
    """Fine-tune adapters for tasks into a zoo (resumable)."""
    from cond_pdiff.training.config import CollectConfig, parse
    from cond_pdiff.training.recipe import read_recipe
    from cond_pdiff.training.zoo.collect import collect

    hide_peft_warning()
    config = parse(CollectConfig, read_recipe(recipe).get("collect", {}), "collect")
    made = collect(config, tasks, zoo, shard or (0, 1), together, execution(executor, workers, address, per_job, store))
    rest = f"; {len(made.missing)} of {len(made.jobs)} runs are missing, of other shards" if made.missing else ""
    count = sum(len(made.runs(name)) for name in (*made.task_names, *made.unseen_names))
    facts = {"zoo": str(made.folder), "adapters": count, "runs": len(made.jobs), "missing": len(made.missing)}
    report(facts, f"{count} adapters in {made.folder}{rest}", as_json)


@commands.command("import-adapters")
def import_adapters(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="peft folders, and LoRA files of diffusers, kohya and ComfyUI.")],
    *,
    conditions: Annotated[Path, typer.Option(metavar="FILE", help="CSV or JSON Lines: name, and text, image or vector.")],
    zoo: Annotated[Path, typer.Option(metavar="FOLDER", help="Folder to create.")],
    base: Annotated[str | None, typer.Option(metavar="NAME", help="Base model: Hub name or folder (default: as recorded).")] = None,
    family: Annotated[str | None, typer.Option(metavar="NAME", help="Its family (default: told by the modules' names).")] = None,
    rank: Annotated[int | None, typer.Option(metavar="R", min=1, help="Rank of all adapters (default: the largest).")] = None,
    as_json: AsJson = False,
) -> None:
    """Make a zoo of adapters that exist.

    They are for one base model and adapt the same modules. Each gets its canonical form, which keeps its update.
    """
    from cond_pdiff.hub import Backbone
    from cond_pdiff.training.zoo.import_adapters import import_adapters

    made = import_adapters(folder, conditions, zoo, Backbone(base) if base else None, family, rank)
    errors = [run.facts["delta_error"] for name in made.task_names for run in made.runs(name)]
    facts = {
        "zoo": str(made.folder), "adapters": len(errors), "condition": made.facts["condition"], "family": made.family.name,
        "rank": made.facts["lora"]["rank"], "largest_error": max(errors),
    }  # fmt: skip
    told = f"{len(errors)} adapters in {made.folder}, of rank {facts['rank']}, each for a {facts['condition']}; family {facts['family']}"
    report(facts, f"{told}; updates are kept to {max(errors):.1e}", as_json)


@commands.command()
def train(
    *,
    recipe: Recipe = DEFAULT_RECIPE,
    zoo: ZooFolder,
    tasks: OwnTasks = None,
    out: RunFolder,
    tensorboard: Tensorboard = False,
    as_json: AsJson = False,
) -> None:
    """Train a generator on a zoo (resumable).

    In the end it is checked on its own tasks; what is wrong with it is told loudly.
    """
    from cond_pdiff.training.processes import processes
    from cond_pdiff.training.recipe import read_recipe
    from cond_pdiff.training.stages.check import check_generator
    from cond_pdiff.training.stages.train import train

    generator = train(read_recipe(recipe), zoo, tasks, out, tensorboard)
    if not processes().is_main_process:
        return
    hide_loading_bars()
    check = check_generator(generator, zoo, tasks, out)
    for wrong in check.warnings:
        print(f"WARNING: THIS GENERATOR IS NO GOOD: {wrong}", file=sys.stderr)
    told = (
        f"generator  {generator}\non its own  {check.routed:.0%} of {check.generated} generated adapters are nearest to their task; "
        f"the autoencoder loses {check.reconstruction_error:.0%}; threshold {check.threshold:.2f}"
    )
    report({"generator": str(generator), "check": check.to_json()}, told, as_json)


@commands.command()
def tune(
    generator: GeneratorName,
    *,
    recipe: Recipe = DEFAULT_RECIPE,
    tasks: Tasks,
    out: RunFolder,
    tensorboard: Tensorboard = False,
    as_json: AsJson = False,
) -> None:
    """Go on training a generator on task loss (resumable).

    It is a generator of adapters for texts or for a language model; the loss of its tasks is what they are for.
    """
    from cond_pdiff.training.processes import processes
    from cond_pdiff.training.recipe import read_recipe
    from cond_pdiff.training.stages.tune import tune

    hide_loading_bars()
    tuned = tune(read_recipe(recipe), generator, tasks, out, tensorboard)
    report({"generator": str(tuned)}, f"generator  {tuned}", as_json, processes().print)


@commands.command("train-base")
def train_base(*, recipe: Recipe = "pixart-mini", out: RunFolder, tensorboard: Tensorboard = False, as_json: AsJson = False) -> None:
    """Train a small text-to-image base model (resumable)."""
    from cond_pdiff.training.processes import processes
    from cond_pdiff.training.recipe import read_recipe
    from cond_pdiff.training.text_to_image.train import train_base

    base = train_base(read_recipe(recipe), out, tensorboard)
    report({"base": str(base)}, f"base model {base}", as_json, processes().print)


@commands.command("make-styles")
def make_styles(
    *,
    images: Annotated[Path, typer.Option(metavar="FOLDER", help="PNG, JPEG or WebP pictures.")],
    out: Annotated[Path, typer.Option(metavar="FOLDER", help="Folder to create or continue.")],
    train: Annotated[int, typer.Option(metavar="N", help="Training pictures a style.")] = STYLE_TRAIN_PICTURES,
    test: Annotated[int, typer.Option(metavar="N", help="Held-out pictures a style.")] = STYLE_TEST_PICTURES,
    seed: Seed = 0,
    recoloured: Annotated[int, typer.Option(metavar="N", help="Further styles a picture, in other colours.")] = 0,
    as_json: AsJson = False,
) -> None:
    """Make style folders from pictures (resumable).

    A style-transfer network draws scenes in the style of every picture.
    """
    from cond_pdiff.training.tasks.make_styles import make_styles

    styles = make_styles(images, out, train, test, seed, recoloured)
    report({"folder": str(out), "styles": [style.name for style in styles]}, f"{len(styles)} styles in {out}", as_json)


@commands.command("import-task")
def import_task(
    source: Annotated[
        list[str],
        typer.Argument(
            metavar="SOURCE", help="CSV, TSV or JSON Lines files, a folder of them, or the Hub's name of a data set."
        ),
    ],
    *,
    description: Annotated[str, typer.Option(metavar="TEXT", help="What to decide, in a sentence or two.")],
    text_column: TextColumns = None,
    label_column: LabelColumn = None,
    out: Annotated[Path, typer.Option(metavar="FOLDER", help="Task folder to create.")],
    as_json: AsJson = False,
) -> None:
    """Make a task folder from texts with labels.

    Of several files, the names say which is train, validation or test. Where there is no test split, one is made.
    """
    from cond_pdiff.training.tasks.import_task import import_task

    made = import_task(source, out, description, text_column or (), label_column)
    for told in made.notes:
        note(told)
    rows = ", ".join(f"{count} {split} rows" for split, count in made.rows.items())
    facts = {"task": str(made.task.folder), "labels": list(made.task.labels), "rows": dict(made.rows), "notes": list(made.notes)}
    report(facts, f"task       {made.task.folder} with the labels {', '.join(made.task.labels)}\nrows       {rows}", as_json)
