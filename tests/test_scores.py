"""An adapter beside its base model, against scikit-learn and a plain bootstrap."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.metrics import accuracy_score, confusion_matrix, f1_score

from cond_pdiff.adapter import LoraAdapter
from cond_pdiff.classifier import PrototypeClassifier
from cond_pdiff.errors import ConditionError
from cond_pdiff.models.sentence_backbone import SentenceBackbone
from cond_pdiff.scores import compare, compare_answers, wilson

LABELS = ("a", "b", "c", "d")


def answers(rows: int, right: np.ndarray, wrong: float, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return np.where(rng.random(rows) < wrong, rng.integers(0, 3, rows), right)


@pytest.fixture
def drawn() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Right labels and two classifiers' answers of 200 rows; the fourth label is an answer of the second one only, and of no row."""
    right = np.random.default_rng(0).integers(0, 3, 200)
    adapter = answers(200, right, 0.3, 2)
    adapter[:3] = 3
    return right, answers(200, right, 0.6, 1), adapter


def test_scores_are_those_of_scikit_learn(drawn: tuple[np.ndarray, np.ndarray, np.ndarray]) -> None:
    right, base, adapter = drawn
    made = compare_answers(LABELS, right, base, adapter)
    for scores, answered in ((made.base, base), (made.adapter, adapter)):
        assert scores.accuracy.value == pytest.approx(accuracy_score(right, answered), abs=1e-4)
        assert scores.macro_f1.value == pytest.approx(f1_score(right, answered, average="macro", zero_division=0), abs=1e-4)
        assert np.array_equal(scores.confusion, confusion_matrix(right, answered, labels=range(4)))
    assert made.accuracy_difference.value == pytest.approx(made.adapter.accuracy.value - made.base.accuracy.value, abs=2e-4)
    assert made.macro_f1_difference.value == pytest.approx(made.adapter.macro_f1.value - made.base.macro_f1.value, abs=2e-4)


def test_intervals_are_those_of_resampled_rows(drawn: tuple[np.ndarray, np.ndarray, np.ndarray]) -> None:
    right, base, adapter = drawn
    made = compare_answers(LABELS, right, base, adapter)
    rng = np.random.default_rng(7)
    f1, accuracy = [], []
    for _ in range(1000):
        rows = rng.integers(0, len(right), len(right))
        own, other = (f1_score(right[rows], one[rows], average="macro", zero_division=0) for one in (adapter, base))
        f1.append((own, own - other))
        accuracy.append((adapter[rows] == right[rows]).mean() - (base[rows] == right[rows]).mean())
    for estimate, values in (
        (made.adapter.macro_f1, [own for own, _ in f1]),
        (made.macro_f1_difference, [difference for _, difference in f1]),
        (made.accuracy_difference, accuracy),
    ):
        assert (estimate.low, estimate.high) == pytest.approx(np.quantile(values, [0.025, 0.975]), abs=0.015)
    assert compare_answers(LABELS, right, base, adapter) == made


def test_the_difference_is_paired() -> None:
    """Two classifiers with the same answers differ by nothing, however little each of them is known."""
    right, answered = np.array([0, 1] * 10), np.array([0, 0] * 10)
    same = compare_answers(("a", "b"), right, answered, answered)
    assert same.accuracy_difference.low == same.accuracy_difference.value == same.accuracy_difference.high == 0
    assert same.adapter.accuracy.low < 0.4 < 0.6 < same.adapter.accuracy.high


@pytest.mark.parametrize(("right", "count", "low", "high"), [(0, 10, 0, 0.2775), (10, 10, 0.7225, 1), (8, 10, 0.4902, 0.9433)])
def test_wilsons_interval(right: int, count: int, low: float, high: float) -> None:
    """Values from Wilson's formula as tables have them."""
    made = wilson(right, count)
    assert (made.low, made.high) == pytest.approx((low, high), abs=1e-4)


def test_a_classifier_is_compared_with_its_base(sentence_backbone: SentenceBackbone, tiny_adapter: LoraAdapter) -> None:
    rows = [(f"the {word} film", label) for label in ("positive", "negative") for word in ("good", "bad", "fine", "dull", "cat")]
    classifier = PrototypeClassifier(sentence_backbone, ("positive", "negative"), tiny_adapter, examples=[("the lovely song", "positive")])
    made = compare(classifier, rows)
    for scores, one in ((made.base, classifier.with_adapter(None)), (made.adapter, classifier)):
        hits = [label == answer for (_, label), answer in zip(rows, one.predict([text for text, _ in rows]), strict=True)]
        assert scores.accuracy.value == sum(hits) / len(hits)
    with pytest.raises(ConditionError, match="the label 'other', which the adapter has not"):
        compare(classifier, [("a", "other")])
    with pytest.raises(ConditionError, match="no labelled texts"):
        compare(classifier, [])
