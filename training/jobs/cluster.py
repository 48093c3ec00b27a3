"""The executor on a Ray cluster: tasks, or an actor a GPU; only names of jobs and their outcomes travel.

Ray's own retries are off. It repeats a task whose worker was killed for memory for ever (`task_oom_retries`), and tells nobody how often it
has tried; here, `run_jobs` counts. Nothing is kept in Ray's object store, as objects die with the command that made them, and no
environment or working folder is shipped, as those are limited in size: every machine has the package installed.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import socket
import sys
import time
from typing import Any, Self

from cond_pdiff.errors import CondPDiffError
from cond_pdiff.training.jobs.run import Bundle, Execution, Lost
from cond_pdiff.training.jobs.store import Store
from cond_pdiff.training.jobs.work import Outcome, Work, perform, set_threads

AHEAD = 2
"""The number of bundles that are out for each that can run: one runs, one waits behind it."""
LEAST_OUT = 4
"""The number that is out at least: what waits makes a cluster that can grow do so."""
CONNECT_SECONDS = 10.0
COUNT_SECONDS = 5.0
"""The time for which the size of the cluster is taken as known."""


class OnRay:
    """A Ray cluster, begun on this machine if there is none."""

    def __init__(self, work: Work, execution: Execution) -> None:
        # Before Ray is imported: it would ship the environment of `uv run` to all workers, and make them build it.
        os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # it would tell its makers of the cluster
        os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # tasks without GPUs see the machine's as before
        try:
            import ray
        except ModuleNotFoundError as error:
            raise CondPDiffError("the executor ray needs the package ray: pip install 'cond-pdiff[ray]'") from error
        self.ray: Any = ray
        self.work, self.execution = dataclasses.replace(work), execution  # type: ignore[type-var]  # all work is a dataclass; without its cache
        per_job = execution.per_job
        resources = {"num_cpus": per_job.cpus, "num_gpus": per_job.gpus, "memory": int(per_job.memory * 1e9) or None}
        self._task = self.ray.remote(_do).options(**resources, max_retries=0, retry_exceptions=False, name=work.label)
        self._actor = self.ray.remote(_Worker).options(**resources, max_restarts=0, max_task_retries=0, name=None)
        self._out: dict[Any, tuple[Bundle, Any]] = {}  # reference → bundle and actor
        self._idle: list[Any] = []
        self._counted = (0, -COUNT_SECONDS)
        self._until = contextlib.ExitStack()

    def __enter__(self) -> Self:
        # An environment variable, as Ray sets it to the CPUs of the first task of a worker only if it is not set.
        threads = {"env_vars": {"OMP_NUM_THREADS": str(self.execution.per_job.cpus)}}
        _check_address(self.execution.address)
        try:
            self._until.enter_context(contextlib.redirect_stdout(sys.stderr))  # where Ray tells of workers that died
            self.ray.init(self.execution.address, runtime_env=threads, log_to_driver=False, logging_level=logging.WARNING)
            self._until.callback(self.ray.shutdown)  # and with it, what is running: it has no receipt yet, and is done again
        except ConnectionError as error:
            self._until.close()
            raise CondPDiffError(f"the Ray cluster cannot be reached: {error}") from error
        if not self._fit():
            print(f"note: no machine of the cluster has room for {self.execution.per_job}; waiting for one", file=sys.stderr)
        return self

    def __exit__(self, *error: object) -> None:
        self._until.close()

    @property
    def free(self) -> int:
        """See `Executor`."""
        fit = self._fit() if self.execution.per_job.gpus else max(LEAST_OUT, AHEAD * self._fit())
        return min(fit, self.execution.workers or fit) - len(self._out)

    def submit(self, bundle: Bundle) -> None:
        """See `Executor`."""
        if not self.execution.per_job.gpus:
            self._out[self._task.remote(self.work, self.execution, bundle)] = bundle, None
            return
        actor = self._idle.pop() if self._idle else self._actor.remote(self.work, self.execution)
        self._out[actor.do.remote(bundle)] = bundle, actor

    def wait(self, seconds: float) -> list[tuple[Bundle, list[Outcome] | Lost]]:
        """See `Executor`."""
        ready, rest = self.ray.wait(list(self._out), timeout=seconds) if self._out else ([], [])
        if rest:
            ready += self.ray.wait(rest, num_returns=len(rest), timeout=0)[0]
        if not self._out:
            time.sleep(seconds)
        return [self._end(reference) for reference in ready]

    def _end(self, reference: Any) -> tuple[Bundle, list[Outcome] | Lost]:
        bundle, actor = self._out.pop(reference)
        try:
            outcomes = self.ray.get(reference)
        except self.ray.exceptions.OutOfMemoryError:
            if len(bundle) > 1:
                return bundle, Lost("Ray killed it for memory")
            return bundle, [Outcome(bundle[0], "Ray killed it, as the machine ran out of memory")]
        except self.ray.exceptions.RayTaskError as error:  # not of the job, whose errors `perform` catches: the machine lacks something
            return bundle, [Outcome(job, f"the machine cannot do it: {error.cause!r}", str(error)) for job in bundle]
        except self.ray.exceptions.RayError as error:
            return bundle, Lost(" ".join(f"{type(error).__name__}: {error}".split())[:500])
        if actor is not None:
            self._idle.append(actor)
        return bundle, outcomes

    def _fit(self) -> int:
        """Return the number of bundles that the machines which are there can do at a time."""
        number, counted = self._counted
        if time.monotonic() - counted >= COUNT_SECONDS:
            per_job = self.execution.per_job
            wanted = {"CPU": per_job.cpus, "GPU": per_job.gpus, "memory": per_job.memory * 1e9}
            nodes = [node["Resources"] for node in self.ray.nodes() if node["Alive"]]
            number = sum(min(int(node.get(name, 0) / amount) for name, amount in wanted.items() if amount) for node in nodes)
            self._counted = number, time.monotonic()
        return number


def _check_address(address: str | None) -> None:
    """Refuse an address where nobody listens: Ray would wait there for minutes."""
    host, _, port = (address or "").rpartition(":")
    if port.isdigit() and "/" not in host:
        try:
            socket.create_connection((host.strip("[]"), int(port)), CONNECT_SECONDS).close()
        except OSError as error:
            raise CondPDiffError(f"there is no Ray cluster at {address} ({error}); `ray start --head` begins one") from error


_kept: tuple[str, Work] | None = None


def _do(work: Work, execution: Execution, bundle: Bundle) -> list[Outcome]:
    """Do a bundle in a process that Ray keeps for the next one: so is what the work has loaded."""
    global _kept
    if _kept is None or _kept[0] != repr(work):
        _kept = repr(work), work
    set_threads(execution.per_job.cpus)
    store = Store(execution.store, work.folder) if execution.store else None
    return perform(_kept[1], bundle, execution.per_job, store)


class _Worker:
    """An actor that holds a GPU, and its base model on it."""

    def __init__(self, work: Work, execution: Execution) -> None:
        self.work, self.execution = work, execution

    def do(self, bundle: Bundle) -> list[Outcome]:
        """Do a bundle."""
        return _do(self.work, self.execution, bundle)
