"""The tab for styles: pictures of a style, or of two that are mixed, become an adapter of a text-to-image model."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import gradio as gr

from cond_pdiff import LoraAdapter, StyleImage
from cond_pdiff.errors import ConditionError
from cond_pdiff.page.report import told
from cond_pdiff.page.tab import (
    AT_ONCE,
    KEEP_SECONDS,
    PROGRESS,
    Tab,
    buttons,
    cancel,
    download_button,
    friendly,
    lines,
    new_folder,
    pack,
    refine_field,
    run_from_nothing,
    seed_field,
)  # fmt: skip
from cond_pdiff.text_to_image import make_pictures

PROMPTS = "a red house beside a tree\na blue boat on the sea at night\nan orange cat in the snow\na castle on a hill at sunset"
MAX_PROMPTS, NUM_EXAMPLES = 4, 6
FILE_TYPES = [".png", ".jpg", ".jpeg", ".webp"]
REFINE_STEPS = 20

CSS = """
.gallery img {image-rendering: pixelated}
.gallery .grid-wrap {min-height: 0; height: auto; max-height: none; overflow: visible}
.gallery .grid-container {height: auto; align-items: start}
.gallery .thumbnail-item {aspect-ratio: auto; height: auto; display: block; background: none}
.gallery .thumbnail-item img {aspect-ratio: 1; height: auto; width: 100%; border-radius: inherit}
.gallery .caption-label {position: static; max-width: 100%; border: 0; padding: 4px 2px; white-space: normal; overflow: visible;
  background: none; text-align: left}
#examples .grid-container, .pictures .grid-container {grid-template-columns: repeat(auto-fill, minmax(80px, 104px))}
.pictures .grid-wrap {padding-top: 32px}
"""

Captioned = list[tuple[str, str]]
"""Files of pictures with their captions."""
Shown = list[tuple[str, str | None]] | None
"""What a field for pictures gives: their files, as `Captioned` though none has a caption; None where it is empty."""


def _pictures(label: str) -> gr.Gallery:
    """Return a field for uploads that only the library opens, which looks at the header first: gradio hands a gallery's paths on."""
    look: dict[str, Any] = {"object_fit": "contain", "height": 220, "elem_classes": "pictures", "buttons": []}
    return gr.Gallery(label=label, type="filepath", sources=["upload", "clipboard"], file_types=FILE_TYPES, interactive=True, **look)


def _gallery(title: str, **options: Any) -> gr.Gallery:
    """Return a field for pictures with their captions, and its title above it, where gradio would lay it over the first one."""
    gr.Markdown(f"#### {title}")
    look: dict[str, Any] = {"columns": 2, "object_fit": "contain", "height": "auto", "elem_classes": "gallery", "buttons": []}
    return gr.Gallery(label=title, show_label=False, **look, **options)


class StyleTab(Tab):
    """The tab for styles."""

    title, makes, recipe = "Style", "style", "pixart-mini-styles"

    @friendly()
    def make(
        self, shown: Shown, second: Shown, mix: float, seed: float, refine_steps: float = 0, progress: Any = PROGRESS
    ) -> tuple[LoraAdapter, str, str]:
        """Make an adapter from pictures of a style, perhaps mixed with that of a second one."""
        if not shown:
            raise ConditionError("drop a style picture first (PNG, JPEG or WebP)")
        styles = [StyleImage.of([path for path, _ in pictures]) for pictures in (shown, second) if pictures]
        made = [self.generate(style, 1, seed, progress, refine_steps) for style in styles]
        adapter, headings = made[0].adapter, [""]
        if second:
            adapter = adapter.interpolate(made[1].adapter, mix)
            headings = [f"First style: {1 - mix:.0%} of the mixture", f"Second style: {mix:.0%} of the mixture"]
        parts = zip(made, styles, headings, strict=True)
        report = "".join(told(out, style, self.pipe.condition_index, heading) for out, style, heading in parts)
        return adapter, report, pack(adapter)

    def preview(self, adapter: LoraAdapter | None, prompts: str, strength: float, seed: float) -> Iterator[Captioned]:
        """Draw a picture a prompt, from the same noise whatever the adapter; without one, the base model's.

        After each of them those that there are: a run that is cancelled ends after the picture it is at.
        """
        shown: Captioned = []
        adapters = [(adapter, strength)] if adapter else []
        with friendly():
            for prompt in lines(prompts)[:MAX_PROMPTS] or [""]:  # an empty one is refused by name
                (picture,) = make_pictures(self.pipe.base_model(), [prompt], adapters, int(seed))
                path = str(new_folder() / "picture.png")
                picture.save(path)
                yield (shown := [*shown, (path, prompt)])

    def base(self, prompts: str, seed: float) -> Iterator[Captioned]:
        """Draw the base model's pictures."""
        yield from self.preview(None, prompts, 0, seed)

    def again(self, adapter: LoraAdapter | None, prompts: str, strength: float, seed: float) -> Iterator[Any]:
        """Draw anew with another strength, once there is an adapter."""
        yield from self.preview(adapter, prompts, strength, seed) if adapter else [gr.skip()]

    def build(self) -> None:
        """Lay the tab out."""
        adapter = gr.State(None, time_to_live=KEEP_SECONDS)
        with gr.Row():
            with gr.Column(scale=2, min_width=280):
                shown = _pictures("Style pictures")
                prompts = gr.Textbox(PROMPTS, lines=4, max_lines=4, label=f"Prompts, one a line (at most {MAX_PROMPTS})")
                strength = gr.Slider(0, 2, 1, step=0.05, label="Strength")
                with gr.Row():
                    refine = refine_field(REFINE_STEPS)
                    seed = seed_field()
                with gr.Accordion("Mix with a second style", open=False):
                    second = _pictures("Pictures of the second style")
                    mix = gr.Slider(0, 1, 0.5, step=0.05, label="Share of the second style")
                make, stop = buttons()
            with gr.Column(scale=3, min_width=280):
                report = gr.HTML("Drop a painting, or several of one style, or click an example below.", elem_classes="report")
                with gr.Row():
                    with gr.Column(min_width=200):
                        plain = _gallery("Base model")
                    with gr.Column(min_width=200):
                        styled = _gallery("With the adapter")
                download = download_button()
        index = self.pipe.condition_index
        names = [name for name in index.names if index.preview(name)]
        names = names[:: max(1, len(names) // NUM_EXAMPLES)][:NUM_EXAMPLES]
        thumbnails = [(index.preview(name), name.replace("_", " ")) for name in names]
        examples = _gallery("Examples", value=thumbnails, allow_preview=False, elem_id="examples")

        def take(event: gr.SelectData) -> Any:
            return [index.preview(names[event.index])]

        examples.select(take, None, shown, **AT_ONCE)
        made = run_from_nothing(
            make, download, [adapter, report, plain, styled],
            fn=self.make, inputs=[shown, second, mix, seed, refine], outputs=[adapter, report, download], api_name="make_style",
        )  # fmt: skip
        private: dict[str, Any] = {"concurrency_id": "model", "api_visibility": "private"}
        bare = made.success(self.base, [prompts, seed], plain, **private)
        asked = [adapter, prompts, strength, seed]
        after = bare.success(self.preview, asked, styled, concurrency_id="model", api_name="preview")
        # Not on release, which the keyboard never does; what is dragged past is skipped.
        again = strength.change(self.again, asked, styled, trigger_mode="always_last", **private)
        cancel([stop], made, bare, after)
        cancel([stop, make], again)
