"""Text tasks on disk: the folder format that `collect` and `evaluate` read.

A task is a folder with

- `meta.json`: `name`, `description`, `label_names` (strings), and optionally `task_type` (default
  "single-classification"; also "pair-classification", and "pair-regression", which has a `label_range` instead of
  `label_names`), `group`, `licence`;
- `train.jsonl.gz` and at least one of `test.jsonl.gz`, `validation.jsonl.gz` (plain `.jsonl` works too): one JSON
  object a line, `{"text": …, "label": i}` or `{"text_a": …, "text_b": …, "label": i}`, with i an index into
  `label_names`, or a number in `label_range`.

A folder of such folders is a task collection. `write_task` makes one from rows, `import_task.import_task` from files or a Hub data set.
"""

from __future__ import annotations

import gzip
import json
import random
from abc import abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Self, TypeVar

from cond_pdiff.atomic import atomic_folder, dump_json
from cond_pdiff.conditions.task_prompt import TaskPrompt
from cond_pdiff.conditions.texts import Text
from cond_pdiff.errors import ConditionError, TaskDataError
from cond_pdiff.training.tasks.rows import SPLITS, check_splits, read_split, test_split
from cond_pdiff.training.tasks.task import ZooTask

Drawn = TypeVar("Drawn")
Row = tuple[Text, Any]
"""A text and its label: an index into the label names, or of a regression task a float."""

EXAMPLE_COUNTS = (0, 2, 4, 8, 16)
"""The numbers of examples of the prompts that a generator is trained on."""
WORD_DROPOUT = 0.15
"""The share of a description's words that such a prompt leaves out."""
CLASSIFICATION_TYPES = ("single-classification", "pair-classification")
REGRESSION_TYPE = "pair-regression"


class PromptTask(ZooTask):
    """A task that is asked for in words."""

    condition_kind: ClassVar[type[TaskPrompt]] = TaskPrompt

    description: str

    @abstractmethod
    def prompt(self, seed: int | str, num_examples: int) -> TaskPrompt:
        """Return the task as a condition, with `num_examples` training rows as examples."""

    def conditions(self, count: int) -> list[TaskPrompt]:
        """Return the full prompt, then prompts with other examples, fewer parts, and words left out (see `varied_prompt`)."""
        return [varied_prompt(self, index) for index in range(count)]


