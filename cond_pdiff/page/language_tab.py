"""The tab for language models: a description becomes an adapter, and the model under it answers as one watches."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from typing import Any

import gradio as gr

from cond_pdiff import LoraAdapter, TaskPrompt
from cond_pdiff.conditions.instruction import Instruction
from cond_pdiff.conditions.texts import Text, check_text
from cond_pdiff.defaults import ANSWER_TOKENS
from cond_pdiff.errors import ConditionError
from cond_pdiff.locks import in_one_thread
from cond_pdiff.notation import PAIR_SEPARATOR, parse_example, parse_text
from cond_pdiff.page.report import likeliest, told
from cond_pdiff.page.tab import (
    CANDIDATES,
    KEEP_SECONDS,
    PROGRESS,
    Tab,
    buttons,
    cancel,
    download_button,
    friendly,
    lines,
    pack,
    run_from_nothing,
    seed_field,
)  # fmt: skip

ANTONYMS = ("Write the antonym of a word.", "", "up = down\nearly = late", "happy")
PLURALS = ("Write the plural of a noun.", "", "", "child")
REMARKS = ("Decide whether a remark about a product is negative or positive.", "negative\npositive", "", "it broke after a week")
EXAMPLES = {"antonyms": ANTONYMS, "plurals": PLURALS, "remarks, with labels": REMARKS}


class LanguageTab(Tab):
    """The tab for language models."""

    title, makes, recipe = "Language model", "language", "smollm2-tasks"

    @friendly()
    def make(
        self, description: str, examples: str, labels: str, seed: float, progress: Any = PROGRESS
    ) -> tuple[LoraAdapter, str, str]:
        """Make an adapter from a description and examples; where no labels are named, answers are free texts."""
        named = lines(labels)
        prompt = TaskPrompt(description, [parse_example(line) for line in lines(examples)], named, free=not named)
        out = self.generate(prompt, CANDIDATES if prompt.examples else 1, seed, progress)
        return out.adapter, told(out, prompt, self.pipe.condition_index), pack(out.adapter)

    def ask(self, adapter: LoraAdapter | None, text: str) -> Iterator[tuple[str, str]]:
        """Yield the base model's answer and the one with the adapter, as far as they are written; the latter is written first."""
        yield "", ""
        with friendly():
            if adapter is None:
                raise ConditionError("make an adapter first, then ask")
            asked = check_text(parse_text(text), "the text to answer")
            yield from in_one_thread(lambda: self._answers(adapter, asked))

    def _answers(self, adapter: LoraAdapter, text: Text) -> Generator[tuple[str, str], None, None]:
        said = ""
        with adapter.attached(self.pipe.base_model()):
            for said in self._answer(adapter, text):
                yield "", said
        for plain in self._answer(adapter, text):
            yield plain, said

    def _answer(self, adapter: LoraAdapter, text: Text) -> Iterator[str]:
        """Yield the answer so far of the model as it is now; where there are labels, the likeliest one."""
        model, instruction, said = self.pipe.base_model(), Instruction.recorded(adapter.metadata), ""
        if instruction.labels:
            yield likeliest(model.shares(instruction, text, self.pipe.template.config.max_length)[0])
            return
        for piece in model.stream(model.prompt_tokens(instruction.prompt(text)), ANSWER_TOKENS):
            yield (said := said + piece)

    def build(self) -> None:
        """Lay the tab out."""
        adapter = gr.State(None, time_to_live=KEEP_SECONDS)
        with gr.Row():
            with gr.Column(min_width=280):
                description = gr.Textbox(ANTONYMS[0], lines=2, label="What to do")
                labels = gr.Textbox(ANTONYMS[1], lines=2, label="Labels, one a line (none: answers are free)")
                examples = gr.Textbox(ANTONYMS[2], lines=3, label="Examples, one a line: text = answer")
                seed = seed_field()
                make, stop = buttons()
            with gr.Column(min_width=280):
                report = gr.HTML("Describe a task, or click an example below.", elem_classes="report")
                text = gr.Textbox(ANTONYMS[3], label=f"Text to answer (a pair: text {PAIR_SEPARATOR} text)")
                ask = gr.Button("Ask")
                with gr.Row():
                    plain = gr.Textbox(label="Base model", lines=3, interactive=False, min_width=200)
                    adapted = gr.Textbox(label="With the adapter", lines=3, interactive=False, min_width=200)
                download = download_button()
        fields = [description, labels, examples, text]
        gr.Examples([list(example) for example in EXAMPLES.values()], fields, example_labels=list(EXAMPLES), label="Examples")
        made = run_from_nothing(
            make, download, [adapter, report, plain, adapted],
            fn=self.make, inputs=[description, examples, labels, seed], outputs=[adapter, report, download], api_name="make_language",
        )  # fmt: skip
        answer: dict[str, Any] = {"fn": self.ask, "inputs": [adapter, text], "outputs": [plain, adapted], "concurrency_id": "model"}
        first = made.success(**answer, api_name="first", api_visibility="private")
        asked = gr.on([ask.click, text.submit], **answer, api_name="ask")
        cancel([stop], made, first)
        cancel([stop, make], asked)
