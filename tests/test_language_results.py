"""The page on language models says what was measured, of the tasks that the shipped recipe names."""

from __future__ import annotations

import json
import re
import shlex
import statistics
from pathlib import Path
from typing import Any

import pytest

from cond_pdiff import cli
from cond_pdiff.training.evaluate.language_table import LanguageTable
from cond_pdiff.training.evaluate.measure import mean
from cond_pdiff.training.evaluate.table import part
from cond_pdiff.training.recipe import read_recipe

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "language_models.md").read_text(encoding="utf-8")
MEASURED = json.loads((ROOT / "results" / "language_tasks.json").read_text(encoding="utf-8"))


def test_the_table_of_the_page_is_the_measured_one() -> None:
    table = LanguageTable()
    assert table.means_table(MEASURED) in PAGE
    assert table.facts(MEASURED) in PAGE
    assert f"{MEASURED['settings']['max_rows']} rows" in PAGE


def shown(row: dict[str, Any]) -> tuple[str, str]:
    """Show a difference in points, and where it may lie, as the page writes it."""
    low, high = (f"{100 * end:.1f}".replace("-", "−") for end in row["interval"])
    return f"{100 * row['mean']:+.1f}".replace("-", "−"), f"{low} to {high}"


def test_what_the_page_says_of_differences_was_measured() -> None:
    alone, best = "zero_shot_differences", "differences"
    told = [("zoo", alone, name) for name in ("base", "in_context", "multitask", "shuffled")]
    told += [("unseen", alone, name) for name in ("base", "in_context", "multitask")]
    for where, kind, name in told:
        mean_of, interval = shown(MEASURED[where][kind][name])
        assert mean_of.lstrip("+") in PAGE, (where, name)
        assert interval in PAGE.replace("\n", " "), (where, name, interval)
    for name in ("base", "in_context", "multitask"):
        mean_of, interval = shown(MEASURED["unseen"][best]["exact_match"][name])
        assert mean_of.lstrip("+") in PAGE
        assert interval in PAGE
    assert shown(MEASURED["zoo"][alone]["trained"]) == ("−3.4", "−7.4 to 0.1")
    assert (MEASURED["zoo"]["routing"], MEASURED["zoo"]["routing_samples"]) == (1.0, 300)


def test_tasks_of_writing_and_of_labels_apart() -> None:
    for free, count in ((True, 14), (False, 46)):
        own = [result["exact_match"] for result in part(MEASURED["tasks"], seen=True) if (not result["group"]) == free]
        assert len(own) == count
        for column in ("base", "in_context", "multitask", "generated_zero_shot", "trained"):
            assert f"{100 * statistics.fmean(values[column] for values in own):.1f}" in PAGE


@pytest.mark.parametrize("where", ["zoo", "unseen"])
def test_means_are_those_of_the_tasks(where: str) -> None:
    results, means = part(MEASURED["tasks"], seen=where == "zoo"), MEASURED[where]
    assert means["tasks"] == len(results)
    for column in LanguageTable.columns:
        assert means["exact_match"][column] == mean([result["exact_match"][column] for result in results])
    collect = read_recipe("smollm2-tasks")["collect"]
    assert {result["task"] for result in results} <= set(collect["tasks" if where == "zoo" else "unseen"])


def test_every_command_of_the_page_parses() -> None:
    lines = [line.split("#")[0] for block in re.findall(r"```bash\n(.*?)```", PAGE, re.DOTALL) for line in block.splitlines()]
    commands = [shlex.split(line)[1:] for line in lines if line.startswith("cond-pdiff ")]
    assert {command[0] for command in commands} >= {"collect", "train", "generate", "ask"}
    for name, *arguments in commands:
        assert cli.command.commands[name].make_context(name, arguments).params
