"""Use of a few labelled examples beside the condition (k-shot): to choose an adapter, or none."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import nn

from cond_pdiff.adapter import LoraAdapter
from cond_pdiff.classifier import LOGIT_SCALE, PrototypeClassifier, held_out_logits
from cond_pdiff.conditions.instruction import Instruction
from cond_pdiff.conditions.texts import Text, with_descriptions
from cond_pdiff.errors import ConditionError
from cond_pdiff.gain import Evidence, GainEstimate, GainModel
from cond_pdiff.models.causal_backbone import CausalBackbone
from cond_pdiff.models.head_backbone import HeadBackbone

KNOWN_SIMILARITY = 0.92
"""The similarity of a request to a trained task from which they may be the same; between different tasks of one kind it is lower."""


@dataclass(frozen=True)
class ExampleScore:
    """A score of how well an adapter tells the examples of a prompt apart.

    Args:
        accuracy: from 0 to 1.
        loss: cross-entropy in nats.
        with_examples: whether prototypes are k-shot (of names and examples, judged by `held_out_logits`) or zero-shot (names only). For a
            known task they are names only: the adapter was made to put texts near these very names, each as often as its class is met,
            and examples undo that.
        separation: see `separation`; None where no class has two examples.
    """

    accuracy: float
    loss: float
    with_examples: bool
    separation: float | None = None

    @classmethod
    def measure(cls, classifier: PrototypeClassifier, with_examples: bool) -> ExampleScore:
        """Measure a classifier on its own examples."""
        names, examples = classifier.example_embeddings()
        return cls.of_embeddings(names, examples, classifier.targets.to(names.device), with_examples)

    @classmethod
    def of_embeddings(cls, names: torch.Tensor, examples: torch.Tensor, targets: torch.Tensor, with_examples: bool) -> ExampleScore:
        """Make a score from embeddings of the label names and the examples; see `held_out_logits`."""
        logits = held_out_logits(names, examples, targets) if with_examples else LOGIT_SCALE * examples @ names.T
        return cls.of(logits, targets, with_examples, separation(examples, targets))

    @classmethod
    def of(cls, logits: torch.Tensor, targets: torch.Tensor, with_examples: bool, separation: float | None = None) -> ExampleScore:
        """Make a score from logits, shape `(num_examples, num_labels)`, and the right labels' indices, shape `(num_examples,)`."""
        accuracy = float((logits.argmax(1) == targets).float().mean())
        return cls(round(accuracy, 4), round(float(nn.functional.cross_entropy(logits, targets)), 6), with_examples, separation)


def separation(examples: torch.Tensor, targets: torch.Tensor) -> float | None:
    """Return how far apart embeddings keep classes: the mean cosine within one class, less that between two classes, in their spread.

    All pairs of examples tell something, which makes it the surest sign of a good adapter among those that were tried (accuracy, losses,
    margins, Fisher's ratio, the area under the curve): on tasks outside the zoo it goes with the real gain with a rank correlation of 0.32,
    the gain in accuracy on the same examples with 0.17.

    Args:
        examples: unit-length embeddings, shape `(num_examples, embedding_dim)`.
        targets: index of each example's label, shape `(num_examples,)`.

    Returns:
        None if no class has two examples, or there is one class only.
    """
    same = targets[:, None] == targets
    pairs = ~torch.eye(len(targets), dtype=torch.bool, device=targets.device)
    if not bool((same & pairs).any()) or bool(same.all()):
        return None
    cosines = examples @ examples.T
    spread = cosines[pairs].std(correction=0).clamp(min=1e-6)
    return round(float((cosines[same & pairs].mean() - cosines[~same].mean()) / spread), 5)


@dataclass(frozen=True)
class FewShotRequest:
    """The labelled examples that candidates are chosen by, and what is known of the request that they belong to.

    Args:
        labels: label names; for adapters with heads, in the order of their outputs.
        examples: `(text, label)` pairs of these labels.
        max_length: texts are cut at this many tokens.
        similarity, known, model, at_hand: see `choose`.
        descriptions: of labels that have some, label → texts; only prototypes hold them.
    """

    labels: Sequence[str]
    examples: Sequence[tuple[Text, str]]
    max_length: int
    similarity: float = 0.0
    known: bool = False
    model: GainModel | None = None
    at_hand: Mapping[Text, torch.Tensor] = field(default_factory=dict)
    descriptions: Mapping[str, Sequence[str]] = field(default_factory=dict)

    @property
    def described(self) -> dict[str, Sequence[str]]:
        """Each label name with its descriptions."""
        return with_descriptions(self.labels, self.descriptions)


@dataclass(frozen=True)
class Choice:
    """The choice that the examples of a prompt make among generated adapters and the base model.

    Args:
        index: of the adapter that does best on them.
        strength: by which its update should be multiplied: 1, or 0 where the base model alone is preferred.
        score: of that adapter at that strength.
        scores: of all adapters.
        base: the base model's; None for adapters that bring a head, without which there is nothing to compare.
        estimate: what that adapter gains over the base model with the same examples, on texts like them; None where no model of gains is:
            for adapters with heads, or for a language model.
        calibrated: was the model behind it fitted to this generator, or is it the bundled text generator's?
    """

    index: int
    strength: float
    score: ExampleScore
    scores: tuple[ExampleScore, ...]
    base: ExampleScore | None
    estimate: GainEstimate | None
    calibrated: bool = True

    @property
    def predicted_gain(self) -> float | None:
        """The predicted gain in accuracy of what is returned: 0 for the base model; None where no model of gains is."""
        if self.estimate is None:
            return None
        return self.estimate.gain if self.strength else 0.0

    @property
    def gain(self) -> str:
        """The gain to expect, in words; empty where no model of gains is."""
        if self.estimate is None:
            return ""
        of_another = "" if self.calibrated else " (by another generator's numbers: `cond-pdiff calibrate` measures this one's)"
        if self.strength:
            unsure = ": unsure" if self.estimate.unsure else ""
            return f"{self.estimate} expected over the base model with these examples{unsure}{of_another}"
        why = "unsure, so the adapter is" if self.estimate.unsure else "the adapter is"
        return f"{why} the base model: a generated one would gain {self.estimate}; fine-tune, or give more examples{of_another}"


