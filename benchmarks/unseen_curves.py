"""Measure what it would take to serve unseen tasks: curves over the examples, the steps of refining, and the zoo's tasks.

    python benchmarks/unseen_curves.py examples --tasks tasks --zoo zoo --out curves
    python benchmarks/unseen_curves.py steps    --tasks tasks --zoo zoo --out curves
    python benchmarks/unseen_curves.py tasks    --tasks tasks --zoo zoo --out curves
    python benchmarks/unseen_curves.py draw     --out curves    # curves.png, curves.md

Mean accuracy over the zoo's unseen tasks on up to 200 rows of their test split, one draw of examples, one sample a prompt.
*examples*: the bundled generator, with 1 to 16 examples a class in the prompt and in the prototypes, the same for every column.
*steps*: eight examples a class, and 0 to 12 steps of `refine` from a generated adapter and from zeros.
*tasks*: generators trained on random 7, 14, 29 and all of the zoo's tasks (each a part of the next, one run a task, the settings of the
recipe), with eight examples a class in the prompt and in the prototypes, and with none. What is measured is not measured again.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import statistics
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from few_shot import TaskMeasurer, once

from cond_pdiff import TaskPrompt
from cond_pdiff.atomic import dump_json, write_text
from cond_pdiff.refinement import refine
from cond_pdiff.training.card import markdown_table
from cond_pdiff.training.recipe import read_recipe
from cond_pdiff.training.stages.train import train
from cond_pdiff.training.tasks.tasks import Task
from cond_pdiff.training.zoo.zoo import Zoo

GENERATOR = RECIPE = "minilm-text-tasks"
SHOTS = (1, 2, 4, 8, 16)
STEPS = (0, 1, 2, 4, 8, 12)
SHARES = (0.125, 0.25, 0.5, 1.0)
COLUMNS = {
    "examples": (
        *("base", "logistic regression", "multi-task", "mean of the zoo", "kernel regression"),
        *("generated", "refined", "trained"),
    ),
    "steps": ("base", "refined", "refined from nothing", "trained"),
    "tasks": ("base", "generated", "base, names only", "generated, names only"),
}
TITLES = {"examples": "labelled examples a class", "steps": "steps of refining", "tasks": "tasks in the zoo"}
LOOKS = {
    "base": ("#56B4E9", "o-"), "multi-task": ("#CC79A7", "x-"), "mean of the zoo": ("#CC79A7", "+:"),
    "kernel regression": ("#E69F00", "^-"), "logistic regression": ("#56B4E9", "v:"),
    "generated": ("#D55E00", "x-"), "refined": ("#009E73", "s-"),
    "refined from nothing": ("#0072B2", "v-"), "trained": ("black", "D-"),
    "base, names only": ("#56B4E9", "+--"), "generated, names only": ("#D55E00", "*--"),
}  # fmt: skip


def with_examples(measurer: TaskMeasurer, task: Task, shots: int) -> dict[str, float]:
    """Measure the accuracies with this number of examples a class, for everybody; of the trained adapter with names only."""
    prompt = task.prompt("shots/0", shots * len(task.labels))
    adapters = {
        "base": None,
        "multi-task": measurer.baselines.multitask,
        "mean of the zoo": measurer.baselines.mean,
        "kernel regression": measurer.baselines.regressed(prompt),
        "generated": measurer.generate(prompt, 1).adapters[0],
    }
    if shots > 1:  # each example is told apart by the others of its class
        adapters["refined"] = refine(measurer.classifier(task, adapters["generated"], prompt))
    found = {column: measurer.accuracy(task, adapter, prompt) for column, adapter in adapters.items()}
    found["logistic regression"] = measurer.logistic(task, prompt)
    return {**found, "trained": measurer.accuracy(task, measurer.zoo.runs(task.name)[0].adapter())}


def with_steps(measurer: TaskMeasurer, task: Task, steps: int) -> dict[str, float]:
    """Measure the accuracies after so many steps, with eight examples a class in the prototypes; of the trained adapter with names only."""
    prompt = task.prompt("shots/0", 8 * len(task.labels))
    generated = measurer.generate(prompt, 1).adapters[0]
    found = {"base": measurer.accuracy(task, None, prompt), "trained": measurer.accuracy(task, measurer.zoo.runs(task.name)[0].adapter())}
    for column, start in (("refined", generated), ("refined from nothing", generated.scaled(0.0))):
        adapter = refine(measurer.classifier(task, start, prompt), steps) if steps else start
        found[column] = measurer.accuracy(task, adapter, prompt)
    return found


def with_fewer_tasks(measurer: TaskMeasurer, task: Task) -> dict[str, float]:
    """Measure the accuracies of one sample, with eight examples a class and with none."""
    prompts = {"": task.prompt("shots/0", 8 * len(task.labels)), ", names only": TaskPrompt(task.description, labels=task.labels)}
    found = {}
    for name, prompt in prompts.items():
        for column, adapter in (("base", None), ("generated", measurer.generate(prompt, 1).adapters[0])):
            found[column + name] = measurer.accuracy(task, adapter, prompt)
    return found


def generator_of(zoo: Zoo, count: int, tasks_folder: Path, out: Path) -> Path:
    """Train a generator on `count` tasks of the zoo, the first run of each, and return its folder."""
    generator = out / "run" / "generator"
    if not (generator / "model_index.json").exists():
        names = sorted(random.Random(0).sample(zoo.task_names, len(zoo.task_names))[:count])
        train(read_recipe(RECIPE), part_of(zoo, names, out / "zoo").folder, tasks_folder, out / "run")
    return generator


def part_of(zoo: Zoo, names: Sequence[str], folder: Path) -> Zoo:
    """Make a complete zoo of the first run of each of these tasks."""
    for name in names:
        shutil.copytree(zoo.run_folder(name, 0), folder / "tasks" / name / "run-0", dirs_exist_ok=True)
    collect = {**zoo.facts["collect"], "runs": 1, "multitask_steps": 0}
    tasks = {name: zoo.facts["tasks"][name] for name in names}
    write_text(folder / "zoo.json", dump_json({**zoo.facts, "collect": collect, "tasks": tasks, "unseen": {}}))
    return Zoo(folder)


def points(curve: str, zoo: Zoo, tasks_folder: Path, out: Path) -> Iterator[tuple[int, Callable[[Task], dict[str, float]]]]:
    """Yield the numbers that a curve is over, and what measures a task there."""
    if curve != "tasks":
        measurer = TaskMeasurer(f"cond-pdiff/{GENERATOR}", zoo)
        numbers, measured = (SHOTS, with_examples) if curve == "examples" else (STEPS, with_steps)
        for number in numbers:
            yield number, lambda task, number=number: measured(measurer, task, number)
        return
    for count in (round(share * len(zoo.task_names)) for share in SHARES):
        generator = generator_of(zoo, count, tasks_folder, out / "generators" / str(count))
        yield count, partial(with_fewer_tasks, TaskMeasurer(str(generator), zoo))


def measure(curve: str, zoo: Zoo, tasks_folder: Path, out: Path) -> None:
    """Measure every point of a curve, a file a point and task."""
    tasks = [Task.load(tasks_folder / name) for name in zoo.unseen_names]
    for number, measured in points(curve, zoo, tasks_folder, out):
        for task in tasks:
            once(out / curve / str(number) / f"{task.name}.json", partial(measured, task))
        print(f"{number} {TITLES[curve]}", flush=True)


def means(folder: Path) -> dict[int, dict[str, float]]:
    """Return number of examples or tasks → column → mean over tasks, in percent."""
    found: dict[int, dict[str, float]] = {}
    for point in sorted(folder.iterdir(), key=lambda path: int(path.name)):
        rows: list[dict[str, Any]] = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(point.glob("*.json"))]
        found[int(point.name)] = {column: 100 * statistics.fmean(row[column] for row in rows) for column in rows[0]}
    return found


def draw(out: Path) -> None:
    """Draw all curves as a picture and as tables."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(COLUMNS), figsize=(13, 3.8), sharey=True, layout="constrained")
    text = []
    for place, (curve, columns) in zip(axes, COLUMNS.items(), strict=True):
        found = means(out / curve)
        for column in columns:
            there = [number for number, row in found.items() if column in row]
            colour, line = LOOKS[column]
            place.plot(there, [found[number][column] for number in there], line, color=colour, label=column)
        place.set(xlabel=TITLES[curve], title=f"over {curve}")
        place.set_xscale("symlog" if 0 in found else "log")
        place.set_xticks(list(found), list(map(str, found)))
        place.minorticks_off()
        place.legend(fontsize="small")
        rows = [[str(number), *(f"{row[name]:.1f}" if name in row else "–" for name in columns)] for number, row in found.items()]
        text.append(markdown_table([TITLES[curve], *columns], rows))
    axes[0].set_ylabel("mean accuracy on unseen tasks, percent")
    figure.savefig(out / "curves.png", dpi=100)
    write_text(out / "curves.md", "\n\n".join(text) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("curve", choices=[*COLUMNS, "draw"])
    parser.add_argument("--tasks", type=Path)
    parser.add_argument("--zoo", type=Path)
    parser.add_argument("--out", required=True, type=Path)
    arguments = parser.parse_args()
    if arguments.curve == "draw":
        draw(arguments.out)
    elif arguments.tasks is None or arguments.zoo is None:
        parser.error(f"{arguments.curve} needs --tasks and --zoo")
    else:
        measure(arguments.curve, Zoo(arguments.zoo), arguments.tasks, arguments.out)


if __name__ == "__main__":
    main()
