from __future__ import annotations

import dataclasses
import random
from pathlib import Path

import pytest
import torch
from conftest import make_adapter
from test_few_shot import EXAMPLES, LABELS
from torch import nn

from cond_pdiff import refinement
from cond_pdiff.adapter import LoraAdapter
from cond_pdiff.classifier import PrototypeClassifier, held_out_logits, prototype_logits
from cond_pdiff.conditions.texts import label_text
from cond_pdiff.errors import AdapterError, CondPDiffError
from cond_pdiff.models.sentence_backbone import SentenceBackbone
from cond_pdiff.refinement import LEARNING_RATE, Checked, refine
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
    assert loss(classifier, refined) < loss(classifier, start) - 0.02
    assert all(torch.equal(start.tensors[key], tensor) for key, tensor in kept.items())
    assert all(torch.equal(refined.tensors[key], tensor) == (".lora_A." in key or ".layer.0." in key) for key, tensor in kept.items())
    assert not any(tensor.requires_grad for tensor in refined.tensors.values())
    assert all(torch.equal(tensor, before[key]) for key, tensor in classifier.backbone.model.state_dict().items())
    assert not any(module._forward_hooks for module in classifier.backbone.model.modules())
    again = refine(classifier, steps=8)
    assert all(torch.equal(again.tensors[key], tensor) for key, tensor in refined.tensors.items())


def test_a_refined_adapter_says_so(classifier: PrototypeClassifier, tmp_path: Path) -> None:
    refined = refine(classifier, steps=2, seed=5)
    assert refined.metadata["refined"] == {"steps": 2, "of": 2, "learning_rate": LEARNING_RATE, "seed": 5}
    card = (refined.save(tmp_path / "adapter") / "README.md").read_text()
    assert "| refined | 2 steps on labelled examples" in card
    with pytest.raises(AdapterError, match="refined"):
        verify(LoraAdapter.load(tmp_path / "adapter"))


def plainly_refined(classifier: PrototypeClassifier, steps: int) -> dict[str, torch.Tensor]:
    """The same by the whole model, one training after the other; all examples are in each step."""
    assert classifier.adapter is not None
    start, backbone = classifier.adapter.tensors, classifier.backbone
    trained = [key for key in start if ".lora_B." in key and ".layer.1." in key]
    halves = []
    for half in (0, 1):
        seen = dict.fromkeys(LABELS, 0)
        own = []
        for text, label in classifier.examples:
            own += [(text, label)] if seen[label] % 2 == half else []
            seen[label] += 1
        moving = {key: start[key].clone().requires_grad_() for key in trained}
        optimizer = torch.optim.AdamW(moving.values(), lr=LEARNING_RATE / 2, weight_decay=0.0)
        for _ in range(steps):
            with dataclasses.replace(classifier.adapter, tensors={**start, **moving}).attached(backbone.model):
                names, rows = (backbone.forward(part, 128) for part in ([label_text(name) for name in LABELS], [text for text, _ in own]))
            targets = torch.tensor([LABELS.index(label) for _, label in own])
            optimizer.zero_grad()
            nn.functional.cross_entropy(held_out_logits(names, rows, targets), targets).backward()
            optimizer.step()
            optimizer.param_groups[0]["lr"] = LEARNING_RATE
        halves.append(moving)
    return {key: ((halves[0][key] + halves[1][key]) / 2).detach() for key in trained}


@pytest.mark.parametrize("steps", [1, 3])
def test_it_is_what_the_whole_model_would_learn(classifier: PrototypeClassifier, monkeypatch: pytest.MonkeyPatch, steps: int) -> None:
    several = PrototypeClassifier(classifier.backbone, LABELS, classifier.adapter, examples=MORE)
    made: dict[int, Checked] = {}
    check = refinement.Refinement._check

    def keep(self: refinement.Refinement, steps: int, trainings: list[object]) -> Checked:
        made[steps] = check(self, steps, trainings)
        return made[steps]

    monkeypatch.setattr(refinement.Refinement, "_check", keep)
    refined = refine(several, steps)
    assert refined.metadata["refined"]["steps"] == min(made, key=lambda number: made[number].loss)
    expected = plainly_refined(several, steps)
    assert made[steps].tensors.keys() == expected.keys()
    for key, tensor in expected.items():
        step = LEARNING_RATE * steps  # AdamW's first steps are as long as the learning rate, whatever the gradient
        torch.testing.assert_close(made[steps].tensors[key], tensor, atol=0.02 * step, rtol=0)


