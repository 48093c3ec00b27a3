"""The whole page: its tabs, and the bounds within which it is served."""

from __future__ import annotations

from typing import Any

import gradio as gr

from cond_pdiff import CondPDiffError
from cond_pdiff.page import report, style_tab
from cond_pdiff.page.language_tab import LanguageTab
from cond_pdiff.page.style_tab import StyleTab
from cond_pdiff.page.tab import KEEP_SECONDS, Tab
from cond_pdiff.page.text_tab import TextTab

TABS: tuple[type[Tab], ...] = (StyleTab, TextTab, LanguageTab)
MAX_WAITING, MAX_UPLOAD = 64, "10mb"
THEME = gr.themes.Default().set(  # gradio's own orange and grey are hard to read on white, and white on its orange
    button_primary_background_fill="*primary_700",
    button_primary_background_fill_dark="*primary_700",
    button_primary_background_fill_hover="*primary_800",
    button_primary_background_fill_hover_dark="*primary_800",
    body_text_color_subdued="*neutral_500",
    color_accent="*primary_700",
)
CSS = """
:focus-visible {outline: 2px solid var(--color-accent) !important; outline-offset: 2px}
.dark {--color-accent: var(--primary-500)}
.prose pre code {white-space: pre-wrap; overflow-wrap: anywhere}
"""
LAUNCH: dict[str, Any] = {
    "theme": THEME,
    "css": CSS + report.CSS + style_tab.CSS,
    "max_file_size": MAX_UPLOAD,
    "allowed_paths": [],
    "footer_links": ["api"],
}
"""The options that the page is launched with."""
ABOUT = "# cond-pdiff\nShow a style, or describe a task: a diffusion model over network weights writes the LoRA adapter."


def build_page(styles: str, tasks: str, language: str) -> gr.Blocks:
    """Build the page, and load its generators; a tab whose generator cannot be loaded says why.

    Args:
        styles, tasks, language: names of the generators of style, text and language adapters.
    """
    with gr.Blocks(title="cond-pdiff", analytics_enabled=False, delete_cache=(KEEP_SECONDS, KEEP_SECONDS)) as page:
        gr.Markdown(ABOUT)
        for kind, generator in zip(TABS, (styles, tasks, language), strict=True):
            with gr.Tab(kind.title):
                try:
                    tab = kind(generator)
                except CondPDiffError as error:
                    kind.explain(error)
                else:
                    tab.build()
    return page.queue(max_size=MAX_WAITING, default_concurrency_limit=1, api_open=False)
