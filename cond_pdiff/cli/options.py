"""Options that several commands have, each described once, and what checks them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, NamedTuple

import typer

from cond_pdiff.errors import CondPDiffError

if TYPE_CHECKING:
    from cond_pdiff.training.jobs.run import Execution

PER_JOB = ("cpus", "gpus", "memory", "minutes")
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


def parse_per_job(text: str) -> dict[str, float]:
    """Read what a job may take, written NAME=NUMBER, several with commas between."""
    found: dict[str, float] = {}
    for part in text.split(","):
        name, _, number = part.partition("=")
        try:
            found[name.strip()] = float(number)
        except ValueError:
            found = {}
            break
    if not found or not set(found) <= set(PER_JOB) or not all(0 <= number < 1e9 for number in found.values()):
        raise typer.BadParameter(f"expected some of {', '.join(f'{name}=N' for name in PER_JOB)}, got {text!r}")
    return found


def execution(
    executor: Literal["local", "ray"], workers: int, address: str | None, per_job: Mapping[str, float] | None, store: str | None
) -> Execution:
    """Return where a command's jobs are done; `CondPDiffError` says what does not fit."""
    from cond_pdiff.training.jobs.run import Execution, PerJob

    given = dict(per_job or {})
    return Execution(executor, workers, address, PerJob(int(given.pop("cpus", 1)), **given), store)


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

Executor = Annotated[
    Literal["local", "ray"],
    typer.Option("--executor", metavar="local|ray", help="Where jobs are done: on this machine, or on a Ray cluster."),
]
Workers = Annotated[
    int, typer.Option("--workers", metavar="N", min=0, help="Processes (default: this one); on Ray, jobs at a time (all that fit).")
]
Address = Annotated[
    str | None, typer.Option("--address", metavar="HOST:PORT", help="Of a Ray cluster (default: RAY_ADDRESS, or one on this machine).")
]
PerJobOption = Annotated[
    dict[str, float] | None,
    typer.Option(
        "--per-job", parser=parse_per_job, metavar="NAME=N,…", help="Limits of a job: cpus, gpus, memory (GB), minutes (default: cpus=1)."
    ),
]
StoreOption = Annotated[
    str | None, typer.Option("--store", metavar="URL", help="A copy of the folder (s3://…), for machines without a common file system.")
]

Repo = Annotated[str, typer.Option(metavar="OWNER/NAME", help="Hub repository, created if there is none.")]
Private = Annotated[bool, typer.Option("--private", help="Make a new repository private.")]
Revision = Annotated[str | None, typer.Option(metavar="BRANCH", help="Branch to push to, created if there is none.")]
Message = Annotated[str | None, typer.Option(metavar="TEXT", help="Of the commit.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Only say what would be sent.")]
