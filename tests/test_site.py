"""The site builds strictly, needs nothing from elsewhere, and stays light."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import ClassVar

import pytest
from documents import ROOT

pytest.importorskip("mkdocs", reason="the extra `docs` is not installed: pip install -e '.[docs]'")
FETCHED = re.compile(r"url\(\s*['\"]?(?:https?:)?//|@import")


class Addresses(HTMLParser):
    """What a page fetches, and where its links lead."""

    FETCHING: ClassVar[dict[str, str]] = {"script": "src", "img": "src", "iframe": "src", "source": "src", "link": "href"}

    def __init__(self, text: str) -> None:
        super().__init__()
        self.fetched: list[str] = []
        self.links: list[str] = []
        self.names: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {name: value or "" for name, value in attrs}
        self.names |= {given[name] for name in ("id", "name") if name in given}
        if tag in self.FETCHING and given.get("rel") not in ("canonical", "prev", "next"):
            self.fetched.append(given.get(self.FETCHING[tag], ""))
        if tag == "a" and "href" in given:
            self.links.append(given["href"])


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site") / "site"
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="module")
def pages(site: Path) -> dict[Path, Addresses]:
    return {path: Addresses(path.read_text(encoding="utf-8")) for path in site.rglob("*.html")}


def test_every_page_is_there(site: Path, pages: dict[Path, Addresses]) -> None:
    sources = {path.relative_to(ROOT / "docs").with_suffix(".html") for path in (ROOT / "docs").rglob("*.md")}
    assert {site / source for source in sources} <= set(pages)
    assert len(pages) > 30
    assert "CondPDiffPipeline" in (site / "api" / "generating.html").read_text(encoding="utf-8")


def test_nothing_is_fetched_from_elsewhere(site: Path, pages: dict[Path, Addresses]) -> None:
    for path, page in pages.items():
        outside = [address for address in page.fetched if re.match(r"(?:https?:)?//", address)]
        assert outside == [], path
        there = [address for address in page.fetched if address and not (path.parent / address.split("?")[0]).exists()]
        assert [address for address in there if not address.startswith(("data:", "/"))] == [], path
    for style in site.rglob("*.css"):
        assert FETCHED.search(style.read_text(encoding="utf-8")) is None, style


def test_links_lead_somewhere(pages: dict[Path, Addresses]) -> None:
    for path, page in pages.items():
        for link in page.links:
            if path.name == "404.html" or re.match(r"[a-z]+:", link):
                continue
            address, _, name = link.partition("#")
            target = (path.parent / address).resolve() if address else path
            assert target.exists(), f"{path}: {link}"
            assert not name or target.suffix != ".html" or name in pages[target].names, f"{path}: {link}"


def test_pages_are_light(site: Path, pages: dict[Path, Addresses]) -> None:
    assert max(path.stat().st_size for path in pages) < 700_000
    assert sum(path.stat().st_size for path in site.rglob("*") if path.is_file()) < 12_000_000


def test_what_is_broken_is_noticed(tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    page.write_text('<a href="no.html">x</a><script src="https://elsewhere/x.js"></script>')
    found = {page: Addresses(page.read_text())}
    with pytest.raises(AssertionError, match=r"no\.html"):
        test_links_lead_somewhere(found)
    with pytest.raises(AssertionError, match="elsewhere"):
        test_nothing_is_fetched_from_elsewhere(tmp_path, found)
