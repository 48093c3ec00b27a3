"""Refinement: a few gradient steps on labelled examples, from a generated adapter or from nothing."""

from __future__ import annotations

import dataclasses
import random
import time
from collections.abc import Sequence

import torch
from torch import nn

from cond_pdiff.adapter import LoraAdapter
from cond_pdiff.classifier import PrototypeClassifier, held_out_logits
from cond_pdiff.conditions.texts import Text, check_refinable_examples
from cond_pdiff.defaults import REFINE_STEPS
from cond_pdiff.errors import CondPDiffError

LEARNING_RATE = 2e-3
EXAMPLES_A_STEP = 32
"""The most examples that a step of refinement sees."""


def check_refinement(examples: Sequence[tuple[Text, str]], steps: int, seconds: float | None = None) -> None:
    """Refuse what `refine` would refuse of examples, steps and seconds, before anything is loaded."""
    if steps < 1:
        raise CondPDiffError(f"steps must be at least 1, got {steps}")
    if seconds is not None and not seconds > 0:
        raise CondPDiffError(f"seconds must be more than 0, got {seconds}")
    check_refinable_examples(examples)


def refine(
    classifier: PrototypeClassifier,
    steps: int = REFINE_STEPS,
    learning_rate: float = LEARNING_RATE,
    seed: int = 0,
    seconds: float | None = None,
) -> LoraAdapter:
    """Go on from an adapter with a few optimiser steps on the classifier's examples, each told apart by the others.

    The loss is the cross-entropy of every example against prototypes that do not hold it (`held_out_logits`), so that an example
    is not fitted to itself. `lora_A` stays as it is, as in a zoo.

    Args:
        classifier: with an adapter, and with at least two examples of some class.
        steps: of AdamW.
        learning_rate: falls linearly to zero.
        seed: of the examples that each step sees.
        seconds: no step is begun after so many; the record then says `of` how many steps those are that were taken.

    Returns:
        The refined adapter; its metadata say `refined`, and hold the examples for the prototypes.

    Raises:
        ConditionError: too few examples.
        CondPDiffError: the classifier has no adapter, or a number is out of its range.
    """
    if classifier.adapter is None:
        raise CondPDiffError("refining goes on from an adapter; give the classifier one (a generated one, or zeros to start cold)")
    check_refinement(classifier.examples, steps, seconds)
    ends = time.monotonic() + seconds if seconds is not None else float("inf")
    start = classifier.adapter.tensors
    backbone = classifier.backbone
    device = next(backbone.model.parameters()).device
    moving = {key: tensor.to(device, torch.float32, copy=True).requires_grad_() for key, tensor in start.items() if ".lora_B." in key}
    optimizer = torch.optim.AdamW(moving.values(), lr=learning_rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 1.0 / steps, total_iters=steps - 1)
    rng, taken = random.Random(seed), 0
    while taken < steps and time.monotonic() < ends:
        picks = sorted(rng.sample(range(len(classifier.targets)), min(EXAMPLES_A_STEP, len(classifier.targets))))
        adapter = dataclasses.replace(classifier.adapter, tensors={**start, **moving})
        with adapter.attached(backbone.model, check=False):
            names = classifier.names_of(backbone.forward(classifier.name_texts, classifier.max_length))
            examples = backbone.forward([classifier.examples[index][0] for index in picks], classifier.max_length)
        targets = classifier.targets[picks].to(device)
        loss = nn.functional.cross_entropy(held_out_logits(names, examples, targets), targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        taken += 1
    tensors = {**start, **{key: tensor.detach().to(start[key].device, start[key].dtype) for key, tensor in moving.items()}}
    settings = {"steps": taken, "learning_rate": learning_rate, "seed": seed, **({"of": steps} if taken < steps else {})}
    given = [list(example) for example in classifier.examples]
    facts: dict[str, object] = {"refined": settings, "labels": list(classifier.labels), "prototype_examples": given}
    if classifier.descriptions:
        facts["label_descriptions"] = {label: list(texts) for label, texts in classifier.descriptions.items()}
    # What the steps began with had another strength, and perhaps other labels.
    kept = {name: fact for name, fact in classifier.adapter.metadata.items() if name not in ("strength", "label_descriptions")}
    return dataclasses.replace(classifier.adapter, tensors=tensors, metadata={**kept, **facts})