@dataclass(frozen=True)
class Task(PromptTask):
    """A classification task, or a regression task: how alike two texts are.

    Args:
        name: the folder's name.
        description: what to decide.
        labels: label names; none of a regression task.
        folder: where the rows are.
        group: the kind of task, for reports.
        licence: of the data.
        dataset: name of the Hub's data set that the rows come from, if they do.
        label_range: (lowest, highest) score of a regression task, else None.
        source: where the rows come from; tasks of one source may share texts. (Of "owner/data : file" the part before the colon.)
    """

    name: str
    description: str
    labels: tuple[str, ...]
    folder: Path
    group: str = ""
    licence: str = ""
    dataset: str = ""
    label_range: tuple[float, float] | None = None
    source: str = ""

    @classmethod
    def load(cls, folder: str | Path) -> Self:
        """Read and check a task folder's `meta.json`; `TaskDataError` says what is wrong."""
        folder = Path(folder)
        meta = read_meta(folder)
        task_type = meta.get("task_type", "single-classification")
        if task_type not in (*CLASSIFICATION_TYPES, REGRESSION_TYPE):
            known = f"{', '.join(CLASSIFICATION_TYPES)} and {REGRESSION_TYPE}"
            raise TaskDataError(f"{folder}: task_type is {task_type!r}; only {known} can be trained")
        try:
            label_range = _label_range(meta["label_range"]) if task_type == REGRESSION_TYPE else None
            if label_range is None and not isinstance(meta["label_names"], list):
                raise TypeError(f"label_names is {meta['label_names']!r:.80}, not a list")
            task = cls(
                name=str(meta["name"]),
                description=str(meta["description"]),
                labels=() if label_range else tuple(str(label) for label in meta["label_names"]),
                folder=folder,
                group=str(meta.get("group", "")),
                licence=str(meta.get("licence", "")),
                dataset=str(meta.get("dataset", "")),
                label_range=label_range,
                source=str(meta.get("source", "")).partition(" : ")[0],
            )
            TaskPrompt(task.description, labels=task.labels)
        except (KeyError, TypeError, ValueError) as error:
            raise TaskDataError(
                f"{folder / 'meta.json'}: {type(error).__name__}: {error}; expected name, description, label_names (or label_range)"
            ) from error
        except ConditionError as error:
            raise TaskDataError(f"{folder / 'meta.json'}: {error}") from error
        return task

    def rows(self, split: str) -> list[Row]:
        """Read all (text, label) rows of a split; `TaskDataError` names the first bad line."""
        return read_split(self.folder, split, self._row)

    @property
    def test_split(self) -> str:
        """The test split, or the validation split where there is none: numbers are reported on it, and nothing is selected on it."""
        return test_split(self.folder)

    def check(self) -> None:
        """Raise `TaskDataError` for a task without training rows, or without any rows to report numbers on."""
        check_splits(self.folder)

    def test_rows(self, limit: int | None) -> list[Row]:
        """Return up to `limit` rows of the test split, a fixed random choice."""
        return sample_rows(self.rows(self.test_split), limit, f"{self.name}/report")

    def prompt(self, seed: int | str, num_examples: int) -> TaskPrompt:
        """Return the task as a condition, with `num_examples` training rows as examples, of as many classes as possible.

        The classes of a regression task's examples are their scores, to the nearest whole number.
        """
        rows = list(self.rows("train"))
        random.Random(f"{self.name}/prompt/{seed}").shuffle(rows)
        if self.label_range is not None:
            low, high = (round(end) for end in self.label_range)
            scores = [str(score) for score in range(low, high + 1)]
            nearest = [(text, min(max(round(label) - low, 0), high - low)) for text, label in rows]
            return TaskPrompt(self.description, spread_over_labels(nearest, num_examples, scores), scores)
        return TaskPrompt(self.description, spread_over_labels(rows, num_examples, self.labels), self.labels)

    def zoo_facts(self) -> dict[str, Any]:
        """Return description and labels beside what the zoo records of every task."""
        return {**super().zoo_facts(), "description": self.description, "labels": list(self.labels)}

    def adapter_facts(self) -> dict[str, Any]:
        """Return the label names, in the order of a head's outputs."""
        return {"labels": list(self.labels)}

    def index_facts(self) -> dict[str, Any]:
        """Return description and labels beside what a generator's index keeps of every task."""
        return {**super().index_facts(), "description": self.description, "labels": list(self.labels)}

    def _row(self, data: Mapping[str, Any]) -> Row:
        label = data["label"]
        if self.label_range is not None:
            low, high = self.label_range
            if isinstance(label, bool) or not isinstance(label, (int, float)) or not low <= label <= high:
                raise ValueError(f"label {label!r} is not a number from {low:g} to {high:g}")
            return self._text(data, pairs_only=True), float(label)
        if isinstance(label, bool) or not isinstance(label, int) or not 0 <= label < len(self.labels):
            raise ValueError(f"label {label!r} is not an index into the {len(self.labels)} label names")
        return self._text(data), label

    @staticmethod
    def _text(data: Mapping[str, Any], pairs_only: bool = False) -> Text:
        text = data["text"] if "text" in data and not pairs_only else (data["text_a"], data["text_b"])
        parts = text if isinstance(text, tuple) else (text,)
        if not all(isinstance(part, str) and part.strip() for part in parts):
            raise ValueError("texts must be non-empty strings")
        return text


def varied_prompt(task: PromptTask, index: int) -> TaskPrompt:
    """Make the index-th condition of a task: the full prompt, then with other examples, fewer parts, and words left out.

    People word a task in their own way and give what they have; a generator that has only seen one wording takes everything
    else for another task.
    """
    if index == 0:
        return task.prompt("variant/0", EXAMPLE_COUNTS[-1])
    rng = random.Random(f"{task.name}/variant/{index}")
    prompt = task.prompt(f"variant/{index}", rng.choice(EXAMPLE_COUNTS))
    words = prompt.description.split()
    kept = [word for word in words if rng.random() >= WORD_DROPOUT] or words
    description = " ".join(words if index % 3 == 0 else kept)
    if not prompt.examples and rng.random() < 0.5:
        return replace(prompt, description=description, labels=())
    return replace(prompt, description=description)


def _label_range(value: Any) -> tuple[float, float]:
    low, high = value
    if not all(isinstance(end, (int, float)) and not isinstance(end, bool) for end in (low, high)) or not high - low >= 1:
        raise TypeError(f"label_range is {value!r:.80}, not two numbers, the second larger by at least 1")
    return float(low), float(high)


