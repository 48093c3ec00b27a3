"""Work: a list of jobs, each with a receipt; and how a worker does some of them."""

from __future__ import annotations

import contextlib
import faulthandler
import hashlib
import json
import os
import platform
import signal
import sys
import threading
import time
import traceback
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from cond_pdiff.atomic import dump_json, write_text
from cond_pdiff.errors import CondPDiffError

if TYPE_CHECKING:
    from types import FrameType

    from cond_pdiff.training.jobs.store import Store

RECEIPTS, FAILURES = "receipts", "failures"
"""The folders, beside the results, of receipts and of the errors of jobs that were set aside."""

PACKAGES = ("cond-pdiff", "torch", "diffusers", "transformers", "peft")
"""The packages whose versions a receipt tells."""

STDERR = 2
GRACE_SECONDS = 30.0
"""The time that a job which hears no signal has, after its limit, before its process is ended."""


class Work(ABC):
    """What a command does, as a list of jobs of which none needs another, but for those that `needs` names.

    A job is named by its result: the path, below `folder`, of a file or folder that is complete or absent. A subclass is a dataclass of
    settings and paths, which goes to other processes and machines; what it loads (a base model, tasks) it keeps in cached properties,
    which stay where they are.
    """

    label: ClassVar[str]
    """What the progress bar calls it, and one job of it."""
    unit: ClassVar[str]

    folder: Path
    at_once: int = 1
    """The number of jobs that a worker is given at a time."""

    @abstractmethod
    def jobs(self) -> Sequence[str]:
        """Return the names of all jobs, in the order in which one process does them; the same in every process."""

    @abstractmethod
    def run_job(self, job: str) -> None:
        """Make a job's result: the same bytes wherever and in whatever company it is done."""

    def run_jobs(self, jobs: Sequence[str]) -> None:
        """Make the results of several jobs; work that does them in one batch says here how."""
        for job in jobs:
            self.run_job(job)

    def joins(self, first: str, other: str) -> bool:
        """Return whether a worker may be given the other job together with the first."""
        return True

    def needs(self, job: str) -> Sequence[str]:
        """Return the jobs whose results it reads; they are done first, and are not in `jobs` if nobody asks for them by themselves."""
        return ()

    def key(self, job: str) -> str:
        """Return what decides the result beside the settings that the folder itself keeps: with another one it is done again."""
        return ""

    def adopts(self, job: str) -> bool:
        """Return whether a result without a receipt counts: of a process that was killed just then, or of a version without receipts."""
        return True

    def shared(self) -> Sequence[str]:
        """Return the paths below `folder` that workers read and the command itself makes, before any job is done."""
        return ()


@dataclass(frozen=True)
class PerJob:
    """What one job may take.

    Args:
        cpus: threads, and CPUs of a cluster.
        gpus: of a cluster; may be a part of one.
        memory: gigabytes that its process may hold, and that a cluster keeps free for it; 0: any.
        minutes: until it is given up; 0: none.
    """

    cpus: int = 1
    gpus: float = 0.0
    memory: float = 0.0
    minutes: float = 0.0

    def __post_init__(self) -> None:
        if self.cpus < 1 or min(self.gpus, self.memory, self.minutes) < 0:
            raise CondPDiffError(f"a job takes at least one CPU, and no negative amount of anything, got {self}")


@dataclass(frozen=True)
class Outcome:
    """What became of a job; small, as it travels.

    Args:
        error: why it failed; empty: it is done.
        trace: where.
        final: doing it again would end in the same refusal.
    """

    job: str
    error: str = ""
    trace: str = ""
    final: bool = False


class JobTimeout(Exception):
    """A job took longer than it may."""


def receipt_path(work: Work, job: str) -> Path:
    """Return where the receipt of a job is, or will be."""
    return work.folder / RECEIPTS / f"{job}.json"


def failure_path(work: Work, job: str) -> Path:
    """Return where the error of a job is kept that was set aside."""
    return work.folder / FAILURES / f"{job}.json"


