from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from cond_pdiff.conditions.task_prompt import TaskPrompt
from cond_pdiff.conditions.texts import MAX_TEXT_CHARS, check_labels, check_text
from cond_pdiff.errors import ConditionError, CondPDiffError

TWO = [("fine film", "good"), ("dull film", "bad")]


@pytest.mark.parametrize(
    "text",
    ["a", "это хороший фильм", "这部电影很好", "هذا فيلم جيد", "यह अच्छी फिल्म है", "👩‍👩‍👧 🎬 👍🏽", "e\u0301 ﬁ \u200f", "word " * 20_000],
    ids=["short", "cyrillic", "chinese", "arabic", "hindi", "emoji", "combining", "100000-characters"],
)
def test_any_script_and_length_is_accepted(text: str) -> None:
    assert check_text(f"\n {text}\t", "x") == text.strip()
    assert check_text([text, f" {text}"], "x") == (text.strip(), text.strip())
    prompt = TaskPrompt(text, [((text, text), "good"), ((text, text), "bad")])
    assert prompt.description == text.strip()
    assert prompt.examples == (((text.strip(), text.strip()), "good"), ((text.strip(), text.strip()), "bad"))
    with pytest.raises(ConditionError, match="some examples are single texts and some are pairs"):
        TaskPrompt(text, [(text, "good"), ((text, text), "bad")])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "the x is empty"),
        (" \n\t\u3000", "the x is empty"),
        ("a" * (MAX_TEXT_CHARS + 1), f"the x has {MAX_TEXT_CHARS + 1} characters"),
        (("a", " "), "the x, part 2 is empty"),
        (["", "b"], "the x, part 1 is empty"),
        (("a",), "string or a pair of strings, got tuple"),
        (("a", "b", "c"), "string or a pair of strings, got tuple"),
        (("a", 1), "string or a pair of strings, got tuple"),
        (None, "got NoneType"),
        (b"bytes", "got bytes"),
        (3.5, "got float"),
        ({"text": "a"}, "got dict"),
    ],
)
def test_check_text_refuses(text: object, message: str) -> None:
    with pytest.raises(ConditionError, match=message):
        check_text(text, "the x")


def test_the_longest_text_is_accepted() -> None:
    assert len(str(check_text("a" * MAX_TEXT_CHARS, "x"))) == MAX_TEXT_CHARS


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ("good", "the single string 'good'"),
        ([], "at least two labels"),
        (["good"], "at least two labels"),
        (["good", " good "], "'good' is given twice"),
        (["good", ""], "label 2 is empty"),
        (["good", 1], "label 2 must be one string, got int"),
        (["good", ("a", "b")], "label 2 must be one string"),
    ],
)
def test_check_labels_refuses(labels: Any, message: str) -> None:
    with pytest.raises(ConditionError, match=message):
        check_labels(labels)


def test_check_labels_strips_and_keeps_the_order() -> None:
    assert check_labels(iter([" zoo", "art ", "été"])) == ("zoo", "art", "été")


def test_labels_default_to_those_of_the_examples_in_order() -> None:
    prompt = TaskPrompt("Is it good?", [("x", "good"), ("y", " bad"), ("z", "good")])
    assert prompt.labels == ("good", "bad")
    assert TaskPrompt("Is it good?").labels == ()
    assert TaskPrompt("Is it good?", TWO[:1], ["bad", "good"]).labels == ("bad", "good")


