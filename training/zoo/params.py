"""ZooParams: all adapters of a zoo as one matrix on disk."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import torch

from cond_pdiff.atomic import atomic_folder, dump_json
from cond_pdiff.models.adapter_template import AdapterTemplate
from cond_pdiff.training.zoo.disk_array import DiskArray
from cond_pdiff.training.zoo.zoo import Zoo

FACTS_FILE, MATRIX_FILE, TEMPLATE_FOLDER = "zoo.json", "params.safetensors", "template"


@dataclass(frozen=True)
class ZooParams:
    """All adapters of a zoo's trained tasks as one matrix, which stays on disk: `data[indices]` reads rows, `chunks` all of them.

    Args:
        template: layout and constants.
        matrix: float32, a row an adapter, as long as `num_params`.
        tasks: index of each adapter's task in `zoo.task_names`, shape `(num_adapters,)`.
        names: `task/run` of each adapter, for messages.
        rows: where in the matrix each adapter stands, shape `(num_adapters,)`.
    """

    template: AdapterTemplate
    matrix: DiskArray
    tasks: torch.Tensor
    names: list[str]
    rows: torch.Tensor

    @classmethod
    def load(cls, zoo: Zoo, folder: Path) -> ZooParams:
        """Read a zoo into a matrix below `folder`; one that was made there of the same adapters is taken as it is.

        Raises:
            TaskDataError: the zoo is not complete, or an adapter has changed since it was collected.
        """
        zoo.check_complete()
        runs = [(index, run) for index, task in enumerate(zoo.task_names) for run in zoo.runs(task)]
        found = [(index, f"{run.task}/{run.folder.name}", sha256) for index, run in runs for sha256 in run.files.values()]
        tasks, names, hashes = (list(column) for column in zip(*found, strict=True))
        max_length = int(zoo.facts["collect"]["max_length"])
        facts = dump_json({"adapters": hashes, "names": names, "tasks": tasks, "base": zoo.base.to_json(), "max_length": max_length})
        path = folder / FACTS_FILE
        if not path.exists() or path.read_text(encoding="utf-8") != facts:
            template = AdapterTemplate.from_adapters((each for _, run in runs for each in run.adapters()), zoo.base, max_length)
            rows = (template.to_params(each) for _, run in runs for each in run.adapters())
            return cls.write(folder, template, rows, tasks, names, facts)
        return cls._open(folder, tasks, names)

    @classmethod
    def write(
        cls, folder: Path, template: AdapterTemplate, params: Iterable[torch.Tensor], tasks: Sequence[int], names: Sequence[str], facts: str
    ) -> ZooParams:
        """Write the matrix of `params`, each of shape `(num_params,)`, complete or not at all, in place of one that is there.

        Args:
            facts: JSON that tells what it was made of.
        """
        for leftover in folder.parent.glob(f".{folder.name}.*"):  # of a killed process
            shutil.rmtree(leftover)
        with atomic_folder(folder, (FACTS_FILE, MATRIX_FILE, TEMPLATE_FOLDER), overwrite=True) as aside:
            template.save_pretrained(aside / TEMPLATE_FOLDER)
            DiskArray.write(aside / MATRIX_FILE, params, len(names))
            (aside / FACTS_FILE).write_text(facts, encoding="utf-8")
        return cls._open(folder, tasks, names)

    @classmethod
    def _open(cls, folder: Path, tasks: Sequence[int], names: Sequence[str]) -> ZooParams:
        template = AdapterTemplate.from_pretrained(folder / TEMPLATE_FOLDER)
        return cls(template, DiskArray(folder / MATRIX_FILE), torch.tensor(tasks), list(names), torch.arange(len(names)))

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, adapters: torch.Tensor) -> torch.Tensor:
        """Return the params of these adapters (indices, or a mask), shape `(n, num_params)`."""
        return self.matrix[self.rows[adapters]]

    def columns(self, start: int, stop: int) -> torch.Tensor:
        """Return a part of the params of all adapters, shape `(num_adapters, stop - start)`."""
        return self.matrix.columns(self.rows, start, stop)

    def chunks(self) -> Iterator[torch.Tensor]:
        """Yield the params of all adapters in order, a few megabytes at a time, shape `(n, num_params)`."""
        return self.matrix.chunks(self.rows)

    def part(self, adapters: Sequence[int]) -> ZooParams:
        """Return these adapters only."""
        return replace(self, tasks=self.tasks[adapters], names=[self.names[index] for index in adapters], rows=self.rows[adapters])

    @cached_property
    def sha256(self) -> str:
        """The sha256 of the matrix: a run may only be continued on the data it began with."""
        digest = hashlib.sha256()
        for chunk in self.chunks():
            digest.update(chunk.numpy().data)
        return digest.hexdigest()
