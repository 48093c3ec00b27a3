from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from torch import nn

from cond_pdiff.adapter import LoraAdapter
from cond_pdiff.classifier import LOGIT_SCALE, NAME_WEIGHT, PrototypeClassifier, leave_one_out_logits
from cond_pdiff.conditioning import label_text
from cond_pdiff.errors import AdapterError, ConditionError, CondPDiffError
from cond_pdiff.few_shot import refine
from cond_pdiff.models.sentence_backbone import SentenceBackbone
from cond_pdiff.verify import verify

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


def test_each_example_is_judged_by_the_others(classifier: PrototypeClassifier) -> None:
    logits = classifier.example_logits()
    for index, (text, _) in enumerate(EXAMPLES):
        others = [example for place, example in enumerate(EXAMPLES) if place != index]
        alone = PrototypeClassifier(classifier.backbone, LABELS, classifier.adapter, examples=others)
        torch.testing.assert_close(logits[index : index + 1], alone.logits([text]), atol=1e-4, rtol=0)


def test_without_examples_prototypes_are_the_names(classifier: PrototypeClassifier) -> None:
    plain = PrototypeClassifier(classifier.backbone, LABELS, classifier.adapter)
    assert plain.example_logits().shape == (0, len(LABELS))
    names, nothing = torch.eye(3), torch.zeros(0, 3)
    assert leave_one_out_logits(names, nothing, torch.zeros(0, dtype=torch.long)).shape == (0, 3)
    assert not torch.equal(plain.logits(["a film"]), classifier.logits(["a film"]))


def loss(classifier: PrototypeClassifier, adapter: LoraAdapter | None) -> float:
    return float(nn.functional.cross_entropy(classifier.with_adapter(adapter).example_logits(), classifier.targets))


def test_refining_lowers_the_loss_of_unheld_examples_and_leaves_all_else(classifier: PrototypeClassifier) -> None:
    before = {key: tensor.clone() for key, tensor in classifier.backbone.model.state_dict().items()}
    start = classifier.adapter
    assert start is not None
    kept = {key: tensor.clone() for key, tensor in start.tensors.items()}
    refined = refine(classifier, steps=8)
    assert loss(classifier, refined) < loss(classifier, start) - 0.05
    assert all(torch.equal(start.tensors[key], tensor) for key, tensor in kept.items())
    assert all(torch.equal(refined.tensors[key], tensor) == (".lora_A." in key) for key, tensor in kept.items())
    assert not any(tensor.requires_grad for tensor in refined.tensors.values())
    assert all(torch.equal(tensor, before[key]) for key, tensor in classifier.backbone.model.state_dict().items())
    assert not any(module._forward_hooks for module in classifier.backbone.model.modules())
    again = refine(classifier, steps=8)
    assert all(torch.equal(again.tensors[key], tensor) for key, tensor in refined.tensors.items())


def test_a_refined_adapter_says_so(classifier: PrototypeClassifier, tmp_path: Path) -> None:
    refined = refine(classifier, steps=2, seed=5)
    assert refined.metadata["refined"] == {"steps": 2, "learning_rate": 0.002, "seed": 5}
    card = (refined.save(tmp_path / "adapter") / "README.md").read_text()
    assert "| refined | 2 steps on labelled examples" in card
    with pytest.raises(AdapterError, match="refined"):
        verify(LoraAdapter.load(tmp_path / "adapter"))


def test_refusals(classifier: PrototypeClassifier) -> None:
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


def test_half_precision_adapters_stay_so(classifier: PrototypeClassifier) -> None:
    assert classifier.adapter is not None
    half = dataclasses.replace(classifier.adapter, tensors={key: tensor.half() for key, tensor in classifier.adapter.tensors.items()})
    assert {tensor.dtype for tensor in refine(classifier.with_adapter(half), steps=2).tensors.values()} == {torch.float16}
