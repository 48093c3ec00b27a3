"""Commands that say what generators there are: `list`, `info`."""

from __future__ import annotations

import typer

from cond_pdiff.cli.options import AsJson, GeneratorName
from cond_pdiff.cli.output import report, table

commands = typer.Typer()


@commands.command("list")
def list_known(as_json: AsJson = False) -> None:
    """List the generators that work offline.

    These are the bundled ones and those in the Hub cache.
    """
    from cond_pdiff.generator_info import known_generators

    known = known_generators()
    rows = [("generator", "makes", "of", "size", "base model")]
    for one in known:
        name = one.name + (f" at {one.revision[:8]}" if one.revision else "")
        kind = one.condition
        rows.append((name, f"{one.makes} adapters", f"{len(one.tasks)} {kind.noun}s", f"{one.megabytes:.1f} MB", one.base.repo_id))
    report([one.to_json() for one in known], table(rows), as_json)


@commands.command()
def info(generator: GeneratorName, *, as_json: AsJson = False) -> None:
    """Say what a generator makes, and what was measured."""
    from cond_pdiff.generator_info import GeneratorInfo

    found = GeneratorInfo.read(generator)
    report(found.to_json(), found, as_json)
