"""Options that several commands have, each described once, and what checks them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, NamedTuple

import typer

from cond_pdiff.errors import CondPDiffError

DEFAULT_RECIPE = "minilm-text-tasks"


class Shard(NamedTuple):
    """A share of all jobs: every `step`-th one, beginning with number `first`."""

    first: int
    step: int


def parse_shard(text: str) -> Shard:
    """Read a shard that is written I/N."""
    try:
        shard = Shard(*(int(part) for part in text.split("/")))
    except (TypeError, ValueError):
        shard = Shard(-1, 0)
    if not 0 <= shard.first < shard.step:
        raise typer.BadParameter(f"expected I/N with 0 ≤ I < N, got {text!r}")
    return shard


def check_seed(seed: int) -> int:
    """Return the seed, if a thousand seeds from it on are ones of torch's."""
    if not 0 <= seed < 2**63 - 1001:
        raise CondPDiffError(f"seed must be a non-negative 63-bit number, got {seed}")
    return seed


AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
Force = Annotated[bool, typer.Option("--force", help="Replace what an earlier run of the command wrote there.")]
Seed = Annotated[int, typer.Option(metavar="N", callback=check_seed, help="Of all that is drawn at random.")]

AdapterName = Annotated[str, typer.Argument(metavar="ADAPTER", help="Adapter folder, or Hub repository.")]
GeneratorName = Annotated[str, typer.Argument(metavar="GENERATOR", help="Bundled name, folder, or Hub repository.")]
Base = Annotated[str | None, typer.Option(metavar="FOLDER", help="The base model's folder (default: found by its recorded name).")]
Labels = Annotated[
    list[str] | None,
    typer.Option("--label", metavar="NAME", help="A label name; repeatable (default: of the examples, or recorded with the adapter)."),
]
TextColumns = Annotated[
    list[str] | None,
    typer.Option("--text-column", metavar="NAME", help="The column of texts; twice for pairs (default: by a usual name)."),
]
LabelColumn = Annotated[
    str | None, typer.Option("--label-column", metavar="NAME", help="The column of labels (default: by a usual name).")
]

Steps = Annotated[int, typer.Option(metavar="N", help="Denoising steps.")]
GuidanceScale = Annotated[
    float | None, typer.Option(metavar="G", help="Classifier-free guidance; 1 is none (default: the generator's own).")
]

Recipe = Annotated[str, typer.Option(metavar="NAME", help="Recipe name[+VARIANT] or JSON file; see `cond-pdiff recipe`.")]
Tasks = Annotated[Path, typer.Option(metavar="FOLDER", help="Folder of task folders, or of style folders.")]
OwnTasks = Annotated[
    Path | None, typer.Option("--tasks", metavar="FOLDER", help="Folder of task or style folders (default: an imported zoo's own).")
]
ZooFolder = Annotated[Path, typer.Option("--zoo", metavar="FOLDER", help="A finished zoo, made by `collect` or `import-adapters`.")]
RunFolder = Annotated[Path, typer.Option("--out", metavar="FOLDER", help="Run folder to create or continue.")]
ResultFolder = Annotated[Path, typer.Option("--out", metavar="FOLDER", help="Folder to create or continue, for what is measured.")]
Tensorboard = Annotated[bool, typer.Option("--tensorboard", help="Also write tensorboard events.")]
ShardOption = Annotated[
    Shard | None, typer.Option("--shard", parser=parse_shard, metavar="I/N", help="Do every N-th job beginning with I (default: all).")
]

Repo = Annotated[str, typer.Option(metavar="OWNER/NAME", help="Hub repository, created if there is none.")]
Private = Annotated[bool, typer.Option("--private", help="Make a new repository private.")]
Revision = Annotated[str | None, typer.Option(metavar="BRANCH", help="Branch to push to, created if there is none.")]
Message = Annotated[str | None, typer.Option(metavar="TEXT", help="Of the commit.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Only say what would be sent.")]
