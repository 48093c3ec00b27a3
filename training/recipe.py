"""Recipes: JSON files with one section a stage, which `cond_pdiff.training.config` checks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from cond_pdiff.errors import TrainingError

RECIPES_FOLDER = Path(__file__).parent / "recipes"
SECTIONS = (
    *("name", "about", "variants", "collect", "autoencoder", "unet", "tune"),
    *("image_autoencoder", "transformer", "scene_classifier", "samples"),
    *("reproduce", "ablation", "quick"),
)


def read_recipe(name: str | Path) -> dict[str, Any]:
    """Read a recipe by name (one of the shipped ones) or by path, as a dict of sections.

    Its section `variants` names entries that replace some of its own: `paper-language-half+roberta+rank4` is the recipe with two of
    its variants, one after the other.
    """
    path, variants = Path(name), []
    if "+" in path.name and not path.is_file():
        stem, *variants = path.name.split("+")
        path = path.with_name(stem or "+")
    if not path.suffix:
        path = RECIPES_FOLDER / f"{path}.json"
    try:
        recipe = _read_file(path)
    except FileNotFoundError as error:
        raise TrainingError(f"no recipe {str(name)!r}; there are {recipe_names()}, or give the path of a JSON file") from error
    known = recipe.pop("variants", {})
    for variant in variants:
        if variant not in known:
            raise TrainingError(f"{path} has no variant {variant!r}; there are {sorted(known)}")
        _check_sections(known[variant], f"{path}, variant {variant!r}")
        for section, entries in known[variant].items():
            if not isinstance(entries, dict) or not isinstance(recipe.get(section, {}), dict):
                raise TrainingError(f"{path}, variant {variant!r}: {section} must be a JSON object, to replace entries of another")
            recipe[section] = {**recipe.get(section, {}), **entries}
    return recipe


def recipe_names() -> list[str]:
    """Return the names of the shipped recipes."""
    return sorted(entry.stem for entry in RECIPES_FOLDER.glob("*.json"))


def recipe_variants(name: str) -> dict[str, Any]:
    """Return the variants of a shipped recipe: name → the entries that it replaces, by section."""
    variants: dict[str, Any] = _read_file(RECIPES_FOLDER / f"{name}.json").get("variants", {})
    return variants


def _read_file(path: Path) -> dict[str, Any]:
    """Read a recipe's sections as they stand in its file, variants included."""
    try:
        recipe = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise TrainingError(f"{path} is not valid JSON: {error}") from error
    _check_sections(recipe, f"{path}")
    if not isinstance(recipe.get("variants", {}), dict):
        raise TrainingError(f"{path}: variants must be a JSON object")
    sections: dict[str, Any] = recipe
    return sections


def _check_sections(recipe: object, where: str) -> None:
    if not isinstance(recipe, dict):
        raise TrainingError(f"{where} must hold a JSON object of sections")
    unknown = sorted(set(recipe) - set(SECTIONS))
    if unknown:
        raise TrainingError(f"{where}: unknown section {unknown[0]!r}; known are {list(SECTIONS)}")
