"""Commands that say what recipes there are and what stands in them, and suggest one: `recipe list`, `recipe show`, `recipe suggest`."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from cond_pdiff.cli.options import DEFAULT_RECIPE, AsJson, Force, Recipe, Tasks
from cond_pdiff.cli.output import hide_loading_bars, hide_peft_warning, report
from cond_pdiff.errors import OutputExistsError

commands = typer.Typer(help="Show recipes: every key, default, range and meaning.")


@commands.command("list")
def list_recipes(as_json: AsJson = False) -> None:
    """List the recipes that come along, with their variants."""
    from cond_pdiff.training.recipe_help import known_recipes

    known = known_recipes()
    report([asdict(recipe) for recipe in known], "\n".join(map(str, known)), as_json)


@commands.command("settings")
def show_settings(as_json: AsJson = False) -> None:
    """Print all that recipes can say, as Markdown."""
    from cond_pdiff.training.recipe_help import SETTINGS, Section, settings_document

    report([asdict(Section.describe(name, {})) for name in SETTINGS], settings_document(), as_json)


@commands.command("show")
def show_recipe(
    name: Annotated[str, typer.Argument(metavar="NAME", help="Recipe name[+VARIANT] or JSON file.")],
    *,
    section: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="Show this section only, also one that the recipe lacks; repeatable (default: all it has)."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Show a recipe's values with all that it could say."""
    from cond_pdiff.training.recipe_help import RecipeHelp

    shown = RecipeHelp.read(name, section or ())
    report(shown.to_json(), shown, as_json)


@commands.command("suggest")
def suggest_recipe(
    *,
    tasks: Tasks,
    out: Annotated[Path, typer.Option(metavar="FILE", help="Recipe to write (JSON).")],
    recipe: Recipe = DEFAULT_RECIPE,
    force: Force = False,
    as_json: AsJson = False,
) -> None:
    """Suggest a recipe for your tasks and this machine.

    Runs, steps and sizes of another recipe are scaled to the number of tasks, and a few steps of everything tell how long all of it takes.
    """
    if out.exists() and not force:
        raise OutputExistsError(f"{out} is already there; choose another name, or --force to replace it")

    from cond_pdiff.atomic import dump_json, write_text
    from cond_pdiff.training.recipe import read_recipe
    from cond_pdiff.training.stages.suggest import suggest

    hide_loading_bars()
    hide_peft_warning()
    made = suggest(read_recipe(recipe), tasks)
    write_text(out, dump_json(made.recipe))
    report({"recipe": str(out), **made.to_json()}, f"{made}\nrecipe     {out}", as_json)
