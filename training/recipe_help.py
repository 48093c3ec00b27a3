"""What a recipe can say and what one says, told from the settings themselves: every key, its default, its range and its meaning."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter
from pydantic_core import to_jsonable_python

from cond_pdiff.errors import TrainingError
from cond_pdiff.training.card import markdown_table
from cond_pdiff.training.config import AutoencoderConfig, CollectConfig, TuneConfig, UNetConfig, parse
from cond_pdiff.training.recipe import read_recipe, recipe_names, recipe_variants
from cond_pdiff.training.reproduce.config import AblationConfig, ReproduceConfig
from cond_pdiff.training.text_to_image.config import ImageAutoencoderConfig, SampleConfig, SceneClassifierConfig, TransformerConfig

SETTINGS: dict[str, type] = {
    "collect": CollectConfig,
    "autoencoder": AutoencoderConfig,
    "unet": UNetConfig,
    "tune": TuneConfig,
    "image_autoencoder": ImageAutoencoderConfig,
    "transformer": TransformerConfig,
    "scene_classifier": SceneClassifierConfig,
    "samples": SampleConfig,
    "reproduce": ReproduceConfig,
    "ablation": AblationConfig,
}
"""The settings of each section. The other sections of a recipe are text, or replace entries of these."""

WIDTH = 120
TYPES = {"integer": "a whole number", "number": "a number", "boolean": "true or false", "string": "text", "null": "null"}
BOUNDS = {"minimum": "of at least", "exclusiveMinimum": "above", "maximum": "of at most", "exclusiveMaximum": "below"}


@dataclass(frozen=True)
class Entry:
    """One key of a section.

    Args:
        key: with a dot before those of an inner object: `fit.steps`.
        meaning: what it is.
        schema: what is allowed, as JSON schema.
        default: what holds if it is not given.
        value: what holds in the recipe.
        given: whether the recipe says it.
    """

    key: str
    meaning: str
    schema: Mapping[str, Any]
    default: Any
    value: Any
    given: bool

    def __str__(self) -> str:
        """Return the key with its value, and what it means, as lines for people."""
        default = "the default" if self.value == self.default else f"default {_json(self.default)}"
        meaning = f"{self.meaning} ({expected(self.schema)}; {default})"
        return f"{_filled(f'{self.key} = {_json(self.value)}', 2, 4)}\n{_filled(meaning, 6, 6)}"


@dataclass(frozen=True)
class Section:
    """A section of a recipe.

    Args:
        name: as it is written.
        about: what its settings are.
        entries: all of its keys, in the order in which they are documented.
    """

    name: str
    about: str
    entries: tuple[Entry, ...]

    @classmethod
    def describe(cls, name: str, section: Mapping[str, Any]) -> Section:
        """Describe all keys of a section with their values where it says only some of them; raise `TrainingError` if one is not allowed."""
        settings = SETTINGS[name]
        schema = TypeAdapter(settings).json_schema()
        default, value = (to_jsonable_python(asdict(parse(settings, one, name))) for one in ({}, section))
        return cls(name, schema["description"], tuple(_entries("", schema, schema.get("$defs", {}), default, value, section)))

    def __str__(self) -> str:
        """Return the section as lines for people."""
        return "\n".join([_filled(f"{self.name}: {self.about}"), *map(str, self.entries)])


@dataclass(frozen=True)
class RecipeHelp:
    """What a recipe says.

    Args:
        name: by which it was asked for.
        about: its own words on itself.
        sections: those that it has, or that were asked for.
        replaced: what its section `quick` replaces in others.
    """

    name: str
    about: str
    sections: tuple[Section, ...]
    replaced: Mapping[str, Any]

    @classmethod
    def read(cls, name: str | Path, sections: Sequence[str] = ()) -> RecipeHelp:
        """Read a recipe by name or path.

        Args:
            sections: names; default: all that the recipe has. The stages take the defaults of those that it lacks.

        Raises:
            TrainingError: no such recipe or section, or settings that are not allowed.
        """
        recipe = read_recipe(name)
        if unknown := [section for section in sections if section not in SETTINGS]:
            raise TrainingError(f"there is no section {unknown[0]!r} with settings; there are {', '.join(SETTINGS)}")
        shown = [section for section in SETTINGS if section in (sections or recipe)]
        described = tuple(Section.describe(section, recipe.get(section, {})) for section in shown)
        return cls(str(name), recipe.get("about", ""), described, {} if sections else recipe.get("quick", {}))

    def to_json(self) -> dict[str, Any]:
        """Return JSON-ready facts."""
        return {
            "name": self.name,
            "about": self.about,
            "sections": [asdict(section) for section in self.sections],
            "quick": dict(self.replaced),
        }

    def __str__(self) -> str:
        """Return the recipe as lines for people."""
        parts = [_filled(f"{self.name}: {self.about}"), *map(str, self.sections)]
        if self.replaced:
            parts.append("quick: what `reproduce --quick` replaces.\n" + _filled(_json(self.replaced), 2, 2))
        absent = [name for name in SETTINGS if name not in {section.name for section in self.sections}]
        return "\n\n".join([*parts, _filled(f"not shown: {', '.join(absent)}")] if absent else parts)


@dataclass(frozen=True)
class RecipeSummary:
    """A shipped recipe in short.

    Args:
        name: of the recipe.
        about: its own words on itself.
        variants: their names; NAME+VARIANT is the recipe with one of them.
    """

    name: str
    about: str
    variants: tuple[str, ...]

    def __str__(self) -> str:
        """Return the recipe's name, variants and own words as lines for people."""
        variants = "".join(f" +{name}" for name in self.variants)
        return f"{self.name}{variants}\n{_filled(self.about, 4, 4)}"


