"""Jobs on a small Ray cluster on this machine, of which a worker and a node are killed."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from plain_work import PlainWork, check

from cond_pdiff.errors import CondPDiffError
from cond_pdiff.training.jobs.run import Execution, run_jobs
from cond_pdiff.training.jobs.work import PerJob

pytest.importorskip("ray", reason="the extra `ray` is not installed: pip install 'cond-pdiff[ray]'")
pytestmark = [pytest.mark.filterwarnings("ignore::ResourceWarning"), pytest.mark.filterwarnings("ignore::FutureWarning:ray")]


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """A head that does no jobs, and a node with a CPU and what passes for a GPU."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_AUTH_MODE", "disabled")
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("PYTHONPATH", str(Path(__file__).parent))  # where workers find the work
        from ray.cluster_utils import Cluster

        cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
        cluster.add_node(num_cpus=1, num_gpus=1)
        yield cluster
        cluster.shutdown()


def test_a_killed_worker_a_killed_node_and_bad_jobs(cluster: Any, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    work = PlainWork(tmp_path, count=16, seconds=0.1, wrong=((2, "die once"), (5, "fail"), (9, "hang")))
    other, done = cluster.add_node(num_cpus=1), list[str]()

    def kill_a_node(job: str) -> None:
        done.append(job)
        if len(done) == 4:
            cluster.remove_node(other, allow_graceful=False)

    report = run_jobs(work, Execution("ray", address=cluster.address, per_job=PerJob(minutes=0.03)), on_done=kill_a_node)
    check(work, but=(5, 9))
    assert sorted(done) == sorted(set(work.jobs()) - {"made/5", "made/9"})
    assert work.begun(2) == 2
    assert report.failed == {"made/5": "RuntimeError: it always fails", "made/9": "JobTimeout: it took longer than 0.03 minutes"}
    assert capfd.readouterr().out == ""  # stdout is for results
    assert sys.stdout is not sys.stderr


def test_a_gpu_has_an_actor_that_is_replaced(cluster: Any, tmp_path: Path) -> None:
    work = PlainWork(tmp_path, count=6, wrong=((2, "die once"),))
    run_jobs(work, Execution("ray", address=cluster.address, per_job=PerJob(gpus=1))).check()
    check(work)
    workers = {path.name.partition("-")[0] for path in (tmp_path / "log").rglob("*-*")}
    assert len(workers) == 2  # the one that died and the one after it
    assert str(os.getpid()) not in workers


def test_a_cluster_that_is_not_there_is_refused(tmp_path: Path) -> None:
    started = time.monotonic()
    with pytest.raises(CondPDiffError, match="there is no Ray cluster at"):
        run_jobs(PlainWork(tmp_path), Execution("ray", address="127.0.0.1:1"))
    assert time.monotonic() - started < 60
