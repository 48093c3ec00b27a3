"""`recipe show` tells every key from the settings themselves."""

from __future__ import annotations

import json
from dataclasses import asdict, fields
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
from pydantic import Field, TypeAdapter
from pydantic_core import to_jsonable_python

from cond_pdiff.errors import TrainingError
from cond_pdiff.training.config import FitConfig, TuneConfig, parse
from cond_pdiff.training.recipe import SECTIONS, read_recipe, recipe_names
from cond_pdiff.training.recipe_help import SETTINGS, RecipeHelp, Section, expected, known_recipes, settings_document


def test_every_section_with_settings_is_told() -> None:
    assert [*SETTINGS] == [name for name in SECTIONS if name not in ("name", "about", "variants", "quick")]


@pytest.mark.parametrize("name", recipe_names())
def test_every_key_stands_there_with_the_recipes_value(name: str) -> None:
    recipe, told = read_recipe(name), RecipeHelp.read(name)
    assert [section.name for section in told.sections] == [section for section in SETTINGS if section in recipe]
    for section in told.sections:
        settings = parse(SETTINGS[section.name], recipe[section.name], section.name)
        values = to_jsonable_python(asdict(settings))
        flat = {entry.key: entry for entry in section.entries}
        for key in fields(settings):
            inner = {f"{key.name}.{one.name}": one.name for one in fields(FitConfig)} if key.name == "fit" else {key.name: ""}
            for full, within in inner.items():
                entry, given = flat.pop(full), recipe[section.name].get(key.name, {})
                assert entry.value == (values[key.name][within] if within else values[key.name])
                assert entry.given == (within in given if within else key.name in recipe[section.name])
                assert entry.given or entry.value == entry.default
                assert entry.meaning
        assert flat == {}
        assert all(f"  {entry.key} = " in str(section) for entry in section.entries)
    assert told.about == recipe["about"]
    assert json.loads(json.dumps(told.to_json()))["name"] == name


def test_the_document_is_what_the_settings_say() -> None:
    told = (Path(__file__).parents[1] / "docs" / "recipes.md").read_text(encoding="utf-8")
    assert told == settings_document() + "\n"
    assert "| `cond_drop_prob` | `0.1` | a number from 0 to 1 | share of samples trained without a condition" in told


def test_lines_tell_value_range_default_and_meaning() -> None:
    assert str(Section.describe("tune", {"examples": 8, "fit": {"steps": 9}})).splitlines()[:3] == [
        "tune: The third stage: task loss. A step's batch is of episodes.",
        "  fit.steps = 9",
        "      optimiser steps (a whole number of at least 1; default 2000)",
    ]
    lines = str(Section.describe("tune", {"examples": 8})).splitlines()
    below = dict(pairwise(lines))
    assert below["  examples = 8"] == "      of an episode, all its classes together (a whole number of at least 4; default 32)"
    told = "classes of an episode; all, for a language model (a whole number of at least 2; the default)"
    assert below["  most_labels = 8"] == f"      {told}"
    assert all(len(line) <= 120 for line in str(RecipeHelp.read("minilm-text-tasks")).splitlines())


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        (int, "a whole number"),
        (Annotated[float, Field(gt=0, le=1)], "a number above 0 and of at most 1"),
        (Annotated[int, Field(ge=1, le=1000)], "a whole number from 1 to 1000"),
        (Annotated[float, Field(ge=0, lt=1)] | None, "a number of at least 0 and below 1 or null"),
        (Literal["no", "bf16", "fp16"], '"no", "bf16" or "fp16"'),
        (Literal["one"], '"one"'),
        (Annotated[tuple[str, ...], Field(min_length=1)], "a list of at least 1, each text"),
        (dict[str, Annotated[float, Field(gt=0)]], "an object, each value a number above 0"),
        (dict[str, Any], "an object"),
        (bool, "true or false"),
    ],
)
def test_what_is_allowed_in_words(kind: Any, words: str) -> None:
    assert expected(TypeAdapter(kind).json_schema()) == words


def test_a_section_that_the_recipe_lacks_has_its_defaults(tmp_path: Path) -> None:
    (tmp_path / "mine.json").write_text('{"collect": {"rank": 2}}')
    told = RecipeHelp.read(tmp_path / "mine.json")
    assert [section.name for section in told.sections] == ["collect"]
    assert str(told).splitlines()[-1].startswith("not shown: autoencoder, unet, tune, ")
    (tune,) = RecipeHelp.read(tmp_path / "mine.json", ["tune"]).sections
    assert {entry.key: entry.value for entry in tune.entries}["examples"] == TuneConfig().examples
    assert not any(entry.given for entry in tune.entries)


def test_variants_and_the_quick_form_are_told() -> None:
    told = RecipeHelp.read("reproduce-minilm")
    assert "quick: what `reproduce --quick` replaces." in str(told)
    assert told.to_json()["quick"]["collect"]["steps"] == 12
    (collect,) = RecipeHelp.read("paper-language-half+rank4", ["collect"]).sections
    assert {entry.key: entry.value for entry in collect.entries}["rank"] == 4
    summaries = {summary.name: summary for summary in known_recipes()}
    assert summaries["reproduce-minilm"].variants == ("mpnet",)
    assert str(summaries["reproduce-minilm"]).startswith("reproduce-minilm +mpnet\n    The paper's Tables 1 and 3")


def test_what_is_wrong_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="there is no section 'unett' with settings; there are collect, autoencoder, unet,"):
        RecipeHelp.read("minilm-text-tasks", ["unett"])
    (tmp_path / "mine.json").write_text('{"collect": {"rank": 0}}')
    with pytest.raises(TrainingError, match="collect: rank must be greater than or equal to 1, got 0"):
        RecipeHelp.read(tmp_path / "mine.json")
