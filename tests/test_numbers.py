"""Every number in a table or sentence of the documents that has a result file is that file's."""

from __future__ import annotations

import itertools
import json
import re
from pathlib import Path
from typing import Any

import pytest
from documents import ROOT, text_of

from cond_pdiff.hub import BUNDLED_FOLDER
from cond_pdiff.training.evaluate.text_table import TextTable

UNSEEN_COLUMNS = ("base", "generated", "one", "raw", "multi-task", "mean", "kernel", "retrieval", "logistic", "shuffled", "refined", "cold",
                  "trained")  # fmt: skip
FEW_SHOT = {
    "base model": "base", "logistic regression on its embeddings": "logistic", "mean of the zoo": "mean", "kernel regression": "kernel",
    "retrieval": "retrieval", "multi-task LoRA": "multi-task", "generated, the best of eight": "generated", "generated, one": "one",
    "generated, one, always taken": "raw", "refined from it": "refined", "refined from nothing": "cold",
    "trained on the task's whole data, the same prototypes": "trained",
}  # fmt: skip


def result(name: str) -> Any:
    return json.loads((ROOT / "results" / f"{name}.json").read_text(encoding="utf-8"))


def words_of(page: str) -> str:
    return " ".join(text_of(page).split())


def percent(value: float) -> str:
    return f"{100 * value:.1f}"


def difference(found: dict[str, Any]) -> str:
    """Show a difference in points with its standard error."""
    return f"{100 * found['mean']:+.1f} ± {100 * found['standard_error']:.1f}".replace("-", "−")


def below(found: dict[str, Any]) -> str:
    """Show the share of tasks that end below the base model, which is a number of tasks."""
    return f"{percent(round(found['below'] * found['tasks']) / found['tasks'])} %"


