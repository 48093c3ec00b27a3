"""docs/cluster.md and its manifest: every command can be given as it stands there, and Kubernetes would take the job."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml

from cond_pdiff.cli import command
from cond_pdiff.cli.options import execution
from cond_pdiff.training.jobs.run import Execution
from cond_pdiff.training.jobs.work import PerJob

DOCS = Path(__file__).resolve().parents[1] / "docs"
PAGE = (DOCS / "cluster.md").read_text(encoding="utf-8").replace("\\\n", " ").replace("$SLURM_ARRAY_TASK_ID", "3")
COMMANDS = re.findall(r"^(?:srun |python .*?-m )?(cond[-_]pdiff .+)$", PAGE, re.MULTILINE)
JOB: dict[str, Any] = yaml.safe_load((DOCS / "ray-job.yaml").read_text(encoding="utf-8"))

# The entries of KubeRay's ray.io/v1 RayJobSpec, RayClusterSpec and groups (apis/ray/v1/*_types.go); True: it must be there.
SPEC = {"entrypoint": True, "backoffLimit": False, "shutdownAfterJobFinishes": False, "ttlSecondsAfterFinished": False,
        "rayClusterSpec": True, "submissionMode": False, "activeDeadlineSeconds": False, "suspend": False}  # fmt: skip
CLUSTER = {"rayVersion": False, "enableInTreeAutoscaling": False, "autoscalerOptions": False, "headGroupSpec": True,
           "workerGroupSpecs": False}  # fmt: skip
HEAD = {"rayStartParams": True, "template": True, "serviceType": False}
WORKER = {"groupName": True, "replicas": False, "minReplicas": True, "maxReplicas": True, "rayStartParams": True, "template": True}


def parse(line: str) -> None:
    """Parse a command as the command line does, without running it."""
    _, name, *arguments = shlex.split(line)
    command.commands[name].make_context(name, arguments)  # type: ignore[attr-defined]


def test_the_pages_commands_can_be_given() -> None:
    assert len(COMMANDS) >= 9
    for line in COMMANDS:
        parse(line)
    with pytest.raises(typer.BadParameter):
        parse("cond-pdiff collect --tasks t --zoo z --per-job cpus=many")
    with pytest.raises(Exception, match="No such option"):
        parse("cond-pdiff collect --tasks t --zoo z --cluster x")


def test_options_say_where_jobs_are_done() -> None:
    line = "collect --tasks t --zoo z --executor ray --address a:1 --workers 3 --per-job cpus=2,gpus=0.5,minutes=3 --store memory://x"
    name, *arguments = line.split()
    given = command.commands[name].make_context(name, arguments).params  # type: ignore[attr-defined]
    found = execution(*(given[option] for option in ("executor", "workers", "address", "per_job", "store")))
    assert found == Execution("ray", 3, "a:1", PerJob(cpus=2, gpus=0.5, minutes=3), "memory://x")
    assert execution("local", 0, None, None, None) == Execution()


def wrong(entry: dict[str, Any], known: dict[str, bool]) -> set[str]:
    return (set(entry) - set(known)) | {name for name, needed in known.items() if needed and name not in entry}


def test_the_manifest_is_a_ray_job() -> None:
    assert (JOB["apiVersion"], JOB["kind"]) == ("ray.io/v1", "RayJob")
    spec, cluster = JOB["spec"], JOB["spec"]["rayClusterSpec"]
    groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    assert wrong(spec, SPEC) | wrong(cluster, CLUSTER) | wrong(groups[0], HEAD) | wrong(groups[1], WORKER) == set()
    assert wrong({"entryPoint": "x"}, SPEC) == {"entryPoint", "entrypoint", "rayClusterSpec"}
    assert groups[1]["minReplicas"] <= groups[1]["replicas"] <= groups[1]["maxReplicas"]
    images = set()
    for group in groups:
        assert all(isinstance(value, str) for value in group["rayStartParams"].values())  # numbers are refused there
        pod = group["template"]["spec"]
        (container,) = pod["containers"]
        images.add(container["image"])
        assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}
        assert all(path.startswith("/data") for path in re.findall(r"(/\S+)", spec["entrypoint"]))
        assert container["volumeMounts"][0]["mountPath"] == "/data"
    assert len(images) == 1  # one Ray on all machines
    parse(spec["entrypoint"])
