"""Commands that say what recipes there are, and what stands in them: `recipe list`, `recipe show`."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

import typer

from cond_pdiff.cli.options import AsJson
from cond_pdiff.cli.output import report

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
