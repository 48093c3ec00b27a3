"""`evaluate`: one table with a generator's adapters beside all baselines, one metric in all columns."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cond_pdiff.atomic import dump_json, write_text
from cond_pdiff.errors import TaskDataError, TrainingError
from cond_pdiff.families.family import families
from cond_pdiff.training.evaluate.adapters import AdapterEvaluator, AdapterTable
from cond_pdiff.training.evaluate.measure import EvaluateConfig, ZooEvaluator, measure_all
from cond_pdiff.training.evaluate.table import EvaluationTable
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

    Raises:
        TrainingError: a zoo of a family that cannot be evaluated yet.
        TaskDataError: the zoo is not complete, does not fit the generator, or lacks a task to be measured.

    Returns:
        The evaluation, or None while tasks of other shards are missing.
    """
    out, zoo = Path(out), Zoo(zoo_folder)
    evaluator_class, table = evaluation_of(zoo, by_tasks=tasks_folder is not None)
    evaluator = evaluator_class(generator, zoo, config, out)
    tasks = evaluator.load_tasks(tasks_folder)
    if unknown := set(only) - {task.name for task in tasks}:
        raise TaskDataError(f"{zoo_folder} has no {min(unknown)!r} that could be measured; it has {', '.join(task.name for task in tasks)}")
    results = measure_all(evaluator, [task for task in tasks if not only or task.name in only], shard)
    if results is None:
        return None
    evaluation: dict[str, Any] = table.summarize(results, evaluator.settings)
    write_text(out / "evaluation.json", dump_json(evaluation))
    write_text(out / "evaluation.md", table.to_markdown(evaluation))
    return evaluation
