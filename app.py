"""The demo's web page, interface only: run `python app.py` and open the address that it prints; the same runs as a Hugging Face Space."""

from __future__ import annotations

import base64
import functools
import html
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gradio as gr

from cond_pdiff import CondPDiffError, CondPDiffPipeline, LoraAdapter, PrototypeClassifier, StyleImage, TaskPrompt
from cond_pdiff.defaults import STYLE_GENERATOR, TEXT_GENERATOR
from cond_pdiff.notation import parse_example
from cond_pdiff.sampling import seeded
from cond_pdiff.text_to_image import encode_png, load_text_to_image, make_pictures

CACHE = Path(gr.utils.get_upload_folder()) / "cond-pdiff"  # in the only folder that gradio serves from
STYLES = os.environ.get("COND_PDIFF_STYLE_GENERATOR", STYLE_GENERATOR)
TASKS = os.environ.get("COND_PDIFF_TEXT_GENERATOR", TEXT_GENERATOR)
PROMPTS = "a red house beside a tree\na blue boat on the sea at night\nan orange cat in the snow\na castle on a hill at sunset"
MAX_PROMPTS, MAX_WAITING, MAX_UPLOAD, KEEP_SECONDS = 4, 64, "10mb", 3600
DESCRIPTION = "Decide whether a sentence from a review of an electronic product is negative or positive."
EXAMPLES = "battery died after a week = negative\ncrisp, bright screen = positive"
SENTENCES = "it keeps disconnecting\nworth every penny\nsets up in a minute and just works"
HEADLINES = "shares fall on weak sales = business\nstriker scores twice = sports\nnew telescope finds a planet = science"
NEW_HEADLINES = "the bank raised its forecast\ncoach praises young team\na vaccine for malaria"
TASK_EXAMPLES = [[DESCRIPTION, EXAMPLES, SENTENCES], ["Decide what a headline is about.", HEADLINES, NEW_HEADLINES]]
GALLERY: dict[str, Any] = {"columns": 2, "object_fit": "contain", "elem_classes": "gallery", "height": "auto"}
CSS = """.gallery img, .near-style {image-rendering: pixelated} .near {background: #1a7f37} .far {background: #9a6700}
.near-style {display: inline; width: 72px; margin: 6px} .badge {color: white; border-radius: 6px; padding: 2px 8px; margin-right: 6px}
.neighbour {display: inline-block; margin-right: 16px}"""

_text_to_image = functools.cache(load_text_to_image)
PROGRESS = gr.Progress()


