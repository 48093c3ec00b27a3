"""The metric of each text task: GLUE's own, one a task in all columns."""

from __future__ import annotations

import math

import torch

from cond_pdiff.training.tasks import Task

METRICS = {"mrpc": ("accuracy", "f1"), "cola": ("matthews",), "stsb": ("spearman",)}
"""GLUE tasks that are measured by something else than accuracy alone. The first metric is the one that means are taken of."""

NAMES = {"accuracy": "accuracy", "f1": "F1", "matthews": "Matthews correlation", "spearman": "Spearman correlation"}


def metric_names(task: Task) -> tuple[str, ...]:
    """The task's metrics, the main one first."""
    return METRICS.get(task.name, ("accuracy",) if task.label_range is None else ("spearman",))


def predictions(task: Task, outputs: torch.Tensor) -> torch.Tensor:
    """What `read_texts` gives → class indices, or the scores of a regression task; shape `(len(outputs),)`."""
    return outputs.argmax(1) if task.label_range is None else outputs


def measure(metric: str, predicted: torch.Tensor, labels: torch.Tensor) -> float:
    """A metric of predictions, both of shape `(rows,)`; in [0, 1], correlations in [-1, 1].

    Args:
        metric: "accuracy", "f1" (of the class 1), "matthews" or "spearman". A correlation with something constant is 0.
    """
    if metric == "accuracy":
        return float((predicted == labels).float().mean())
    if metric == "spearman":
        from scipy.stats import rankdata

        ranks = torch.tensor(rankdata(torch.stack([predicted.double(), labels.double()]).numpy(), axis=1))
        return _ratio(*_covariances(*ranks))
    positive, true = (predicted == 1).double(), (labels == 1).double()
    if metric == "f1":
        return _ratio(2 * float(positive @ true), float(positive.sum() + true.sum()))
    return _ratio(*_covariances(positive, true))  # of two classes, Matthews' correlation is Pearson's of the indicators


def _covariances(first: torch.Tensor, second: torch.Tensor) -> tuple[float, float]:
    first, second = first - first.mean(), second - second.mean()
    return float(first @ second), math.sqrt(float(first @ first) * float(second @ second))


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole > 0 else 0.0
