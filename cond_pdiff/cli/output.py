"""What commands print: a result on stdout, for people or as JSON; all else on stderr."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any

from cond_pdiff.atomic import dump_json


def report(facts: Any, text: object, as_json: bool, write: Callable[[str], None] = print) -> None:
    """Print a result: JSON-ready facts, or what they are in words.

    Args:
        write: how; `processes().print` where several processes train together.
    """
    write(dump_json(facts).rstrip() if as_json else str(text))


def note(text: str) -> None:
    """Print something beside the result."""
    print(f"note: {text}", file=sys.stderr)


def table(rows: Sequence[Sequence[str]]) -> str:
    """Lay out rows of text in columns, the first row being their titles."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows)


def hide_loading_bars(of_transformers: bool = False) -> None:
    """Hide diffusers' bars for components that are loaded, and transformers' ones too if that is wanted: they are no news."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    diffusers_logging.disable_progress_bar()
    if of_transformers:
        transformers_logging.disable_progress_bar()


def hide_peft_warning() -> None:
    """Hide a warning that peft causes: looking for modules, it reads every attribute of a transformers model, a deprecated one included."""
    import warnings

    warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated", category=FutureWarning)
