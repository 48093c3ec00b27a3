"""The demo's web page: run `python app.py` and open the address that it prints; the same runs as a Hugging Face Space."""

from __future__ import annotations

import os

from cond_pdiff.defaults import LANGUAGE_GENERATOR, STYLE_GENERATOR, TEXT_GENERATOR
from cond_pdiff.page.page import LAUNCH, build_page

GENERATORS = (
    os.environ.get("COND_PDIFF_STYLE_GENERATOR", STYLE_GENERATOR),
    os.environ.get("COND_PDIFF_TEXT_GENERATOR", TEXT_GENERATOR),
    os.environ.get("COND_PDIFF_LANGUAGE_GENERATOR", LANGUAGE_GENERATOR),
)

if __name__ == "__main__":
    build_page(*GENERATORS).launch(**LAUNCH)
