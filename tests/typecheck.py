"""The type check: mypy over the package as it is installed. Run it with `python tests/typecheck.py`.

mypy does not see setuptools' package-dir (`pipelines/` is installed as `cond_pdiff.pipelines`, and so on), and takes what it
does not see for `Any`. So it runs over an overlay, a temporary folder with symbolic links in the installed shape. An overlay
that is wrong would pass silently: each mapped package therefore gets a probe module with a deliberate error, and the check
fails unless mypy reports every one of them.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PROBE = "typecheck_probe"
PROBE_SOURCE = 'from cond_pdiff.errors import CondPDiffError\n\nnumber: int = CondPDiffError("a deliberate type error")\n'
PROBE_MESSAGE = re.compile(rf"^(?P<package>\S+)/{PROBE}\.py:3: error: .*\"CondPDiffError\".*\"int\".*\[assignment\]$")


def mapped_folders() -> dict[str, str]:
    """Installed folder → folder in the repository, for every mapped package but `cond_pdiff` itself."""
    with (ROOT / "pyproject.toml").open("rb") as file:
        package_dir = tomllib.load(file)["tool"]["setuptools"]["package-dir"]
    return {package.replace(".", "/"): folder for package, folder in package_dir.items() if package != "cond_pdiff"}


def link_entries(source: Path, target: Path) -> None:
    """Make the folder `target` with a symbolic link to every entry of `source`."""
    target.mkdir(parents=True)
    for entry in source.iterdir():
        if entry.name != "__pycache__":
            (target / entry.name).symlink_to(entry, target_is_directory=entry.is_dir())


def make_overlay(overlay: Path, mapped: dict[str, str]) -> None:
    """Fill `overlay` with the package in its installed shape, plus the probes."""
    link_entries(ROOT / "cond_pdiff", overlay / "cond_pdiff")
    for installed, folder in mapped.items():
        link_entries(ROOT / folder, overlay / installed)
        (overlay / installed / f"{PROBE}.py").write_text(PROBE_SOURCE, encoding="utf-8")
    if (ROOT / "app.py").exists():
        (overlay / "app.py").symlink_to(ROOT / "app.py")


def run_mypy(overlay: Path) -> tuple[list[str], int]:
    """mypy's output lines, paths relative to `overlay`, and its exit status (0 fine, 1 type errors, 2 could not run)."""
    command = [sys.executable, "-m", "mypy", "--config-file", str(ROOT / "pyproject.toml"), "--cache-dir", str(ROOT / ".mypy_cache")]
    # The running interpreter, not the oldest one supported: installed stubs may be written in newer syntax.
    command += ["--python-version", f"{sys.version_info.major}.{sys.version_info.minor}", "--no-error-summary", "--no-pretty"]
    command += sorted(entry.name for entry in overlay.iterdir())
    done = subprocess.run(command, cwd=overlay, capture_output=True, text=True, check=False)
    return (done.stdout + done.stderr).splitlines(), done.returncode


def judge(lines: list[str], status: int, mapped: dict[str, str]) -> list[str]:
    """What is wrong, as lines with the repository's own paths; empty if all is well."""
    seen = {match["package"] for line in lines if (match := PROBE_MESSAGE.match(line))}
    problems = [line for line in lines if not PROBE_MESSAGE.match(line)]
    for installed, folder in mapped.items():
        problems = [line.replace(f"{installed}/", f"{folder}/") for line in problems]
        if installed not in seen:
            problems.append(f"{folder}: mypy did not report the deliberate error put there, so it checks nothing in that folder")
    if status not in (0, 1):
        problems.append(f"mypy ended with status {status}")
    return problems


def main() -> int:
    """Print every type error; 0 if there is none and the check is proven not to be empty."""
    mapped = mapped_folders()
    with tempfile.TemporaryDirectory() as folder:
        overlay = Path(folder).resolve()
        make_overlay(overlay, mapped)
        lines, status = run_mypy(overlay)
    problems = judge(lines, status, mapped)
    for problem in problems:
        print(problem)
    print(f"type check: {len(problems)} problems" if problems else f"type check: fine (and {len(mapped)} deliberate errors were found)")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
