"""The tab for text tasks: a description, label names and examples become an adapter of a sentence encoder, which is tried at once."""

from __future__ import annotations

from typing import Any

import gradio as gr

from cond_pdiff import PrototypeClassifier, TaskPrompt
from cond_pdiff.classifier import recorded_labels
from cond_pdiff.conditions.texts import check_text
from cond_pdiff.defaults import REFINE_STEPS
from cond_pdiff.notation import PAIR_SEPARATOR, parse_description, parse_example, parse_text
from cond_pdiff.page.report import answer_table, told
from cond_pdiff.page.tab import (
    CANDIDATES,
    PROGRESS,
    Tab,
    buttons,
    cancel,
    download_button,
    friendly,
    lines,
    pack,
    refine_field,
    run_from_nothing,
    seed_field,
)

PAIR = f"a pair: text {PAIR_SEPARATOR} text"
REVIEWS = (
    "Decide whether a sentence from a review of an electronic product is negative or positive.",
    "",
    "battery died after a week = negative\ncrisp, bright screen = positive",
    "it keeps disconnecting\nworth every penny\nsets up in a minute and just works",
)
HEADLINES = (
    "Decide what a headline is about.",
    "",
    "shares fall on weak sales = business\nstriker scores twice = sports\nnew telescope finds a planet = science",
    "the bank raised its forecast\ncoach praises young team\na vaccine for malaria",
)
PAIRS = (
    "Decide whether two questions ask the same.",
    "same\ndifferent",
    "",
    f"how do i learn to swim {PAIR_SEPARATOR} how can i learn swimming\nwho wrote hamlet {PAIR_SEPARATOR} when was hamlet written",
)
EXAMPLES = {"product reviews": REVIEWS, "headlines": HEADLINES, "pairs of questions": PAIRS}

NO_TEXT = "<p>No text was given to try. Write some into “Texts to try”, one a line.</p>"
NO_LABELS = (
    "<p>There is nothing to answer with: the request names no labels, and is unlike every trained task, whose labels could stand in. "
    "Write them into “Labels”, or give examples.</p>"
)


def named_labels(written: str) -> tuple[list[str], dict[str, list[str]]]:
    """Read a label a line, `name` or `name = what it means`; return the names, and what is said of some, perhaps in several lines."""
    names: list[str] = []
    described: dict[str, list[str]] = {}
    for line in lines(written):
        name, *said = parse_description(line) if "=" in line else (line,)
        if name not in described:
            names.append(name)
        if said:
            described.setdefault(name, []).extend(said)
    return names, described


class TextTab(Tab):
    """The tab for text tasks."""

    title, makes, recipe = "Text task", "text", "minilm-text-tasks"

    @friendly()
    def make(
        self, description: str, examples: str, texts: str, seed: float, labels: str = "", refine_steps: float = 0, progress: Any = PROGRESS
    ) -> tuple[str, str, str]:
        """Make an adapter from description, labels and examples, and tell what it says of the texts beside what the base model says."""
        asked = [check_text(parse_text(line), f"text {place}") for place, line in enumerate(lines(texts), 1)]
        names, described = named_labels(labels)
        prompt = TaskPrompt(description, [parse_example(line) for line in lines(examples)], names, descriptions=described)
        out = self.generate(prompt, CANDIDATES if prompt.examples else 1, seed, progress, refine_steps)
        answers = NO_TEXT if not asked else NO_LABELS
        if asked and (known := recorded_labels(out.adapter)):
            given = out.adapter.metadata.get("prototype_examples", ())
            adapted = PrototypeClassifier(self.pipe.base_model(), known, out.adapter, examples=given)
            both = [classifier.probabilities(asked) for classifier in (adapted.with_adapter(None), adapted)]
            answers = answer_table(lines(texts), *both)
        return told(out, prompt, self.pipe.condition_index), answers, pack(out.adapter)

    def build(self) -> None:
        """Lay the tab out."""
        with gr.Row():
            with gr.Column(min_width=280):
                description = gr.Textbox(REVIEWS[0], lines=2, label="What to decide")
                labels = gr.Textbox("", lines=2, label="Labels, one a line: label, or label = what it means (none: those of the examples)")
                examples = gr.Textbox(REVIEWS[2], lines=3, label=f"Examples, one a line: text = label ({PAIR} = label)")
                texts = gr.Textbox(REVIEWS[3], lines=3, label=f"Texts to try, one a line ({PAIR})")
                with gr.Row():
                    refine = refine_field(REFINE_STEPS)
                    seed = seed_field()
                make, stop = buttons()
            with gr.Column(min_width=280):
                report = gr.HTML(elem_classes="report")
                answers = gr.HTML(elem_classes="answers")
                download = download_button()
        fields = [description, labels, examples, texts]
        gr.Examples([list(example) for example in EXAMPLES.values()], fields, example_labels=list(EXAMPLES), label="Examples")
        made = run_from_nothing(
            make, download, [report, answers],
            fn=self.make, inputs=[description, examples, texts, seed, labels, refine], outputs=[report, answers, download],
            api_name="make_task",
        )  # fmt: skip
        cancel([stop], made)
