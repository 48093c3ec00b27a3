"""Cells: the parts of a reproduction, each measured once and kept."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cond_pdiff.atomic import check_output_folder, dump_json, write_text
from cond_pdiff.errors import CondPDiffError, TrainingError

SETTINGS_FILE = "settings.json"


@dataclass(frozen=True)
class Cell:
    """A part that is measured at once.

    Args:
        measure: gives its value, JSON-ready.
        needs: the steps before it.
    """

    measure: Callable[[], Any]
    needs: tuple[str, ...] = ()


@dataclass(frozen=True)
class Step:
    """What several cells read and is made once: a zoo, a matrix of adapters, a trained generator.

    Args:
        make: makes it.
        needs: the steps before it.
    """

    make: Callable[[], Any]
    needs: tuple[str, ...] = ()


Plan = Mapping[str, Cell | Step]
"""The name of a cell (a path below the folder of cells), or the path of a step's result below the reproduction's folder → the part."""


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


def read_json(path: Path) -> Any:
    """Read what a file of this folder holds; raise `CondPDiffError` if it is damaged."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CondPDiffError(f"{path} is not valid JSON ({error}); delete it, and it is measured again") from error
