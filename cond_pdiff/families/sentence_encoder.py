"""Sentence encoders: adapters put texts near the names of their classes; no head is needed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from cond_pdiff.adapter import LoraAdapter
from cond_pdiff.classifier import PrototypeClassifier
from cond_pdiff.conditions.condition import Condition
from cond_pdiff.conditions.texts import with_descriptions
from cond_pdiff.families.family import Family, register_family
from cond_pdiff.few_shot import Choice, FewShotRequest, choose
from cond_pdiff.hub import Backbone
from cond_pdiff.lora import LoraSpec
from cond_pdiff.mixed_batch import ClassifierPool
from cond_pdiff.models.sentence_backbone import SentenceBackbone
from cond_pdiff.refinement import refine

if TYPE_CHECKING:
    from cond_pdiff.training.config import CollectConfig
    from cond_pdiff.training.finetuning.text_fine_tuning import TextFineTuning
    from cond_pdiff.training.stages.text_tune import TextTuneStage
    from cond_pdiff.training.tasks.tasks import Task


@register_family
class SentenceEncoder(Family):
    """The family of transformers encoders with mean pooling, as sentence-transformers uses them."""

    name = "sentence-encoder"
    has_prototypes = True
    adapter_card = "text_adapter.md"
    generator_card = "text_generator.md"
    merged_card = ("sentence-similarity", "transformers")
    recipe = "minilm-text-tasks"

    def claims(self, spec: LoraSpec, modules: Sequence[str]) -> bool:
        """Claim adapters by peft's task type, which not everybody sets."""
        return spec.task_type in ("FEATURE_EXTRACTION", None)

    def load(self, base: Backbone, spec: LoraSpec, num_labels: int | None = None) -> SentenceBackbone:
        """Load an encoder with its tokenizer; see `SentenceBackbone.load`."""
        return SentenceBackbone.load(base)

    def load_adapted(self, base: Backbone) -> nn.Module:
        """Load the transformers model alone."""
        return SentenceBackbone.load(base).model

    def choose(self, base: Any, adapters: Sequence[LoraAdapter], request: FewShotRequest) -> Choice:
        """Choose by class prototypes; see `cond_pdiff.few_shot.choose`."""
        classifier = PrototypeClassifier(base, request.described, adapters[0], request.max_length, request.examples)
        return choose(classifier, adapters, request.similarity, request.known, request.model, request.at_hand)

    def pool(self, base: SentenceBackbone) -> ClassifierPool:
        """Return an empty pool of classifiers."""
        return ClassifierPool(base)

    def refine(
        self, base: Any, adapter: LoraAdapter, condition: Condition, steps: int, seed: int = 0, seconds: float | None = None
    ) -> LoraAdapter:
        """Take steps on a prompt's labelled examples; see `cond_pdiff.refinement.refine`."""
        described = with_descriptions(condition.labels, condition.descriptions)
        return refine(PrototypeClassifier(base, described, adapter, examples=condition.examples), steps, seed=seed, seconds=seconds)

    def load_tasks(self, folder: str | Path, names: Sequence[str] | None) -> list[Task]:
        """Load text tasks from a folder."""
        from cond_pdiff.training.tasks.tasks import load_tasks

        return load_tasks(folder, names)

    def fine_tuning(self, config: CollectConfig, tasks: Sequence[Task]) -> TextFineTuning:
        """Return the fine-tuning for class prototypes that are the label names' embeddings."""
        from cond_pdiff.training.finetuning.text_fine_tuning import TextFineTuning

        return TextFineTuning(config)

    def tuning(self) -> type[TextTuneStage]:
        """Return the stage by prototypes."""
        from cond_pdiff.training.stages.text_tune import TextTuneStage

        return TextTuneStage

    def evaluation(self) -> tuple[Any, Any]:
        """Return the evaluation by accuracy, or a task's own metric."""
        from cond_pdiff.training.evaluate.text_table import TextTable
        from cond_pdiff.training.evaluate.texts import TextEvaluator

        return TextEvaluator, TextTable()
