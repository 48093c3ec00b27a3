"""The demo: an adapter for a task in words and two examples, and its answers to new sentences beside the base model's."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from cond_pdiff.classifier import PrototypeClassifier
from cond_pdiff.conditions.task_prompt import TaskPrompt
from cond_pdiff.defaults import CHOOSE_FROM
from cond_pdiff.notation import parse_example
from cond_pdiff.pipelines.pipeline_cond_pdiff import CondPDiffPipeline
from cond_pdiff.pipelines.pipeline_output import GenerationReport
from cond_pdiff.sampling import seeded

DESCRIPTION = "Decide whether a sentence from a review of an electronic product is negative or positive."
EXAMPLES = ("battery died after a week=negative", "crisp, bright screen=positive")
SENTENCES = (
    ("it keeps disconnecting", "negative"),
    ("worth every penny", "positive"),
    ("the manual is useless and support never answered", "negative"),
    ("sets up in a minute and just works", "positive"),
    ("returned it the same day", "negative"),
    ("i would buy it again without thinking twice", "positive"),
)


@dataclass(frozen=True)
class Answer:
    """A classifier's answer to the question what a sentence is.

    Args:
        label: the likeliest.
        probability: of that label, a softmax over scaled similarities.
        right: is it the sentence's label?
    """

    label: str
    probability: float
    right: bool

    def __str__(self) -> str:
        return f"{'✓' if self.right else '✗'} {self.label} {self.probability:.0%}"


@dataclass(frozen=True)
class Demonstration:
    """The result of the demo.

    Args:
        report: what is known of the request and its candidates.
        base: the base model's answers, one for each of `SENTENCES`.
        adapted: the chosen adapter's.
    """

    report: GenerationReport
    base: tuple[Answer, ...]
    adapted: tuple[Answer, ...]

    def to_json(self) -> dict[str, Any]:
        """Return a JSON-ready description."""
        rows = [
            {"text": text, "label": label, "base": asdict(base), "adapted": asdict(adapted)}
            for (text, label), base, adapted in zip(SENTENCES, self.base, self.adapted, strict=True)
        ]
        return {"description": DESCRIPTION, "examples": list(EXAMPLES), "report": self.report.to_json(), "sentences": rows}

    def __str__(self) -> str:
        """Write the report, and both models' answers in columns, as text for people."""
        lines = [str(self.report), "", f"{'base model':<18} {'with the adapter':<18} sentence"]
        rows = zip(SENTENCES, self.base, self.adapted, strict=True)
        return "\n".join([*lines, *(f"{base!s:<18} {adapted!s:<18} {text}" for (text, _), base, adapted in rows)])


def demonstrate(pipe: CondPDiffPipeline) -> Demonstration:
    """Generate adapters for the demo's task with a generator of text adapters, choose one, and ask it and the base model."""
    prompt = TaskPrompt(DESCRIPTION, [parse_example(example) for example in EXAMPLES])
    output = pipe(prompt, num_adapters=CHOOSE_FROM, generator=seeded(0, CHOOSE_FROM))
    adapter = output.adapter
    adapted = PrototypeClassifier(pipe.base_model(), prompt.labels, adapter, examples=adapter.metadata.get("prototype_examples", ()))
    return Demonstration(output.report, _answers(adapted.with_adapter(None)), _answers(adapted))


def _answers(classifier: PrototypeClassifier) -> tuple[Answer, ...]:
    """Return a classifier's answers for `SENTENCES`."""
    rows = classifier.probabilities([text for text, _ in SENTENCES])
    best = [max(row.items(), key=lambda item: item[1]) for row in rows]
    return tuple(Answer(label, share, label == right) for (label, share), (_, right) in zip(best, SENTENCES, strict=True))
