"""What mkdocs does besides: files of the repository that stand outside of `docs/`, and the package as griffe can read it.

Pages link to the README, to results and to recipes as they lie in the repository, so that the links work there, too. On the site these
files lie below `repository/` (the README is its first page), and every relative link is written anew for the place where its file lies.
"""

from __future__ import annotations

import os
import posixpath
import re
import shutil
import tomllib
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]
COPY = ROOT / "build" / "docs-package"
OUTSIDE = ("README.md", "CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md", "CITATION.cff", "results/**/*.png", "training/recipes/*.json",
           "cond_pdiff/bundled/*/README.md", "cond_pdiff/bundled/*/pictures/*.png")  # fmt: skip
"""What the site holds of the repository besides `docs/`."""
LINK = re.compile(r"(?P<before>\]\()(?P<target>[^)\s#:]+)(?P<after>(?:#[^)\s]*)?(?:\s+\"[^\"]*\")?\))")


def place(path: str) -> str:
    """Return where a file of the repository lies on the site: its source address, as mkdocs counts them."""
    if path.startswith("docs/"):
        return path.removeprefix("docs/")
    return path if path == "README.md" else f"repository/{path}"


def outside() -> dict[str, Path]:
    """Return the files from outside of `docs/` by their source addresses."""
    found = (path for pattern in OUTSIDE for path in sorted(ROOT.glob(pattern)))
    return {place(path.relative_to(ROOT).as_posix()): path for path in found}


def on_startup(command: str, dirty: bool) -> None:
    """Copy the package's modules into the shape that it is installed in: griffe does not see setuptools' package-dir."""
    with (ROOT / "pyproject.toml").open("rb") as file:
        folders = tomllib.load(file)["tool"]["setuptools"]["package-dir"]
    shutil.rmtree(COPY, ignore_errors=True)
    for package, folder in sorted(folders.items()):
        for path in (ROOT / folder).rglob("*.py"):
            copied = COPY / package.replace(".", "/") / path.relative_to(ROOT / folder)
            copied.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, copied)


def on_files(files: Files, config: Any) -> Files:
    """Add the files from outside of `docs/`."""
    for address, path in outside().items():
        files.append(File.generated(config, address, abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Write every relative link anew for where its file lies on the site, and take the head off a card."""
    source = outside().get(page.file.src_uri)
    here = source.relative_to(ROOT).as_posix() if source else f"docs/{page.file.src_uri}"

    def anew(link: re.Match[str]) -> str:
        target = posixpath.normpath(posixpath.join(posixpath.dirname(here), link["target"]))
        address = place(target)
        if files.get_file_from_path(address) is None:
            return link[0]
        return f"{link['before']}{os.path.relpath(address, posixpath.dirname(page.file.src_uri) or '.')}{link['after']}"

    return LINK.sub(anew, markdown)