def is_done(work: Work, job: str) -> bool:
    """Return whether a job has its result, and a receipt for it or nothing that speaks against it."""
    if not (work.folder / job).exists():
        return False
    try:
        return bool(json.loads(receipt_path(work, job).read_text(encoding="utf-8"))["key"] == work.key(job))
    except FileNotFoundError:
        return work.adopts(job)
    except (ValueError, KeyError, TypeError):
        return False  # damaged: it is done again


def write_receipt(work: Work, job: str, seconds: float | None) -> None:
    """Write what says that a job is done: the hashes of its files, the seconds that it took (None: not known), versions and host."""
    result = work.folder / job
    files = sorted(path for path in result.rglob("*") if path.is_file()) if result.is_dir() else [result]
    hashes = {path.relative_to(work.folder).as_posix(): _sha256(path) for path in files}
    facts = {"job": job, "key": work.key(job), "files": hashes, "seconds": seconds, "host": platform.node(), "versions": _versions()}
    write_text(receipt_path(work, job), dump_json(facts))


def perform(work: Work, jobs: Sequence[str], per_job: PerJob, store: Store | None = None) -> list[Outcome]:
    """Do some jobs in this process, and write their receipts; where one of several fails, all are done one by one, to learn which.

    What has been done meanwhile, by a worker that a command lost sight of, is not done again.
    """
    started = time.monotonic()
    if store:
        store.pull(work.shared())
    todo = [job for job in jobs if not is_done(work, job)]
    memory = 0 if per_job.gpus else per_job.memory  # what a GPU's driver maps is no measure
    try:
        with _time_limit(60 * per_job.minutes * len(todo)), _memory_limit(memory):
            if store:
                store.pull(need for job in todo for need in work.needs(job))
            if todo:
                work.run_jobs(todo)
    except Exception as error:
        if len(todo) > 1:
            return [outcome for job in jobs for outcome in perform(work, [job], per_job, store)]
        if not is_done(work, todo[0]):
            told, final = (str(error), True) if isinstance(error, CondPDiffError) else (f"{type(error).__name__}: {error}", False)
            told = told.removesuffix(": ")
            return [Outcome(todo[0], " ".join(told.split()), traceback.format_exc(), final)]
    seconds = round((time.monotonic() - started) / max(1, len(todo)), 3)
    for job in jobs:
        if job in todo or not receipt_path(work, job).exists():
            write_receipt(work, job, seconds if job in todo else None)
        if store:
            store.push([job, receipt_path(work, job).relative_to(work.folder).as_posix()])  # the receipt last
    return [Outcome(job) for job in jobs]


def set_threads(count: int) -> None:
    """Take sums by so many threads in this process, whether torch is there already or not."""
    os.environ["OMP_NUM_THREADS"] = str(count)
    if torch := sys.modules.get("torch"):
        torch.set_num_threads(count)


@contextlib.contextmanager
def _time_limit(seconds: float) -> Iterator[None]:
    """Raise `JobTimeout` in the block after some seconds; end the process a little later if it does not hear that. 0: no limit."""
    if not seconds or threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(_: int, __: FrameType | None) -> None:
        raise JobTimeout(f"it took longer than {seconds / 60:g} minutes")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    faulthandler.dump_traceback_later(seconds + GRACE_SECONDS, exit=True, file=STDERR)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        faulthandler.cancel_dump_traceback_later()
        signal.signal(signal.SIGALRM, before)


@contextlib.contextmanager
def _memory_limit(gigabytes: float) -> Iterator[None]:
    """Refuse memory to the process in the block, beyond so many gigabytes in all. 0: no limit."""
    if not gigabytes:
        yield
        return
    import resource

    before = resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, (int(gigabytes * 1e9), before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, before)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@cache
def _versions() -> dict[str, Any]:
    found: dict[str, Any] = {"python": platform.python_version()}
    for name in PACKAGES:
        with contextlib.suppress(PackageNotFoundError):
            found[name] = version(name)
    return found
