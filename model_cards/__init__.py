"""Templates of the cards of generators, adapters, zoos, base models and the Space, and the function that fills them."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.resources import files
from string import Template
from typing import Any


def fill_card(template: str, fields: Mapping[str, Any]) -> str:
    """Return a template of this package with its `$fields` filled in; every one of them must be there."""
    return Template(files(__name__).joinpath(template).read_text(encoding="utf-8")).substitute(fields)
