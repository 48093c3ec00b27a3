"""`evaluate`: one table with a generator's adapters beside all baselines, one metric in all columns."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from cond_pdiff.atomic import dump_json, write_text
from cond_pdiff.errors import TaskDataError, TrainingError
from cond_pdiff.families.family import families
from cond_pdiff.training.evaluate.adapters import AdapterEvaluator, AdapterTable
from cond_pdiff.training.evaluate.measure import EvaluateConfig, ZooEvaluator
from cond_pdiff.training.evaluate.table import EvaluationTable
from cond_pdiff.training.jobs.run import Execution, run_jobs
from cond_pdiff.training.jobs.work import Work, is_done
from cond_pdiff.training.zoo.zoo import Zoo


def evaluation_of(zoo: Zoo, by_tasks: bool = True) -> tuple[type[ZooEvaluator], EvaluationTable]:
    """Choose how generators of a zoo are measured, and how that is told; raise `TrainingError` where its family has no evaluation yet.

    Args:
        by_tasks: there are tasks to measure by; else, for an imported zoo, the updates alone are compared.
    """
    if not by_tasks:
        return AdapterEvaluator, AdapterTable()
    found = zoo.family.evaluation()
    if found is None:
        able = sorted(name for name, family in families().items() if family.evaluation())
        raise TrainingError(f"{zoo.folder} holds adapters for a {zoo.family.name}; so far those for {', '.join(able)} can be evaluated")
    return found


def evaluate(
    generator: str | Path,
    zoo_folder: str | Path,
    tasks_folder: str | Path | None,
    out: str | Path,
    config: EvaluateConfig,
    shard: tuple[int, int] = (0, 1),
    only: Sequence[str] = (),
    execution: Execution | None = None,
) -> dict[str, Any] | None:
    """Measure every task of the zoo and every unseen one, or some; write `<out>/tasks/*.json`, `evaluation.json` and `evaluation.md`.

    For styles also `<out>/pictures/*.png`, the first pictures of every column. A task that has been measured with the same
    settings is not measured again. With `shard` (i, n), only every n-th task is, and the tables are written by the process that
    finds all tasks done.

    Args:
        generator: bundled name, folder, or Hub repository.
        zoo_folder: a finished zoo with all tasks that the generator was trained on, or with a part of them.
        tasks_folder: where the zoo's tasks are. None for an imported zoo: then updates are compared, not what they do.
        out: the evaluation's folder.
        config: how much is measured.
        shard: which tasks this process measures.
        only: names of the tasks to be measured; none: all.
        execution: where; default: in this process.

    Raises:
        TrainingError: a zoo of a family that cannot be evaluated yet, or tasks that could not be measured.
        TaskDataError: the zoo is not complete, does not fit the generator, or lacks a task to be measured.

    Returns:
        The evaluation, or None while tasks of other shards are missing.
    """
    tasks = None if tasks_folder is None else Path(tasks_folder)
    work = EvaluateWork(str(generator), Path(zoo_folder), tasks, Path(out), config, tuple(only))
    if unknown := set(only) - set(work.tasks):
        raise TaskDataError(f"{zoo_folder} has no {min(unknown)!r} that could be measured; it has {', '.join(work.tasks)}")
    names = work.jobs()
    run_jobs(work, execution, shard).check()
    if not all(is_done(work, name) for name in names):
        return None
    results = [json.loads((work.folder / name).read_text(encoding="utf-8")) for name in names]
    evaluation: dict[str, Any] = work.table.summarize(results, work.evaluator.settings)
    write_text(work.folder / "evaluation.json", dump_json(evaluation))
    write_text(work.folder / "evaluation.md", work.table.to_markdown(evaluation))
    return evaluation


@dataclass
class EvaluateWork(Work):
    """The tasks that a generator is measured on, each a job; see `evaluate`."""

    label = "evaluate"
    unit = "task"

    generator: str
    zoo_folder: Path
    tasks_folder: Path | None
    folder: Path
    config: EvaluateConfig
    only: tuple[str, ...] = ()

    @cached_property
    def _chosen(self) -> tuple[ZooEvaluator, EvaluationTable]:
        zoo = Zoo(self.zoo_folder)
        evaluator, table = evaluation_of(zoo, by_tasks=self.tasks_folder is not None)
        return evaluator(self.generator, zoo, self.config, self.folder), table

    @property
    def evaluator(self) -> ZooEvaluator:
        """What measures a task."""
        return self._chosen[0]

    @property
    def table(self) -> EvaluationTable:
        """How the results are told."""
        return self._chosen[1]

    @cached_property
    def tasks(self) -> dict[str, Any]:
        """All tasks that can be measured, by name."""
        return {task.name: task for task in self.evaluator.load_tasks(self.tasks_folder)}

    def jobs(self) -> list[str]:
        """Return the files of results."""
        return [f"tasks/{name}.json" for name in self.tasks if not self.only or name in self.only]

    def key(self, job: str) -> str:
        """Return a hash of the settings: what was measured with others is measured again."""
        return self._key

    @cached_property
    def _key(self) -> str:
        return hashlib.sha256(dump_json(self.evaluator.settings).encode()).hexdigest()

    def adopts(self, job: str) -> bool:
        """Return whether a result without a receipt, of a version that wrote none, was measured with these settings."""
        found = json.loads((self.folder / job).read_text(encoding="utf-8"))
        return bool(found["settings"] == json.loads(dump_json(self.evaluator.settings)))

    def run_job(self, job: str) -> None:
        """Measure a task."""
        result = self.evaluator.measure(self.tasks[Path(job).stem])
        write_text(self.folder / job, dump_json(result))
