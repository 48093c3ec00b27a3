"""Store: a folder that all machines reach, where they share no file system; by fsspec: S3, GCS, Azure, SSH and others."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterable
from pathlib import Path

from cond_pdiff.errors import CondPDiffError
from cond_pdiff.training.jobs.work import RECEIPTS


class Store:
    """A copy of an output folder behind a URL: workers bring their results and receipts there, the command fetches them.

    Args:
        url: of the copy, such as `s3://bucket/zoo`.
        folder: the output folder, of the same name on every machine.

    Raises:
        CondPDiffError: fsspec knows no such file system, or lacks a package for it.
    """

    def __init__(self, url: str, folder: Path) -> None:
        import fsspec

        self.folder = folder
        try:
            self._files, self._root = fsspec.url_to_fs(url)
        except (ImportError, ValueError) as error:
            raise CondPDiffError(f"the store {url!r} cannot be reached: {error}") from error

    def push(self, names: Iterable[str]) -> None:
        """Bring files and folders there, in this order; what a folder held there before is replaced file by file."""
        for name in names:
            path = self.folder / name
            for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
                if file.is_file():
                    target = f"{self._root}/{file.relative_to(self.folder).as_posix()}"
                    self._files.makedirs(target.rpartition("/")[0], exist_ok=True)
                    self._files.put_file(str(file), target)

    def pull(self, names: Iterable[str]) -> None:
        """Fetch those files and folders that are there and not here; each is here complete or not at all."""
        for name in names:
            target, source = self.folder / name, f"{self._root}/{name}"
            if target.exists() or not self._files.exists(source):
                continue
            target.parent.mkdir(parents=True, exist_ok=True)
            aside = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
            try:
                for file in self._files.find(source):
                    place = aside / "result" / file[len(source) :].lstrip("/")
                    place.parent.mkdir(parents=True, exist_ok=True)
                    self._files.get_file(file, str(place))
                os.replace(aside / "result", target)
            except OSError:
                if not target.exists():  # else another process of this machine has fetched it meanwhile
                    raise
            finally:
                shutil.rmtree(aside)

    def pull_results(self) -> None:
        """Fetch every result that has a receipt there, and the receipt."""
        start = f"{self._root}/{RECEIPTS}"
        for file in self._files.find(start) if self._files.exists(start) else ():
            receipt = f"{RECEIPTS}/{file[len(start) :].lstrip('/')}"
            self.pull([receipt.removeprefix(f"{RECEIPTS}/").removesuffix(".json"), receipt])
