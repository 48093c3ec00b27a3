from __future__ import annotations

import hashlib
import json
import os
import platform
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from plain_work import PlainWork, check

from cond_pdiff.errors import CondPDiffError, TrainingError
from cond_pdiff.training.jobs.run import MAX_LOSSES, Execution, run_jobs
from cond_pdiff.training.jobs.work import PerJob

TESTS = Path(__file__).parent


def test_every_job_leaves_its_result_and_a_receipt(tmp_path: Path) -> None:
    work = PlainWork(tmp_path)
    told: list[str] = []
    report = run_jobs(work, on_done=told.append)
    check(work)
    report.check()
    assert (report.done, told) == (5, list(work.jobs()))
    receipt = json.loads((tmp_path / "receipts" / "made" / "3.json").read_text())
    assert receipt["files"] == {"made/3": hashlib.sha256((tmp_path / "made" / "3").read_bytes()).hexdigest()}
    assert receipt["host"] == platform.node()
    assert receipt["seconds"] >= 0
    assert {"python", "cond-pdiff", "torch"} <= set(receipt["versions"])


def test_what_is_done_is_not_done_again(tmp_path: Path) -> None:
    work = PlainWork(tmp_path, at_once=2)
    run_jobs(work, shard=(1, 2))
    assert sorted(path.name for path in (tmp_path / "made").iterdir()) == ["1", "3"]
    (tmp_path / "receipts" / "made" / "3.json").unlink()  # as of a version without receipts, or of a process that was killed just then
    run_jobs(work)
    check(work)
    assert [work.begun(number) for number in range(5)] == [1] * 5
    assert json.loads((tmp_path / "receipts" / "made" / "3.json").read_text())["seconds"] is None
    (tmp_path / "made" / "2").unlink()
    run_jobs(work)
    check(work)
    assert [work.begun(number) for number in range(5)] == [1, 1, 2, 1, 1]
    other = replace(work, salt="other settings")
    run_jobs(other)
    (tmp_path / "receipts" / "made" / "4.json").write_text("{")
    run_jobs(other)
    assert [work.begun(number) for number in range(5)] == [2, 2, 3, 2, 3]


def test_a_job_that_fails_three_times_is_set_aside_and_the_rest_goes_on(tmp_path: Path) -> None:
    work = PlainWork(tmp_path, wrong=((1, "fail"), (2, "refuse")), at_once=3)
    report = run_jobs(work)
    check(work, but=(1, 2))
    # The first time all three of a bundle, which says nothing of any; then one by one, three times, but for what is refused.
    assert (work.begun(0), work.begun(1), work.begun(2)) == (1, 4, 1)
    assert report.failed == {"made/2": "the data are wrong", "made/1": "RuntimeError: it always fails"}
    failure = json.loads((tmp_path / "failures" / "made" / "1.json").read_text())
    assert failure["attempts"] == 3
    assert "run_job" in failure["trace"]
    with pytest.raises(TrainingError, match=r"2 of 5 jobs failed .*made/2 among them: the data are wrong; all errors are in"):
        report.check()
    mended = replace(work, wrong=())
    run_jobs(mended).check()
    check(mended)
    assert list((tmp_path / "failures").rglob("*.json")) == []


def test_needs_are_done_first_and_a_failure_takes_along_what_needs_it(tmp_path: Path) -> None:
    work = PlainWork(tmp_path / "a", chain=True)
    work.jobs = lambda: ["made/4", "made/1"]  # type: ignore[method-assign]
    told: list[str] = []
    run_jobs(work, on_done=told.append)
    assert told == [f"made/{number}" for number in range(5)]
    work = PlainWork(tmp_path / "b", chain=True, wrong=((2, "refuse"),))
    assert run_jobs(work).failed == {
        "made/2": "the data are wrong", "made/3": "it needs made/2, which failed", "made/4": "it needs made/3, which failed",
    }  # fmt: skip
    check(work, but=(2, 3, 4))


def test_processes_do_the_same_and_outlive_workers_that_die(tmp_path: Path) -> None:
    work = PlainWork(tmp_path, count=8, wrong=((2, "die once"), (5, "die")))
    report = run_jobs(work, Execution(workers=2))
    check(work, but=(5,))
    assert work.begun(2) == 2
    assert work.begun(5) == MAX_LOSSES
    assert report.failed["made/5"] == f"its worker was lost {MAX_LOSSES} times: its process ended with signal 9"


