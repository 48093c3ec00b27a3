"""Tab: what the tabs of the page have in common, from the click on a button to the file that is downloaded."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar

import gradio as gr

from cond_pdiff import CondPDiffError, CondPDiffPipeline, LoraAdapter
from cond_pdiff.conditions.condition import Condition
from cond_pdiff.generator_info import GeneratorInfo
from cond_pdiff.publish import VARIABLE
from cond_pdiff.sampling import seeded

CACHE = Path(gr.utils.get_upload_folder()) / "cond-pdiff"  # in the only folder that gradio serves from
KEEP_SECONDS = 3600
CANDIDATES = 8
"""The number of adapters that examples choose among: fewer than elsewhere, as somebody is waiting."""
MAX_REFINEMENT = 100
"""The most steps of refinement: they are taken to their end, also after a cancellation, and others wait."""
PROGRESS = gr.Progress()
AT_ONCE: dict[str, Any] = {"queue": False, "show_progress": "hidden", "api_visibility": "private"}
"""How an event runs that only sets the page's own fields."""


class Tab(ABC):
    """A tab for one kind of adapters: a form, and what was made of it.

    Args:
        generator: name of the generator, which is loaded.

    Raises:
        CondPDiffError: it cannot be loaded, or makes adapters of another kind.
    """

    title: ClassVar[str]
    makes: ClassVar[str]
    """The word in front of "adapters" for what its generators make."""
    recipe: ClassVar[str]
    """The shipped recipe for such a generator."""

    def __init__(self, generator: str) -> None:
        if (makes := GeneratorInfo.read(generator).makes) != self.makes:
            raise CondPDiffError(f"{generator} makes {makes} adapters, this tab needs a generator of {self.makes} adapters")
        self.pipe = CondPDiffPipeline.from_pretrained(generator)
        self.pipe.set_progress_bar_config(disable=True)

    @abstractmethod
    def build(self) -> None:
        """Lay the tab out, and say what its buttons do."""

    @classmethod
    def explain(cls, error: CondPDiffError) -> None:
        """Lay out, in place of the form, why there is none, and what to do."""
        variable = VARIABLE.format(cls.makes.upper())
        gr.Markdown(
            f"### This tab needs a generator of {cls.makes} adapters\n\nThere is none: {error}.\n\n"
            f"Name one, a folder or a repository on the Hub, and start the page again:\n\n    {variable}=GENERATOR python app.py\n\n"
            f"The recipe `{cls.recipe}` makes one from a folder of tasks:\n\n"
            f"    cond-pdiff collect --recipe {cls.recipe} --tasks TASKS --zoo zoo\n"
            f"    cond-pdiff train --recipe {cls.recipe} --tasks TASKS --zoo zoo --out run\n    {variable}=run/generator python app.py"
        )

    def generate(self, condition: Condition, count: int, seed: float, progress: Any, refine_steps: float = 0) -> Any:
        """Return the pipeline's output for a condition, with a bar that shows its steps, and then says that it is refined."""

        def tell(pipe: CondPDiffPipeline, step: int, *_: Any) -> dict[str, Any]:
            done, steps = step + 1, len(pipe.scheduler.timesteps)
            progress((done, steps), f"refining on {condition.refined_on()}" if refine_steps and done == steps else "writing weights")
            return {}

        return self.pipe(
            condition,
            num_adapters=count,
            generator=seeded(int(seed), count),
            callback_on_step_end=tell,
            refine_steps=int(refine_steps),
            refine_seed=int(seed),
        )


@contextlib.contextmanager
def friendly() -> Iterator[None]:
    """Turn what a user can mend into a message on the page; a decorator, or around what a generator does."""
    try:
        yield
    except CondPDiffError as error:
        raise gr.Error(str(error), print_exception=False) from error


def lines(text: str) -> list[str]:
    """Return the lines of a field that are not empty."""
    return [line.strip() for line in text.splitlines() if line.strip()]


def new_folder() -> Path:
    """Make a new folder in the cache. Files there are written once: gradio would write pictures anew while others download them."""
    CACHE.mkdir(parents=True, exist_ok=True)
    for old in CACHE.iterdir():
        if time.time() - old.stat().st_mtime > KEEP_SECONDS:
            shutil.rmtree(old, ignore_errors=True)
    return Path(tempfile.mkdtemp(dir=CACHE))


def pack(adapter: LoraAdapter) -> str:
    """Write a zip with the adapter and its card, which says how to load it, and return its path."""
    folder = new_folder()
    adapter.save(folder / "zip" / "adapter")
    return shutil.make_archive(str(folder / "adapter"), "zip", folder / "zip")


def seed_field() -> gr.Number:
    """Return a field for a seed."""
    return gr.Number(0, label="Seed", precision=0, minimum=0, maximum=2**31)


def refine_field(usual: int) -> gr.Number:
    """Return a field for the number of steps of refinement."""
    return gr.Number(0, label=f"Refinement steps (0: none, usual: {usual})", precision=0, minimum=0, maximum=MAX_REFINEMENT)


def buttons() -> tuple[gr.Button, gr.Button]:
    """Return the two buttons below a form."""
    with gr.Row():
        return gr.Button("Make the adapter", variant="primary", scale=2), gr.Button("Cancel", min_width=100)


def download_button() -> gr.DownloadButton:
    """Return the button for what was made, of which there is nothing yet."""
    return gr.DownloadButton("Download the adapter (zip)", interactive=False)


def run_from_nothing(button: gr.Button, download: gr.DownloadButton, results: Sequence[Any], **made: Any) -> Any:
    """Let a button clear all results, and then run what is `made`: nothing old stands beside an error, or after a cancellation.

    Args:
        results: fields that are cleared, beside the download, which is enabled when `made` has succeeded.
        made: function, inputs, outputs and the name of the event.
    """
    nothing = (gr.update(value=None, interactive=False), *[None] * len(results))
    cleared = button.click(lambda: nothing, None, [download, *results], **AT_ONCE)
    event = cleared.then(concurrency_id="model", **made)
    event.success(lambda: gr.update(interactive=True), None, download, **AT_ONCE)
    return event


def cancel(pressed: Sequence[gr.Button], *events: Any) -> None:
    """Let buttons cancel events that wait or run: also what else a tab runs, which would fill in what a run that begins has cleared."""
    gr.on([button.click for button in pressed], None, cancels=list(events), api_visibility="private")