@functools.cache
def _generator(name: str) -> CondPDiffPipeline:
    pipe = CondPDiffPipeline.from_pretrained(name)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _friendly(handler: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap an event handler so that what a user can mend becomes a message on the page."""

    @functools.wraps(handler)
    def handle(*arguments: Any, **options: Any) -> Any:
        try:
            return handler(*arguments, **options)
        except CondPDiffError as error:
            raise gr.Error(str(error), print_exception=False) from error

    return handle


def _picture(label: str) -> gr.Image:
    """Return a field for an upload that only the library opens, which looks at the header first: gradio's own way would open it before."""
    picture = gr.Image(type="filepath", sources=["upload", "clipboard"], height=220, label=label)
    picture.preprocess = lambda payload: payload.path if payload else None  # type: ignore[method-assign]
    return picture


def _lines(text: str) -> list[str]:
    return [line.strip() for line in text.splitlines() if line.strip()]


def _badge(report: Any, index: Any) -> str:
    """Say how near the request is to what was trained, with a small picture of each neighbour where the generator has one."""
    sign = ("near", "in distribution") if report.in_distribution else ("far", "out of distribution: expect less")
    lines = [f'<span class="badge {sign[0]}">{sign[1]}</span> nearest (threshold {report.threshold:.2f}):<br>']
    for neighbour in report.nearest:
        picture = index.preview(neighbour.task)
        data = base64.b64encode(encode_png(picture)).decode() if picture else ""
        shown = f'<img class="near-style" src="data:image/png;base64,{data}">' if data else ""
        name = html.escape(neighbour.task.replace("_", " "))
        lines.append(f'<span class="neighbour">{shown}<b>{name}</b> {neighbour.similarity:.2f}</span> ')
    return "".join([*lines, *([f"<br>gain: {report.choice.gain}"] if report.choice else [])])


def _folder() -> Path:
    """Make a new folder in the cache. Files there are written once: gradio would write pictures anew while others download them."""
    CACHE.mkdir(parents=True, exist_ok=True)
    for old in CACHE.iterdir():
        if time.time() - old.stat().st_mtime > KEEP_SECONDS:
            shutil.rmtree(old, ignore_errors=True)
    return Path(tempfile.mkdtemp(dir=CACHE))


def _pack(adapter: LoraAdapter) -> str:
    """Write a zip with the adapter and its card, which says how to load it, and return its path."""
    folder = _folder()
    adapter.save(folder / "zip" / "adapter")
    return shutil.make_archive(str(folder / "adapter"), "zip", folder / "zip")


def _generate(name: str, condition: Any, count: int, seed: int, progress: Any) -> Any:
    pipe, tell = _generator(name), lambda pipe, index, *_: progress((index + 1, len(pipe.scheduler.timesteps)), "writing weights") or {}
    return pipe(condition, num_adapters=count, generator=seeded(int(seed), count), callback_on_step_end=tell)


@_friendly
def make_style(image: str | None, other: str | None, mix: float, seed: int, progress: Any = PROGRESS) -> tuple[Any, ...]:
    """Make an adapter from a style image, perhaps mixed with that of a second one."""
    if not image:
        raise gr.Error("Drop a style picture first (PNG, JPEG or WebP).", print_exception=False)
    out = _generate(STYLES, StyleImage.open(image), 1, seed, progress)
    adapter = out.adapter
    if other:
        adapter = adapter.interpolate(_generate(STYLES, StyleImage.open(other), 1, seed, progress).adapter, mix)
    return adapter, _badge(out.report, _generator(STYLES).condition_index), _pack(adapter)


@_friendly
def preview(adapter: LoraAdapter | None, prompts: str, strength: float, seed: int) -> list[tuple[str, str]]:
    """Draw a picture a prompt, from the same noise whatever the adapter; without one, the base model's."""
    asked = _lines(prompts)[:MAX_PROMPTS]
    base, adapters = _generator(STYLES).template.base, [(adapter, strength)] if adapter else []
    pictures = make_pictures(_text_to_image(base), asked, adapters, int(seed))
    paths = [str(_folder() / "picture.png") for _ in pictures]
    for picture, path in zip(pictures, paths, strict=True):
        picture.save(path)
    return list(zip(paths, asked, strict=True))


@_friendly
def make_task(description: str, examples: str, sentences: str, seed: int, progress: Any = PROGRESS) -> tuple[Any, ...]:
    """Make an adapter from description and examples, and tell what it says of the sentences beside what the base model says."""
    pairs = [parse_example(line) for line in _lines(examples)]
    out = _generate(TASKS, TaskPrompt(description, pairs), 8 if pairs else 1, seed, progress)
    rows: list[Any] = []
    texts = _lines(sentences)
    if out.report.labels and texts:
        given = out.adapter.metadata.get("prototype_examples", ())
        adapted = PrototypeClassifier(_generator(TASKS).base_model(), out.report.labels, out.adapter, examples=given)
        rows = list(zip(texts, adapted.with_adapter(None).predict(texts), adapted.predict(texts), strict=True))
    return _badge(out.report, _generator(TASKS).condition_index), rows, _pack(out.adapter)


def build() -> gr.Blocks:
    """Build the page."""
    with gr.Blocks(title="cond-pdiff", analytics_enabled=False, delete_cache=(KEEP_SECONDS, KEEP_SECONDS)) as page:
        gr.Markdown("# cond-pdiff\nShow a style, or describe a task: a diffusion model over network weights writes the LoRA adapter.")
        with gr.Tab("Style → PixArt adapter"):
            adapter, nothing = gr.State(None, time_to_live=KEEP_SECONDS), gr.State(None)
            with gr.Row():
                with gr.Column(scale=2, min_width=280):
                    image = _picture("Style picture")
                    prompts = gr.Textbox(PROMPTS, lines=4, max_lines=4, label=f"Prompts, one a line (at most {MAX_PROMPTS})")
                    strength = gr.Slider(0, 2, 1, step=0.05, label="Strength")
                    seed = gr.Number(0, label="Seed", precision=0, minimum=0, maximum=2**31)
                    with gr.Accordion("Mix with a second style", open=False):
                        other = _picture("Second picture")
                        mix = gr.Slider(0, 1, 0.5, step=0.05, label="Share of the second style")
                    make, stop = gr.Button("Make the adapter", variant="primary"), gr.Button("Cancel")
                with gr.Column(scale=3, min_width=280):
                    with gr.Row():
                        plain, styled = (gr.Gallery(label=title, **GALLERY) for title in ("Base model", "With the adapter"))
                    report = gr.HTML("Drop a painting, or click an example below.")
                    download = gr.DownloadButton("Download the adapter (zip)")
            index = _generator(STYLES).condition_index
            gr.Examples([[index.preview(name)] for name in index.names[:: max(1, len(index.names) // 6)]], [image], label="Examples")
            asked, bare, given = [image, other, mix, seed], [nothing, prompts, strength, seed], [adapter, prompts, strength, seed]
            made = make.click(make_style, asked, [adapter, report, download], api_name="make_style", concurrency_id="model")
            run: dict[str, Any] = {"fn": preview, "concurrency_id": "model"}
            before = made.success(**run, inputs=bare, outputs=plain, api_name="base", api_visibility="private")
            after = before.success(**run, inputs=given, outputs=styled, api_name="preview")
            slid = strength.release(**run, inputs=given, outputs=styled, api_name="again", api_visibility="private")
            stop.click(None, cancels=[made, before, after, slid], api_visibility="private")
        with gr.Tab("Task → text adapter"):
            with gr.Row():
                with gr.Column(min_width=280):
                    description = gr.Textbox(DESCRIPTION, lines=2, label="What to decide")
                    examples = gr.Textbox(EXAMPLES, lines=4, label="Examples, one a line: text = label")
                    sentences = gr.Textbox(SENTENCES, lines=4, label="Sentences to try")
                    task_seed = gr.Number(0, label="Seed", precision=0, minimum=0, maximum=2**31)
                    go = gr.Button("Make the adapter", variant="primary")
                with gr.Column(min_width=280):
                    task_report = gr.HTML()
                    table = gr.Dataframe(headers=["sentence", "base model", "with the adapter"], interactive=False, wrap=True)
                    task_download = gr.DownloadButton("Download the adapter (zip)")
            gr.Examples(TASK_EXAMPLES, [description, examples, sentences], label="Examples")
            given, outputs = [description, examples, sentences, task_seed], [task_report, table, task_download]
            go.click(make_task, given, outputs, api_name="make_task", concurrency_id="model")
    return page.queue(max_size=MAX_WAITING, default_concurrency_limit=1, api_open=False)


if __name__ == "__main__":
    build().launch(css=CSS, max_file_size=MAX_UPLOAD, allowed_paths=[], footer_links=["api"])
