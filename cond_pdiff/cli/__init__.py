"""The command `cond-pdiff`: commands parse, call the library, and print. Heavy imports happen inside them, so that help is instant."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from cond_pdiff import __version__
from cond_pdiff.cli import adapters, ask, classify, evaluate, generate, generators, push, recipes, train
from cond_pdiff.errors import CondPDiffError

PROGRAM = "cond-pdiff"


class Commands(TyperGroup):
    """The group of all commands: errors that a user can meet are printed on one line and give exit status 1."""

    def invoke(self, ctx: Any) -> Any:
        """Run the command that was asked for."""
        try:
            return super().invoke(ctx)
        except (CondPDiffError, OSError) as error:  # OSError: no space left, no permission …
            self._stop(f"error: {' '.join(str(error).split())}", 1)
        except ModuleNotFoundError as error:
            self._stop(f"error: this needs the package {error.name}: pip install 'cond-pdiff[train]'", 1)
        except KeyboardInterrupt:
            self._stop("interrupted; finished parts are kept, run the same command again to go on", 130)

    @staticmethod
    def _stop(message: str, status: int) -> None:
        print(f"{PROGRAM}: {message}", file=sys.stderr)
        raise typer.Exit(status)


def _version(asked: bool) -> None:
    if asked:
        print(f"{PROGRAM} {__version__}")
        raise typer.Exit


app = typer.Typer(
    cls=Commands,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for module in (generate, classify, ask, adapters, generators, push, train, evaluate):
    app.add_typer(module.commands)
app.add_typer(recipes.commands, name="recipe")


@app.callback()
def options(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and exit.")] = False,
) -> None:
    """Turn a task description or a style image into a LoRA adapter."""


command = typer.main.get_command(app)


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return its exit status: 0; 1 for an error, 2 for a wrong usage, both explained on stderr; 130 for an interrupt."""
    try:
        command.main(None if argv is None else list(argv), PROGRAM)
    except SystemExit as stop:  # always
        return int(stop.code or 0)
    return 0
