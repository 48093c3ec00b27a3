from __future__ import annotations

import json
import statistics
from pathlib import Path

import pytest
import torch
from conftest import HIDDEN, make_adapter
from torch import nn

from cond_pdiff.adapter import LoraAdapter
from cond_pdiff.classifier import LOGIT_SCALE, NAME_WEIGHT, SIDE_BY_SIDE, PrototypeClassifier, held_out_logits
from cond_pdiff.conditions.texts import label_text
from cond_pdiff.errors import ConditionError, CondPDiffError
from cond_pdiff.few_shot import ExampleScore, choose, separation
from cond_pdiff.gain import Evidence, GainModel
from cond_pdiff.models.sentence_backbone import SentenceBackbone
from cond_pdiff.refinement import refine

LABELS = ("positive", "negative", "not_the_same")
EXAMPLES = [
    ("the good film", "positive"),
    ("a good song", "positive"),
    ("the bad meal", "negative"),
    ("bad room", "negative"),
    ("the kitten", "not_the_same"),
    ("a puppy", "not_the_same"),
]


@pytest.fixture
def classifier(sentence_backbone: SentenceBackbone, tiny_adapter: LoraAdapter) -> PrototypeClassifier:
    return PrototypeClassifier(sentence_backbone, LABELS, tiny_adapter, examples=EXAMPLES)


def unit(vector: torch.Tensor) -> torch.Tensor:
    return vector / vector.norm()


def test_prototypes_hold_the_examples(classifier: PrototypeClassifier) -> None:
    backbone, adapter = classifier.backbone, classifier.adapter
    assert adapter is not None
    with adapter.attached(backbone.model):
        prototypes = []
        for label in LABELS:
            own = backbone.embed([text for text, name in EXAMPLES if name == label])
            prototypes.append(unit(NAME_WEIGHT * backbone.embed([label_text(label)])[0] + own.sum(0)))
        texts = backbone.embed(["a film", "bad bad"])
    torch.testing.assert_close(classifier.logits(["a film", "bad bad"]), LOGIT_SCALE * texts @ torch.stack(prototypes).T, atol=1e-4, rtol=0)


def test_a_class_without_examples_gets_the_mean_of_the_others(sentence_backbone: SentenceBackbone) -> None:
    labels, given = ("positive", "negative", "same"), EXAMPLES[:4]
    names, examples, texts = (
        sentence_backbone.embed(part) for part in ([label_text(label) for label in labels], [text for text, _ in given], ["a film"])
    )
    positive, negative = examples[:2].sum(0), examples[2:].sum(0)
    for count, sums in ((2, [positive] * 3), (4, [positive, negative, (positive + negative) / 2])):
        expected = torch.stack([unit(NAME_WEIGHT * name + own) for name, own in zip(names, sums, strict=True)])
        classifier = PrototypeClassifier(sentence_backbone, labels, examples=given[:count])
        torch.testing.assert_close(classifier.logits(["a film"]), LOGIT_SCALE * texts @ expected.T, atol=1e-4, rtol=0)


def test_examples_are_judged_by_the_others_one_of_every_class_held_out(classifier: PrototypeClassifier) -> None:
    logits = held_out_logits(*classifier.example_embeddings(), classifier.targets)
    for index, (text, _) in enumerate(EXAMPLES):
        kept = [example for place, example in enumerate(EXAMPLES) if place % 2 != index % 2]  # two of each class, side by side
        alone = PrototypeClassifier(classifier.backbone, LABELS, classifier.adapter, examples=kept)
        torch.testing.assert_close(logits[index : index + 1], alone.logits([text]), atol=1e-4, rtol=0)


def test_of_classes_that_are_alike_examples_are_right_by_chance() -> None:
    rng = torch.Generator().manual_seed(0)
    examples = nn.functional.normalize(torch.randn(400, 16, generator=rng) + 2, dim=1)
    targets = torch.arange(400) % 2
    names = nn.functional.normalize(torch.ones(2, 16), dim=1)
    right = (held_out_logits(names, examples, targets).argmax(1) == targets).float().mean()
    assert 0.4 < float(right) < 0.6