def test_the_number_of_steps_is_what_held_out_examples_say(classifier: PrototypeClassifier, sentence_backbone: SentenceBackbone) -> None:
    """Wrong labels: nothing that one half learns is true of the other."""
    rng, texts = random.Random(0), [f"the {word} {noun}" for word in ("good", "bad", "great") for noun in ("film", "meal", "song", "room")]
    labels = [LABELS[place % 3] for place in range(len(texts))]
    rng.shuffle(labels)
    wrong = PrototypeClassifier(sentence_backbone, LABELS, classifier.adapter, examples=list(zip(texts, labels, strict=True)))
    refined = refine(wrong, steps=32, learning_rate=0.03)
    taken = refined.metadata["refined"]
    assert taken["steps"] <= 4
    assert taken["of"] < 32  # ended early
    if taken["steps"] == 0:
        assert all(torch.equal(refined.tensors[key], tensor) for key, tensor in classifier.adapter.tensors.items())


def test_held_out_loss_is_that_of_the_other_half(classifier: PrototypeClassifier) -> None:
    assert classifier.adapter is not None
    own = refinement.Refinement(classifier, classifier.adapter)
    done, best = own.run(1, LEARNING_RATE, 0, 0.0)  # no time for a step
    assert (done, best.steps) == (0, 0)
    names, examples = classifier.example_embeddings()
    losses = []
    for half in (0, 1):
        learnt, held = slice(half, None, 2), slice(1 - half, None, 2)
        logits = prototype_logits(names, examples[learnt], classifier.targets[learnt], examples[held])
        losses.append(float(nn.functional.cross_entropy(logits, classifier.targets[held])))
    assert best.loss == pytest.approx(sum(losses) / 2, abs=1e-4)


def test_the_steps_that_were_kept_make_it_again(classifier: PrototypeClassifier) -> None:
    refined = refine(PrototypeClassifier(classifier.backbone, LABELS, classifier.adapter, examples=MORE), steps=7, learning_rate=0.01)
    kept = refined.metadata["refined"]["steps"]
    assert 0 < kept <= 7
    again = refine(PrototypeClassifier(classifier.backbone, LABELS, classifier.adapter, examples=MORE), steps=kept, learning_rate=0.01)
    assert all(torch.equal(again.tensors[key], tensor) for key, tensor in refined.tensors.items())


def test_seconds_end_it(classifier: PrototypeClassifier) -> None:
    refined = refine(classifier, steps=30, seconds=1e-6)
    assert refined.metadata["refined"]["of"] == 0
    for seconds in (0, -1.0, float("nan")):
        with pytest.raises(CondPDiffError, match="seconds must be more than 0"):
            refine(classifier, seconds=seconds)


def test_adapters_of_some_blocks(sentence_backbone: SentenceBackbone) -> None:
    for layer in (0, 1):
        spec_of = make_adapter(sentence_backbone.model, "tiny")
        tensors = {key: tensor for key, tensor in spec_of.tensors.items() if f".layer.{layer}." in key}
        targets = tuple(f"layer.{layer}.{name}" for name in ("attention.self.query", "attention.self.key", "attention.self.value",
                                                                 "attention.output.dense"))
        adapter = LoraAdapter(dataclasses.replace(spec_of.spec, target_modules=targets, base_fingerprint=None), tensors)
        refined = refine(PrototypeClassifier(sentence_backbone, LABELS, adapter, examples=MORE), 3)
        assert refined.metadata["refined"]["of"] == 3


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
