"""What the documents hold: their pages and the blocks of code in these, read as a person would paste them."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
PAGES = tuple(path.relative_to(ROOT).as_posix() for path in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(DOCS.rglob("*.md"))))
FENCE = re.compile(r"^(?:<!-- not run: (?P<reason>[^>]+) -->\n)?```(?P<language>\w*)\n(?P<text>.*?)^```$", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Block:
    """A block of code on a page.

    Args:
        page: its path in the repository.
        line: where it begins.
        language: the word behind the fence.
        text: what stands in it.
        reason: why it is not run; empty: it is.
    """

    page: str
    line: int
    language: str
    text: str
    reason: str

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"

    def commands(self) -> list[str]:
        """Return the lines of a shell block as the shell sees them: joined where a backslash ends them, without comments."""
        lines = [re.sub(r"(^|\s+)#( .*)?$", "", line) for line in self.text.replace("\\\n", " ").splitlines()]
        return [" ".join(line.split()) for line in lines if line.strip()]


def text_of(page: str) -> str:
    """Return a page's text."""
    return (ROOT / page).read_text(encoding="utf-8")


def blocks(page: str) -> list[Block]:
    """Return the blocks of a page, in order."""
    text = text_of(page)
    return [
        Block(page, text.count("\n", 0, found.start()) + 1, found["language"], found["text"], found["reason"] or "")
        for found in FENCE.finditer(text)
    ]


def own_arguments(line: str) -> Iterator[list[str]]:
    """Yield the arguments of each `cond-pdiff` in a line of a shell, whatever starts it (`srun`, `torchrun` …)."""
    for part in line.replace("$SLURM_ARRAY_TASK_ID", "3").split(" && "):
        words = shlex.split(part, comments=True)
        for place, word in enumerate(words):
            if word in ("cond-pdiff", "cond_pdiff", "$(which cond-pdiff)"):
                yield words[place + 1 :]
                break
