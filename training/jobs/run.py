"""`run_jobs`: do all jobs of a command that are not done yet, with any executor. What fails three times is set aside."""

from __future__ import annotations

import heapq
import os
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, Protocol, Self

from tqdm.auto import tqdm

from cond_pdiff.atomic import dump_json, write_text
from cond_pdiff.errors import CondPDiffError, TrainingError
from cond_pdiff.training.jobs.store import Store
from cond_pdiff.training.jobs.work import Outcome, PerJob, Work, failure_path, is_done, receipt_path, write_receipt

MAX_FAILURES = 3
"""The number of failures (an error, a limit that was passed, a kill for memory) after which a job is set aside."""
MAX_LOSSES = 6
"""The number of workers that may die under a job before it is set aside: what kills its worker each time is the job's own fault."""

WAIT_SECONDS = 1.0
SEEN_SECONDS = 60.0

Bundle = tuple[str, ...]
"""Jobs that a worker is given together."""


@dataclass(frozen=True)
class Lost:
    """What became of a bundle whose worker died: a process, or the machine that it was on."""

    reason: str


class Executor(Protocol):
    """Where jobs are done: in this process, in several of this machine, or on a cluster."""

    @property
    def free(self) -> int:
        """The number of bundles that may be submitted now; what is out is kept few, so that a long list costs nothing."""

    def submit(self, bundle: Bundle) -> None:
        """Give a bundle to a worker."""

    def wait(self, seconds: float) -> list[tuple[Bundle, list[Outcome] | Lost]]:
        """Return what has ended, at the latest after some seconds."""

    def __enter__(self) -> Self: ...

    def __exit__(self, *error: object) -> None: ...


@dataclass(frozen=True)
class Execution:
    """Where the jobs of a command are done, and what each may take.

    Args:
        executor: "local", on this machine; or "ray", on a cluster.
        workers: processes on this machine (0: this one does all); on a cluster the most jobs at a time (0: as many as fit).
        address: of a Ray cluster; None: `RAY_ADDRESS`, or else one is started on this machine.
        per_job: see `PerJob`.
        store: URL of a folder that all machines reach (`s3://…`, or whatever fsspec knows), where they share no file system.

    Raises:
        CondPDiffError: settings that do not fit each other.
    """

    executor: Literal["local", "ray"] = "local"
    workers: int = 0
    address: str | None = None
    per_job: PerJob = field(default_factory=PerJob)
    store: str | None = None

    def __post_init__(self) -> None:
        if self.executor == "local" and (self.address or self.per_job.gpus):
            raise CondPDiffError("an address, and GPUs a job, are for the executor ray; on this machine, jobs use what it has")
        if self.workers < 0:
            raise CondPDiffError(f"workers must be at least 0, got {self.workers}")

    @property
    def is_elsewhere(self) -> bool:
        """Whether jobs are done in other processes than this one."""
        return self != Execution()

    def open(self, work: Work) -> Executor:
        """Return where the jobs are done; a context manager."""
        from cond_pdiff.training.jobs.local import Here, Processes

        if self.executor == "ray":
            from cond_pdiff.training.jobs.cluster import OnRay

            return OnRay(work, self)
        return Processes(work, self) if self.is_elsewhere else Here(work)


@dataclass
class Report:
    """What became of all jobs: the number that are done, and the errors of those that were set aside."""

    done: int
    failed: dict[str, str]
    folder: Path

    def check(self) -> None:
        """Raise `TrainingError` that tells what failed, unless all is done."""
        if self.failed:
            job, error = next(iter(self.failed.items()))
            raise TrainingError(
                f"{len(self.failed)} of {self.done + len(self.failed)} jobs failed and were set aside, {job} among them: {error}; "
                f"all errors are in {self.folder / 'failures'}; the same command tries these jobs again"
            )


def run_jobs(
    work: Work, execution: Execution | None = None, shard: tuple[int, int] = (0, 1), on_done: Callable[[str], None] = lambda _: None
) -> Report:
    """Do every job that is not done yet; a command that is killed, and given again, goes on with what is left.

    Args:
        execution: where; default: in this process.
        shard: (i, n) does every n-th job beginning with i, so that n commands can share the work. What a job needs of another shard is not
            waited for.
        on_done: is told each job as soon as it is done.
    """
    execution = execution or Execution()
    store = Store(execution.store, work.folder) if execution.store else None
    asked = list(work.jobs())[shard[0] :: shard[1]]
    if store:
        store.push(work.shared())
        store.pull_results()
    plan = _Plan(work, asked, with_needs=shard[1] == 1)
    if not plan.todo:
        return Report(plan.done, {}, work.folder)
    with (
        tqdm(initial=plan.done, total=plan.done + len(plan.todo), desc=work.label, unit=work.unit) as bar,
        execution.open(work) as executor,
    ):
        while plan.left:
            while executor.free > 0 and (bundle := plan.next()):
                executor.submit(bundle)
            for bundle, ended in executor.wait(WAIT_SECONDS):
                for job in plan.settle(bundle, ended):
                    if store:
                        store.pull([job, receipt_path(work, job).relative_to(work.folder).as_posix()])
                    _await(work.folder / job)
                    on_done(job)
            bar.n = plan.done
            bar.set_postfix({"failed": len(plan.failed)} if plan.failed else {}, refresh=False)
            bar.update(0)
    return Report(plan.done, plan.failed, work.folder)


