"""A zoo: a folder of adapters collected by fine-tuning, or imported, with a manifest.

zoo.json                                the settings and tasks it was collected with
lora_a.safetensors                      the one `lora_A` (and new head) that all runs start from; with `from_multitask`, the multi-task run
tasks/<task>/run-<k>/                   an adapter folder, with `run.json`: metrics, seed, steps, machine, hash
multitask/                              one adapter trained on all zoo tasks, both factors of it: the baseline
tasks/<task>/run-<k>/step-<n>/          earlier checkpoints of the run, if they were kept
conditions/                             of an imported zoo: see `cond_pdiff.training.tasks.imported`
manifest.json                           all run.json in one table, and whether the zoo is complete
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from cond_pdiff.adapter import ADAPTER_FILES, LoraAdapter
from cond_pdiff.atomic import atomic_folder, dump_json, write_text
from cond_pdiff.errors import TaskDataError
from cond_pdiff.families.family import Family, family_named
from cond_pdiff.hub import Backbone
from cond_pdiff.peft_files import WEIGHTS_FILE
from cond_pdiff.training.config import PAIRS, modern_collect
from cond_pdiff.training.tasks.imported import read_conditions
from cond_pdiff.training.tasks.task import ZooTask

RUN_FILE = "run.json"
MULTITASK = "multitask"
ZOO_PARTS = ("base", "lora", "collect", "tasks", "unseen")
"""The parts of `zoo.json`, each a JSON object."""


def file_sha256(path: Path) -> str:
    """Return the sha256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_run(
    folder: Path, adapter: LoraAdapter, facts: Mapping[str, Any], checkpoints: Mapping[int, Mapping[str, torch.Tensor]] | None = None
) -> None:
    """Write a run's folder, complete or not at all.

    Args:
        facts: at least the names of task and run; the hashes are added.
        checkpoints: steps → the adapter's tensors after them.
    """
    with atomic_folder(folder, (*ADAPTER_FILES, RUN_FILE)) as aside:
        adapter.save(aside)
        hashes: dict[str, Any] = {"sha256": file_sha256(aside / WEIGHTS_FILE), "checkpoints": {}}
        for step, tensors in (checkpoints or {}).items():
            earlier = aside / f"step-{step}"
            dataclasses.replace(adapter, tensors=dict(tensors)).save(earlier)
            hashes["checkpoints"][earlier.name] = file_sha256(earlier / WEIGHTS_FILE)
        (aside / RUN_FILE).write_text(dump_json({**facts, **hashes}), encoding="utf-8")


Job = tuple[str, int]
"""A task's name (or `MULTITASK`) and the number of the run."""


@dataclass(frozen=True)
class ZooRun:
    """One fine-tuned adapter of a zoo: where it is and what `run.json` says of it."""

    folder: Path
    facts: dict[str, Any]

    @property
    def task(self) -> str:
        """The task's name."""
        return str(self.facts["task"])

    def adapter(self) -> LoraAdapter:
        """Load the adapter, checking that its bytes are the ones that were collected."""
        return self._load(self.folder, self.facts["sha256"])

    @property
    def files(self) -> dict[Path, str]:
        """The folders of the adapter and, if they were kept, of its earlier checkpoints → sha256 of the weights."""
        return {self.folder: self.facts["sha256"]} | {self.folder / name: sha for name, sha in self.facts.get("checkpoints", {}).items()}

    def adapters(self) -> Iterator[LoraAdapter]:
        """Yield the adapter and, if they were kept, its earlier checkpoints, loaded one after the other."""
        return (self._load(folder, sha256) for folder, sha256 in self.files.items())

    def _load(self, folder: Path, sha256: str) -> LoraAdapter:
        if file_sha256(folder / WEIGHTS_FILE) != sha256:
            raise TaskDataError(f"{folder / WEIGHTS_FILE} has changed since it was collected; delete {self.folder} and collect it again")
        return LoraAdapter.load(folder)


