"""Any other base model: its adapters are imported and generated, and whoever has the model attaches them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

from cond_pdiff.errors import CondPDiffError
from cond_pdiff.families.family import OTHER_BASE, Family, register_family
from cond_pdiff.hub import Backbone
from cond_pdiff.lora import LoraSpec


@register_family
class AnyBase(Family):
    """The family of base models that no code here loads: an adapter names it where no other family claims it."""

    name = OTHER_BASE
    cuts_texts = False

    def load(self, base: Backbone, spec: LoraSpec, num_labels: int | None = None) -> Any:
        """Refuse."""
        raise CondPDiffError(
            f"{base.repo_id!r} is of no family of base models that is loaded here; load it yourself and give it to adapter.attach(model)"
        )

    def load_adapted(self, base: Backbone) -> nn.Module:
        """Refuse, as `load` does."""
        raise CondPDiffError(f"{base.repo_id!r} is of no family of base models that is loaded here; merge the adapter with peft instead")

    def load_tasks(self, folder: str | Path, names: Sequence[str] | None) -> Sequence[Any]:
        """Refuse: nobody here can train adapters for it."""
        raise CondPDiffError("adapters for such a base are not trained here; import those that exist: cond-pdiff import-adapters")

    def fine_tuning(self, config: Any, tasks: Sequence[Any]) -> Any:
        """Refuse, as `load_tasks` does."""
        raise CondPDiffError("adapters for such a base are not trained here; import those that exist: cond-pdiff import-adapters")
