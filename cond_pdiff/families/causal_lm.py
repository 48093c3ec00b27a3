"""Causal language models: adapters make them answer the prompts of a task."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from cond_pdiff.adapter import LoraAdapter
from cond_pdiff.conditions.instruction import Instruction
from cond_pdiff.families.family import Family, register_family
from cond_pdiff.few_shot import Choice, FewShotRequest, choose_by_answers
from cond_pdiff.hub import Backbone
from cond_pdiff.lora import LANGUAGE_TASK, LoraSpec
from cond_pdiff.mixed_batch import WriterPool
from cond_pdiff.models.causal_backbone import CausalBackbone

if TYPE_CHECKING:
    from cond_pdiff.training.config import CollectConfig
    from cond_pdiff.training.finetuning.language_fine_tuning import LanguageFineTuning
    from cond_pdiff.training.stages.language_tune import LanguageTuneStage
    from cond_pdiff.training.tasks.language import LanguageTask


@register_family
class CausalLM(Family):
    """The family of what transformers' `AutoModelForCausalLM` loads."""

    name = "causal-lm"
    adapters = "language"
    writes = True
    cuts_texts = False  # not of every task; its cards say what was cut
    adapter_card = "language_adapter.md"
    generator_card = "language_generator.md"
    merged_card = ("text-generation", "transformers")
    recipe = "smollm2-tasks"

    def claims(self, spec: LoraSpec, modules: Sequence[str]) -> bool:
        """Claim adapters by peft's task type."""
        return spec.task_type == LANGUAGE_TASK

    def load(self, base: Backbone, spec: LoraSpec, num_labels: int | None = None) -> CausalBackbone:
        """Load a model with its tokenizer; see `CausalBackbone.load`."""
        return CausalBackbone.load(base)

    def load_adapted(self, base: Backbone) -> nn.Module:
        """Load the transformers model alone."""
        return CausalBackbone.load(base).model

    def choose(self, base: Any, adapters: Sequence[LoraAdapter], request: FewShotRequest) -> Choice:
        """Choose by the likelihood of the examples' answers; see `cond_pdiff.few_shot.choose_by_answers`."""
        return choose_by_answers(base, adapters, request, Instruction.recorded(adapters[0].metadata))

    def tuning(self) -> type[LanguageTuneStage]:
        """Return the stage by the answers' likelihood."""
        from cond_pdiff.training.stages.language_tune import LanguageTuneStage

        return LanguageTuneStage

    def pool(self, base: CausalBackbone) -> WriterPool:
        """Return an empty pool of adapters that write, or choose among their labels."""
        return WriterPool(base)

    def evaluation(self) -> tuple[Any, Any]:
        """Return the evaluation by exact match."""
        from cond_pdiff.training.evaluate.language_table import LanguageTable
        from cond_pdiff.training.evaluate.languages import LanguageEvaluator

        return LanguageEvaluator, LanguageTable()

    def load_tasks(self, folder: str | Path, names: Sequence[str] | None) -> list[LanguageTask]:
        """Load classification and generation tasks from a folder."""
        from cond_pdiff.training.tasks.language import load_language_tasks

        return load_language_tasks(folder, names)

    def fine_tuning(self, config: CollectConfig, tasks: Sequence[LanguageTask]) -> LanguageFineTuning:
        """Return the fine-tuning by the answers' likelihood."""
        from cond_pdiff.training.finetuning.language_fine_tuning import LanguageFineTuning

        return LanguageFineTuning(config, tasks)
