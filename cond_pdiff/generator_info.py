"""The facts of a generator, read from its JSON files: no network is built, no weights are read."""

from __future__ import annotations

import contextlib
import json
import re
import textwrap
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cond_pdiff.attach import adapted_names
from cond_pdiff.conditions.condition import Condition
from cond_pdiff.errors import AdapterError, CondPDiffError, HubError
from cond_pdiff.families.family import family_of
from cond_pdiff.hub import Backbone, bundled, bundled_generators, cached_generators, check_generator, find_generator
from cond_pdiff.layout import ParamLayout
from cond_pdiff.lora import LoraSpec
from cond_pdiff.models.condition_encoder import condition_encoders
from cond_pdiff.weights import weights_megabytes

MEASURED = "## What was measured"
RECOLOURED = re.compile(r"_recoloured_\d+$")
"""The ending by which `make-styles` names the further forms of a style."""

MOST_TARGETS = 12
"""The most target modules that are told by name."""


@dataclass(frozen=True)
class GeneratorInfo:
    """The facts of a generator.

    Args:
        name: what it was asked for by.
        folder: where it is.
        revision: commit on the Hub, None for bundled ones and local folders.
        condition: the kind of condition that it reads.
        base: the frozen base model.
        spec: rank, alpha and target modules of its adapters.
        layout: their tensors.
        tasks: the trained tasks or styles.
        megabytes: of all weights.
        measured: the card's section on what was measured, in Markdown; empty if there is none.
    """

    name: str
    folder: Path
    revision: str | None
    condition: type[Condition]
    base: Backbone
    spec: LoraSpec
    layout: ParamLayout
    tasks: tuple[str, ...]
    megabytes: float
    measured: str

    @property
    def makes(self) -> str:
        """The word in front of "adapters" for what it makes."""
        family = None
        with contextlib.suppress(CondPDiffError):  # one that is not known here
            family = family_of(self.spec, adapted_names(self.layout.shapes))
        return (family.adapters if family else "") or self.condition.adapters

    @classmethod
    def read(cls, name: str | Path, **options: Any) -> GeneratorInfo:
        """Read the facts of a bundled, local, cached or Hub generator.

        Args:
            options: as for `cond_pdiff.hub.fetch`.

        Raises:
            HubError: there is no such generator, or it is incomplete.
        """
        return cls._read(str(name), find_generator(name, **options), None)

    @classmethod
    def _read(cls, name: str, folder: Path, revision: str | None) -> GeneratorInfo:
        index = check_generator(folder)
        template, tasks = (_config(folder / component) for component in ("template", "condition_index"))
        try:
            return cls(
                name,
                folder,
                revision,
                condition_encoders()[index["condition_encoder"][1]].condition_kind,
                Backbone.from_json(template["base"]),
                LoraSpec.from_json(template["lora"]),
                ParamLayout.from_json(template["layout"]),
                tuple(tasks["names"]),
                weights_megabytes(folder),
                _section(folder / "README.md", MEASURED),
            )
        except (LookupError, TypeError, AttributeError, ValueError, AdapterError) as error:
            raise HubError(f"the generator {name!r} is incomplete: {type(error).__name__}: {error}") from error

    def to_json(self) -> dict[str, Any]:
        """Return JSON-ready facts."""
        numbers = {"parameters": self.layout.num_adapter_params, "modelled": self.layout.num_params, "tensors": len(self.layout.shapes)}
        return {
            "name": self.name,
            "folder": str(self.folder),
            "revision": self.revision,
            "makes": self.makes,
            "condition": self.condition.name,
            "base": self.base.to_json(),
            "lora": self.spec.to_json(),
            "adapter": numbers,
            "tasks": list(self.tasks),
            "megabytes": self.megabytes,
            "measured": self.measured,
        }

    def __str__(self) -> str:
        """Write the facts as text for people."""
        spec, layout = self.spec, self.layout
        modelled = f", {layout.num_params:,} of them modelled" if layout.num_params != layout.num_adapter_params else ""
        # Those of imported adapters are named one by one, as nobody knows which others the base has.
        targets = spec.target_modules if len(spec.target_modules) <= MOST_TARGETS else [f"{len(spec.target_modules)} modules"]
        heads = [f"head {name}" for name in spec.modules_to_save]
        named = [name for name in self.tasks if not RECOLOURED.search(name)]
        title = f"{self.condition.noun + 's':<10} {len(named)}: "
        if len(named) < len(self.tasks):
            title = title.replace(":", f", and {len(self.tasks) - len(named)} recoloured forms of them:")
        lines = [
            f"generator  {self.name}" + (f" at {self.revision}" if self.revision else ""),
            f"folder     {self.folder} ({self.megabytes:.1f} MB of weights)",
            f"makes      {self.makes} adapters for {self.base.repo_id}"
            + (f" at revision {self.base.revision}" if self.base.revision else ""),
            f"adapters   rank {spec.rank}, alpha {spec.alpha:g}, on {', '.join([*targets, *heads])}: "
            f"{layout.num_adapter_params:,} parameters in {len(layout.shapes)} tensors{modelled}",
            textwrap.fill(", ".join(named), 120, initial_indent=title, subsequent_indent=" " * 11, break_on_hyphens=False),
        ]
        return "\n".join([*lines, *(["", self.measured] if self.measured else [])])


def known_generators(cache_dir: str | Path | None = None) -> list[GeneratorInfo]:
    """Return the generators that can be loaded without a network: bundled ones, then those in the Hub cache."""
    found = [GeneratorInfo._read(name, bundled(name), None) for name in bundled_generators()]
    for cached in cached_generators(cache_dir):
        with contextlib.suppress(HubError):  # a fetch that broke off, or of kinds that nobody has made known
            found.append(GeneratorInfo._read(*cached))
    return found


def _config(folder: Path) -> Mapping[str, Any]:
    try:
        found = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise HubError(f"{folder / 'config.json'} cannot be read: {error}") from error
    if not isinstance(found, dict):
        raise HubError(f"{folder / 'config.json'} must hold a JSON object")
    return found


def _section(path: Path, title: str) -> str:
    """Return a section of a Markdown file, without its title and pictures."""
    if not path.is_file():
        return ""
    _, _, rest = path.read_text(encoding="utf-8").partition(f"\n{title}\n")
    lines = rest.partition("\n## ")[0].strip().splitlines()
    return "\n".join(line for line in lines if not line.startswith("!["))
