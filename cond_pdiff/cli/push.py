"""Commands that share on the Hub: `push`, `push-zoo`, `push-space`."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cond_pdiff.cli.options import AsJson, DryRun, Message, Private, Repo, Revision
from cond_pdiff.cli.output import report

if TYPE_CHECKING:
    from cond_pdiff.hub import Push

commands = typer.Typer()


@commands.command()
def push(
    folder: Annotated[str, typer.Argument(metavar="FOLDER", help="A generator (folder or bundled name), or an adapter folder.")],
    *,
    repo: Repo,
    private: Private = False,
    revision: Revision = None,
    message: Message = None,
    dry_run: DryRun = False,
    as_json: AsJson = False,
) -> None:
    """Push a generator or an adapter, with its card."""
    from cond_pdiff.publish import push

    _report(push(folder, repo, **_options(private, revision, message, dry_run)), as_json)


@commands.command("push-zoo")
def push_zoo(
    zoo: Annotated[Path, typer.Argument(metavar="ZOO", help="A finished zoo.")],
    *,
    repo: Repo,
    private: Private = False,
    revision: Revision = None,
    message: Message = None,
    dry_run: DryRun = False,
    as_json: AsJson = False,
) -> None:
    """Push a zoo as a data set (resumable)."""
    from cond_pdiff.training.zoo.push import push_zoo
    from cond_pdiff.training.zoo.zoo import Zoo

    _report(push_zoo(Zoo(zoo), repo, **_options(private, revision, message, dry_run)), as_json)


@commands.command("push-space")
def push_space(
    *,
    app: Annotated[Path, typer.Option(metavar="FILE", help="The demo.")] = Path("app.py"),
    generator: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="A Hub repository to show instead of a bundled one; repeatable.")
    ] = None,
    repo: Repo,
    private: Private = False,
    revision: Revision = None,
    message: Message = None,
    dry_run: DryRun = False,
    as_json: AsJson = False,
) -> None:
    """Push the demo as a Space."""
    from cond_pdiff.publish import push_space

    _report(push_space(app, repo, tuple(generator or ()), **_options(private, revision, message, dry_run)), as_json)


def _options(private: bool, revision: str | None, message: str | None, dry_run: bool) -> dict[str, Any]:
    """Return what `push_folder` takes; not private leaves a repository as it is, and no message is the library's own."""
    options = {"private": private or None, "revision": revision, "dry_run": dry_run}
    return options | ({"commit_message": message} if message else {})


def _report(made: Push, as_json: bool) -> None:
    report(asdict(made), made, as_json)