def known_recipes() -> list[RecipeSummary]:
    """Return the shipped recipes, in the order of their names."""
    return [RecipeSummary(name, read_recipe(name).get("about", ""), tuple(recipe_variants(name))) for name in recipe_names()]


def settings_document() -> str:
    """Render every section's keys with their defaults, ranges and meanings as Markdown: `docs/recipes.md`."""
    parts = [
        "# What a recipe can say",
        "For whoever writes a recipe. It is a JSON file with a section a stage. Every key has a default; unknown keys and values out of "
        "their range are refused. "
        "`cond-pdiff recipe list` names the shipped recipes, `cond-pdiff recipe show NAME` shows one with all that it could say, and "
        "`cond-pdiff recipe settings > docs/recipes.md` wrote this page.",
    ]
    for name in SETTINGS:
        section = Section.describe(name, {})
        rows = [[f"`{entry.key}`", f"`{_json(entry.default)}`", expected(entry.schema), entry.meaning] for entry in section.entries]
        parts += [f"## `{name}`", section.about, markdown_table(["key", "default", "allowed", "meaning"], rows)]
    return "\n\n".join(parts)


def expected(schema: Mapping[str, Any]) -> str:
    """Put a JSON schema of one value into words."""
    if "anyOf" in schema:
        return " or ".join(expected(one) for one in schema["anyOf"])
    if "const" in schema:
        return _json(schema["const"])
    if "enum" in schema:
        *others, last = map(_json, schema["enum"])
        return f"{', '.join(others)} or {last}"
    if schema["type"] == "array":
        least = f" of at least {schema['minItems']}" if "minItems" in schema else ""
        return f"a list{least}, each {expected(schema['items'])}"
    if schema["type"] == "object":
        inner = schema["additionalProperties"]
        return "an object" if inner is True else f"an object, each value {expected(inner)}"
    if "minimum" in schema and "maximum" in schema:
        return f"{TYPES[schema['type']]} from {schema['minimum']} to {schema['maximum']}"
    bounds = " and ".join(f"{word} {schema[key]}" for key, word in BOUNDS.items() if key in schema)
    return f"{TYPES[schema['type']]} {bounds}".strip()


def _entries(
    prefix: str,
    schema: Mapping[str, Any],
    inner: Mapping[str, Any],
    default: Mapping[str, Any],
    value: Mapping[str, Any],
    given: Mapping[str, Any],
) -> Iterator[Entry]:
    """Yield the keys of an object of settings, those of objects of settings inside it in their place."""
    for key, found in schema["properties"].items():
        if "$ref" in found:
            settings = inner[found["$ref"].rpartition("/")[2]]
            yield from _entries(f"{prefix}{key}.", settings, inner, default[key], value[key], given.get(key, {}))
        else:
            allowed = {name: entry for name, entry in found.items() if name not in ("title", "description", "default")}
            yield Entry(f"{prefix}{key}", found["description"], allowed, default[key], value[key], key in given)


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def _filled(text: str, indent: int = 0, rest: int = 4) -> str:
    """Break text into lines of at most `WIDTH` columns, the first one indented by `indent` and the others by `rest`."""
    first, others = " " * indent, " " * rest
    return textwrap.fill(text, WIDTH, initial_indent=first, subsequent_indent=others, break_long_words=False, break_on_hyphens=False)
