"""A probability model of what a generated adapter gains in accuracy over the base model, with few examples (k-shot) or none (zero-shot).

The base model's accuracy on texts of a task is sigmoid(β), the adapter's sigmoid(β + δ): both lie between 0 and 1 whatever is expected.
Tasks that a generator has not seen say what β and δ are before an example is looked at; the examples move them. Fitted by
`cond_pdiff.training.evaluate.calibrate`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch

from cond_pdiff.errors import CondPDiffError

POINTS = 32
"""The number of points on each of the two axes of a distribution, all equally likely."""


@dataclass(frozen=True)
class Evidence:
    """The facts of a request from which its gain is predicted.

    Args:
        labels: classes of the task.
        similarity: of the request to the nearest trained task.
        known: is it a trained task, in about its own words?
        examples: labelled ones.
        base_hits: how many of them the base model gets right, each judged by prototypes that do not hold it.
        separation: by how much the adapters, on the mean over all candidates, separate the classes better than the base model does (the
            difference of two values of `cond_pdiff.few_shot.separation`); 0 where no class has two examples.
        own_separation: by how much the chosen adapter does better than that mean. Of many candidates the best is better by chance to a good
            part, so this counts less than `separation`, by what was fitted.
    """

    labels: int
    similarity: float
    known: bool = False
    examples: int = 0
    base_hits: int = 0
    separation: float = 0.0
    own_separation: float = 0.0


@dataclass(frozen=True)
class GainEstimate:
    """The predicted gain in accuracy of an adapter over the base model with the same examples, on new texts of the task.

    Args:
        gain: expected, from -1 to 1.
        low: a tenth of the probability lies below …
        high: … and a tenth above: the gain is between the two with a probability of 80 %.
        probability: that the adapter is better than the base model.
        prior_share: of the uncertainty before any example, the share that is left: 1 if the examples say nothing.
        base_accuracy: expected of the base model.
    """

    gain: float
    low: float
    high: float
    probability: float
    prior_share: float
    base_accuracy: float

    @property
    def unsure(self) -> bool:
        """Whether the interval reaches to both sides of nothing."""
        return self.low < 0 < self.high

    def __str__(self) -> str:
        """Write the gain, its interval and the prior's share as text for people."""
        return (
            f"{100 * self.gain:+.0f} points of accuracy (80 %: {100 * self.low:+.0f} to {100 * self.high:+.0f}; "
            f"{self.prior_share:.0%} prior)"
        )


