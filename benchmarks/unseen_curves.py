"""What it would take to serve tasks that the generator has never seen: curves over the examples, and over the zoo's tasks.

    python benchmarks/unseen_curves.py examples --tasks tasks --zoo zoo --out curves
    python benchmarks/unseen_curves.py tasks    --tasks tasks --zoo zoo --out curves
    python benchmarks/unseen_curves.py draw     --tasks tasks --zoo zoo --out curves    # curves.png, curves.md

Mean accuracy over the zoo's unseen tasks on up to 200 rows of their reported split, one draw of examples, one sample a prompt.
*examples*: the bundled generator, with 1 to 16 examples a class in the prompt and in the prototypes, the same for every column.
*tasks*: generators trained on random 7, 14, 29 and all of the zoo's tasks (each a part of the next, one run a task, the settings of the
recipe), with eight examples a class in the prompt and in the prototypes, and with none. What is measured is not measured again.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import statistics
from functools import partial
from pathlib import Path
from typing import Any

import torch
from few_shot import ROWS, Bench, accuracy, once

from cond_pdiff import LoraAdapter, TaskPrompt
from cond_pdiff.atomic import dump_json, write_text
from cond_pdiff.few_shot import refine
from cond_pdiff.training.card import markdown_table
from cond_pdiff.training.config import read_recipe
from cond_pdiff.training.tasks import Task
from cond_pdiff.training.train import train
from cond_pdiff.training.zoo import Zoo

GENERATOR = RECIPE = "minilm-text-tasks"
SHOTS = (1, 2, 4, 8, 16)
SHARES = (0.125, 0.25, 0.5, 1.0)
COLUMNS = {
    "examples": ("base", "multi-task", "generated", "refined", "trained"),
    "tasks": ("base", "generated", "base, names only", "generated, names only"),
}


def with_examples(bench: Bench, task: Task, shots: int) -> dict[str, float]:
    """Accuracies with this number of examples a class, for everybody; of the trained adapter with names only."""
    rows = task.report_rows(ROWS)
    texts, targets = [text for text, _ in rows], torch.tensor([label for _, label in rows])
    prompt = task.prompt("shots/0", shots * len(task.labels))

    def right(adapter: LoraAdapter | None, given: TaskPrompt | None) -> float:
        return accuracy(bench.classifier(task, adapter, given).logits(texts), targets)

    generated = bench.generate(prompt, 1).adapter
    found = {"base": right(None, prompt), "multi-task": right(bench.multitask, prompt), "generated": right(generated, prompt)}
    if shots > 1:  # each example is told apart by the others of its class
        found["refined"] = right(refine(bench.classifier(task, generated, prompt)), prompt)
    return {**found, "trained": right(bench.zoo.runs(task.name)[0].adapter(), None)}


def with_fewer_tasks(bench: Bench, task: Task) -> dict[str, float]:
    """Accuracies of one sample, with eight examples a class and with none."""
    rows = task.report_rows(ROWS)
    texts, targets = [text for text, _ in rows], torch.tensor([label for _, label in rows])
    prompts = {"": task.prompt("shots/0", 8 * len(task.labels)), ", names only": TaskPrompt(task.description, labels=task.labels)}
    found = {}
    for name, prompt in prompts.items():
        for column, adapter in (("base", None), ("generated", bench.generate(prompt, 1).adapter)):
            found[column + name] = accuracy(bench.classifier(task, adapter, prompt).logits(texts), targets)
    return found


def generator_of(zoo: Zoo, count: int, tasks_folder: Path, out: Path) -> Path:
    """A generator trained on `count` tasks of the zoo, the first run of each."""
    part = out / "zoo"
    names = sorted(random.Random(0).sample(zoo.task_names, len(zoo.task_names))[:count])
    for name in names:
        shutil.copytree(zoo.run_folder(name, 0), part / "tasks" / name / "run-0", dirs_exist_ok=True)
    write_text(part / "zoo.json", dump_json({**zoo.facts, "tasks": {name: zoo.facts["tasks"][name] for name in names}}))
    if not (out / "run" / "generator" / "model_index.json").exists():
        train(read_recipe(RECIPE), part, tasks_folder, out / "run")
    return out / "run" / "generator"


def measure(curve: str, zoo: Zoo, tasks_folder: Path, out: Path) -> None:
    """Every point of a curve, a file a point and task."""
    tasks = [Task.load(tasks_folder / name) for name in zoo.unseen_names]
    if curve == "examples":
        bench = Bench(f"cond-pdiff/{GENERATOR}", zoo)
        for shots in SHOTS:
            for task in tasks:
                once(out / curve / str(shots) / f"{task.name}.json", partial(with_examples, bench, task, shots))
            print(f"{shots} examples a class", flush=True)
        return
    for count in (round(share * len(zoo.task_names)) for share in SHARES):
        folder = out / curve / str(count)
        bench = Bench(str(generator_of(zoo, count, tasks_folder, out / "generators" / str(count))), zoo)
        for task in tasks:
            once(folder / f"{task.name}.json", partial(with_fewer_tasks, bench, task))
        print(f"{count} tasks", flush=True)


def means(folder: Path) -> dict[int, dict[str, float]]:
    """Number of examples or tasks → column → mean over tasks, in percent."""
    found: dict[int, dict[str, float]] = {}
    for point in sorted(folder.iterdir(), key=lambda path: int(path.name)):
        rows: list[dict[str, Any]] = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(point.glob("*.json"))]
        found[int(point.name)] = {column: 100 * statistics.fmean(row[column] for row in rows) for column in rows[0]}
    return found


def draw(out: Path) -> None:
    """Both curves as a picture and as tables."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(9, 3.8), sharey=True, layout="constrained")
    titles = {"examples": "labelled examples a class", "tasks": "tasks in the zoo"}
    looks = dict(zip((name for names in COLUMNS.values() for name in names), "ox^sD" "ox+*", strict=True))
    colours = ("#56B4E9", "#CC79A7", "#D55E00", "#009E73", "black")
    text = []
    for place, (curve, columns) in zip(axes, COLUMNS.items(), strict=True):
        points = means(out / curve)
        for column, colour in zip(columns, colours if curve == "examples" else ("#56B4E9", "#D55E00", "#56B4E9", "#D55E00"), strict=True):
            there = [number for number, row in points.items() if column in row]
            line = "--" if "names only" in column else "-"
            place.plot(there, [points[number][column] for number in there], line, marker=looks[column], color=colour, label=column)
        place.set(xscale="log", xlabel=titles[curve], title=f"over {curve}")
        place.set_xticks(list(points), list(map(str, points)))
        place.minorticks_off()
        place.legend(fontsize="small")
        rows = [[str(number), *(f"{row[name]:.1f}" if name in row else "–" for name in columns)] for number, row in points.items()]
        text.append(markdown_table([titles[curve], *columns], rows))
    axes[0].set_ylabel("mean accuracy on unseen tasks, percent")
    figure.savefig(out / "curves.png", dpi=100)
    write_text(out / "curves.md", "\n\n".join(text) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("curve", choices=[*COLUMNS, "draw"])
    parser.add_argument("--tasks", required=True, type=Path)
    parser.add_argument("--zoo", required=True, type=Path)
    parser.add_argument("--out", required=True, type=Path)
    arguments = parser.parse_args()
    if arguments.curve == "draw":
        draw(arguments.out)
    else:
        measure(arguments.curve, Zoo(arguments.zoo), arguments.tasks, arguments.out)


if __name__ == "__main__":
    main()
