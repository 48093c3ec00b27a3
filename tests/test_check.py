"""A trained generator is checked on its own tasks, and what is wrong with it is found."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from cond_pdiff import CondPDiffPipeline
from cond_pdiff.sampling import seeded
from cond_pdiff.training.evaluate.similarity import ZooSpace
from cond_pdiff.training.stages.check import GeneratorCheck, check_generator
from cond_pdiff.training.tasks.tasks import load_tasks
from cond_pdiff.training.zoo.params import ZooParams
from cond_pdiff.training.zoo.zoo import Zoo


def copied(generator: Path, folder: Path, component: str, **tensors: float) -> Path:
    """A copy of a generator in which some tensors of a component hold one number."""
    shutil.copytree(generator, folder)
    file = folder / component / "diffusion_pytorch_model.safetensors"
    found = load_file(file)
    for key in found:
        number = next((number for part, number in tensors.items() if part in key), None)
        found[key] = found[key] if number is None else torch.full_like(found[key], number)
    save_file(found, file, {"format": "pt"})
    return folder


def test_a_generator_is_checked_by_what_it_makes(tiny_generator: Path, tiny_zoo: Path, tasks_folder: Path, tmp_path: Path) -> None:
    check = check_generator(tiny_generator, tiny_zoo, tasks_folder, tmp_path)
    zoo, pipe = Zoo(tiny_zoo), CondPDiffPipeline.from_pretrained(tiny_generator)
    pipe.set_progress_bar_config(disable=True)
    runs = [run for name in zoo.task_names for run in zoo.runs(name)]
    space = ZooSpace([run.adapter() for run in runs], [run.task for run in runs])
    made = [
        pipe.codec.to_adapter(pipe(task.conditions(1)[0], generator=seeded(0, 1), output_type="params")[0])
        for task in load_tasks(tasks_folder, zoo.task_names)
    ]
    hits = [space.tasks[index] == name for (index, _), name in zip(space.nearest(made), zoo.task_names, strict=True)]
    assert (check.routed, check.generated) == (sum(hits) / 2, 2)
    lost = pipe.codec.reconstruction_error(ZooParams.load(zoo, tmp_path / "again").chunks())
    assert check.reconstruction_error == pytest.approx(lost, abs=1e-4)
    assert check.threshold == pytest.approx(float(pipe.condition_index.threshold), abs=1e-4)


def test_broken_generators_are_found(tiny_generator: Path, tiny_zoo: Path, tasks_folder: Path, tmp_path: Path) -> None:
    silent = copied(tiny_generator, tmp_path / "silent", "autoencoder", decoder=0.0)
    check = check_generator(silent, tiny_zoo, tasks_folder, tmp_path / "run")
    assert check.reconstruction_error > 0.9
    assert any("the autoencoder loses" in warning for warning in check.warnings)
    below = copied(tiny_generator, tmp_path / "below", "condition_index", threshold=-0.2)
    check = check_generator(below, tiny_zoo, tasks_folder, tmp_path / "run")
    assert any("index is -0.20, below zero" in warning for warning in check.warnings)


def test_a_good_generator_is_not_warned_of() -> None:
    assert GeneratorCheck(0.2, 1.0, 40, 0.6).warnings == []
    (wrong,) = GeneratorCheck(0.2, 0.5, 40, 0.6).warnings
    assert wrong.startswith("only 50% of the adapters generated for its own tasks")