@dataclass(frozen=True)
class GainModel:
    """The fitted numbers of the gain's prediction; the defaults are those of `cond-pdiff/minilm-text-tasks`.

    With n examples, w = n / (n + base_examples) and v = n / (n + gain_examples), in units of the logit:

    - β ~ N(w · logit((hits + 1) / (n + 2)) + (1 − w) · (base_mean + base_labels · log(labels − 1)), base_variance · (1 − w) + base_noise)
    - δ ~ N(gain + gain_similarity · similarity + v · (gain_separation · separation + gain_own · own_separation),
      gain_variance · (1 − v) + gain_noise); of a known task known_gain and known_variance stand for the first two terms and gain_variance.

    Args:
        take: the probability of being better from which an adapter is preferred to the base model.
    """

    base_mean: float = 0.2558
    base_labels: float = -0.1825
    base_examples: float = 6.345
    base_variance: float = 0.546
    base_noise: float = 0.2443
    gain: float = -0.07236
    gain_similarity: float = 0.3094
    gain_examples: float = 20.26
    gain_separation: float = 1.086
    gain_own: float = 0.8252
    gain_variance: float = 0.04694
    gain_noise: float = 0.002107
    known_gain: float = 0.7975
    known_variance: float = 0.615
    take: float = 0.73

    def __post_init__(self) -> None:
        for entry in fields(self):
            value = getattr(self, entry.name)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
                raise CondPDiffError(f"gain model: {entry.name} must be a finite number, got {value!r}")
            if value < 0 and entry.name.endswith(("examples", "variance", "noise")):
                raise CondPDiffError(f"gain model: {entry.name} must not be negative, got {value}")
        if not 0 < self.take < 1:
            raise CondPDiffError(f"gain model: take must be a probability between 0 and 1, got {self.take}")

    def to_json(self) -> dict[str, float]:
        """Return a JSON-ready description; `from_json` reads it back."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> GainModel:
        """Read what `to_json` wrote; `CondPDiffError` for anything else."""
        different = sorted(set(data) ^ {entry.name for entry in fields(cls)})
        if different:
            raise CondPDiffError(f"gain model: {'unknown' if different[0] in data else 'missing'} entry {different[0]!r}")
        return cls(**data)

    def tensors(self) -> dict[str, torch.Tensor]:
        """Return the numbers as `moments` takes them."""
        return {name: torch.tensor(value, dtype=torch.float64) for name, value in self.to_json().items()}

    def predict(self, evidence: Evidence) -> GainEstimate:
        """Predict the gain of an adapter over the base model with the same examples."""
        facts, numbers = stacked([evidence]), self.tensors()
        _, _, gain, deviation = moments(numbers, facts)
        accuracies, gains = distribution(numbers, facts)
        ordered = gains.flatten().sort().values
        low, high = (float(ordered[round(share * (len(ordered) - 1))]) for share in (0.1, 0.9))
        probability = torch.special.ndtr(gain / deviation.clamp(min=1e-9))
        _, _, _, before = moments(numbers, {**facts, "examples": torch.zeros(1, dtype=torch.float64)})
        share = (deviation / before.clamp(min=1e-9)).square()
        found = (float(gains.mean()), low, high, float(probability), float(share), float(accuracies.mean()))
        return GainEstimate(*(round(number, 4) for number in found))


def stacked(requests: Sequence[Evidence]) -> dict[str, torch.Tensor]:
    """Stack the entries of several requests as `moments` takes them, each of shape `(requests,)`."""
    names = [entry.name for entry in fields(Evidence)]
    return {name: torch.tensor([float(getattr(request, name)) for request in requests], dtype=torch.float64) for name in names}


def moments(model: Mapping[str, torch.Tensor], evidence: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, ...]:
    """Return the mean and standard deviation of β, and of δ; see `GainModel`.

    Args:
        model: its numbers (`GainModel.tensors`).
        evidence: the entries of `Evidence` (`stacked`), each of shape `(requests,)`.

    Returns:
        four tensors of shape `(requests,)`.
    """
    count, hits = evidence["examples"], evidence["base_hits"]
    weight = count / (count + model["base_examples"]).clamp(min=1e-9)
    prior = model["base_mean"] + model["base_labels"] * (evidence["labels"] - 1).clamp(min=1).log()
    base = weight * ((hits + 1) / (count - hits + 1)).log() + (1 - weight) * prior
    base_deviation = (model["base_variance"] * (1 - weight) + model["base_noise"]).sqrt()
    weight = count / (count + model["gain_examples"]).clamp(min=1e-9)
    known = evidence["known"] > 0
    before = torch.where(known, model["known_gain"], model["gain"] + model["gain_similarity"] * evidence["similarity"])
    better = model["gain_separation"] * evidence["separation"] + model["gain_own"] * evidence["own_separation"]
    variance = torch.where(known, model["known_variance"], model["gain_variance"])
    return base, base_deviation, before + weight * better, (variance * (1 - weight) + model["gain_noise"]).sqrt()


def distribution(
    model: Mapping[str, torch.Tensor], evidence: Mapping[str, torch.Tensor], num_points: int = POINTS
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return equally likely accuracies of the base model, shape `(requests, points, 1)`, and gains, shape `(requests, points, points)`.

    Args:
        model, evidence: see `moments`.
        num_points: on each axis.
    """
    base, base_deviation, gain, gain_deviation = (moment[:, None, None] for moment in moments(model, evidence))
    points = torch.special.ndtri((torch.arange(num_points, dtype=torch.float64) + 0.5) / num_points)
    beta = base + base_deviation * points[:, None]
    accuracies = torch.sigmoid(beta)
    return accuracies, torch.sigmoid(beta + gain + gain_deviation * points) - accuracies
