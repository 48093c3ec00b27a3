"""`import-adapters`: a zoo of adapters that exist, whoever trained them, with what each of them is asked for by."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from cond_pdiff.adapter import LoraAdapter
from cond_pdiff.atomic import atomic_folder, dump_json
from cond_pdiff.canonical import canonical
from cond_pdiff.conditions.condition import CONDITIONS, Condition
from cond_pdiff.errors import AdapterError, CondPDiffError, TaskDataError
from cond_pdiff.families.family import OTHER_BASE, family_named, family_of
from cond_pdiff.formats.lora_file import PICKLED, read_adapter
from cond_pdiff.formats.module_names import ModuleNames
from cond_pdiff.hub import Backbone
from cond_pdiff.lora import LoraSpec
from cond_pdiff.peft_files import CONFIG_FILE
from cond_pdiff.tables import JSON_SUFFIXES, read_table
from cond_pdiff.training.config import CollectConfig
from cond_pdiff.training.tasks.imported import ImportedTask, write_conditions
from cond_pdiff.training.zoo.zoo import Zoo, file_sha256, write_run

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
NAME_COLUMNS = ("name", "file")
ENDINGS = (".safetensors", *PICKLED)


@dataclass(frozen=True)
class Source:
    """One adapter to be imported: where it is, and its task."""

    path: Path
    task: ImportedTask


def import_adapters(
    folder: str | Path,
    conditions: str | Path,
    zoo_folder: str | Path,
    base: Backbone | None = None,
    family: str | None = None,
    rank: int | None = None,
    names: ModuleNames | None = None,
) -> Zoo:
    """Make a zoo of adapters for one base model and one set of modules, each brought into canonical form (`cond_pdiff.canonical`).

    Args:
        folder: holds them: peft folders, and files of diffusers, kohya and ComfyUI.
        conditions: a table, `.csv` or `.jsonl`, with a row for each condition: `name` (or `file`) of the adapter, and `text`, `image` or
            `vector` (the latter two name files, from the table's folder); perhaps `group` and `licence`. Several rows of one name are
            several conditions for it; in JSON Lines they may also be a list.
        zoo_folder: created, complete or not at all.
        base: the base model; None: the one that the adapters record.
        family: its family; None: told by the adapters, "other-base" where they tell nothing.
        rank: of the zoo; None: the largest of the adapters'. Others are padded with zeros.
        names: see `LoraFile.read`.

    Raises:
        TaskDataError: a row or an adapter is missing or malformed.
        AdapterError: an adapter cannot be read, is not plain LoRA, or adapts other modules than the first.
        OutputExistsError: `zoo_folder` is not empty.
    """
    sources = find_sources(Path(folder), Path(conditions))
    spec, reference = _common_spec(sources, base, family, rank, names)
    first = sources[0].task.condition_kind
    collect = CollectConfig(
        family=str(spec.family or family_of(spec, spec.target_modules).name),  # type: ignore[union-attr]  # `_common_spec` saw to it
        base=reference.to_json(), rank=spec.rank, alpha=spec.alpha, target_modules=spec.target_modules,
        modules_to_save=spec.modules_to_save, fan_in_fan_out=spec.fan_in_fan_out, train_lora_a=True, runs=1, multitask_steps=0,
    )  # fmt: skip
    facts = {
        "base": reference.to_json(),
        "lora": spec.to_json(),
        "collect": {**collect.record(), "imported": True},
        "tasks": {source.task.name: source.task.zoo_facts() for source in sources},
        "unseen": {},
        "condition": first.name,
    }
    target = Path(zoo_folder)
    with atomic_folder(target, ()) as aside:
        for source in sources:
            _write_adapter(aside, source, spec, reference, names)
        write_conditions(aside, [source.task for source in sources])
        (aside / "zoo.json").write_text(dump_json(json.loads(json.dumps(facts))), encoding="utf-8")
        Zoo(aside).write_manifest()
    return Zoo(target)


def _write_adapter(zoo: Path, source: Source, spec: LoraSpec, base: Backbone, names: ModuleNames | None) -> None:
    """Write one adapter into a zoo, in canonical form, with how much of its ΔW that lost."""
    given = read_adapter(source.path, names, base.repo_id)
    try:
        made = canonical(given, spec.rank)
    except AdapterError as error:
        raise AdapterError(f"{source.path}: {error}") from error
    metadata = {"base": base.to_json(), "task": source.task.name, "imported_from": source.path.name}
    if isinstance(given.metadata.get("labels"), list):
        metadata["labels"] = given.metadata["labels"]
    weights = source.path if source.path.is_file() else source.path / "adapter_model.safetensors"
    facts = {
        "task": source.task.name, "run": 0, "train_lora_a": True, "source": source.path.name, "source_sha256": file_sha256(weights),
        "source_rank": given.spec.rank, "delta_error": update_error(given, made),
    }  # fmt: skip
    write_run(zoo / "tasks" / source.task.name / "run-0", LoraAdapter(spec, made.tensors, metadata), facts)


def update_error(given: LoraAdapter, made: LoraAdapter) -> float:
    """Return ‖ΔW' − ΔW‖ / ‖ΔW‖ of two adapters of the same modules, in float64; the largest over modules. No ΔW is formed.

    With a QR of the stacked factors of the difference, its norm is that of the small product of both R.
    """
    worst = 0.0
    for module in given.modules:
        (a, b), (new_a, new_b) = ([part.double() for part in one.factors(module)] for one in (given, made))
        b, new_b = given.spec.scaling * b, made.spec.scaling * new_b
        size = _norm(a, b)
        difference = _norm(torch.cat([a, new_a]), torch.cat([b, -new_b], 1))
        worst = max(worst, difference / size if size else difference)
    return worst


def _norm(lora_a: torch.Tensor, lora_b: torch.Tensor) -> float:
    return float((torch.linalg.qr(lora_b)[1] @ torch.linalg.qr(lora_a.T)[1].T).norm())


def _common_spec(
    sources: Sequence[Source], base: Backbone | None, family: str | None, rank: int | None, names: ModuleNames | None
) -> tuple[LoraSpec, Backbone]:
    """Return the specification and the base of the zoo, after a look at every adapter; raise `AdapterError` where they do not fit."""
    shapes: dict[str, tuple[int, ...]] = {}
    specs: list[LoraSpec] = []
    bases: set[Backbone] = set()
    for source in sources:
        adapter = read_adapter(source.path, names)
        found = {key: _without_rank(key, tuple(tensor.shape)) for key, tensor in adapter.tensors.items()}
        if specs and found != shapes:
            odd = min(key for key in {*found, *shapes} if found.get(key) != shapes.get(key))
            raise AdapterError(
                f"{source.path.name} and {sources[0].path.name} do not adapt the same modules of one base: {odd!r} is {found.get(odd)} and "
                f"{shapes.get(odd)}; a zoo is of one base model and one set of modules"
            )
        shapes = found
        specs.append(adapter.spec)
        bases |= {adapter.base} if adapter.spec.base_model else set()
    recorded = sorted({one.repo_id for one in bases})
    if base is None and len(recorded) != 1:
        what = f"name several base models ({', '.join(recorded[:3])})" if recorded else "do not name their base model"
        raise AdapterError(f"the adapters {what}; say which it is (--base)")
    reference = base or (bases.pop() if len(bases) == 1 else Backbone(recorded[0]))  # a revision only where all record it
    first, modules = specs[0], adapter.modules
    if any(spec.fan_in_fan_out != first.fan_in_fan_out or spec.modules_to_save != first.modules_to_save for spec in specs):
        raise AdapterError("the adapters differ in modules_to_save or fan_in_fan_out; a zoo is of one kind")
    largest = rank or max(spec.rank for spec in specs)
    alike = all(spec.target_modules == first.target_modules for spec in specs)
    prints = {spec.base_fingerprint for spec in specs if spec.base_fingerprint}
    spec = replace(
        first, base_model=reference.repo_id, rank=largest, alpha=float(largest), family=family or first.family,
        target_modules=first.target_modules if alike else modules, base_fingerprint=prints.pop() if len(prints) == 1 else None,
    )  # fmt: skip
    if family:
        family_named(family)
    elif family_of(spec, modules) is None:
        spec = replace(spec, family=OTHER_BASE)
    return spec, reference


def _without_rank(key: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return the shape of a factor without the rank, or that of a head's tensor."""
    if ".lora_A." in key:
        return shape[1:]
    return (shape[0], *shape[2:]) if ".lora_B." in key else shape


# --- the table of conditions ------------------------------------------------------------------------------------------------------


def find_sources(folder: Path, table: Path) -> list[Source]:
    """Return the adapters that a table names, in its order, with their conditions.

    Raises:
        TaskDataError: a row names no adapter, or no condition; conditions of several kinds; an adapter without a row.
    """
    if not folder.is_dir():
        raise TaskDataError(f"{folder} is no folder of adapters")
    shown: dict[str, list[Condition]] = {}
    facts: dict[str, dict[str, str]] = {}
    paths: dict[str, Path] = {}
    for line, row in _rows(table):
        where = f"{table}, row {line}"
        path = _adapter_path(folder, row, where)
        name = path.name if path.is_dir() else path.stem
        if not NAME.fullmatch(name):
            raise TaskDataError(f"{where}: {name!r} cannot name a task; use letters, digits, '.', '-' and '_'")
        if not path.samefile(paths.setdefault(name, path)):
            raise TaskDataError(f"{where}: {path} and {paths[name]} are two adapters of one name, {name!r}; rename one of them")
        shown.setdefault(name, []).extend(_conditions(row, table.parent, where))
        facts[name] = {"group": str(row.get("group") or ""), "licence": str(row.get("licence") or "")}
    if not paths:
        raise TaskDataError(f"{table} has no rows")
    kinds = {condition.form for conditions in shown.values() for condition in conditions}
    if len(kinds) > 1:
        raise TaskDataError(f"{table}: a zoo's conditions are of one kind, these are a {' and a '.join(sorted(kinds))}")
    if left := sorted(set(_adapters_in(folder)) - set(paths.values())):
        raise TaskDataError(f"{table} has no row for {len(left)} of the adapters in {folder}: {', '.join(path.name for path in left[:3])}")
    return [Source(paths[name], ImportedTask(name, tuple(shown[name]), **facts[name])) for name in paths]


def _rows(table: Path) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """Yield the number and the entries of each row of a CSV, TSV or JSON (Lines) file; the last may have lists in its cells."""
    if table.suffix not in JSON_SUFFIXES:
        found = read_table(table)
        rows: list[Any] = [dict(zip(found.columns, row, strict=True)) for row in found.rows]
    else:
        try:
            text = table.read_text(encoding="utf-8-sig")
            lines = [line for line in text.split("\n") if line.strip()]  # texts may hold the other characters of `splitlines`
            rows = json.loads(text) if text.lstrip().startswith("[") else [json.loads(line) for line in lines]
        except (OSError, ValueError) as error:
            raise TaskDataError(f"{table} cannot be read as a table of conditions: {error}") from error
    for line, row in enumerate(rows, 1):
        if not isinstance(row, dict):
            raise TaskDataError(f"{table}, row {line} must be a JSON object, got {type(row).__name__}")
        yield line, row


def _adapter_path(folder: Path, row: Mapping[str, Any], where: str) -> Path:
    given = next((str(row[column]) for column in NAME_COLUMNS if row.get(column)), None)
    if given is None:
        raise TaskDataError(f"{where}: expected the adapter's name in a column {' or '.join(NAME_COLUMNS)}, got {', '.join(map(str, row))}")
    if Path(given).is_absolute() or ".." in Path(given).parts:
        raise TaskDataError(f"{where}: {given!r} is not in {folder}")
    for path in (folder / given, *(folder / (given + ending) for ending in ENDINGS)):
        if os.path.exists(path):  # unlike `Path.exists`, False for a name that is too long
            return path
    raise TaskDataError(f"{where}: there is no adapter {given!r} in {folder}")


def _adapters_in(folder: Path) -> list[Path]:
    return [path for path in folder.iterdir() if (path / CONFIG_FILE).is_file() or (path.is_file() and path.suffix in ENDINGS)]


def _conditions(row: Mapping[str, Any], folder: Path, where: str) -> list[Condition]:
    """Return the conditions of a row, checked."""
    columns = {kind.column: kind for kind in CONDITIONS.values() if kind.column}
    named = [column for column in columns if row.get(column) not in (None, "", [])]
    if len(named) != 1:
        raise TaskDataError(f"{where}: expected one of {', '.join(columns)}, got {' and '.join(named) or 'none of them'}")
    kind, value = columns[named[0]], row[named[0]]
    values = value if isinstance(value, list) and not all(isinstance(one, (int, float)) for one in value) else [value]
    try:
        return [kind.of(folder / one if kind.column_names_files and isinstance(one, str) else one) for one in values]
    except CondPDiffError as error:
        raise TaskDataError(f"{where}: {error}") from error
