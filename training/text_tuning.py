"""Fine-tuning on text tasks: a sentence encoder learns to put texts near the name of their class."""

from __future__ import annotations

import random
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from cond_pdiff.adapter import LoraAdapter
from cond_pdiff.classifier import LOGIT_SCALE, PrototypeClassifier
from cond_pdiff.conditioning import Text, label_text
from cond_pdiff.hub import Backbone
from cond_pdiff.models.sentence_backbone import SentenceBackbone
from cond_pdiff.models.text_backbone import text_length
from cond_pdiff.training.config import CollectConfig
from cond_pdiff.training.tasks import Row, Task, load_tasks


class TaskTuning(ABC):
    """What fine-tuning on text tasks shares, with a head or without; see `cond_pdiff.training.collect.Tuning`."""

    model: nn.Module

    def __init__(self, config: CollectConfig) -> None:
        self.config = config

    def load_tasks(self, folder: str | Path, names: Sequence[str] | None) -> list[Task]:
        """The named tasks, or all."""
        return load_tasks(folder, names)

    def facts(self, task: Task) -> dict[str, Any]:
        """What the zoo records of a task."""
        return {"description": task.description, "labels": list(task.labels), "group": task.group, "licence": task.licence}

    def metadata(self, task: Task) -> dict[str, Any]:
        """What an adapter records of its task."""
        return {"labels": list(task.labels)}

    def batches(self, task: Task, rng: random.Random) -> Iterator[list[Row]]:
        """Endless batches of a random subset; texts of like length share a batch, which halves the padding."""
        rows = task.rows("train")
        rows = rng.sample(rows, max(1, round(self.config.subset * len(rows))))
        size = self.config.batch_size
        while True:
            pool = [rng.choice(rows) for _ in range(8 * size)]
            pool.sort(key=lambda row: text_length(row[0]))
            batches = [pool[start : start + size] for start in range(0, len(pool), size)]
            rng.shuffle(batches)
            yield from batches

    def loss(self, batch: list[Row], task: Task) -> torch.Tensor:
        """Cross-entropy."""
        logits = self.batch_logits([text for text, _ in batch], task)
        return nn.functional.cross_entropy(logits, torch.tensor([label for _, label in batch]))

    def metrics(self, adapter: LoraAdapter, task: Task) -> dict[str, Any]:
        """Accuracy on rows of the reported split."""
        rows = task.report_rows(self.config.metric_rows)
        predicted = self.logits([text for text, _ in rows], task, adapter).argmax(-1)
        accuracy = float((predicted == torch.tensor([label for _, label in rows])).float().mean())
        return {"accuracy": round(accuracy, 4), "split": task.report_split}

    @abstractmethod
    def batch_logits(self, texts: list[Text], task: Task) -> torch.Tensor:
        """Logits of one batch by the model as it is, with gradients, shape `(len(texts), number of labels)`."""

    @abstractmethod
    def logits(self, texts: list[Text], task: Task, adapter: LoraAdapter) -> torch.Tensor:
        """Logits of any number of texts by the base model with an adapter, without gradients."""


class TextTuning(TaskTuning):
    """Class prototypes are the label names' embeddings: no head is trained."""

    task_type = "FEATURE_EXTRACTION"

    def __init__(self, config: CollectConfig) -> None:
        super().__init__(config)
        self.backbone = SentenceBackbone.load(Backbone.from_json(config.base))
        self.model = self.backbone.model

    def batch_logits(self, texts: list[Text], task: Task) -> torch.Tensor:
        """Scaled cosine similarities to the label names' embeddings."""
        prototypes = self.backbone.forward([label_text(label) for label in task.labels], self.config.max_length)
        embeddings = self.backbone.forward(texts, self.config.max_length)
        return LOGIT_SCALE * embeddings @ prototypes.T

    def logits(self, texts: list[Text], task: Task, adapter: LoraAdapter) -> torch.Tensor:
        """Those of `PrototypeClassifier`."""
        return PrototypeClassifier(self.backbone, task.labels, adapter, self.config.max_length).logits(texts)
