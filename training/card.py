"""Model cards: templates filled with what was measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from cond_pdiff.atomic import write_text
from cond_pdiff.model_cards import fill_card


def write_card(folder: Path, template: str, fields: Mapping[str, Any]) -> Path:
    """Write `README.md` into a folder from a template of `cond_pdiff.model_cards`; every field of it must be there."""
    path = folder / "README.md"
    write_text(path, fill_card(template, fields))
    return path


def millions(module: nn.Module) -> str:
    """Say how many parameters a network has: 1.2 M, and below a million 0.12 M."""
    count = sum(parameter.numel() for parameter in module.parameters()) / 1e6
    return f"{count:.1f} M" if count >= 1 else f"{count:.2f} M"


def markdown_table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table, one line a row."""
    return "\n".join(["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|", *("| " + " | ".join(row) + " |" for row in rows)])
