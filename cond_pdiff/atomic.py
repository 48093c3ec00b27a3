"""Files and folders that are either complete or absent: written aside, synced, renamed."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import IO, Any

from cond_pdiff.errors import OutputExistsError


def dump_json(data: Any) -> str:
    """Return sorted, indented JSON that is the same in every process; NaN is refused."""
    return json.dumps(data, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n"


def write_text(path: Path, text: str) -> None:
    """Write `text` to `path` in UTF-8; see `write_bytes`."""
    write_bytes(path, text.encode())


def write_bytes(path: Path, data: bytes) -> None:
    """Write `data` to `path` so that a reader sees the old or the new content, never a part."""
    with atomic_file(path) as file:
        file.write(data)


@contextlib.contextmanager
def atomic_file(path: Path) -> Iterator[IO[bytes]]:
    """Yield a binary file beside `path`; on success it becomes `path`, on failure nothing is left."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.chmod(name, 0o644)
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def check_output_folder(target: Path, own_files: Collection[str], overwrite: bool) -> None:
    """Raise `OutputExistsError` unless `target` is absent, empty, or (with `overwrite`) holds nothing but `own_files`."""
    nearest = next(path for path in (target.absolute(), *target.absolute().parents) if path.exists())
    if not nearest.is_dir():
        raise OutputExistsError(f"{nearest} is a file; name a folder to write to")
    if not target.exists():
        return
    found = sorted(entry.name for entry in target.iterdir())
    if found and not overwrite:
        raise OutputExistsError(
            f"{target} is not empty (it holds {found[0]!r}); choose another folder, "
            "delete it, or replace it where that is offered (--force, overwrite=True)"
        )
    foreign = [name for name in found if name not in own_files]
    if foreign:
        raise OutputExistsError(f"{target} holds {foreign[0]!r}, which is not ours to replace; choose another folder")


@contextlib.contextmanager
def atomic_folder(target: Path, own_files: Collection[str], overwrite: bool = False) -> Iterator[Path]:
    """Yield a temporary folder beside `target`; on success it becomes `target`, on failure nothing is left.

    Args:
        target: the folder to create.
        own_files: the names that the caller writes; with `overwrite`, a folder holding only these may be replaced.
        overwrite: replace an existing folder.

    Raises:
        OutputExistsError: `target` holds something that may not be replaced, or is the current folder.
    """
    target = Path(target).resolve()  # what a link names is to be filled, not the link replaced
    check_output_folder(target, own_files, overwrite)
    if Path.cwd().is_relative_to(target):
        raise OutputExistsError(f"{target} is the current folder, or holds it, and cannot be replaced; name a new one")
    made = [parent for parent in target.parents if not parent.exists()]  # innermost first
    target.parent.mkdir(parents=True, exist_ok=True)
    aside = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        yield aside
        for path in sorted(aside.rglob("*")):
            if path.is_file():
                path.chmod(0o644)
                _sync(path)
        aside.chmod(0o755)
        _sync(aside)
        check_output_folder(target, own_files, overwrite)  # again: another process may have written there meanwhile
        old = None
        if target.exists():
            old = Path(tempfile.mkdtemp(prefix=f".{target.name}.old.", dir=target.parent)) / "folder"
            os.replace(target, old)
        try:
            os.replace(aside, target)
        except OSError:
            if old is not None:
                os.replace(old, target)
            raise
        _sync(target.parent)
        if old is not None:
            shutil.rmtree(old.parent)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        with contextlib.suppress(OSError):  # another process may have put something there meanwhile
            for parent in made:
                parent.rmdir()
        raise


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
