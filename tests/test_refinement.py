from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from test_few_shot import EXAMPLES, LABELS
from torch import nn

from cond_pdiff.adapter import LoraAdapter
from cond_pdiff.classifier import PrototypeClassifier, held_out_logits
from cond_pdiff.errors import AdapterError, CondPDiffError
from cond_pdiff.models.sentence_backbone import SentenceBackbone
from cond_pdiff.refinement import LEARNING_RATE, refine
from cond_pdiff.verify import verify

MORE = [*EXAMPLES, ("a fine room", "positive"), ("poor song", "negative"), ("the puppy and the kitten", "not_the_same")]


@pytest.fixture
def classifier(sentence_backbone: SentenceBackbone, tiny_adapter: LoraAdapter) -> PrototypeClassifier:
    return PrototypeClassifier(sentence_backbone, LABELS, tiny_adapter, examples=EXAMPLES)


def loss(classifier: PrototypeClassifier, adapter: LoraAdapter | None) -> float:
    logits = held_out_logits(*classifier.with_adapter(adapter).example_embeddings(), classifier.targets)
    return float(nn.functional.cross_entropy(logits, classifier.targets))


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
    assert refined.metadata["refined"] == {"steps": 2, "learning_rate": LEARNING_RATE, "seed": 5}
    card = (refined.save(tmp_path / "adapter") / "README.md").read_text()
    assert "| refined | 2 steps on labelled examples" in card
    with pytest.raises(AdapterError, match="refined"):
        verify(LoraAdapter.load(tmp_path / "adapter"))


def test_seconds_end_it(classifier: PrototypeClassifier) -> None:
    refined = refine(classifier, steps=30, seconds=1e-6)
    assert refined.metadata["refined"] == {"steps": 0, "of": 30, "learning_rate": LEARNING_RATE, "seed": 0}
    assert "of" not in refine(classifier, steps=1, seconds=60).metadata["refined"]
    for seconds in (0, -1.0, float("nan")):
        with pytest.raises(CondPDiffError, match="seconds must be more than 0"):
            refine(classifier, seconds=seconds)


def test_descriptions_are_kept(classifier: PrototypeClassifier) -> None:
    labels = {"positive": "a lovely song", "negative": None, "not_the_same": ["a cat", "a dog"]}
    described = PrototypeClassifier(classifier.backbone, labels, classifier.adapter, examples=EXAMPLES)
    refined = refine(described, steps=1)
    assert refined.metadata["label_descriptions"] == {"positive": ["a lovely song"], "not_the_same": ["a cat", "a dog"]}
    assert "label_descriptions" not in refine(classifier.with_adapter(refined), steps=1).metadata


def test_half_precision_adapters_stay_so(classifier: PrototypeClassifier) -> None:
    assert classifier.adapter is not None
    half = dataclasses.replace(classifier.adapter, tensors={key: tensor.half() for key, tensor in classifier.adapter.tensors.items()})
    assert {tensor.dtype for tensor in refine(classifier.with_adapter(half), steps=2).tensors.values()} == {torch.float16}
