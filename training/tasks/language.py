"""Tasks for language models: texts and the answers that are right for them.

A classification task's answer is the name of a class (its folder is one of `cond_pdiff.training.tasks.tasks`). A generation task is a
folder with `meta.json` (`name`, `description`, `task_type`: "generation", and optionally `group`, `licence`, `source`) and the same
splits, with one JSON object a line, `{"input": …, "outputs": […]}`: each of the outputs is right, letter case and outer spaces aside.
"""

from __future__ import annotations

import random
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Self

from cond_pdiff.conditions.instruction import Instruction
from cond_pdiff.conditions.task_prompt import TaskPrompt
from cond_pdiff.conditions.texts import Text, check_string
from cond_pdiff.errors import ConditionError, TaskDataError
from cond_pdiff.training.tasks.rows import check_splits, read_split, test_split
from cond_pdiff.training.tasks.tasks import CLASSIFICATION_TYPES, PromptTask, Task, read_meta, sample_rows

GENERATION_TYPE = "generation"


class Exchange(NamedTuple):
    """A text and all answers to it that are right."""

    text: Text
    answers: tuple[str, ...]


class LanguageTask(PromptTask):
    """A task for a language model."""

    cuts_texts: ClassVar[bool]
    """Whether the beginning of a long text is enough to answer."""

    folder: Path

    @property
    @abstractmethod
    def instruction(self) -> Instruction:
        """What the model is told to do."""

    @abstractmethod
    def exchanges(self, split: str) -> list[Exchange]:
        """Read a split; `TaskDataError` names the first bad line."""

    @abstractmethod
    def examples(self, split: str) -> list[tuple[Text, str]]:
        """Return the rows of a split as examples of a condition: with their label's own name, or with one right answer."""

    @property
    def reported_split(self) -> str:
        """The test split, or the validation split where there is none."""
        return test_split(self.folder)

    def test_exchanges(self, limit: int | None) -> list[Exchange]:
        """Return up to `limit` exchanges of the test split, a fixed random choice."""
        return sample_rows(self.exchanges(self.reported_split), limit, f"{self.name}/report")


@dataclass(frozen=True)
class LabelTask(Task, LanguageTask):
    """A classification task whose label names are the answers."""

    cuts_texts: ClassVar[bool] = True

    @property
    def instruction(self) -> Instruction:
        """The description and the label names to choose from."""
        return Instruction(self.description, self.labels)

    def exchanges(self, split: str) -> list[Exchange]:
        """Read a split, with the label names as the instruction has them."""
        answers = self.instruction.answers
        return [Exchange(text, (answers[label],)) for text, label in self.rows(split)]

    def examples(self, split: str) -> list[tuple[Text, str]]:
        """Return the rows of a split with their labels' names."""
        return [(text, self.labels[label]) for text, label in self.rows(split)]

    def adapter_facts(self) -> dict[str, Any]:
        """Return description and label names, of which prompts are made."""
        return {"description": self.description, **super().adapter_facts()}