def row(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


def missing(lines: list[str], page: str) -> list[str]:
    """Return the lines that a page lacks."""
    there = text_of(page).splitlines()
    return [line for line in lines if line not in there]


# --- text tasks --------------------------------------------------------------------------------------------------------------


def test_readme_has_four_rows_of_the_text_tasks() -> None:
    measured = result("text_tasks")
    names = {"base": "none: the base model", "multitask": "one LoRA for all tasks (multi-task)",
             "generated_mean": "generated, one",
             "generated_best": "generated, the best of 20", "trained": "trained on the task's own data"}  # fmt: skip

    def cell(part: str, name: str) -> str:
        low, high = measured[part]["intervals"]["accuracy"][name]
        return f"{percent(measured[part]['accuracy'][name])} ({percent(low)} to {percent(high)})"

    assert missing([row(title, cell("zoo", name), cell("unseen", name)) for name, title in names.items()], "README.md") == []
    zoo, unseen = (measured[part]["accuracy"] for part in ("zoo", "unseen"))
    assert f"retrieval of the nearest trained adapter does as well ({percent(zoo['retrieval'])})" in words_of("README.md")
    assert round(100 * (unseen["trained"] - unseen["generated_best"])) == 24
    assert "training on the task's data is 24 points ahead" in words_of("README.md")


def test_the_table_of_text_tasks_is_the_measured_one() -> None:
    lines = TextTable().to_markdown(result("text_tasks")).splitlines()
    first = next(index for index, line in enumerate(lines) if line.startswith("| mean over"))
    table = list(itertools.takewhile(lambda line: line.startswith("|"), lines[first:]))
    assert len(table) == 6
    card = (BUNDLED_FOLDER / "minilm-text-tasks" / "README.md").read_text(encoding="utf-8")
    assert missing(table, "docs/text_numbers.md") == []
    assert "\n".join(table) in card


def test_sentences_on_text_tasks_are_measured() -> None:
    measured, words = result("text_tasks"), words_of("docs/text_numbers.md")
    against = measured["unseen"]["differences"]["accuracy"]
    for name in ("multitask", "kernel_regression"):
        low, high = (f"{100 * bound:.1f}".replace("-", "−") for bound in against[name]["interval"])
        assert f"{100 * against[name]['mean']:+.1f}, {low} to {high}" in words
    zoo = measured["zoo"]
    assert f"All {zoo['routing_samples']} adapters" in words
    assert f"*routing* in tables: {100 * zoo['routing']:.0f} %" in words
    assert f"{zoo['novelty_distance']:.2f} of an update's size away" in words
    assert f"shares {100 * zoo['novelty_common_errors']:.0f} % of its errors (two trained runs of a task: " in words
    assert f"{100 * zoo['novelty_common_errors_between_runs']:.0f} %)" in words
    assert f"give {zoo['distinct_mean']:.1f} different sets of predictions" in words
    for inside, told in ((True, "the ten unseen tasks called so gain {} points over the base"), (False, "the six others {}")):
        gains = [task["accuracy"]["generated_best"] - task["accuracy"]["base"] for task in measured["tasks"]
                 if not task["seen"] and task["in_distribution"] == inside]  # fmt: skip
        assert told.format(f"{100 * sum(gains) / len(gains):.1f}") in words


# --- with examples -----------------------------------------------------------------------------------------------------------


def test_the_table_with_examples_is_the_measured_one() -> None:
    found = result("few_shot")["with examples"]
    shown = {name: difference(values) for name, values in found["generated minus"].items()}
    lines = [row(title, percent(found["means"][name]), shown.get(name, "")) for title, name in FEW_SHOT.items()]
    assert missing(lines, "docs/text_numbers.md") == []
    gap = result("few_shot")["names only"]["means"]["trained"] - found["means"]["base"]
    share = (found["means"]["generated"] - found["means"]["base"]) / gap
    assert f"That is {share:.0%} of the way from the base model" in words_of("docs/text_numbers.md")


def test_the_table_of_unseen_tasks_is_the_measured_one() -> None:
    measured = result("few_shot")
    found, names = measured["with examples"], measured["names only"]["means"]
    gap = names["trained"] - found["means"]["base"]
    lines = [row(task, *(percent(values[name]) for name in UNSEEN_COLUMNS)) for task, values in found["tasks"].items()]
    lines.append(row("**mean**", *(percent(found["means"][name]) for name in UNSEEN_COLUMNS)))
    lines.append(row("share of the gap", *(f"{(found['means'][name] - found['means']['base']) / gap:.0%}" for name in UNSEEN_COLUMNS)))
    against = {name: difference(values) for name, values in found["generated minus"].items()}
    lines.append(row("*generated* minus it", *(against.get(name, "–") for name in UNSEEN_COLUMNS)))
    assert len(lines) == 19
    assert missing(lines, "docs/unseen_tasks.md") == []
    titles = {
        "base": "base",
        "generated": "generated",
        "multi-task": "multi-task LoRA",
        "mean": "mean of the zoo",
        "kernel": "kernel regression",
    }
    assert ", ".join(f"{title} {percent(names[name])}" for name, title in titles.items()) in words_of("docs/unseen_tasks.md")


def test_the_table_of_predicted_gains_is_the_measured_one() -> None:
    one, eight = (result("gain_model")["check"][count] for count in ("1", "8"))

    def line(title: str, show: Any) -> str:
        return row(title, show(one), show(eight))

    lines = [
        line("tasks (draws)", lambda found: f"{found['tasks']} ({found['draws']})"),
        line("measured gain within the 80 % interval¹", lambda found: f"{percent(found['inside'])} %"),
        line("gain if the adapter is always taken, points", lambda found: f"{100 * found['unjudged']:.2f}"),
        line("gain of what is returned", lambda found: f"{100 * found['returned']:.2f}"),
        line("returned adapters, share of draws", lambda found: f"{100 * found['taken']:.0f} %"),
        line("tasks where what is returned is more than a point below the base model²", below),
        line("the same if the adapter is always taken", lambda found: f"{100 * found['below_unjudged']:.0f} %"),
    ]
    lines.append(row("rank correlation of predicted and measured gain in each draw",
                     *(", ".join(f"{value:.2f}" for value in found["rank"]) for found in (one, eight))))  # fmt: skip
    assert missing(lines, "docs/unseen_tasks.md") == []
    told = words_of("docs/text_numbers.md")
    assert f"{below(one)} of the tasks (with eight candidates {below(eight)})" in told


# --- a cluster, pictures, limits ---------------------------------------------------------------------------------------------


def test_the_numbers_of_the_cluster_are_measured() -> None:
    found, words = result("cluster"), words_of("docs/cluster.md")
    chaos, many, rates = found["chaos"], found["many"], found["batch"]["rates"]
    assert f"{chaos['done']} done, each once, bytes as from one process; {chaos['begun']} beginnings" in words
    assert f"at most {chaos['begun_most']} of a job" in words
    assert f"{many['a_second']} a second, {many['peak_gigabytes']} GB, {many['seconds_to_first_after_resume']} s" in words
    ways = ("batch, one process", "single calls in a loop, threads: 1")
    together, single = (f"{rates[way]['cpu_milliseconds_each']:.0f} ms" for way in ways)
    assert f"{together} of a core (a call for one: {single})" in words
    assert f"{single} on a CPU core; {together} in a batch" in words_of("docs/comparison.md")
    over = found["batch"]["over_the_loop_of_one_thread"]
    assert f"two processes {over['batch, two processes']:.1f} times, one {over['batch, one process']:.1f} times as fast" in words
    two = found["scaling"]["goes"]["workers"]
    assert f"{two[0]:.2f}, {two[1]:.2f} and {two[2]:.2f} times the throughput" in words


def test_the_picture_of_examples_shows_the_measured_means() -> None:
    drawn = re.findall(r">(\d\d\.\d)</text>|<!-- (\d\d\.\d) -->", (ROOT / "docs" / "pictures" / "k_shot.svg").read_text(encoding="utf-8"))
    measured = result("few_shot")
    names, examples = measured["names only"]["means"], measured["with examples"]["means"]
    wanted = [percent(examples[name]) for name in ("base", "multi-task", "one", "generated", "refined", "trained")]
    wanted += [percent(names[name]) for name in ("base", "multi-task", "generated", "trained")]
    assert sorted({first or second for first, second in drawn}) == sorted(set(wanted))


@pytest.mark.parametrize("page", ["docs/limits.md", "docs/comparison.md", "docs/concepts/k_shot.md"])
def test_numbers_that_pages_repeat_are_measured(page: str) -> None:
    text, few, styles = result("text_tasks"), result("few_shot")["with examples"], words_of("docs/style_numbers.md")
    words, means = words_of(page), few["means"]
    told = {
        "docs/limits.md": [
            f"({percent(text['zoo']['accuracy']['generated_best'])} and {percent(text['zoo']['accuracy']['trained'])})",
            f"{difference(few['generated minus']['multi-task'])} with eight examples a class",
            f"from {percent(means['generated'])} to {percent(means['refined'])} on unseen tasks "
            f"({difference(few['generated minus']['refined']).removeprefix('−')}, mean and standard error); "
            f"from nothing they end at {percent(means['cold'])}. The multi-task LoRA has {percent(means['multi-task'])} without steps",
            f"of 219 far tasks {below(result('gain_model')['check']['1'])} end more",
        ],
        "docs/comparison.md": [
            f"{percent(text['zoo']['accuracy']['generated_best'])}; trained {percent(text['zoo']['accuracy']['trained'])}",
            f"16 text tasks: {percent(text['unseen']['accuracy']['generated_best'])}; multi-task LoRA "
            f"{percent(text['unseen']['accuracy']['multitask'])}; trained {percent(text['unseen']['accuracy']['trained'])}",
        ],
        "docs/concepts/k_shot.md": [f"{100 * means['refined'] - 100 * means['cold']:.1f} points above refining from nothing"],
    }
    assert [sentence for sentence in told[page] if sentence not in words] == []
    assert "and a third behind an adapter trained on that style" in styles


def test_another_number_is_noticed(tmp_path: Path) -> None:
    found = result("few_shot")["with examples"]["means"]
    assert missing([row("base model", percent(found["base"] + 0.001), "+4.6 ± 1.7")], "docs/text_numbers.md")
