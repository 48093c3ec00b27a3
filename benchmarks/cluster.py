"""Jobs on a Ray cluster of several nodes on this machine: what is lost where workers, nodes and commands are killed, and what it costs.

python benchmarks/cluster.py --work FOLDER [--rows chaos bad real overhead scaling many batch] [--out results/cluster.json]

The rows stand in docs/cluster.md. `scaling`, `many` and `batch` are numbers of the machine, which should be doing nothing else.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import random
import resource
import shutil
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cond_pdiff.atomic import dump_json, write_bytes, write_text
from cond_pdiff.training.jobs.run import Execution, run_jobs
from cond_pdiff.training.jobs.work import PerJob, Work

TEXTS = "cond-pdiff/minilm-text-tasks"
MARK = "COND_PDIFF_BENCHMARK"
SUBJECTS = ("films", "meals", "hotels", "phones", "songs", "novels", "trains", "parks", "shops", "games")


@dataclass
class Sleeper(Work):
    """Jobs that take a while, on the processor or not, and write a hash of their number."""

    label = "sleep"
    unit = "job"

    folder: Path
    count: int
    seconds: float = 0.0
    rounds: int = 0
    trouble: str = ""
    at_once: int = 1

    def jobs(self) -> Sequence[str]:
        return [f"made/{number // 1000}/{number}" for number in range(self.count)]

    def run_job(self, job: str) -> None:
        number = int(job.rpartition("/")[2])
        begun = self.folder / "begun" / str(number)
        if self.seconds or self.rounds or self.trouble:
            begun.mkdir(parents=True, exist_ok=True)
            (begun / f"{os.getpid()}-{time.time_ns()}").touch()
        if number == 0 and self.trouble == "fail":
            raise RuntimeError("it always fails")
        if number == 0 and self.trouble == "hang":
            time.sleep(3600)
        if number == 0 and self.trouble == "eat":
            held = [bytearray(100_000_000) for _ in range(60)]
            time.sleep(30)
            raise AssertionError(len(held))
        time.sleep(self.seconds)
        digest = str(number).encode()
        for _ in range(self.rounds):
            digest = hashlib.sha256(digest).digest()
        if self.seconds or self.rounds:
            write_bytes(self.folder / job, digest)
        else:
            (self.folder / job).parent.mkdir(parents=True, exist_ok=True)
            (self.folder / job).touch()


@contextlib.contextmanager
def cluster(nodes: int, **options: Any) -> Iterator[Any]:
    """A head that does no jobs, and nodes of one CPU each."""
    os.environ[MARK] = str(os.getpid())
    os.environ |= {"RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0", "PYTHONPATH": str(Path(__file__).parent)}
    from ray.cluster_utils import Cluster

    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False, **options})
    try:
        for _ in range(nodes):
            made.add_node(num_cpus=1)
        yield made
    finally:
        made.shutdown()


def ray(made: Any, **options: Any) -> Execution:
    return Execution("ray", address=made.address, per_job=PerJob(**options))


def hashes(folder: Path) -> dict[str, str]:
    """Of all files but those that a killed worker had begun aside."""
    files = {str(path.relative_to(folder)): path for path in folder.rglob("*") if path.is_file()}
    whole = {name: path for name, path in files.items() if not name.startswith(".") and "/." not in name}
    return {name: hashlib.sha256(path.read_bytes()).hexdigest() for name, path in whole.items()}


# --- what is lost ------------------------------------------------------------------------------------------------------------


def chaos(work: Path) -> dict[str, Any]:
    """200 jobs on three nodes; 20 workers and a node killed at random, the command killed twice."""
    jobs, kills, rng = 200, 20, random.Random(0)
    one, many = Sleeper(work / "one", jobs, 0.001), Sleeper(work / "many", jobs, 0.4)
    run_jobs(one).check()
    killed: list[int] = []

    def progress() -> int:
        return sum(1 for _ in (many.folder / "made").rglob("[0-9]*") if _.is_file()) if many.folder.exists() else 0

    def kill_workers() -> None:
        while len(killed) < kills:
            time.sleep(rng.uniform(0.3, 1.5))
            running = [path for path in many.folder.glob("begun/*/*") if not (many.folder / many.jobs()[int(path.parent.name)]).exists()]
            pids = {int(path.name.partition("-")[0]) for path in running} - set(killed)
            alive = sorted(pids & _own_workers())
            if alive:
                killed.append(rng.choice(alive))
                os.kill(killed[-1], signal.SIGKILL)

    started = time.monotonic()
    with cluster(3) as made:
        killer = threading.Thread(target=kill_workers, daemon=True)
        killer.start()
        node_killed = False
        for stop_at in (jobs // 4, jobs // 2, jobs):
            command = [sys.executable, __file__, "--drive", made.address, "--work", str(work)]
            driver = subprocess.Popen(command, stderr=subprocess.DEVNULL)
            while driver.poll() is None and progress() < stop_at:
                if not node_killed and progress() > jobs // 3:
                    made.remove_node(next(iter(made.worker_nodes)), allow_graceful=False)
                    node_killed = True
                time.sleep(0.05)
            if stop_at < jobs:
                driver.kill()
            driver.wait()
        seconds = time.monotonic() - started
    again = [len(list(path.iterdir())) for path in (many.folder / "begun").iterdir()]
    return {
        "jobs": jobs, "workers_killed": len(killed), "nodes_killed": int(node_killed), "commands_killed": 2,
        "done": progress(), "receipts": len(list((many.folder / "receipts").rglob("*.json"))),
        "bytes_equal_to_one_process": hashes(one.folder / "made") == hashes(many.folder / "made"),
        "begun": sum(again), "begun_most": max(again), "seconds": round(seconds, 1),
    }  # fmt: skip


def drive(address: str, work: Path) -> None:
    run_jobs(Sleeper(work / "many", 200, 0.4), Execution("ray", address=address)).check()


def _command(pid: int, what: str = "cmdline") -> bytes:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/{what}").read_bytes()
    return b""


def _own_workers() -> set[int]:
    """The processes that do jobs on this benchmark's cluster: Ray's, with its mark in their environment."""
    mark = f"{MARK}={os.getpid()}".encode()
    pids = (int(path.name) for path in Path("/proc").iterdir() if path.name.isdigit())
    return {pid for pid in pids if _command(pid).startswith(b"ray::") and mark in _command(pid, "environ").split(b"\0")}


def bad(work: Path) -> dict[str, Any]:
    """A job that always fails, one that hangs, one that takes memory: beyond its own limit, and until Ray's monitor kills it."""
    result: dict[str, Any] = {}

    def row(name: str, trouble: str, made: Any, **limits: Any) -> None:
        sleeper = Sleeper(work / name, 6, 0.1, trouble=trouble)
        report = run_jobs(sleeper, ray(made, **limits))
        begun = len(list((sleeper.folder / "begun" / "0").iterdir()))
        result[name] = {"set_aside": list(report.failed.values()), "attempts": begun, "others_done": report.done}

    with cluster(2) as made:
        row("fails", "fail", made)
        row("hangs", "hang", made, minutes=0.05)
        row("eats, its own limit", "eat", made, memory=1.5)
    facts = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    total, free = (int(facts[name].split()[0]) for name in ("MemTotal", "MemAvailable"))
    threshold = round(1 - free / total + 3e6 / total, 3)
    with cluster(2, _system_config={"memory_usage_threshold": threshold}) as made:
        row("eats, Ray's monitor", "eat", made)
    return result


