"""Fine-tuning with a classification head, as the paper's language half does; the head is part of the adapter."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence

import torch

from cond_pdiff.adapter import LoraAdapter
from cond_pdiff.conditions.texts import Text
from cond_pdiff.errors import TaskDataError
from cond_pdiff.hub import Backbone
from cond_pdiff.lora import HEAD_TASK
from cond_pdiff.models.head_backbone import HeadBackbone
from cond_pdiff.training.config import CollectConfig
from cond_pdiff.training.finetuning.text_fine_tuning import TextTaskFineTuning
from cond_pdiff.training.precision import training_device
from cond_pdiff.training.tasks.tasks import Task


class HeadFineTuning(TextTaskFineTuning):
    """Fine-tuning of a sequence classifier on tasks that all have as many labels, so that their heads have one shape.

    Raises:
        TaskDataError: tasks of different numbers of labels, or a regression task.
    """

    task_type = HEAD_TASK

    def __init__(self, config: CollectConfig, tasks: Sequence[Task]) -> None:
        super().__init__(config)
        if regression := [task.name for task in tasks if task.label_range is not None]:
            raise TaskDataError(f"{regression[0]} is a regression task; heads are trained for classification tasks only")
        first, count = tasks[0], len(tasks[0].labels)
        for task in tasks:
            if len(task.labels) != count:
                raise TaskDataError(
                    f"{task.name} has {len(task.labels)} labels, but {first.name} has {count}; the heads of one zoo have one shape: "
                    "name tasks with as many labels each"
                )
        torch.manual_seed(config.seed)  # of the new head
        self.backbone = HeadBackbone.load(Backbone.from_json(config.base), count, config.modules_to_save)
        self.model = self.backbone.model.to(training_device())

    def batch_outputs(self, texts: Sequence[list[Text]], tasks: Sequence[Task]) -> Sequence[torch.Tensor]:
        """Return the head's logits for one batch of each task."""
        return [self.backbone.forward(batch, self.config.max_length) for batch in texts]

    def outputs(self, adapter: LoraAdapter | None, task: Task, texts: Sequence[Text]) -> torch.Tensor:
        """Return the logits of the adapter's head, or of the base model's new head."""
        with adapter.attached(self.model) if adapter else contextlib.nullcontext():
            return self.backbone.logits(texts, self.config.max_length).cpu()
