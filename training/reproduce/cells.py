"""Cells: the parts of a reproduction, each measured once and kept."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from cond_pdiff.atomic import check_output_folder, dump_json, write_text
from cond_pdiff.errors import CondPDiffError, TrainingError

Plan = Mapping[str, Callable[[], Any]]
"""The name of a cell (a path below the folder of cells) → how it is measured, JSON-ready."""

SETTINGS_FILE = "settings.json"


def open_folder(out: Path, settings: dict[str, Any]) -> None:
    """Create the folder of a reproduction, or check that it was begun with the same settings.

    Args:
        settings: section of the recipe → its entries. Sections that the folder does not know yet are added.

    Raises:
        TrainingError: other settings.
        OutputExistsError: a folder with something else in it.
    """
    path = out / SETTINGS_FILE
    if not path.exists():
        check_output_folder(out, (), overwrite=False)
        write_text(path, dump_json({}))
    known = read_json(path)
    if json.loads(dump_json(settings | known)) != json.loads(dump_json(known | settings)):
        raise TrainingError(f"{out} was begun with other settings (another recipe, or with or without --quick); choose another folder")
    write_text(path, dump_json(known | settings))


def run_cells(folder: Path, plan: Plan, label: str, after_cell: Callable[[dict[str, Any]], None] = lambda _: None) -> dict[str, Any]:
    """Return the values of all cells; those that are not in `folder` yet are measured, in order, and kept there.

    Args:
        after_cell: is told all values so far whenever one has been measured.
    """
    values = {}
    for name, measure in tqdm(plan.items(), desc=label, unit="cell"):
        path = folder / f"{name}.json"
        measured = not path.exists()
        if measured:
            write_text(path, dump_json(measure()))
        values[name] = read_json(path)
        if measured:
            after_cell(values)
    return values


def read_json(path: Path) -> Any:
    """Read what a file of this folder holds; raise `CondPDiffError` if it is damaged."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CondPDiffError(f"{path} is not valid JSON ({error}); delete it, and it is measured again") from error
