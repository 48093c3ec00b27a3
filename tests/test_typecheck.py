"""The type check refuses an overlay in which mypy sees nothing."""

from __future__ import annotations

from pathlib import Path

import typecheck

MAPPED = {"cond_pdiff/training": "training", "cond_pdiff/pipelines": "pipelines"}
PROBES = [
    f"{folder}/{typecheck.PROBE}.py:3: error: Incompatible types in assignment "
    '(expression has type "CondPDiffError", variable has type "int")  [assignment]'
    for folder in MAPPED
]


def test_only_the_deliberate_errors_is_fine() -> None:
    assert typecheck.judge(PROBES, 1, MAPPED) == []


def test_a_probe_that_was_not_reported_is_a_problem() -> None:
    (problem,) = typecheck.judge(PROBES[:1], 1, MAPPED)
    assert problem.startswith("pipelines: mypy did not report")


def test_a_type_error_is_reported_with_the_path_in_the_repository() -> None:
    assert typecheck.judge([*PROBES, "cond_pdiff/training/zoo/zoo.py:1: error: no"], 1, MAPPED) == ["training/zoo/zoo.py:1: error: no"]


def test_a_crash_of_mypy_is_a_problem() -> None:
    assert typecheck.judge(PROBES, 2, MAPPED) == ["mypy ended with status 2"]


def test_overlay_has_the_installed_shape(tmp_path: Path) -> None:
    mapped = typecheck.mapped_folders()
    typecheck.make_overlay(tmp_path, mapped)
    assert (tmp_path / "cond_pdiff" / "errors.py").resolve() == typecheck.ROOT / "cond_pdiff" / "errors.py"
    for installed, folder in mapped.items():
        assert (tmp_path / installed / "__init__.py").resolve() == typecheck.ROOT / folder / "__init__.py"
        assert (tmp_path / installed / f"{typecheck.PROBE}.py").is_file()
        assert not (typecheck.ROOT / folder / f"{typecheck.PROBE}.py").exists()