def test_classes_may_have_different_numbers_of_examples() -> None:
    rng = torch.Generator().manual_seed(0)
    names, examples = (nn.functional.normalize(torch.randn(count, 8, generator=rng), dim=1) for count in (3, 5))
    targets = torch.tensor([0, 1, 0, 0, 1])
    logits = held_out_logits(names, examples, targets)
    for fold, held in enumerate([[0, 1], [2, 4], [3]]):
        sums = NAME_WEIGHT * names
        kept = [place for place in range(5) if place not in held]
        for place in kept:
            sums[targets[place]] += examples[place]
        for label in set(range(3)) - set(targets[kept].tolist()):  # of no examples: the mean of the others' sums
            sums[label] += examples[kept].sum(0) / len(targets[kept].unique())
        torch.testing.assert_close(logits[held], LOGIT_SCALE * examples[held] @ nn.functional.normalize(sums, dim=1).T, msg=str(fold))


def test_without_examples_prototypes_are_the_names(classifier: PrototypeClassifier) -> None:
    plain = PrototypeClassifier(classifier.backbone, LABELS, classifier.adapter)
    assert plain.example_embeddings()[1].shape[0] == 0
    names, nothing = torch.eye(3), torch.zeros(0, 3)
    assert held_out_logits(names, nothing, torch.zeros(0, dtype=torch.long)).shape == (0, 3)
    assert not torch.equal(plain.logits(["a film"]), classifier.logits(["a film"]))


def test_of_adapters_the_one_that_keeps_the_classes_apart_is_chosen(classifier: PrototypeClassifier) -> None:
    assert classifier.adapter is not None
    good = refine(classifier, steps=20, learning_rate=5e-3)
    choice = choose(classifier, [classifier.adapter, good, classifier.adapter.scaled(5.0)], similarity=0.5)
    separations = [score.separation for score in choice.scores]
    assert separations.index(max(separations)) == choice.index == 1
    mean, base = statistics.fmean(separations), choice.base
    assert choice.estimate == GainModel().predict(
        Evidence(3, 0.5, False, len(EXAMPLES), round(base.accuracy * len(EXAMPLES)), mean - base.separation, separations[1] - mean)
    )


def test_candidates_side_by_side_embed_as_one_by_one(classifier: PrototypeClassifier) -> None:
    assert classifier.adapter is not None
    adapters = [classifier.adapter.scaled(strength / 4) for strength in range(SIDE_BY_SIDE + 2)]
    wider = [make_adapter(classifier.backbone.model, "tiny", seed=seed) for seed in (1, 2)]  # of another specification
    together = classifier.embeddings_under([*adapters, *wider])
    assert len(together) == len(adapters) + 2
    for adapter, rows in zip([*adapters, *wider], together, strict=True):
        for found, expected in zip(rows, classifier.with_adapter(adapter).example_embeddings(), strict=True):
            torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


def test_what_is_embedded_already_is_not_embedded_again(classifier: PrototypeClassifier) -> None:
    alone = classifier.with_adapter(None)
    expected, texts = alone.example_embeddings(), [text for text, _ in EXAMPLES]
    at_hand = dict(zip(texts[1:], classifier.backbone.embed(texts[1:]), strict=True))
    for found, wanted in zip(classifier.base_embeddings(at_hand), expected, strict=True):
        torch.testing.assert_close(found, wanted, atol=1e-5, rtol=0)
    wrong = {text: torch.zeros_like(row) for text, row in at_hand.items()}
    assert torch.equal(classifier.base_embeddings(wrong)[1][1:], torch.zeros(len(texts) - 1, HIDDEN))
    short = PrototypeClassifier(classifier.backbone, LABELS, max_length=3, examples=EXAMPLES)  # which would be cut here
    torch.testing.assert_close(short.base_embeddings(wrong)[1], short.example_embeddings()[1], atol=1e-5, rtol=0)


def test_an_adapter_is_taken_if_it_is_probably_better(classifier: PrototypeClassifier) -> None:
    assert classifier.adapter is not None
    for take, strength in ((0.001, 1.0), (0.999, 0.0)):
        choice = choose(classifier, [classifier.adapter], model=GainModel(take=take))
        assert choice.strength == strength
        assert choice.score == (choice.scores[0] if strength else choice.base)
        assert choice.predicted_gain == (choice.estimate.gain if strength else 0.0)
        assert ("the adapter is the base model" in choice.gain) == (not strength)
        assert ("unsure" in choice.gain) == choice.estimate.unsure