def real(work: Path) -> dict[str, Any]:
    """Adapters by `generate --batch` on two nodes, two workers killed, beside one process's."""
    from cond_pdiff.training.jobs.generate import GenerateWork, generate_batch

    file = write_requests(work / "requests.jsonl", 96)
    one, many = GenerateWork(TEXTS, file, work / "real-one"), GenerateWork(TEXTS, file, work / "real-many")
    killed: list[int] = []

    def kill(report: Callable[[], int]) -> None:
        while len(killed) < 2:
            time.sleep(0.2)
            pids = [pid for pid in _own_workers() if b"generate" in _command(pid)]
            if pids and report() > 20 * len(killed):
                killed.append(pids[0])
                os.kill(pids[0], signal.SIGKILL)

    import torch

    torch.set_num_threads(1)  # as on the cluster
    generate_batch(one).jobs.check()
    with cluster(2) as made:
        done = threading.Thread(target=kill, args=(lambda: len(list((work / "real-many").glob("[0-9]*"))),), daemon=True)
        done.start()
        generate_batch(many, ray(made)).jobs.check()
    sums = [hashes(folder) for folder in (work / "real-one", work / "real-many")]
    same = [{name: value for name, value in each.items() if not name.startswith("receipts")} for each in sums]
    different = sorted(name for name in same[0].keys() | same[1].keys() if same[0].get(name) != same[1].get(name))
    aside = len([path for path in (work / "real-many").iterdir() if path.name.startswith(".")])
    return {"adapters": 96, "workers_killed": len(killed), "bytes_equal_to_one_process": not different, "different": different,
            "files": len(same[0]), "begun_aside_by_killed_workers": aside}  # fmt: skip


