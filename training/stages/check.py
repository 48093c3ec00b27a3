"""Check of a trained generator on its own tasks: is it any good at all? It takes seconds, where an evaluation takes hours."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from cond_pdiff.pipelines.pipeline_cond_pdiff import CondPDiffPipeline
from cond_pdiff.sampling import seeded
from cond_pdiff.training.evaluate.similarity import ZooSpace, delta_gram
from cond_pdiff.training.zoo.params import ZooParams
from cond_pdiff.training.zoo.zoo import Zoo

CHECKED_TASKS = 40
"""The most tasks of which an adapter is generated."""
MOST_LOST, LEAST_ROUTED = 0.5, 0.9
"""The reconstruction error above which, and the task-identification accuracy below which a generator is no good."""
CHECKED_NUMBERS = 2**29
"""The most numbers of adapters that are encoded and decoded: some hundred adapters of five million."""


@dataclass(frozen=True)
class GeneratorCheck:
    """What a generator does on the tasks that it was trained on.

    Args:
        reconstruction_error: share of the normalised params' energy that the autoencoder loses.
        routed: task-identification accuracy: of so many adapters, generated from the plainest condition of a task each, the share that
            is nearest (in ΔW) to an adapter of that task.
        generated: the number of these adapters, one a task.
        threshold: similarity below which its index calls a request out of distribution.
    """

    reconstruction_error: float
    routed: float
    generated: int
    threshold: float

    @property
    def warnings(self) -> list[str]:
        """What is wrong with the generator and what may help, a sentence each; empty if nothing was found."""
        found = []
        if self.reconstruction_error > MOST_LOST:
            found.append(
                f"the autoencoder loses {self.reconstruction_error:.0%} of what tells the zoo's adapters apart (at most {MOST_LOST:.0%} is "
                "usable): train it for more steps, give it a larger latent_dim, or collect more runs a task"
            )
        if self.routed < LEAST_ROUTED:
            found.append(
                f"only {self.routed:.0%} of the adapters generated for its own tasks are nearest to these tasks (expected: at least "
                f"{LEAST_ROUTED:.0%}): train the U-Net for more steps, or on more conditions_per_task"
            )
        if self.threshold < 0:
            found.append(
                f"the threshold of its index is {self.threshold:.2f}, below zero: it would call every request known; "
                "collect more tasks, or describe them in words that are more alike within a task than between tasks"
            )
        return found

    def to_json(self) -> dict[str, Any]:
        """Return a JSON-ready description."""
        return {**asdict(self), "warnings": self.warnings}


def check_generator(generator: Path, zoo_folder: str | Path, tasks_folder: str | Path | None, run_folder: Path) -> GeneratorCheck:
    """Check a generator that `train` has just made.

    Args:
        generator: its folder.
        zoo_folder, tasks_folder, run_folder: as `train` was given them.

    Raises:
        TaskDataError: a task or an adapter of the zoo is missing.
    """
    zoo = Zoo(zoo_folder)
    data = ZooParams.load(zoo, run_folder / "params")
    pipe = CondPDiffPipeline.from_pretrained(generator)
    pipe.set_progress_bar_config(disable=True)
    names = zoo.task_names[:: -(-len(zoo.task_names) // CHECKED_TASKS)]
    tasks = zoo.load_tasks(tasks_folder, names)
    params = [pipe(task.conditions(1)[0], generator=seeded(0, 1), output_type="params")[0] for task in tasks]
    made, distances, start = [pipe.codec.to_adapter(row) for row in params], [], 0
    for chunk in data.chunks():  # the zoo is never in memory as a whole
        stop = start + len(chunk)
        space = ZooSpace([data.template.to_adapter(row) for row in chunk], data.names[start:stop])
        distances.append(space.norms.square() - 2 * delta_gram(made, space.adapters))  # ‖ΔW‖² of what was made is the same for all
        start = stop
    nearest = data.tasks[torch.cat(distances, dim=1).argmin(1)]
    step = -(-len(data) * data.template.layout.num_params // CHECKED_NUMBERS)
    hits = [zoo.task_names[index] == name for index, name in zip(nearest.tolist(), names, strict=True)]
    return GeneratorCheck(
        reconstruction_error=round(pipe.codec.reconstruction_error(data.part(range(0, len(data), step)).chunks()), 4),
        routed=round(sum(hits) / len(hits), 4),
        generated=len(hits),
        threshold=round(float(pipe.condition_index.threshold), 4),
    )