class Zoo:
    """Read access to a zoo folder.

    Args:
        folder: the zoo.

    Raises:
        TaskDataError: not a zoo, or a malformed one.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        try:
            self.facts: dict[str, Any] = json.loads((self.folder / "zoo.json").read_text(encoding="utf-8"))
        except FileNotFoundError as error:
            raise TaskDataError(f"{self.folder} is not a zoo: zoo.json is missing; `cond-pdiff collect` makes one") from error
        except ValueError as error:
            raise TaskDataError(f"{self.folder / 'zoo.json'} is not valid JSON: {error}") from error
        if not isinstance(self.facts, dict) or not all(isinstance(self.facts.get(part), dict) for part in ZOO_PARTS):
            raise TaskDataError(f"{self.folder / 'zoo.json'} must hold a JSON object with {', '.join(ZOO_PARTS)}")
        collect = modern_collect(self.facts["collect"])  # which in zoos of 0.1.0 has a `kind`, or does not name it
        if not isinstance(collect.get("family"), str):
            raise TaskDataError(f"{self.folder / 'zoo.json'}: collect names no family of base models")
        condition = PAIRS.get(str(self.facts["collect"].get("kind", "text")), ("", ""))[0]
        self.facts = {"condition": condition, **self.facts, "collect": collect}

    @property
    def family(self) -> Family:
        """The family of its base model.

        Raises:
            CondPDiffError: it is not known here.
        """
        return family_named(self.facts["collect"]["family"])

    @property
    def is_imported(self) -> bool:
        """Whether its adapters were trained elsewhere; then it holds their conditions itself."""
        return bool(self.facts["collect"].get("imported"))

    def load_tasks(self, folder: str | Path | None, names: Sequence[str]) -> Sequence[ZooTask]:
        """Load tasks from the folder that the zoo was collected on; None: from the zoo itself, which was imported.

        Raises:
            TaskDataError: a task is missing or malformed, or the zoo does not hold its conditions.
        """
        return read_conditions(self.folder, names) if folder is None else self.family.load_tasks(folder, names)

    @property
    def task_names(self) -> list[str]:
        """The tasks that the generator is to be trained on."""
        return list(self.facts["tasks"])

    @property
    def unseen_names(self) -> list[str]:
        """The tasks kept out of training, with directly trained adapters for comparison."""
        return list(self.facts["unseen"])

    @property
    def base(self) -> Backbone:
        """The base model."""
        return Backbone.from_json(self.facts["base"])

    def run_folder(self, task: str, run: int) -> Path:
        """Return where the adapter of a task's k-th run is, or will be."""
        return self.folder / "tasks" / task / f"run-{run}"

    def runs(self, task: str) -> list[ZooRun]:
        """Return the finished runs of a task, in order."""
        paths = (self.folder / "tasks" / task).glob(f"run-*/{RUN_FILE}")
        runs = [ZooRun(path.parent, json.loads(path.read_text(encoding="utf-8"))) for path in paths]
        return sorted(runs, key=lambda run: int(run.facts["run"]))

    @property
    def jobs(self) -> list[Job]:
        """The runs that the zoo's settings ask for, ordered by run: a zoo cut short covers all tasks."""
        collect, names = self.facts["collect"], self.task_names
        made = {name for name, facts in self.facts["tasks"].items() if facts.get("source")}  # there for variety: one run says it
        jobs = [(name, 0) for name in (*names, *self.unseen_names)]
        jobs += [(name, run) for run in range(1, int(collect.get("runs", 1))) for name in names if name not in made]
        if collect.get("multitask_steps"):
            jobs.insert(0 if collect.get("from_multitask") else len(jobs), (MULTITASK, 0))
        return jobs

    @property
    def missing(self) -> list[Job]:
        """The runs that have not been collected yet; none of a complete zoo."""
        return [job for job in self.jobs if not (self.job_folder(job) / RUN_FILE).exists()]

    def check_complete(self) -> None:
        """Raise `TaskDataError` that tells what is missing, unless the zoo was collected to its end."""
        if missing := self.missing:
            shown = [name if name == MULTITASK else f"run {run} of {name!r}" for name, run in missing[:3]] + ["…"] * (len(missing) > 3)
            raise TaskDataError(
                f"{self.folder} is not complete: {len(missing)} of {len(self.jobs)} runs are missing ({', '.join(shown)}); run "
                f"`cond-pdiff collect --zoo {self.folder}` with its recipe and tasks again to go on"
            )

    def job_folder(self, job: Job) -> Path:
        """Return where a job's adapter is, or will be."""
        name, run = job
        return self.folder / MULTITASK if name == MULTITASK else self.run_folder(name, run)

    def multitask(self) -> ZooRun | None:
        """Return the multi-task baseline, if it has been collected."""
        path = self.folder / MULTITASK / RUN_FILE
        return ZooRun(path.parent, json.loads(path.read_text(encoding="utf-8"))) if path.exists() else None

    def write_manifest(self) -> None:
        """Gather all `run.json` into `manifest.json`, which also says whether these are all."""
        rows = [run.facts for task in (*self.task_names, *self.unseen_names) for run in self.runs(task)]
        write_text(self.folder / "manifest.json", dump_json({"zoo": self.facts, "runs": rows, "complete": not self.missing}))


def soup(adapters: list[LoraAdapter]) -> LoraAdapter:
    """Return the mean, in ΔW, of one task's adapters (the paper's "model soup" baseline)."""
    return LoraAdapter.mean(adapters)
