"""Push: what is sent to the Hub, or would be."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Push:
    """The record of what a push sends, or would send.

    Args:
        repo_id: the repository.
        repo_type: "model", "dataset" or "space".
        files: name → bytes, sorted by name.
        url: of the commit (or pull request); None for a dry run.
    """

    repo_id: str
    repo_type: str
    files: Mapping[str, int]
    url: str | None

    def __str__(self) -> str:
        """Write what was pushed, or would be, as text for people."""
        total = f"{len(self.files)} files, {sum(self.files.values()) / 1e6:.1f} MB"
        if self.url is not None:
            return f"pushed     {total} to the {self.repo_type} repository {self.repo_id}\nat         {self.url}"
        lines = [f"{size:>12,}  {name}" for name, size in self.files.items()]
        return "\n".join([*lines, f"dry run: {total} would be sent to the {self.repo_type} repository {self.repo_id}"])