def test_limits_of_time_and_memory(tmp_path: Path) -> None:
    for name, wrong, per_job, error in (
        ("time", "hang", PerJob(minutes=0.02), "JobTimeout: it took longer than 0.02 minutes"),
        ("memory", "eat", PerJob(memory=0.8), "MemoryError"),
    ):
        work = PlainWork(tmp_path / name, count=3, wrong=((1, wrong),))
        report = run_jobs(work, Execution(per_job=per_job))
        check(work, but=(1,))
        assert report.failed == {"made/1": error}
        assert work.begun(1) == 3


DEAF = """
import sys
from pathlib import Path
from plain_work import PlainWork
import cond_pdiff.training.jobs.work as jobs
jobs.GRACE_SECONDS = 0.3
jobs.perform(PlainWork(Path(sys.argv[1]), wrong=((0, "deaf"),)), ["made/0"], jobs.PerJob(minutes=0.01))
"""


def test_a_job_that_hears_no_signal_is_ended_with_its_process(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", DEAF, tmp_path], env={**os.environ, "PYTHONPATH": str(TESTS)}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert "Timeout" in done.stderr
    assert "in run_job" in done.stderr  # where it was


DRIVER = """
import sys
from pathlib import Path
from plain_work import PlainWork
from cond_pdiff.training.jobs.run import Execution, run_jobs
if __name__ == "__main__":
    run_jobs(PlainWork(Path(sys.argv[1]), count=12, seconds=0.1), Execution(workers=2))
"""


@pytest.mark.parametrize("with_signal", [signal.SIGKILL, signal.SIGINT])
def test_a_command_that_is_killed_loses_nothing(tmp_path: Path, with_signal: signal.Signals) -> None:
    script = tmp_path / "driver.py"
    script.write_text(DRIVER)
    command = subprocess.Popen(
        [sys.executable, script, tmp_path / "out"], env={**os.environ, "PYTHONPATH": str(TESTS)}, stderr=subprocess.PIPE, text=True
    )
    receipts = tmp_path / "out" / "receipts" / "made"
    while not receipts.exists() or len(list(receipts.glob("[0-9]*"))) < 4:
        assert command.poll() is None, command.communicate()
        time.sleep(0.01)
    command.send_signal(with_signal)
    command.communicate()
    work = PlainWork(tmp_path / "out", count=12)
    run_jobs(work).check()
    check(work)
    assert sum(work.begun(number) for number in range(12)) <= 12 + 2  # those that were running


def test_machines_without_a_common_file_system_meet_in_a_store(tmp_path: Path) -> None:
    store = f"file://{tmp_path / 'store'}"
    first = PlainWork(tmp_path / "first")
    run_jobs(first, Execution(store=store), shard=(0, 2)).check()
    second = PlainWork(tmp_path / "second")
    told: list[str] = []
    run_jobs(second, Execution(store=store), on_done=told.append).check()
    assert told == ["made/1", "made/3"]
    for folder in ("second", "store"):
        assert [(tmp_path / folder / job).read_bytes() for job in second.jobs()] == [
            hashlib.sha256(str(number).encode()).digest() for number in range(5)
        ]
        assert len(list((tmp_path / folder / "receipts" / "made").iterdir())) == 5
    with pytest.raises(CondPDiffError, match="cannot be reached"):
        run_jobs(second, Execution(store="nowhere://x"))


def test_without_ray_its_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(CondPDiffError, match=r"pip install 'cond-pdiff\[ray\]'"):
        run_jobs(PlainWork(tmp_path), Execution("ray"))


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"address": "auto"}, "are for the executor ray"), ({"per_job": PerJob(gpus=1)}, "GPUs a job"), ({"workers": -1}, "at least 0")],
)
def test_executions_that_make_no_sense_are_refused(settings: dict[str, object], message: str) -> None:
    with pytest.raises(CondPDiffError, match=message):
        Execution(**settings)  # type: ignore[arg-type]
    with pytest.raises(CondPDiffError, match="at least one CPU"):
        PerJob(cpus=0)
