"""ImportedTask: what an imported adapter does, known by its conditions alone; kept in the zoo.

conditions/conditions.json              name → group, licence, and the records of its conditions
conditions/<name>-<k>.png               what a record does not hold: pictures
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle, islice
from pathlib import Path
from typing import Any

from cond_pdiff.atomic import dump_json, write_bytes, write_text
from cond_pdiff.conditions.condition import Condition, condition_kind
from cond_pdiff.errors import ConditionError, TaskDataError
from cond_pdiff.training.tasks.task import ZooTask

CONDITIONS_FOLDER, CONDITIONS_FILE = "conditions", "conditions.json"


@dataclass(frozen=True)
class ImportedTask(ZooTask):
    """An adapter's task that nobody here can train or measure.

    Args:
        name: of the adapter.
        shown: its conditions, at least one, all of one kind.
        group: see `ZooTask`.
        licence: of the adapter.
    """

    name: str
    shown: tuple[Condition, ...]
    group: str = ""
    licence: str = ""

    @property
    def condition_kind(self) -> type[Condition]:  # type: ignore[override]  # a constant of the tasks of one kind
        """The kind of its conditions."""
        return type(self.shown[0])

    def conditions(self, count: int) -> list[Condition]:
        """Return the given conditions, then their views, then all of these again."""
        return list(islice(cycle([*self.shown, *(view for one in self.shown for view in one.views())]), count))


def write_conditions(folder: Path, tasks: Sequence[ImportedTask]) -> None:
    """Write the conditions into a zoo's folder."""
    facts: dict[str, Any] = {}
    for task in tasks:
        records = []
        for place, condition in enumerate(task.shown):
            record: dict[str, Any] = {"record": condition.to_json(), "file": None}
            if (found := condition.file()) is not None:
                record["file"] = f"{task.name}-{place}{found[0]}"
                write_bytes(folder / CONDITIONS_FOLDER / record["file"], found[1])
            records.append(record)
        facts[task.name] = {"group": task.group, "licence": task.licence, "conditions": records}
    write_text(folder / CONDITIONS_FOLDER / CONDITIONS_FILE, dump_json(facts))


def read_conditions(folder: Path, names: Sequence[str]) -> list[ImportedTask]:
    """Read the named tasks of a zoo that was imported.

    Raises:
        TaskDataError: it was not, or its conditions are malformed.
    """
    path = folder / CONDITIONS_FOLDER / CONDITIONS_FILE
    if not path.is_file():
        raise TaskDataError(f"{folder} does not hold its conditions, as an imported zoo does; name the folder of its tasks (--tasks)")
    try:
        facts = json.loads(path.read_text(encoding="utf-8"))
        tasks = []
        for name in names:
            shown = tuple(_condition(path.parent, one) for one in facts[name]["conditions"])
            tasks.append(ImportedTask(name, shown, facts[name]["group"], facts[name]["licence"]))
        return tasks
    except (ValueError, KeyError, TypeError, ConditionError) as error:
        raise TaskDataError(f"{path} is malformed: {type(error).__name__}: {error}") from error


def _condition(folder: Path, kept: Mapping[str, Any]) -> Condition:
    file = None if kept["file"] is None else folder / Path(kept["file"]).name
    return condition_kind(kept["record"]).from_json(kept["record"], file)
