"""What a few labelled examples can do beside the condition: class prototypes that hold them, and gradient steps on them."""

from __future__ import annotations

import dataclasses
import random

import torch
from torch import nn

from cond_pdiff.adapter import LoraAdapter
from cond_pdiff.classifier import PrototypeClassifier, leave_one_out_logits
from cond_pdiff.conditioning import label_text
from cond_pdiff.errors import ConditionError, CondPDiffError

REFINE_EXAMPLES = 32
"""Examples of a step at most: with more of them, each step draws anew."""


def refine(classifier: PrototypeClassifier, steps: int = 12, learning_rate: float = 2e-3, seed: int = 0) -> LoraAdapter:
    """Go on from an adapter with a few optimiser steps on the classifier's examples, each told apart by the others.

    The loss is the cross-entropy of every example against prototypes that do not hold it, so that an example is not fitted to
    itself. `lora_A` stays as it is, as in a zoo.

    Args:
        classifier: with an adapter, and with at least two examples of some class.
        steps: of AdamW.
        learning_rate: falls linearly to zero.
        seed: of the examples that each step sees.

    Returns:
        The refined adapter; its metadata say `refined`.

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
        loss = nn.functional.cross_entropy(leave_one_out_logits(names, examples, targets), targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    tensors = {**start, **{key: tensor.detach().to(start[key].device, start[key].dtype) for key, tensor in moving.items()}}
    settings = {"steps": steps, "learning_rate": learning_rate, "seed": seed}
    return dataclasses.replace(classifier.adapter, tensors=tensors, metadata={**classifier.adapter.metadata, "refined": settings})