def test_prototypes_hold_the_examples_of_unknown_tasks(classifier: PrototypeClassifier) -> None:
    assert classifier.adapter is not None
    names, examples = classifier.example_embeddings()
    apart = separation(examples, classifier.targets)
    by_names = ExampleScore.of(LOGIT_SCALE * examples @ names.T, classifier.targets, False, apart)
    by_both = ExampleScore.of(held_out_logits(names, examples, classifier.targets), classifier.targets, True, apart)
    assert by_names.loss != by_both.loss
    for known, expected in ((False, by_both), (True, by_names)):
        choice = choose(classifier, [classifier.adapter], known=known)
        assert choice.scores == (expected,)
        assert choice.base == ExampleScore.measure(classifier.with_adapter(None), with_examples=True)


def test_separation_is_of_pairs() -> None:
    examples = nn.functional.normalize(torch.tensor([[1.0, 0.0], [1.0, 0.1], [0.0, 1.0], [0.1, 1.0]]), dim=1)
    apart = separation(examples, torch.tensor([0, 0, 1, 1]))
    assert apart > 1.5
    assert separation(examples, torch.tensor([0, 1, 0, 1])) == pytest.approx(-apart / 2, abs=0.1)
    for targets in ([0, 1, 2, 3], [0, 0, 0, 0]):  # no two of one class; no two of different ones
        assert separation(examples, torch.tensor(targets)) is None
    assert separation(torch.ones(4, 2) / 2**0.5, torch.tensor([0, 0, 1, 1])) == 0.0


def test_one_example_a_class_says_nothing_of_the_gain(sentence_backbone: SentenceBackbone, tiny_adapter: LoraAdapter) -> None:
    single = PrototypeClassifier(sentence_backbone, LABELS, tiny_adapter, examples=EXAMPLES[::2])
    choice = choose(single, [tiny_adapter, tiny_adapter.scaled(0.5)])
    assert [score.separation for score in choice.scores] == [None, None]
    assert choice.index == min((0, 1), key=lambda place: choice.scores[place].loss)
    assert choice.estimate.gain == GainModel().predict(Evidence(3, 0.0, False, 3, round(3 * choice.base.accuracy))).gain


def test_strength_multiplies_the_update(classifier: PrototypeClassifier) -> None:
    assert classifier.adapter is not None
    half = classifier.adapter.scaled(0.5)
    for module in half.modules:
        torch.testing.assert_close(half.delta(module), 0.5 * classifier.adapter.delta(module))
        assert torch.equal(half.factors(module)[0], classifier.adapter.factors(module)[0])


def test_examples_that_help_are_served_with_the_adapter(classifier: PrototypeClassifier, tmp_path: Path) -> None:
    refined = refine(classifier, steps=2).save(tmp_path / "refined")
    loaded = PrototypeClassifier.load(refined)
    assert loaded.examples == tuple(EXAMPLES)
    assert PrototypeClassifier.load(refined, examples=()).examples == ()
    assert PrototypeClassifier.load(refined, labels=["kind", "unkind"]).examples == ()
    facts = json.loads((refined / "cond_pdiff.json").read_text())
    (refined / "cond_pdiff.json").write_text(json.dumps({**facts, "prototype_examples": [["the film", "fine"]]}))
    with pytest.raises(ConditionError, match="'fine'"):
        PrototypeClassifier.load(refined)
    assert classifier.adapter is not None
    assert PrototypeClassifier.load(classifier.adapter.save(tmp_path / "plain"), labels=LABELS).examples == ()


def test_refusals(classifier: PrototypeClassifier) -> None:
    with pytest.raises(ConditionError, match="labelled examples only"):
        choose(PrototypeClassifier(classifier.backbone, LABELS), [])
    with pytest.raises(CondPDiffError, match="goes on from an adapter"):
        refine(classifier.with_adapter(None))
    with pytest.raises(CondPDiffError, match="at least 1, got 0"):
        refine(classifier, steps=0)
    few = PrototypeClassifier(classifier.backbone, LABELS, classifier.adapter, examples=[EXAMPLES[0], EXAMPLES[2]])
    with pytest.raises(ConditionError, match="two examples of at least one class"):
        refine(few)
    with pytest.raises(ConditionError, match="two examples of at least one class"):
        refine(PrototypeClassifier(classifier.backbone, LABELS, classifier.adapter))
    with pytest.raises(ConditionError, match=r"example 1 has the label 'fine'"):
        PrototypeClassifier(classifier.backbone, LABELS, examples=[("a film", "fine")])
