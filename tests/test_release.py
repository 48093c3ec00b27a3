"""What a release names: one version everywhere, and checks before a commit that exist."""

from __future__ import annotations

import re
import tomllib
from importlib.metadata import version

import yaml
from documents import ROOT, text_of

import cond_pdiff


def test_the_version_is_one() -> None:
    with (ROOT / "pyproject.toml").open("rb") as file:
        wanted = tomllib.load(file)["project"]["version"]
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    newest = re.search(r"^## \[([\d.]+)\]", text_of("CHANGELOG.md"), re.MULTILINE)
    assert newest is not None
    assert {cond_pdiff.__version__, citation["version"], newest[1]} == {wanted}
    assert version("cond-pdiff") == wanted
    assert f"from 0.1.0 to {wanted}" in text_of("docs/upgrade.md")


def test_the_citation_names_the_paper() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert {"cff-version", "title", "message", "authors", "license"} <= set(citation)
    assert [reference["title"] for reference in citation["references"]] == ["Conditional LoRA Parameter Generation"]


def test_checks_before_a_commit_are_those_of_lint() -> None:
    (local,) = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))["repos"]
    lint = re.search(r"^lint:.*\n((?:\t.+\n)+)", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    assert lint is not None
    wanted = [line.strip().replace("$(BIN)", ".venv/bin").removesuffix(" .") for line in lint[1].splitlines()]
    assert [hook["entry"] for hook in local["hooks"]] == wanted
