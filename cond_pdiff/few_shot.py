"""What a few labelled examples can do beside the condition: choose an adapter, or none, and gradient steps on them."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from cond_pdiff.adapter import LoraAdapter
from cond_pdiff.classifier import LOGIT_SCALE, PrototypeClassifier, held_out_logits
from cond_pdiff.conditioning import Text, label_text
from cond_pdiff.errors import ConditionError, CondPDiffError
from cond_pdiff.models.head_backbone import HeadBackbone

REFINE_EXAMPLES = 32
"""Examples of a step at most: with more of them, each step draws anew."""


@dataclass(frozen=True)
class Prior:
    """What is believed before any example is seen, as firmly as so many examples say it.

    Args:
        examples: how firmly.
        gain: in accuracy of an adapter over the base model.
        with_examples: do class prototypes hold the examples, or are they of label names alone?
    """

    examples: int
    gain: float
    with_examples: bool


UNKNOWN_TASK, KNOWN_TASK = Prior(63, 0.043, True), Prior(32, 0.2, False)
"""For a trained task, in about its own words and with its labels, the adapter was made to put texts near these very names, each as often
as its class is met; examples undo that. Number and gain of the first were fitted by `benchmarks/choice_prior.py`."""

KNOWN_SIMILARITY = 0.92
"""From which similarity of a request to a trained task they may be the same; between different tasks of one kind it is lower."""


@dataclass(frozen=True)
class ExampleScore:
    """How well an adapter tells the examples of a prompt apart.

    Args:
        accuracy: from 0 to 1.
        loss: cross-entropy in nats.
        with_examples: of class prototypes of names and examples (judged by `held_out_logits`), or of names alone?
    """

    accuracy: float
    loss: float
    with_examples: bool

    @classmethod
    def measure(cls, classifier: PrototypeClassifier, with_examples: bool) -> ExampleScore:
        """Of a classifier's own examples."""
        names, examples = classifier.example_embeddings()
        targets = classifier.targets.to(names.device)
        logits = held_out_logits(names, examples, targets) if with_examples else LOGIT_SCALE * examples @ names.T
        return cls.of(logits, targets, with_examples)

    @classmethod
    def of(cls, logits: torch.Tensor, targets: torch.Tensor, with_examples: bool) -> ExampleScore:
        """From logits, shape `(num_examples, num_labels)`, and the right labels' indices, shape `(num_examples,)`."""
        accuracy = float((logits.argmax(1) == targets).float().mean())
        return cls(round(accuracy, 4), round(float(nn.functional.cross_entropy(logits, targets)), 6), with_examples)


@dataclass(frozen=True)
class Choice:
    """What the examples of a prompt say of generated adapters.

    Args:
        index: of the adapter with the least loss.
        strength: by which its update should be multiplied: 1, or 0 where the base model alone is expected to do better.
        score: of that adapter at that strength.
        scores: of all adapters.
        base: the base model's; None for adapters that bring a head, without which there is nothing to compare.
        predicted_gain: in accuracy over the base model with the same examples, on texts like them; None for those adapters.
    """

    index: int
    strength: float
    score: ExampleScore
    scores: tuple[ExampleScore, ...]
    base: ExampleScore | None
    predicted_gain: float | None

    @property
    def gain(self) -> str:
        """What to expect, in words; nothing for adapters that bring a head."""
        if self.predicted_gain is None:
            return ""
        if not self.strength:
            return "none expected: the adapter is the base model; fine-tune instead"
        return f"{100 * self.predicted_gain:+.0f} points of accuracy expected over the base model with these examples"


def choose(classifier: PrototypeClassifier, adapters: Sequence[LoraAdapter], prior: Prior = UNKNOWN_TASK) -> Choice:
    """Choose an adapter, or the base model, by a classifier's examples: nothing else is ever selected on.

    The adapter with the least loss is taken. What it gains in accuracy on few examples is chance to a good part, so it is drawn
    towards the prior: with n examples, the predicted gain is (n · observed + `prior.examples` · `prior.gain`) / (n + `prior.examples`).
    Where it is negative, the base model is chosen.

    Args:
        classifier: of the task, with its examples.
        adapters: for its base model.
        prior: `KNOWN_TASK` for a trained task, asked for in about its own words.

    Raises:
        ConditionError: there are no examples.
    """
    count = len(classifier.targets)
    if not count:
        raise ConditionError("adapters can be compared on labelled examples only; give some")
    base = ExampleScore.measure(classifier.with_adapter(None), with_examples=True)
    scores = tuple(ExampleScore.measure(classifier.with_adapter(adapter), prior.with_examples) for adapter in adapters)
    index = _best(scores)
    gain = (count * (scores[index].accuracy - base.accuracy) + prior.examples * prior.gain) / (count + prior.examples)
    if gain < 0:
        return Choice(index, 0.0, base, scores, base, 0.0)
    return Choice(index, 1.0, scores[index], scores, base, round(gain, 4))


