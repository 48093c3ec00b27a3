"""Sequence classifiers: adapters bring a trained head, as those of the paper's language half do."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from cond_pdiff.adapter import LoraAdapter
from cond_pdiff.errors import AdapterError
from cond_pdiff.families.family import Family, register_family
from cond_pdiff.few_shot import Choice, FewShotRequest, choose_with_head
from cond_pdiff.hub import Backbone
from cond_pdiff.lora import HEAD_TASK, LoraSpec
from cond_pdiff.models.head_backbone import HeadBackbone

if TYPE_CHECKING:
    from cond_pdiff.training.config import CollectConfig
    from cond_pdiff.training.finetuning.head_fine_tuning import HeadFineTuning
    from cond_pdiff.training.tasks.tasks import Task


@register_family
class SequenceClassifier(Family):
    """The family of what transformers' `AutoModelForSequenceClassification` loads."""

    name = "sequence-classifier"
    brings_head = True
    adapter_card = "head_adapter.md"
    recipe = "paper-language-half"
    fewest_judged = 2  # a new base has a random head: there is nothing to compare a single adapter with

    def claims(self, spec: LoraSpec, modules: Sequence[str]) -> bool:
        """Claim adapters by peft's task type."""
        return spec.task_type == HEAD_TASK

    def is_certain(self, adapter: LoraAdapter) -> bool:
        """Be certain: the task type that it is claimed by is of nothing else."""
        return True

    def load(self, base: Backbone, spec: LoraSpec, num_labels: int | None = None) -> HeadBackbone:
        """Load a model with new heads; see `HeadBackbone.load`."""
        if num_labels is None:
            raise AdapterError("a sequence classifier is loaded for a number of labels; give num_labels")
        return HeadBackbone.load(base, num_labels, spec.modules_to_save)

    def load_adapted(self, base: Backbone) -> nn.Module:
        """Refuse to load one: a head has its labels' number of outputs, which a reference does not tell."""
        raise AdapterError("adapters with a head are attached to a base that was loaded for their number of labels")

    def choose(self, base: Any, adapters: Sequence[LoraAdapter], request: FewShotRequest) -> Choice:
        """Choose by the heads' logits; see `cond_pdiff.few_shot.choose_with_head`."""
        return choose_with_head(base, request.labels, request.examples, adapters, request.max_length)

    def load_tasks(self, folder: str | Path, names: Sequence[str] | None) -> list[Task]:
        """Load text tasks from a folder."""
        from cond_pdiff.training.tasks.tasks import load_tasks

        return load_tasks(folder, names)

    def fine_tuning(self, config: CollectConfig, tasks: Sequence[Task]) -> HeadFineTuning:
        """Return the fine-tuning by the head's cross-entropy, for tasks that all have as many labels."""
        from cond_pdiff.training.finetuning.head_fine_tuning import HeadFineTuning

        return HeadFineTuning(config, tasks)