def test_prompts_are_values() -> None:
    prompt = TaskPrompt(" Is it good? ", [list(TWO[0]), TWO[1]])
    assert prompt == TaskPrompt("Is it good?", tuple(TWO))
    assert hash(prompt) == hash(TaskPrompt("Is it good?", tuple(TWO)))
    with pytest.raises(dataclasses.FrozenInstanceError):
        prompt.description = "other"  # type: ignore[misc]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"description": ""}, "the task description is empty"),
        ({"description": 5}, "the task description must be one string, got int"),
        ({"description": ("a", "b")}, "the task description must be one string"),
        ({"examples": ["text"]}, r"example 1 must be a \(text, label\) pair, got 'text'"),
        ({"examples": "ab"}, "example 1 must be a"),
        ({"examples": 5}, "examples"),
        ({"examples": [*TWO, ("a", "b", "c")]}, "example 3 must be a"),
        ({"examples": [*TWO, ("", "good")]}, "the text of example 3 is empty"),
        ({"examples": [*TWO, (("a", ""), "good")]}, "the text of example 3, part 2 is empty"),
        ({"examples": [*TWO, ("a", "")]}, "the label of example 3 is empty"),
        ({"examples": [*TWO, ("a", 1)]}, "the label of example 3 must be one string, got int"),
        ({"examples": [*TWO, ("a", ("b", "c"))]}, "the label of example 3 must be one string"),
        ({"examples": [("a", "good"), ("b", "good")]}, "all examples have the label 'good'"),
        ({"examples": TWO, "labels": ["good", "fair"]}, r"example 2 has the label 'bad'.*\['good', 'fair'\]"),
        ({"labels": ["good"]}, "at least two labels"),
        ({"labels": ["a", "a"]}, "'a' is given twice"),
        ({"labels": "good"}, "the single string"),
        ({"labels": 5}, "labels"),
    ],
)
def test_task_prompt_refuses(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ConditionError, match=message) as caught:
        TaskPrompt(**{"description": "Is it good?", **arguments})
    assert isinstance(caught.value, CondPDiffError)
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize(
    ("condition", "message"),
    [(None, "a string or a"), (5, "a string or a"), (("a", "b"), "one condition a call"), (["a"], "one condition a call")],
)
def test_of_refuses_other_types(condition: Any, message: str) -> None:
    with pytest.raises(ConditionError, match=message):
        TaskPrompt.of(condition)


def test_of_accepts_strings_and_prompts() -> None:
    prompt = TaskPrompt("Is it good?", TWO)
    assert TaskPrompt.of(prompt) is prompt
    assert TaskPrompt.of(" Is it good? ") == TaskPrompt("Is it good?")


# --- descriptions of labels ----------------------------------------------------------------------------------------------------


DESCRIBED = {"good": "praise of any kind", "bad": ["a complaint ", "scorn"], "other": None}


def test_labels_may_be_described() -> None:
    prompt = TaskPrompt("Is it kind?", TWO, DESCRIBED)
    assert prompt.labels == ("good", "bad", "other")
    assert prompt.descriptions == {"good": ("praise of any kind",), "bad": ("a complaint", "scorn")}
    beside = TaskPrompt("Is it kind?", TWO, ["good", "bad", "other"], descriptions=DESCRIBED)
    assert beside == prompt == TaskPrompt.from_json(json.loads(json.dumps(prompt.to_json(), sort_keys=True)))
    assert hash(beside) == hash(prompt)
    assert dataclasses.replace(prompt, examples=()).descriptions == prompt.descriptions
    of_examples = TaskPrompt("Is it kind?", TWO, descriptions={"bad": "scorn"})
    assert (of_examples.labels, of_examples.descriptions) == (("good", "bad"), {"bad": ("scorn",)})


def test_names_alone_are_recorded_as_ever() -> None:
    for labels in (["good", "bad"], {"good": None, "bad": ""}, {"good": [], "bad": ()}):
        prompt = TaskPrompt("Is it kind?", TWO, labels)
        assert prompt.to_json() == {"description": "Is it kind?", "examples": [list(one) for one in TWO], "labels": ["good", "bad"]}
        assert prompt == TaskPrompt("Is it kind?", TWO)


def test_requests_in_files_may_describe_labels(tmp_path: Path) -> None:
    record = {"description": "Is it kind?", "labels": DESCRIBED}
    assert TaskPrompt.from_request(record, tmp_path) == TaskPrompt("Is it kind?", (), DESCRIBED)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"labels": {"good": 1, "bad": None}}, "description of the label 'good' must be a string or a list of strings, got int"),
        ({"labels": {"good": " ", "bad": None}}, "description of the label 'good' is empty"),
        ({"labels": {"good": ["fine", ""], "bad": None}}, "description of the label 'good' is empty"),
        ({"labels": {"good": "fine"}}, "at least two labels"),
        ({"labels": ["good", "bad"], "descriptions": {"fine": "x"}}, "description of 'fine', which is not among the labels"),
        ({"labels": (), "descriptions": {"good": "x"}, "free": True}, "free answers have no labels"),
    ],
)
def test_descriptions_that_cannot_be_used(arguments: Any, message: str) -> None:
    with pytest.raises(ConditionError, match=message):
        TaskPrompt("Is it kind?", TWO, **arguments)