def choose_with_head(
    base: HeadBackbone, labels: Sequence[str], examples: Sequence[tuple[Text, str]], adapters: Sequence[LoraAdapter], max_length: int
) -> Choice:
    """Choose among adapters that bring a trained head, by its logits of the examples; never the base model.

    Args:
        base: what the adapters are for.
        labels: in the order of the logits.
        examples: `(text, label)` pairs of these labels.
        max_length: texts are cut at this many tokens.
    """
    adapters[0].check_base(base.model)
    targets = torch.tensor([labels.index(label) for _, label in examples])
    scores = []
    for adapter in adapters:
        with adapter.attached(base.model, check=False):
            scores.append(ExampleScore.of(base.logits([text for text, _ in examples], max_length).cpu(), targets, False))
    index = _best(scores)
    return Choice(index, 1.0, scores[index], tuple(scores), None, None)


def _best(scores: Sequence[ExampleScore]) -> int:
    """Index of the one with the least loss: on few examples, candidates differ in accuracy by chance mostly."""
    return min(range(len(scores)), key=lambda place: scores[place].loss)


def refine(classifier: PrototypeClassifier, steps: int = 12, learning_rate: float = 2e-3, seed: int = 0) -> LoraAdapter:
    """Go on from an adapter with a few optimiser steps on the classifier's examples, each told apart by the others.

    The loss is the cross-entropy of every example against prototypes that do not hold it (`held_out_logits`), so that an example
    is not fitted to itself. `lora_A` stays as it is, as in a zoo.

    Args:
        classifier: with an adapter, and with at least two examples of some class.
        steps: of AdamW.
        learning_rate: falls linearly to zero.
        seed: of the examples that each step sees.

    Returns:
        The refined adapter; its metadata say `refined`, and hold the examples for the prototypes.

    Raises:
        ConditionError: too few examples.
        CondPDiffError: the classifier has no adapter, or `steps` is no positive number.
    """
    if classifier.adapter is None:
        raise CondPDiffError("refining goes on from an adapter; give the classifier one (a generated one, or zeros to start cold)")
    if steps < 1:
        raise CondPDiffError(f"steps must be at least 1, got {steps}")
    if int(classifier.targets.bincount().max() if len(classifier.targets) else 0) < 2:
        raise ConditionError("refining needs two examples of at least one class: each is told apart by the others of its class")
    start = classifier.adapter.tensors
    backbone = classifier.backbone
    device = next(backbone.model.parameters()).device
    moving = {key: tensor.to(device, torch.float32, copy=True).requires_grad_() for key, tensor in start.items() if ".lora_B." in key}
    optimizer = torch.optim.AdamW(moving.values(), lr=learning_rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 1.0 / steps, total_iters=steps - 1)
    rng = random.Random(seed)
    for _ in range(steps):
        picks = sorted(rng.sample(range(len(classifier.targets)), min(REFINE_EXAMPLES, len(classifier.targets))))
        adapter = dataclasses.replace(classifier.adapter, tensors={**start, **moving})
        with adapter.attached(backbone.model, check=False):
            names = backbone.forward(list(map(label_text, classifier.labels)), classifier.max_length)
            examples = backbone.forward([classifier.examples[index][0] for index in picks], classifier.max_length)
        targets = classifier.targets[picks].to(device)
        loss = nn.functional.cross_entropy(held_out_logits(names, examples, targets), targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    tensors = {**start, **{key: tensor.detach().to(start[key].device, start[key].dtype) for key, tensor in moving.items()}}
    settings = {"steps": steps, "learning_rate": learning_rate, "seed": seed}
    given = [list(example) for example in classifier.examples]
    facts = {"refined": settings, "labels": list(classifier.labels), "prototype_examples": given}
    kept = {name: fact for name, fact in classifier.adapter.metadata.items() if name != "strength"}  # of what the steps began with
    return dataclasses.replace(classifier.adapter, tensors=tensors, metadata={**kept, **facts})
