"""The tables of docs/large_adapters.md are those of the measured results."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
DOCUMENT = (ROOT / "docs" / "large_adapters.md").read_text(encoding="utf-8").splitlines()


@pytest.mark.parametrize("name", ["scale", "scale_quality"])
def test_the_tables_are_the_measured_ones(name: str) -> None:
    spec = importlib.util.spec_from_file_location(name, ROOT / "benchmarks" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    benchmark = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(benchmark)
    lines = benchmark.markdown(json.loads((ROOT / "results" / f"{name}.json").read_text(encoding="utf-8")))
    assert lines
    assert [line for line in lines if line not in DOCUMENT] == []