def choose(
    classifier: PrototypeClassifier,
    adapters: Sequence[LoraAdapter],
    similarity: float = 0.0,
    known: bool = False,
    model: GainModel | None = None,
    at_hand: Mapping[Text, torch.Tensor] | None = None,
) -> Choice:
    """Choose an adapter, or the base model, by a classifier's examples: nothing else is ever selected on.

    The adapter under which the classes are best separated is taken (for a known task, whose prototypes are names, the one with the least
    loss). What it gains over the base model is predicted by `GainModel`; unless it is more probably better than `model.take`, the base
    model is chosen.

    Args:
        classifier: of the task, with its examples.
        adapters: for its base model.
        similarity: of the request to the nearest trained task.
        known: is it a trained task, asked for in about its own words and with its labels?
        model: of gains, fitted to the generator; default: the one of the bundled text generator, and the choice says so.
        at_hand: embeddings that need not be made again (see `PrototypeClassifier.base_embeddings`).

    Raises:
        ConditionError: there are no examples.
    """
    count = len(classifier.targets)
    if not count:
        raise ConditionError("adapters can be compared on labelled examples only; give some")
    of_base = classifier.base_embeddings(at_hand or {})
    targets = classifier.targets.to(of_base[0].device)
    base = ExampleScore.of_embeddings(*of_base, targets, with_examples=True)
    scores = tuple(ExampleScore.of_embeddings(*rows, targets, not known) for rows in classifier.embeddings_under(adapters))
    index, evidence = weigh(base, scores, count, len(classifier.labels), similarity, known)
    own = model or GainModel()
    estimate = own.predict(evidence)
    strength = float(estimate.probability >= own.take)
    return Choice(index, strength, scores[index] if strength else base, scores, base, estimate, model is not None)


def weigh(
    base: ExampleScore, scores: Sequence[ExampleScore], count: int, num_labels: int, similarity: float, known: bool
) -> tuple[int, Evidence]:
    """Return the index of the best of several adapters, and what is known of its gain over the base model.

    Args:
        base: the base model's score on `count` examples of `num_labels` classes.
        scores: the adapters' on the same examples.
        similarity, known: see `choose`.
    """
    index = _best(scores)
    separations = [score.separation for score in scores if score.separation is not None]
    mean = statistics.fmean(separations) if separations else 0.0
    return index, Evidence(
        labels=num_labels,
        similarity=similarity,
        known=known,
        examples=count,
        base_hits=round(base.accuracy * count),
        separation=mean - (base.separation or 0.0),
        own_separation=(scores[index].separation or 0.0) - mean if separations else 0.0,
    )


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


def choose_by_answers(base: CausalBackbone, adapters: Sequence[LoraAdapter], request: FewShotRequest, instruction: Instruction) -> Choice:
    """Choose among adapters for a language model, or the base model, by the likelihood of the examples' answers.

    Of a request with label names it is that of the right name among all names; else that of the answer as a text, which counts as right
    where the model would write it, the likeliest token each time. The base model is chosen where it finds the answers likelier than
    the best adapter does.

    Args:
        base: what the adapters are for.
        instruction: what the adapters are asked with.
    """
    adapters[0].check_base(base.model)
    texts, answers = [text for text, _ in request.examples], [answer for _, answer in request.examples]
    if request.labels:
        names = [base.answer_tokens(name) for name in instruction.answers]
        room = request.max_length - max(map(len, names))
        texts = [base.fitted(instruction, text, room) for text in texts]
    prompts = [base.prompt_tokens(instruction.prompt(text)) for text in texts]

    def score() -> ExampleScore:
        if request.labels:
            return ExampleScore.of(base.choices(prompts, names), torch.tensor([request.labels.index(answer) for answer in answers]), False)
        likelihoods, written = base.judge(prompts, [base.answer_tokens(answer) for answer in answers])
        return ExampleScore(round(float(written.float().mean()), 4), round(-float(likelihoods.mean()), 6), False)

    scores, own = [], score()
    for adapter in adapters:
        with adapter.attached(base.model, check=False):
            scores.append(score())
    index = _best(scores)
    strength = float(scores[index].loss <= own.loss)
    return Choice(index, strength, scores[index] if strength else own, tuple(scores), own, None)


def _best(scores: Sequence[ExampleScore]) -> int:
    """Return the index of the best score.

    It separates the classes best, or has the least loss where prototypes are names only or no class has two examples. On few examples,
    candidates differ in accuracy by chance mostly.
    """

    def badness(place: int) -> float:
        score = scores[place]
        return -score.separation if score.with_examples and score.separation is not None else score.loss

    return min(range(len(scores)), key=badness)
