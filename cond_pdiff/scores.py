"""Scores of an adapter and its base model on the same labelled texts, with intervals."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from cond_pdiff.classifier import PrototypeClassifier
from cond_pdiff.conditions.texts import Text
from cond_pdiff.errors import ConditionError

RESAMPLED = 2000
"""The number of resamples of the bootstrap."""
LEVEL, NORMAL_QUANTILE = 0.95, 1.959964
"""The level of all intervals, and the quantile of the normal distribution that belongs to it."""
INTERVALS = f"{LEVEL:.0%}: Wilson's of accuracies; of the rest the percentile bootstrap, {RESAMPLED} resamples of the rows, paired"


@dataclass(frozen=True)
class Estimate:
    """A number with the ends of its interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Scores:
    """What a classifier got right.

    Args:
        accuracy: share of the rows.
        macro_f1: mean of F1 = 2 · hits / (rows of the label + answers with it) over the labels that a row or an answer has.
        confusion: rows by right label (outer) and answer (inner), in the order of the labels.
    """

    accuracy: Estimate
    macro_f1: Estimate
    confusion: tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Comparison:
    """An adapter beside its base model, on the same rows.

    Args:
        labels: label names.
        rows: the number of rows.
        base: the base model's scores, with the same class prototypes' names and examples.
        adapter: the adapter's.
        accuracy_difference: the adapter's less the base model's, paired.
        macro_f1_difference: the same of macro F1.
    """

    labels: tuple[str, ...]
    rows: int
    base: Scores
    adapter: Scores
    accuracy_difference: Estimate
    macro_f1_difference: Estimate

    def to_json(self) -> dict[str, Any]:
        """Return a JSON-ready description."""
        return {**asdict(self), "intervals": INTERVALS}


def compare(classifier: PrototypeClassifier, rows: Sequence[tuple[Text, str]]) -> Comparison:
    """Classify labelled texts with an adapter and with its base model alone.

    Raises:
        ConditionError: no rows, or one with a label that the classifier has not.
    """
    if not rows:
        raise ConditionError("there are no labelled texts to test on")
    unknown = sorted({label for _, label in rows} - set(classifier.labels))
    if unknown:
        raise ConditionError(f"the texts have the label {unknown[0]!r}, which the adapter has not; it has {list(classifier.labels)}")
    texts, names = [text for text, _ in rows], {label: index for index, label in enumerate(classifier.labels)}
    right = np.array([names[label] for _, label in rows])
    answers = [one.logits(texts).argmax(1).cpu().numpy() for one in (classifier.with_adapter(None), classifier)]
    return compare_answers(classifier.labels, right, answers[0], answers[1])


def compare_answers(labels: Sequence[str], right: np.ndarray, base: np.ndarray, adapter: np.ndarray) -> Comparison:
    """Compare two classifiers' answers, all of them indices of labels, shape `(rows,)`.

    Rows that are alike in all three are one cell: to draw rows with replacement is to draw how often each cell comes.
    """
    cells, counts = np.unique(np.stack([right, base, adapter]), axis=1, return_counts=True)
    rows = len(right)
    drawn = np.random.default_rng(0).multinomial(rows, counts / rows, size=RESAMPLED)
    measured = [_measure(cells[0], answer, counts[None], len(labels)) for answer in cells[1:]]
    resampled = [_measure(cells[0], answer, drawn, len(labels)) for answer in cells[1:]]
    scores = []
    for answer, (accuracy, macro_f1), (_, other_f1) in zip((base, adapter), measured, resampled, strict=True):
        confusion = np.zeros((len(labels), len(labels)), dtype=int)
        np.add.at(confusion, (right, answer), 1)
        exact = wilson(round(accuracy[0] * rows), rows)
        scores.append(Scores(exact, _percentiles(macro_f1[0], other_f1), tuple(map(tuple, confusion.tolist()))))
    differences = [
        _percentiles(measured[1][index][0] - measured[0][index][0], resampled[1][index] - resampled[0][index]) for index in (0, 1)
    ]
    return Comparison(tuple(labels), rows, scores[0], scores[1], differences[0], differences[1])


def wilson(right: int, count: int) -> Estimate:
    """Return a share with Wilson's score interval, which is sound for few rows and near 0 and 1."""
    share, square = right / count, NORMAL_QUANTILE**2 / count
    middle = (share + square / 2) / (1 + square)
    half = NORMAL_QUANTILE / (1 + square) * math.sqrt(share * (1 - share) / count + square / (4 * count))
    return _rounded(share, max(0.0, middle - half), min(1.0, middle + half))


def _measure(right: np.ndarray, answer: np.ndarray, counts: np.ndarray, num_labels: int) -> tuple[np.ndarray, np.ndarray]:
    """Return accuracy and macro F1 of each sample, shapes `(samples,)`.

    Args:
        right, answer: indices of labels of each cell, shape `(cells,)`.
        counts: how often each cell comes in each sample, shape `(samples, cells)`.
    """
    labels = np.arange(num_labels)
    of_right, of_answer = (counts @ (one[:, None] == labels) for one in (right, answer))
    hits = counts @ ((right[:, None] == labels) & (answer == right)[:, None])
    met = of_right + of_answer > 0
    f1 = np.where(met, 2 * hits / np.maximum(of_right + of_answer, 1), 0).sum(1) / met.sum(1)
    return hits.sum(1) / counts.sum(1), f1


def _percentiles(value: float, resampled: np.ndarray) -> Estimate:
    low, high = np.quantile(resampled, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return _rounded(value, low, high)


def _rounded(value: float, low: float, high: float) -> Estimate:
    return Estimate(*(round(float(one), 4) + 0.0 for one in (value, low, high)))
