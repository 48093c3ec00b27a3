"""The metric of each text task: GLUE's own, one a task in all columns."""

from __future__ import annotations

import torch

from cond_pdiff.training.tasks.tasks import Task

METRICS = {"mrpc": ("accuracy", "f1"), "cola": ("matthews",), "stsb": ("spearman",)}
"""The GLUE tasks that are measured by something else than accuracy alone. The first metric is the one that means are taken of."""

NAMES = {"accuracy": "accuracy", "f1": "F1", "matthews": "Matthews correlation", "spearman": "Spearman correlation"}


def metric_names(task: Task) -> tuple[str, ...]:
    """Return the task's metrics, the main one first."""
    return METRICS.get(task.name, ("accuracy",) if task.label_range is None else ("spearman",))


def predictions(task: Task, outputs: torch.Tensor) -> torch.Tensor:
    """Turn what `read_texts` gives into class indices, or the scores of a regression task; shape `(len(outputs),)`."""
    return outputs.argmax(1) if task.label_range is None else outputs


def measure(metric: str, predicted: torch.Tensor, labels: torch.Tensor) -> float:
    """Return a metric of predictions against labels, both of shape `(rows,)`; in [0, 1], correlations in [-1, 1].

    Args:
        metric: "accuracy", "f1" (of the class 1), "matthews" or "spearman". A correlation with something constant is 0.
    """
    if metric == "accuracy":
        return float((predicted == labels).float().mean())
    from scipy.stats import spearmanr
    from sklearn.metrics import f1_score, matthews_corrcoef

    if metric == "f1":
        return float(f1_score(labels.numpy(), predicted.numpy(), zero_division=0.0))
    if min(len(predicted.unique()), len(labels.unique())) < 2:
        return 0.0
    if metric == "spearman":
        return float(spearmanr(predicted.numpy(), labels.numpy()).statistic)
    return float(matthews_corrcoef(labels.numpy(), predicted.numpy()))
