"""The page on language models says what was measured, of the tasks that the shipped recipe names."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

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
