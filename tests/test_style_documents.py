"""The tables of docs/styles.md are those of the measured results."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def test_the_tables_are_the_measured_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [str(ROOT / "benchmarks"), *sys.path])
    spec = importlib.util.spec_from_file_location("style_pictures", ROOT / "benchmarks" / "style_pictures.py")
    assert spec is not None
    assert spec.loader is not None
    benchmark = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(benchmark)
    lines = benchmark.markdown(json.loads((ROOT / "results" / "style_pictures.json").read_text(encoding="utf-8")))
    assert len(lines) > 10
    document = (ROOT / "docs" / "styles.md").read_text(encoding="utf-8")
    assert "\n".join(lines) in document
