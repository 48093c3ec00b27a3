"""Refinement: a few gradient steps on labelled examples, from a generated adapter or from nothing; how many, held-out folds say."""

from __future__ import annotations

import dataclasses
import random
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import nn

from cond_pdiff.adapter import LoraAdapter
from cond_pdiff.attach import attached_to_groups
from cond_pdiff.classifier import PrototypeClassifier, held_out_logits, place_in_class, prototype_logits
from cond_pdiff.conditions.texts import Text, check_refinable_examples
from cond_pdiff.defaults import REFINE_STEPS
from cond_pdiff.errors import CondPDiffError
from cond_pdiff.lora import KEY_PREFIX
from cond_pdiff.models.upper_blocks import FixedTexts, blocks_of

LEARNING_RATE = 3e-3
BATCHES_A_STEP = 2
"""The most batches of examples that a step embeds; of the other examples, it has the embeddings of earlier steps."""
CHECKS = (0, 1, 2, 4, 6, 8, 12, 16, 24, 32)
"""The numbers of steps after which the held-out examples are asked."""
PATIENCE = 2
"""The number of checks in a row without a better one, after which no more steps are taken."""


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
    """Go on from an adapter with a few AdamW steps on the classifier's examples.

    The examples are parted in two, example by example of each class. For each part an adapter is trained on the other one: the loss is
    the cross-entropy of its examples, each against prototypes that do not hold it (`held_out_logits`). The mean of the two is returned,
    after as many steps as tell the held-out examples apart best; that may be none, and no more steps are taken once they only do worse.
    What is trained is `lora_B` in the upper half of the model's blocks: what the lower half makes of the texts is computed once.

    Args:
        classifier: with an adapter, and with at least two examples of some class.
        steps: the most that each of the two takes.
        learning_rate: the same in all steps but the first, which has half of it.
        seed: of the order in which examples are seen.
        seconds: no step is begun after so many. The steps that were kept are recorded; as `steps`, they make the same adapter again.

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
    refinement = Refinement(classifier, classifier.adapter)
    done, best = refinement.run(steps, learning_rate, seed, ends)
    facts: dict[str, object] = {
        "refined": {"steps": best.steps, "of": done, "learning_rate": learning_rate, "seed": seed},
        "labels": list(classifier.labels),
        "prototype_examples": [list(example) for example in classifier.examples],
    }
    if classifier.descriptions:
        facts["label_descriptions"] = {label: list(texts) for label, texts in classifier.descriptions.items()}
    # What the steps began with had another strength, and perhaps other labels.
    kept = {name: fact for name, fact in classifier.adapter.metadata.items() if name not in ("strength", "label_descriptions")}
    start = classifier.adapter.tensors
    moved = {key: tensor.to(start[key].device, start[key].dtype) for key, tensor in best.tensors.items()}
    return dataclasses.replace(classifier.adapter, tensors={**start, **moved}, metadata={**kept, **facts})


@dataclasses.dataclass(frozen=True)
class Checked:
    """What held-out examples said after some steps.

    Args:
        steps: how many.
        loss: the mean over both halves of the cross-entropy of the examples that were held out.
        tensors: of the modules that are trained, the mean over both.
    """

    steps: int
    loss: float
    tensors: Mapping[str, torch.Tensor]


class Refinement:
    """The halves of a classifier's examples, and what is the same in all steps of its refinement.

    Args:
        classifier: with the examples.
        adapter: where both trainings start.
    """

    def __init__(self, classifier: PrototypeClassifier, adapter: LoraAdapter) -> None:
        self.backbone, self.spec, model = classifier.backbone, adapter.spec, classifier.backbone.model
        self.names_of = classifier.names_of
        weight = next(model.parameters())
        self.start = {key: tensor[None].to(weight) for key, tensor in adapter.tensors.items()}
        lower, upper = halved_blocks(model, adapter.modules)
        self.trained = [f"{KEY_PREFIX}{name}.lora_B.weight" for name in upper]
        place, targets = place_in_class(classifier.targets, len(classifier.labels)), classifier.targets
        with attached_to_groups(model, self.spec, self.start):
            self.names = FixedTexts(self.backbone, classifier.name_texts, classifier.max_length, lower)
            self.halves = []
            for half in range(2):
                own = (place % 2 == half).nonzero()[:, 0]
                texts = FixedTexts(self.backbone, [classifier.examples[index][0] for index in own], classifier.max_length, lower)
                self.halves.append((texts, targets[own].to(weight.device)))

    def run(self, steps: int, learning_rate: float, seed: int, ends: float) -> tuple[int, Checked]:
        """Take steps, and return how many were taken on each half, and the best of `CHECKS` among them.

        Args:
            steps, learning_rate, seed: see `refine`.
            ends: the time (`time.monotonic`) after which no step is begun.
        """
        trainings = [HalfTraining(self, half, learning_rate, seed) for half in range(2)]
        checks = [self._check(0, trainings)]
        done = 0
        while done < steps and time.monotonic() < ends and not _declines(checks):
            for training in trainings:
                training.step()
            done += 1
            if done in CHECKS or done == steps:
                checks.append(self._check(done, trainings))
        return done, min(checks, key=lambda check: check.loss)

    def _check(self, steps: int, trainings: Sequence[HalfTraining]) -> Checked:
        tensors = {key: torch.stack([each.moving[key].detach() for each in trainings]).mean(0)[0] for key in self.trained}
        return Checked(steps, statistics.fmean(each.held_out_loss() for each in trainings), tensors)

    def embed(self, tensors: Mapping[str, torch.Tensor], parts: Sequence[tuple[FixedTexts, Sequence[int] | None]]) -> list[torch.Tensor]:
        """Return embeddings of the names, and of batches of examples with the place of each."""
        with attached_to_groups(self.backbone.model, self.spec, tensors):
            rows, places = self.names.embed()
            found = [self.names_of(rows[places.argsort()])]
            for texts, batches in parts:
                found += texts.embed(batches)
        return found


class HalfTraining:
    """The training of one of the two adapters: on one half of the examples, with the other one held out.

    Args:
        half: the number of the one that is learnt from.
        learning_rate, seed: see `refine`.
    """

    def __init__(self, refinement: Refinement, half: int, learning_rate: float, seed: int) -> None:
        self.refinement, self.learning_rate = refinement, learning_rate
        (self.learnt, self.targets), (self.held, self.held_targets) = refinement.halves[half], refinement.halves[1 - half]
        self.moving = {key: refinement.start[key].detach().float().clone().requires_grad_() for key in refinement.trained}
        self.optimizer = torch.optim.AdamW(self.moving.values(), lr=learning_rate / 2, weight_decay=0.0)
        self.memory, self.steps = self.learnt.embeddings, 0
        self.batches = _in_turn(len(self.learnt.parts), random.Random(f"{seed}/{half}"))

    @property
    def tensors(self) -> dict[str, torch.Tensor]:
        """The adapter's tensors as they are now."""
        return {**self.refinement.start, **self.moving}

    def step(self) -> None:
        """Take a step on the next batches of examples."""
        names, rows, places = self.refinement.embed(self.tensors, [(self.learnt, next(self.batches))])
        current = self.memory.index_copy(0, places, rows)
        self.memory = current.detach()
        logits = held_out_logits(names, current, self.targets)
        loss = nn.functional.cross_entropy(logits[places], self.targets[places])
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.optimizer.param_groups[0]["lr"] = self.learning_rate
        self.steps += 1

    @torch.no_grad()
    def held_out_loss(self) -> float:
        """Return the cross-entropy of the other half against prototypes of the names and of the half that is learnt from."""
        names, learnt, held = self._embeddings()
        return float(nn.functional.cross_entropy(prototype_logits(names, learnt, self.targets, held), self.held_targets))

    def _embeddings(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return those of the names, of the half that is learnt from and of the other one; before the first step they are known."""
        own = self.refinement
        if not self.steps:
            return own.names_of(own.names.embeddings), self.learnt.embeddings, self.held.embeddings
        names, learnt, places, held, others = own.embed(self.tensors, [(self.learnt, None), (self.held, None)])
        return names, learnt[places.argsort()], held[others.argsort()]


def halved_blocks(model: nn.Module, modules: Sequence[str]) -> tuple[list[nn.Module], list[str]]:
    """Return the lower half of a model's blocks, and the adapted modules that are not in it; no blocks where it has all of them."""
    blocks = blocks_of(model, modules)
    lower = blocks[: len(blocks) // 2]
    fixed = {id(module) for block in lower for module in block.modules()}
    upper = [name for name in modules if id(model.get_submodule(name)) not in fixed]
    return (lower, upper) if upper else ([], list(modules))


def _declines(checks: Sequence[Checked]) -> bool:
    """Return whether the best check is so many back that nothing better is to be expected."""
    losses = [check.loss for check in checks]
    return len(losses) - 1 - losses.index(min(losses)) >= PATIENCE


def _in_turn(count: int, rng: random.Random) -> Iterator[list[int]]:
    """Yield numbers of batches, `BATCHES_A_STEP` at a time, each before any comes again."""
    left: list[int] = []
    while True:
        if len(left) < min(BATCHES_A_STEP, count):
            left += rng.sample([number for number in range(count) if number not in left], count - len(left))
        now, left = left[:BATCHES_A_STEP], left[BATCHES_A_STEP:]
        yield now