def _await(path: Path) -> None:
    """Wait until another machine's file is seen here: a network's file system may take its time."""
    until = time.monotonic() + SEEN_SECONDS
    while not path.exists() and time.monotonic() < until:
        time.sleep(0.1)


class _Plan:
    """The jobs that are left, in order, and what is known of those that failed."""

    def __init__(self, work: Work, asked: Sequence[str], with_needs: bool) -> None:
        self.work, self.done, self.failed = work, 0, dict[str, str]()
        self.todo: dict[str, int] = {}  # → place in the order
        self._needed_by: dict[str, list[str]] = defaultdict(list)
        self._missing: Counter[str] = Counter()
        self._failures: Counter[str] = Counter()
        self._losses: Counter[str] = Counter()
        self._alone: set[str] = set()
        self._add(asked, with_needs)
        for job in self.todo:
            for need in work.needs(job):
                if need in self.todo:
                    self._needed_by[need].append(job)
                    self._missing[job] += 1
        self.left = len(self.todo)
        self._ready = [(place, job) for job, place in self.todo.items() if not self._missing[job]]
        heapq.heapify(self._ready)

    def _add(self, jobs: Sequence[str], with_needs: bool) -> None:
        """Plan the jobs of these that are not done, behind what they need."""
        listing = _Listing(self.work)
        stack = [(job, False) for job in reversed(jobs)]
        seen: set[str] = set()
        while stack:
            job, behind_needs = stack.pop()
            if behind_needs:
                self.todo.setdefault(job, len(self.todo))
            elif job not in seen:
                seen.add(job)
                if listing.is_done(job):
                    self.done += 1
                else:
                    stack.append((job, True))
                    stack += [(need, False) for need in reversed(self.work.needs(job))] if with_needs else []

    def next(self) -> Bundle:
        """Return the jobs that are done next, together; none if all are out, or wait for others."""
        bundle: list[str] = []
        while self._ready and len(bundle) < self.work.at_once:
            job = self._ready[0][1]
            if bundle and (job in self._alone or bundle[0] in self._alone or not self.work.joins(bundle[0], job)):
                break
            bundle.append(heapq.heappop(self._ready)[1])
        return tuple(bundle)

    def settle(self, bundle: Bundle, ended: list[Outcome] | Lost) -> list[str]:
        """Note what became of a bundle; return the jobs that are done."""
        done: list[str] = []
        if isinstance(ended, Lost):
            for job in bundle:
                self._losses[job] += 1
                if self._losses[job] > 1:  # of several, nobody knows whose fault it was
                    self._alone.add(job)
                over = len(bundle) == 1 and self._losses[job] >= MAX_LOSSES
                self._again(job, f"its worker was lost {self._losses[job]} times: {ended.reason}", over)
            return done
        for outcome in ended:
            if outcome.error:
                self._failures[outcome.job] += 1
                self._alone.add(outcome.job)
                over = outcome.final or self._failures[outcome.job] >= MAX_FAILURES
                self._again(outcome.job, outcome.error, over, outcome.trace)
                continue
            done.append(outcome.job)
            self.done += 1
            self.left -= 1
            failure_path(self.work, outcome.job).unlink(missing_ok=True)
            for other in self._needed_by[outcome.job]:
                self._missing[other] -= 1
                if not self._missing[other]:
                    heapq.heappush(self._ready, (self.todo[other], other))
        return done

    def _again(self, job: str, error: str, over: bool, trace: str = "") -> None:
        """Put a job behind all others; or aside, with all that need it."""
        if not over:
            later = (self._failures[job] + self._losses[job]) * len(self.todo)
            heapq.heappush(self._ready, (self.todo[job] + later, job))
            return
        self.failed[job] = error
        self.left -= 1
        attempts = self._failures[job] + self._losses[job]
        write_text(failure_path(self.work, job), dump_json({"job": job, "error": error, "attempts": attempts, "trace": trace}))
        for other in self._needed_by[job]:
            if other not in self.failed:
                self._again(other, f"it needs {job}, which failed", over=True)


class _Listing:
    """What a folder holds, each of its folders read once: asking for a hundred thousand files one by one takes minutes on a network."""

    def __init__(self, work: Work) -> None:
        self.work, self._names = work, dict[Path, set[str]]()

    def is_done(self, job: str) -> bool:
        """Return whether a job is done; one without a receipt that counts gets it now."""
        if not self._holds(self.work.folder / job):
            return False
        has_receipt = self._holds(receipt_path(self.work, job))
        if not is_done(self.work, job) if self.work.key(job) or not has_receipt else False:
            return False
        if not has_receipt:
            write_receipt(self.work, job, None)
        return True

    def _holds(self, path: Path) -> bool:
        if path.parent not in self._names:
            self._names[path.parent] = set(_entries(path.parent))
        return path.name in self._names[path.parent]


def _entries(folder: Path) -> Iterable[str]:
    try:
        return os.listdir(folder)
    except (FileNotFoundError, NotADirectoryError):
        return ()