def sample_rows(rows: Sequence[Drawn], limit: int | None, seed: str) -> list[Drawn]:
    """Return up to `limit` rows, a random choice that depends only on `seed`, in their original order."""
    if limit is None or len(rows) <= limit:
        return list(rows)
    return [rows[index] for index in sorted(random.Random(seed).sample(range(len(rows)), limit))]


def spread_over_labels(rows: Iterable[Row], count: int, labels: Sequence[str]) -> list[tuple[Text, str]]:
    """Choose `count` (text, label name) examples from `rows`, in turn from every class that has rows."""
    by_label: dict[int, list[Text]] = {}
    for text, label in rows:
        by_label.setdefault(label, []).append(text)
    queues = list(by_label.items())
    examples: list[tuple[Text, str]] = []
    depth = 0
    while len(examples) < count and any(len(texts) > depth for _, texts in queues):
        examples += [(texts[depth], labels[label]) for label, texts in queues if len(texts) > depth]
        depth += 1
    return examples[:count]


def load_tasks(folder: str | Path, names: Sequence[str] | None = None) -> list[Task]:
    """Load the named tasks below `folder`, or all classification tasks there, sorted by name.

    Regression tasks must be named: not everything that is done with a folder of tasks can be done with them.

    Raises:
        TaskDataError: no such folder, or a named task is missing or malformed.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise TaskDataError(f"{folder} is not a folder of tasks")
    if names is None:
        folders = [path.parent for path in sorted(folder.glob("*/meta.json"))]
        folders = [path for path in folders if read_meta(path).get("task_type", "single-classification") in CLASSIFICATION_TYPES]
        if not folders:
            raise TaskDataError(f"no classification tasks below {folder}")
    else:
        folders = [folder / name for name in names]
    tasks = [Task.load(path) for path in folders]
    for task in tasks:
        if task.name != task.folder.name:
            raise TaskDataError(f"{task.folder / 'meta.json'}: name is {task.name!r}, but the folder is called {task.folder.name!r}")
    return tasks


def read_meta(folder: Path) -> dict[str, Any]:
    """Read the `meta.json` of a task folder; raise `TaskDataError` if it is missing or no JSON object."""
    try:
        meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise TaskDataError(f"{folder} is not a task folder: meta.json is missing") from error
    except ValueError as error:
        raise TaskDataError(f"{folder / 'meta.json'} is not valid JSON: {error}") from error
    if not isinstance(meta, dict):
        raise TaskDataError(f"{folder / 'meta.json'} must hold a JSON object, got {type(meta).__name__}")
    return meta


def write_task(
    folder: str | Path,
    description: str,
    labels: Sequence[str],
    splits: Mapping[str, Sequence[Row]],
    label_range: tuple[float, float] | None = None,
    **meta: Any,
) -> Task:
    """Write a task folder, complete or not at all, and read it back checked.

    Args:
        labels: label names; none of a regression task.
        splits: "train", "validation" and/or "test" → rows.
        label_range: (lowest, highest) score of a regression task.
        meta: further entries of `meta.json` (`group`, `licence`, …).
    """
    folder = Path(folder)
    pairs = any(not isinstance(text, str) for rows in splits.values() for text, _ in rows)
    facts = {
        **meta,
        "name": folder.name,
        "description": description,
        "label_names": list(labels),
        "task_type": CLASSIFICATION_TYPES[pairs],
    }
    if label_range is not None:
        facts |= {"label_names": None, "label_range": list(label_range), "task_type": REGRESSION_TYPE}
    with atomic_folder(folder, ()) as aside:
        (aside / "meta.json").write_text(dump_json(facts), encoding="utf-8")
        for split, rows in splits.items():
            if split not in SPLITS:
                raise TaskDataError(f"{split!r} is not one of the splits {SPLITS}")
            with gzip.open(aside / f"{split}.jsonl.gz", "wt", encoding="utf-8") as file:
                for text, label in rows:
                    fields = {"text": text} if isinstance(text, str) else {"text_a": text[0], "text_b": text[1]}
                    file.write(json.dumps({**fields, "label": label}, ensure_ascii=False) + "\n")
        written = Task.load(aside)
        for split in splits:
            written.rows(split)
    return Task.load(folder)
