"""Fine-tuning on text tasks: a sentence encoder learns to put texts near the name of their class, or the closer the more alike they are."""

from __future__ import annotations

import contextlib
import random
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import nn

from cond_pdiff.adapter import LoraAdapter
from cond_pdiff.classifier import LOGIT_SCALE
from cond_pdiff.conditions.texts import Text, label_text
from cond_pdiff.hub import Backbone
from cond_pdiff.models.sentence_backbone import SentenceBackbone
from cond_pdiff.models.text_backbone import text_length
from cond_pdiff.training.config import CollectConfig
from cond_pdiff.training.finetuning.fine_tuning import batches_by_length
from cond_pdiff.training.precision import mixed_precision, training_device
from cond_pdiff.training.tasks.metrics import measure, metric_names, predictions
from cond_pdiff.training.tasks.tasks import Row, Task


class TextTaskFineTuning(ABC):
    """What fine-tuning on text tasks shares, with a head or without; see `cond_pdiff.training.finetuning.fine_tuning.FineTuning`."""

    model: nn.Module
    task_type: str | None

    def __init__(self, config: CollectConfig) -> None:
        self.config = config

    def batches(self, task: Task, rng: random.Random) -> Iterator[list[Row]]:
        """Yield batches of a random subset without end, of like length each."""
        rows = task.rows("train")
        rows = rng.sample(rows, max(1, round(self.config.subset * len(rows))))
        return batches_by_length(rows, self.config.batch_size, rng, lambda row: text_length(row[0]))

    def losses(self, batches: Sequence[list[Row]], tasks: Sequence[Task]) -> torch.Tensor:
        """Return the loss of each task's batch; see `task_loss`."""
        outputs = self.batch_outputs([[text for text, _ in batch] for batch in batches], tasks)
        labels = [[label for _, label in batch] for batch in batches]
        return torch.stack([task_loss(*each) for each in zip(tasks, outputs, labels, strict=True)])

    def metrics(self, adapter: LoraAdapter, task: Task) -> dict[str, Any]:
        """Measure the accuracy on rows of the test split; of a regression task its own metric."""
        rows = task.test_rows(self.config.metric_rows)
        predicted = predictions(task, self.outputs(adapter, task, [text for text, _ in rows]))
        labels = torch.tensor([label for _, label in rows])
        names = ("accuracy",) if task.label_range is None else metric_names(task)
        return {**{name: round(measure(name, predicted, labels), 4) for name in names}, "split": task.test_split}

    @abstractmethod
    def batch_outputs(self, texts: Sequence[list[Text]], tasks: Sequence[Task]) -> Sequence[torch.Tensor]:
        """Return the outputs for one batch of each task by the model as it is, with gradients.

        Returns:
            For each task logits, shape `(its number of texts, number of labels)`; for a regression task scores, `(its number of texts,)`.
        """

    @abstractmethod
    def outputs(self, adapter: LoraAdapter | None, task: Task, texts: Sequence[Text]) -> torch.Tensor:
        """Return the outputs for any number of texts by the base model with an adapter, without gradients, on the CPU."""


class TextFineTuning(TextTaskFineTuning):
    """Fine-tuning of a sentence encoder: class prototypes are the label names' embeddings, and no head is trained."""

    task_type: str | None = "FEATURE_EXTRACTION"

    def __init__(self, config: CollectConfig) -> None:
        super().__init__(config)
        self.backbone = SentenceBackbone.load(Backbone.from_json(config.base))
        self.model = self.backbone.model.to(training_device())

    def batch_outputs(self, texts: Sequence[list[Text]], tasks: Sequence[Task]) -> Sequence[torch.Tensor]:
        """Return the sentence encoder's outputs for one batch of each task; see `read_texts`."""
        return read_texts(tasks, texts, lambda groups: self.backbone.forward_groups(groups, self.config.max_length))

    @torch.no_grad()
    def outputs(self, adapter: LoraAdapter | None, task: Task, texts: Sequence[Text]) -> torch.Tensor:
        """Return `read_texts` under an adapter (None: the base model as it is now), embedded in the settings' precision, float32."""

        def embed(groups: Sequence[Sequence[Text]]) -> list[torch.Tensor]:
            with mixed_precision(self.config.precision, next(self.model.parameters()).device):
                return [self.backbone.embed(group, self.config.max_length).float().cpu() for group in groups]

        with adapter.attached(self.model, check=False) if adapter else contextlib.nullcontext():
            return read_texts([task], [texts], embed)[0]


def read_texts(
    tasks: Sequence[Task], texts: Sequence[Sequence[Text]], embed: Callable[[Sequence[Sequence[Text]]], list[torch.Tensor]]
) -> list[torch.Tensor]:
    """Return what a sentence encoder says of texts of one or several tasks.

    Args:
        texts: of each task.
        embed: one group of texts a task → unit-length embeddings of each group, shape `(len(group), embedding_dim)`.

    Returns:
        For each classification task scaled cosine similarities to the label names, shape `(its number of texts, len(task.labels))`; for
        each regression task scores, shape `(its number of texts,)`: the cosine similarity of the two texts, on the label range
        (orthogonal texts have the lowest score).
    """
    pairs = list(zip(tasks, texts, strict=True))
    # Label names and texts apart, because names are short and a batch is as long as its longest text.
    first = embed([list(map(label_text, task.labels)) if task.label_range is None else [text[0] for text in own] for task, own in pairs])
    second = embed([own if task.label_range is None else [text[1] for text in own] for task, own in pairs])
    outputs = []
    for task, left, right in zip(tasks, first, second, strict=True):
        if task.label_range is None:
            outputs.append(LOGIT_SCALE * right @ left.T)
        else:
            low, high = task.label_range
            outputs.append(low + (high - low) * (left * right).sum(1))
    return outputs


def task_loss(task: Task, outputs: torch.Tensor, labels: Sequence[Any]) -> torch.Tensor:
    """Return the cross-entropy, or of a regression task the mean squared error in units of the label range."""
    if task.label_range is not None:
        low, high = task.label_range
        targets = torch.tensor(labels, dtype=torch.float32, device=outputs.device)
        return nn.functional.mse_loss(outputs / (high - low), targets / (high - low))
    return nn.functional.cross_entropy(outputs, torch.tensor(labels, device=outputs.device))