# --- what it costs -----------------------------------------------------------------------------------------------------------


def overhead(work: Path) -> dict[str, Any]:
    """Jobs of 20 seconds, which wait, one after another: the time beyond them, without that of starting the first worker."""
    result = {}
    jobs, seconds = 3, 20.0
    with cluster(1) as made:
        for name, where in (("local", Execution(workers=1)), ("ray", ray(made))):
            sleeper = Sleeper(work / f"overhead-{name}", jobs, seconds)
            ended: list[float] = []
            run_jobs(sleeper, where, on_done=lambda _, ended=ended: ended.append(time.time())).check()
            first = min(int(path.name.partition("-")[2]) for path in sleeper.folder.glob("begun/*/*")) / 1e9
            result[name] = round((ended[-1] - first) / (jobs * seconds) - 1, 4)
    return {"jobs": jobs, "seconds_each": seconds, "share_beyond": result}


def scaling(work: Path) -> dict[str, Any]:
    """Jobs that keep a core busy without memory: throughput of two workers over one, and of two plain processes over one beside it.

    Where other work shares the cores, neither gets to two.
    """
    rounds, jobs = 1_500_000, 8
    ratios: dict[str, list[float]] = {"workers": [], "plain processes": []}
    for go in range(3):
        workers, plain = {}, {}
        for count in (1, 2):
            sleeper = Sleeper(work / f"scaling-{go}-{count}", jobs, rounds=rounds)
            ended: list[float] = []
            run_jobs(sleeper, Execution(workers=count), on_done=lambda _, ended=ended: ended.append(time.time())).check()
            first = min(int(path.name.partition("-")[2]) for path in sleeper.folder.glob("begun/*/*")) / 1e9
            workers[count] = ended[-1] - first
            loop = f"import hashlib\nd = b''\nfor _ in range({rounds * jobs // count}): d = hashlib.sha256(d).digest()"
            started = time.monotonic()
            running = [subprocess.Popen([sys.executable, "-c", loop]) for _ in range(count)]
            for process in running:
                process.wait()
            plain[count] = time.monotonic() - started
        ratios["workers"].append(round(workers[1] / workers[2], 3))
        ratios["plain processes"].append(round(plain[1] / plain[2], 3))
    medians = {name: statistics.median(each) for name, each in ratios.items()}
    return {"two_over_one": medians, "goes": ratios, "seconds_a_job": round(workers[1] / jobs, 2), "load_average": _load()}


def many(work: Path, count: int = 100_000) -> dict[str, Any]:
    """A list of 10⁵ empty jobs on a cluster; half of it, then the rest after a new start."""
    sleeper, stopped = Sleeper(work / "many-empty", count, at_once=100), 0
    started = time.monotonic()
    first: list[float] = []

    class Enough(Exception):
        pass

    def until_half(job: str) -> None:
        nonlocal stopped
        stopped += 1
        first.append(time.monotonic()) if stopped == 1 else None
        if stopped == count // 2:
            raise Enough

    with cluster(2) as made:
        with contextlib.suppress(Enough):
            run_jobs(sleeper, ray(made), on_done=until_half)
        half = time.monotonic() - first[0]
        started = time.monotonic()
        again: list[float] = []
        run_jobs(sleeper, ray(made), on_done=lambda _: again.append(time.monotonic()) if not again else None).check()
    return {
        "jobs": count, "a_second": round(count / 2 / half), "seconds_to_first_after_resume": round(again[0] - started, 1),
        "peak_gigabytes": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6, 2), "load_average": _load(),
    }  # fmt: skip


