"""Work that needs no model: files of a few bytes, made in ways that go wrong when they are told to."""

from __future__ import annotations

import contextlib
import hashlib
import os
import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cond_pdiff.atomic import write_bytes
from cond_pdiff.errors import TrainingError
from cond_pdiff.training.jobs.work import Work


@dataclass
class PlainWork(Work):
    """Jobs `made/<n>` and what they do beside their result.

    Args:
        folder: gets the results, and in `log/` a file for each time that a job began.
        count: jobs.
        seconds: that each takes.
        wrong: number of a job → "fail", "refuse", "hang", "deaf", "eat", "die", or "die once".
        chain: each job needs the one before it.
    """

    label = "plain"
    unit = "file"

    folder: Path
    count: int = 5
    seconds: float = 0.0
    wrong: tuple[tuple[int, str], ...] = ()
    chain: bool = False
    at_once: int = 1
    salt: str = ""

    def jobs(self) -> Sequence[str]:
        return [f"made/{number}" for number in range(self.count)]

    def needs(self, job: str) -> Sequence[str]:
        number = int(job.rpartition("/")[2])
        return [f"made/{number - 1}"] if self.chain and number else []

    def key(self, job: str) -> str:
        return self.salt

    def run_job(self, job: str) -> None:
        number = int(job.rpartition("/")[2])
        begun = self.folder / "log" / str(number)
        begun.mkdir(parents=True, exist_ok=True)
        (begun / f"{os.getpid()}-{time.monotonic_ns()}").touch()
        trouble = dict(self.wrong).get(number)
        if trouble == "fail":
            raise RuntimeError("it always fails")
        if trouble == "refuse":
            raise TrainingError("the data are wrong")
        if trouble == "hang":
            time.sleep(3600)
        while trouble == "deaf":
            with contextlib.suppress(Exception):
                time.sleep(3600)
        if trouble == "eat":
            held = [bytearray(50_000_000) for _ in range(400)]
            raise AssertionError(f"{len(held)} pieces were there")
        if trouble == "die" or (trouble == "die once" and len(list(begun.iterdir())) == 1):
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(self.seconds)
        write_bytes(self.folder / job, content(number))

    def begun(self, number: int) -> int:
        """How often the job began."""
        return len(list((self.folder / "log" / str(number)).iterdir()))


def content(number: int) -> bytes:
    return hashlib.sha256(str(number).encode()).digest()


def check(work: PlainWork, but: Sequence[int] = ()) -> None:
    """All is done, with the right bytes, but for some jobs."""
    for number in range(work.count):
        path = work.folder / "made" / str(number)
        assert path.exists() == (number not in but)
        assert number in but or path.read_bytes() == content(number)
        assert (work.folder / "receipts" / "made" / f"{number}.json").exists() == (number not in but)
