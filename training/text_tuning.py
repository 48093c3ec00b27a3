"""Fine-tuning on text tasks: a sentence encoder learns to put texts near the name of their class, or the closer the more alike they are."""

from __future__ import annotations

import contextlib
import random
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from cond_pdiff.adapter import LoraAdapter
from cond_pdiff.classifier import LOGIT_SCALE
from cond_pdiff.conditioning import Text, label_text
from cond_pdiff.hub import Backbone
from cond_pdiff.models.sentence_backbone import SentenceBackbone
from cond_pdiff.models.text_backbone import text_length
from cond_pdiff.training.config import CollectConfig
from cond_pdiff.training.metrics import measure, metric_names, predictions
from cond_pdiff.training.precision import mixed_precision, training_device
from cond_pdiff.training.tasks import Row, Task, load_tasks


class TaskTuning(ABC):
    """What fine-tuning on text tasks shares, with a head or without; see `cond_pdiff.training.collect.Tuning`."""

    model: nn.Module
    task_type: str | None

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
        """See `task_loss`."""
        return task_loss(task, self.batch_outputs([text for text, _ in batch], task), [label for _, label in batch])

    def metrics(self, adapter: LoraAdapter, task: Task) -> dict[str, Any]:
        """Accuracy on rows of the reported split; of a regression task its own metric."""
        rows = task.report_rows(self.config.metric_rows)
        predicted = predictions(task, self.outputs(adapter, task, [text for text, _ in rows]))
        labels = torch.tensor([label for _, label in rows])
        names = ("accuracy",) if task.label_range is None else metric_names(task)
        return {**{name: round(measure(name, predicted, labels), 4) for name in names}, "split": task.report_split}

    @abstractmethod
    def batch_outputs(self, texts: list[Text], task: Task) -> torch.Tensor:
        """Of one batch by the model as it is, with gradients.

        Returns:
            Logits, shape `(len(texts), number of labels)`; of a regression task scores, shape `(len(texts),)`.
        """

    @abstractmethod
    def outputs(self, adapter: LoraAdapter | None, task: Task, texts: Sequence[Text]) -> torch.Tensor:
        """Those of any number of texts by the base model with an adapter, without gradients, on the CPU."""


class TextTuning(TaskTuning):
    """Class prototypes are the label names' embeddings: no head is trained."""

    task_type: str | None = "FEATURE_EXTRACTION"

    def __init__(self, config: CollectConfig) -> None:
        super().__init__(config)
        self.backbone = SentenceBackbone.load(Backbone.from_json(config.base))
        self.model = self.backbone.model.to(training_device())

    def batch_outputs(self, texts: list[Text], task: Task) -> torch.Tensor:
        """See `read_texts`."""
        return read_texts(task, texts, lambda texts: self.backbone.forward(texts, self.config.max_length))

    @torch.no_grad()
    def outputs(self, adapter: LoraAdapter | None, task: Task, texts: Sequence[Text]) -> torch.Tensor:
        """`read_texts` under an adapter (None: the base model as it is now), embedded in the settings' precision, float32."""

        def embed(texts: Sequence[Text]) -> torch.Tensor:
            with mixed_precision(self.config.precision, next(self.model.parameters()).device):
                return self.backbone.embed(texts, self.config.max_length).float().cpu()

        with adapter.attached(self.model, check=False) if adapter else contextlib.nullcontext():
            return read_texts(task, texts, embed)


def read_texts(task: Task, texts: Sequence[Text], embed: Callable[[Sequence[Text]], torch.Tensor]) -> torch.Tensor:
    """What a sentence encoder says of texts.

    Args:
        embed: texts → unit-length embeddings, shape `(len(texts), embedding_dim)`.

    Returns:
        Of a classification task scaled cosine similarities to the label names, shape `(len(texts), len(task.labels))`; of a
        regression task scores, shape `(len(texts),)`: the cosine similarity of the two texts, on the label range (orthogonal
        texts have the lowest score).
    """
    if task.label_range is not None:
        low, high = task.label_range
        first, second = embed([text[0] for text in texts]), embed([text[1] for text in texts])
        return low + (high - low) * (first * second).sum(1)
    prototypes = embed([label_text(label) for label in task.labels])
    return LOGIT_SCALE * embed(texts) @ prototypes.T


def task_loss(task: Task, outputs: torch.Tensor, labels: Sequence[Any]) -> torch.Tensor:
    """Cross-entropy, or of a regression task the mean squared error in units of the label range."""
    if task.label_range is not None:
        low, high = task.label_range
        targets = torch.tensor(labels, dtype=torch.float32, device=outputs.device)
        return nn.functional.mse_loss(outputs / (high - low), targets / (high - low))
    return nn.functional.cross_entropy(outputs, torch.tensor(labels, device=outputs.device))