@dataclass(frozen=True)
class GenerationTask(LanguageTask):
    """A task whose answers are texts of their own.

    Args:
        name: the folder's name.
        description: what to write.
        folder: where the rows are.
        group: the kind of task, for reports.
        licence: of the data.
        source: where the rows come from.
    """

    cuts_texts: ClassVar[bool] = False

    name: str
    description: str
    folder: Path
    group: str = ""
    licence: str = ""
    source: str = ""

    @classmethod
    def load(cls, folder: str | Path) -> Self:
        """Read and check a task folder's `meta.json`; `TaskDataError` says what is wrong."""
        folder = Path(folder)
        meta = read_meta(folder)
        try:
            texts = {name: str(meta.get(name, "")) for name in ("group", "licence")}
            source = str(meta.get("source", "")).partition(" : ")[0]
            task = cls(str(meta["name"]), check_string(meta["description"], "the description"), folder, source=source, **texts)
        except KeyError as error:
            raise TaskDataError(f"{folder / 'meta.json'} has no {error}; expected name and description") from error
        except ConditionError as error:
            raise TaskDataError(f"{folder / 'meta.json'}: {error}") from error
        return task

    @property
    def instruction(self) -> Instruction:
        """The description."""
        return Instruction(self.description)

    def exchanges(self, split: str) -> list[Exchange]:
        """Read a split."""
        return read_split(self.folder, split, _exchange)

    def examples(self, split: str) -> list[tuple[Text, str]]:
        """Return the rows of a split with the first of their answers."""
        return [(text, answers[0]) for text, answers in self.exchanges(split)]

    def check(self) -> None:
        """Raise `TaskDataError` for a task without training rows, or without any rows to report numbers on."""
        check_splits(self.folder)

    def prompt(self, seed: int | str, num_examples: int) -> TaskPrompt:
        """Return the task as a condition, with `num_examples` training rows and the first of their answers as examples."""
        rows = self.examples("train")
        random.Random(f"{self.name}/prompt/{seed}").shuffle(rows)
        return TaskPrompt(self.description, rows[:num_examples], free=True)

    def zoo_facts(self) -> dict[str, Any]:
        """Return the description beside what the zoo records of every task."""
        return {**super().zoo_facts(), "description": self.description, "labels": []}

    def adapter_facts(self) -> dict[str, Any]:
        """Return the description, of which prompts are made."""
        return {"description": self.description}

    def index_facts(self) -> dict[str, Any]:
        """Return the description beside what a generator's index keeps of every task."""
        return {**super().index_facts(), "description": self.description, "labels": []}


def _exchange(data: Mapping[str, Any]) -> Exchange:
    text, answers = data["input"], data["outputs"]
    if not isinstance(text, str) or not text.strip():
        raise ValueError("input must be a text that is not empty")
    if not isinstance(answers, list) or not answers or not all(isinstance(answer, str) and answer.strip() for answer in answers):
        raise ValueError(f"outputs must be a list of answers, none of them empty, got {answers!r:.80}")
    return Exchange(text.strip(), tuple(answer.strip() for answer in answers))


def load_language_tasks(folder: str | Path, names: Sequence[str] | None = None) -> list[LanguageTask]:
    """Load the named tasks below `folder`, or all classification and generation tasks there, sorted by name.

    Tasks lie in `folder` itself, or in collections in it, one level deeper: classification and generation tasks may stand side by side.

    Raises:
        TaskDataError: no such folder, or a named task is missing, malformed, there twice, or of another type.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise TaskDataError(f"{folder} is not a folder of tasks")
    if names is None:
        found = [path.parent for pattern in ("*/meta.json", "*/*/meta.json") for path in folder.glob(pattern)]
        folders = [path for path in found if _type_of(path) in (*CLASSIFICATION_TYPES, GENERATION_TYPE)]
        if not folders:
            raise TaskDataError(f"no classification or generation tasks below {folder}")
    else:
        folders = [_folder_of(folder, name) for name in names]
    tasks = [load_language_task(path) for path in (folders if names is not None else sorted(folders, key=lambda path: path.name))]
    for position, task in enumerate(tasks):
        if task.name != task.folder.name:
            raise TaskDataError(f"{task.folder / 'meta.json'}: name is {task.name!r}, but the folder is called {task.folder.name!r}")
        if twin := next((other for other in tasks[:position] if other.name == task.name), None):
            raise TaskDataError(f"{task.folder} and {twin.folder} have one name; name the tasks that are meant, or rename one")
    return tasks


def _type_of(folder: Path) -> str:
    return str(read_meta(folder).get("task_type", CLASSIFICATION_TYPES[0]))


def _folder_of(folder: Path, name: str) -> Path:
    found = [path.parent for pattern in (f"{name}/meta.json", f"*/{name}/meta.json") for path in sorted(folder.glob(pattern))]
    if len(found) > 1:
        raise TaskDataError(f"{found[0]} and {found[1]} have one name; rename one")
    return found[0] if found else folder / name  # where reading it says that it is missing


def load_language_task(folder: Path) -> LanguageTask:
    """Read a classification or generation task; `TaskDataError` says what is wrong, or that it is of another type."""
    task_type = _type_of(folder)
    if task_type == GENERATION_TYPE:
        return GenerationTask.load(folder)
    task = LabelTask.load(folder)
    if task.label_range is not None:
        raise TaskDataError(f"{folder} is a regression task; language models are trained on classification and generation tasks")
    return task
