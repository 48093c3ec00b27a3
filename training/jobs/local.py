"""Executors of this machine: the command's own process, or several."""

from __future__ import annotations

import contextlib
import dataclasses
import multiprocessing
import signal
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from typing import Self

from cond_pdiff.training.jobs.run import Bundle, Execution, Lost
from cond_pdiff.training.jobs.store import Store
from cond_pdiff.training.jobs.work import Outcome, PerJob, Work, perform, set_threads


class Here:
    """The command's own process, which does one bundle after another."""

    def __init__(self, work: Work) -> None:
        self.work, self._out = work, list[Bundle]()

    @property
    def free(self) -> int:
        """See `Executor`."""
        return 1 - len(self._out)

    def submit(self, bundle: Bundle) -> None:
        """See `Executor`."""
        self._out.append(bundle)

    def wait(self, seconds: float) -> list[tuple[Bundle, list[Outcome] | Lost]]:
        """Do what was submitted."""
        bundle = self._out.pop()
        return [(bundle, perform(self.work, bundle, PerJob()))]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        pass


class Processes:
    """Processes of this machine, each with as many threads as a job may have. One that dies is replaced."""

    def __init__(self, work: Work, execution: Execution) -> None:
        self.work, self.execution = dataclasses.replace(work), execution  # type: ignore[type-var]  # all work is a dataclass; without its cache
        self._out: dict[Connection, Bundle] = {}
        self._idle: list[Connection] = []
        self._processes: dict[Connection, SpawnProcess] = {}

    @property
    def free(self) -> int:
        """See `Executor`."""
        return max(1, self.execution.workers) - len(self._out)

    def submit(self, bundle: Bundle) -> None:
        """See `Executor`."""
        pipe = self._idle.pop() if self._idle else self._start()
        self._out[pipe] = bundle
        with contextlib.suppress(OSError):  # it died while it had nothing to do; `wait` finds out
            pipe.send(bundle)

    def wait(self, seconds: float) -> list[tuple[Bundle, list[Outcome] | Lost]]:
        """See `Executor`."""
        ended: list[tuple[Bundle, list[Outcome] | Lost]] = []
        for pipe in wait(list(self._out), seconds):
            assert isinstance(pipe, Connection)
            bundle = self._out.pop(pipe)
            try:
                ended.append((bundle, pipe.recv()))
                self._idle.append(pipe)
            except (EOFError, OSError):
                process = self._processes.pop(pipe)
                process.join()
                ended.append((bundle, Lost(f"its process ended with {_exit(process.exitcode)}")))
                pipe.close()
        return ended

    def _start(self) -> Connection:
        context = multiprocessing.get_context("spawn")
        pipe, end = context.Pipe()
        process = context.Process(target=_serve, args=(end, self.work, self.execution), name="cond-pdiff worker")
        process.start()
        end.close()  # so that the pipe ends when the process does
        self._processes[pipe] = process
        return pipe

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        for process in self._processes.values():
            process.terminate()
        for process in self._processes.values():
            process.join()


def _serve(pipe: Connection, work: Work, execution: Execution) -> None:
    """Do the bundles that come through the pipe, until the command that sends them is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the command, which then ends this process
    set_threads(execution.per_job.cpus)
    store = Store(execution.store, work.folder) if execution.store else None
    while True:
        try:
            bundle = pipe.recv()
        except EOFError:
            return
        pipe.send(perform(work, bundle, execution.per_job, store))


def _exit(code: int | None) -> str:
    return f"signal {-code}" if code is not None and code < 0 else f"status {code}"