def write_requests(path: Path, count: int) -> Path:
    lines = [
        {"description": f"Decide whether a remark number {number} about {SUBJECTS[number % 10]} is negative or positive.",
         "labels": ["negative", "positive"], "seed": number}
        for number in range(count)
    ]  # fmt: skip
    write_text(path, "".join(json.dumps(line) + "\n" for line in lines))
    return path


def batch(work: Path, count: int = 10_000, singles: int = 100) -> dict[str, Any]:
    """Adapters of a batch in one run, beside single calls: in a loop in one process, and of the command."""
    import torch

    from cond_pdiff import CondPDiffPipeline, TaskPrompt
    from cond_pdiff.sampling import seeded
    from cond_pdiff.training.jobs.generate import GenerateWork, generate_batch

    file = write_requests(work / "batch.jsonl", count)
    requests = [json.loads(line) for line in file.read_text().splitlines()[:singles]]
    pipe = CondPDiffPipeline.from_pretrained(TEXTS)
    pipe.set_progress_bar_config(disable=True)
    rates: dict[str, dict[str, float]] = {}

    @contextlib.contextmanager
    def timed(name: str, number: int) -> Iterator[None]:
        wall, cpu = time.monotonic(), _cpu()
        yield
        rates[name] = {"a_second": number / (time.monotonic() - wall), "cpu_milliseconds_each": 1000 * (_cpu() - cpu) / number}

    pipe(TaskPrompt("warm up"), generator=seeded(0, 1))
    for threads in (torch.get_num_threads(), 1):  # torch's default; and what each process of a batch has
        torch.set_num_threads(threads)
        with timed(f"single calls in a loop, threads: {threads}", singles):
            for number, request in enumerate(requests):
                prompt = TaskPrompt(request["description"], (), request["labels"])
                pipe(prompt, generator=seeded(request["seed"], 1)).save_adapter(work / f"single-{threads}" / str(number))
    with timed("single calls of the command", 3):
        for number, request in enumerate(requests[:3]):
            labels = [word for label in request["labels"] for word in ("--label", label)]
            out = str(work / "command" / str(number))
            subprocess.run([sys.executable, "-m", "cond_pdiff", "generate", request["description"], *labels, "--out", out], check=True,
                           stdout=subprocess.DEVNULL)  # fmt: skip
    half = count // 2
    parts = [write_requests(work / f"part-{part}.jsonl", half) for part in range(2)]
    with timed("batch, one process", half):
        generate_batch(GenerateWork(TEXTS, parts[0], work / "batch-1")).jobs.check()
    with timed("batch, two processes", half):
        generate_batch(GenerateWork(TEXTS, parts[1], work / "batch-2"), Execution(workers=2)).jobs.check()
    sizes = sum(path.stat().st_size for path in (work / "batch-1" / "1").iterdir())
    rounded = {name: {key: round(value, 2) for key, value in rate.items()} for name, rate in rates.items()}
    loop, command = rates["single calls in a loop, threads: 1"], rates["single calls of the command"]
    return {
        "adapters": count, "rates": rounded, "bytes_an_adapter": sizes, "load_average": _load(),
        "over_the_loop_of_one_thread": {name: round(rates[name]["a_second"] / loop["a_second"], 2) for name in rates},
        "over_the_command": round(rates["batch, one process"]["a_second"] / command["a_second"], 1),
    }  # fmt: skip


def _cpu() -> float:
    return sum(sum(resource.getrusage(who)[:2]) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))


def _load() -> float:
    return round(os.getloadavg()[0], 1)


ROWS: dict[str, Callable[[Path], dict[str, Any]]] = {
    "chaos": chaos, "bad": bad, "real": real, "overhead": overhead, "scaling": scaling, "many": many, "batch": batch,
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--work", type=Path, required=True, help="scratch folder")
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS))
    parser.add_argument("--out", type=Path, default=Path("results/cluster.json"))
    parser.add_argument("--drive", metavar="ADDRESS", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.drive:
        drive(arguments.drive, arguments.work)
        return
    result = json.loads(arguments.out.read_text()) if arguments.out.exists() else {}
    for name in arguments.rows:
        folder = arguments.work / name
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        result[name] = {**ROWS[name](folder), "cores": os.cpu_count()}
        print(name, dump_json(result[name]), flush=True)
        write_text(arguments.out, dump_json(result))
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
