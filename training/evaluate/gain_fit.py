"""Fitting a `GainModel` to what adapters really gained, and checking it on tasks of other sources."""

from __future__ import annotations

import hashlib
import statistics
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from cond_pdiff.errors import TaskDataError
from cond_pdiff.gain import Evidence, GainModel, distribution, stacked

LOG_NUMBERS = ("base_examples", "base_variance", "base_noise", "gain_examples", "gain_variance", "gain_noise", "known_variance")
"""The numbers of a `GainModel` that must not be negative: their logarithms are fitted."""
WEIGHT_DECAY = 1e-3
ITERATIONS, FIT_POINTS = 60, 12
MOST_BELOW = 0.05
"""The share of the fitted tasks for which what is returned may be more than a point below the base model; `take` is set by it."""
FEWEST_TASKS = 5


@dataclass(frozen=True)
class GainRow:
    """What was known of one prompt, and what came of it.

    Args:
        task: its name.
        source: of its texts; tasks of one source stay on one side of a split.
        draw: of the examples.
        shots: examples a class.
        candidates: of which the best by the examples was taken.
        evidence: see `Evidence`.
        rows: of the test split that the accuracies are of.
        base: accuracy of the base model with the same examples.
        gain: of the adapter over it.
        changed: share of the rows that one of the two gets right and the other wrong.
    """

    task: str
    source: str
    draw: int
    shots: int
    candidates: int
    evidence: Evidence
    rows: int
    base: float
    gain: float
    changed: float

    def to_json(self) -> dict[str, Any]:
        """Return a JSON-ready description; `from_json` reads it back."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> GainRow:
        """Read what `to_json` wrote."""
        return cls(**{**data, "evidence": Evidence(**data["evidence"])})

    @property
    def half(self) -> int:
        """The side of a split: 0 or 1 by the source's name."""
        return hashlib.sha256(self.source.encode()).digest()[0] % 2


def fit_gain_model(rows: Sequence[GainRow]) -> GainModel:
    """Fit the numbers under which the measured accuracies and gains are likeliest; each task counts as much as any other.

    What is measured on a few hundred rows differs from the truth by chance: Gaussian, with the variance that so many rows have. `take` is
    the least probability with which at most `MOST_BELOW` of the unknown tasks end more than a point below the base model, or 0.95.

    Raises:
        TaskDataError: there are fewer than `FEWEST_TASKS` unknown tasks.
    """
    unknown = {row.task for row in rows if not row.evidence.known}
    if len(unknown) < FEWEST_TASKS:
        raise TaskDataError(
            f"{len(unknown)} tasks that the generator was not trained on are too few; "
            f"measure at least {FEWEST_TASKS}, in each half of the sources"
        )
    facts, columns = stacked([row.evidence for row in rows]), _columns(rows)
    start = GainModel().to_json()
    names = [name for name in start if name != "take" and (not name.startswith("known") or bool(facts["known"].any()))]
    scale = torch.tensor([max(start[name], 1e-4) for name in names], dtype=torch.float64).log()
    logged = torch.tensor([name in LOG_NUMBERS for name in names])
    first = torch.where(logged, scale, torch.tensor([start[name] for name in names], dtype=torch.float64))
    values = first.clone().requires_grad_()
    fixed = GainModel().tensors()

    def numbers() -> dict[str, torch.Tensor]:
        return fixed | dict(zip(names, torch.where(logged, values.exp(), values), strict=True))

    optimizer = torch.optim.LBFGS([values], max_iter=ITERATIONS, line_search_fn="strong_wolfe")

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = negative_log_likelihood(numbers(), facts, columns) + WEIGHT_DECAY * (values - first).square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    fitted = {name: float(f"{value.item():.4g}") for name, value in numbers().items() if name != "take"}
    model = GainModel(**fitted)
    return replace(model, take=_least_take(model, rows))


def negative_log_likelihood(
    model: Mapping[str, torch.Tensor], evidence: Mapping[str, torch.Tensor], columns: Mapping[str, torch.Tensor]
) -> torch.Tensor:
    """Return −log p of the base model's accuracies and the gains as measured, a weighted mean over rows (constants left out)."""
    accuracies, gains = distribution(model, evidence, FIT_POINTS)
    base, gain, rows, changed, weights = (columns[name][:, None, None] for name in ("base", "gain", "rows", "changed", "weights"))
    base_noise, gain_noise = (base * (1 - base) + 1 / rows) / rows, (changed + 1 / rows) / rows
    log_likelihood = -(base - accuracies).square() / (2 * base_noise) - (gain - gains).square() / (2 * gain_noise)
    return -(weights[:, 0, 0] * torch.logsumexp(log_likelihood, (1, 2))).mean()


def check(models: Sequence[GainModel], rows: Sequence[GainRow]) -> dict[str, Any]:
    """Check how predictions hold on rows that were not fitted on, with the most examples a class; one and many candidates apart.

    Args:
        models: fitted on the sources of half 0, and of half 1; each predicts the other half's rows.
        rows: of both halves.

    Returns:
        `inside`: share of the measured gains within the 80 % interval, which is widened by what so many test rows differ from
        the truth by chance (`inside_alone`: without that). `rank`: Spearman correlation of predicted and measured gains, in each draw of
        examples. `below`: share of the tasks where what is returned is more than a point below the base model, on the mean of the draws
        (`below_unjudged`: if the adapter is always returned); `returned`, `unjudged`: the mean gains.
    """
    unknown = [row for row in rows if not row.evidence.known and row.shots == max(row.shots for row in rows)]
    counts = sorted({row.candidates for row in unknown})
    return {str(count): _check_one(models, [row for row in unknown if row.candidates == count]) for count in counts}


def _check_one(models: Sequence[GainModel], rows: Sequence[GainRow]) -> dict[str, Any]:
    from scipy.stats import spearmanr

    rows = sorted(rows, key=lambda row: row.half)
    own = [models[1 - row.half] for row in rows]
    estimates = [model.predict(row.evidence) for model, row in zip(own, rows, strict=True)]
    inside = statistics.fmean(estimate.low <= row.gain <= estimate.high for estimate, row in zip(estimates, rows, strict=True))
    columns = _columns(rows)
    halves = [stacked([row.evidence for row in rows if row.half == half]) for half in (0, 1)]
    gains = torch.cat([distribution(models[1 - half].tensors(), halves[half])[1].flatten(1) for half in (0, 1)])
    chance = ((columns["changed"] + 1 / columns["rows"]) / columns["rows"]).sqrt()
    noisy = gains + chance[:, None] * torch.randn(gains.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    low, high = (noisy.quantile(share, 1) for share in (0.1, 0.9))
    by_draw = [[place for place, row in enumerate(rows) if row.draw == draw] for draw in sorted({row.draw for row in rows})]
    ranks = [float(spearmanr([estimates[i].gain for i in places], [rows[i].gain for i in places]).statistic) for places in by_draw]
    taken = [estimate.probability >= model.take for model, estimate in zip(own, estimates, strict=True)]
    returned = by_task(rows, [row.gain * take for row, take in zip(rows, taken, strict=True)])
    unjudged = by_task(rows, [row.gain for row in rows])
    return {
        "tasks": len(returned),
        "draws": len(rows),
        "inside": round(float(((columns["gain"] >= low) & (columns["gain"] <= high)).double().mean()), 4),
        "inside_alone": round(inside, 4),
        "rank": [round(rank, 3) for rank in ranks],
        "predicted": round(statistics.fmean(estimate.gain for estimate in estimates), 4),
        "unjudged": round(statistics.fmean(unjudged), 4),
        "returned": round(statistics.fmean(returned), 4),
        "taken": round(statistics.fmean(taken), 4),
        "unsure": round(statistics.fmean(estimate.unsure for estimate in estimates), 4),
        "below": round(statistics.fmean(gain < -0.01 for gain in returned), 4),
        "below_unjudged": round(statistics.fmean(gain < -0.01 for gain in unjudged), 4),
    }


def by_task(rows: Sequence[GainRow], values: Iterable[float]) -> list[float]:
    """Return the mean of each task's values."""
    found: dict[str, list[float]] = defaultdict(list)
    for row, value in zip(rows, values, strict=True):
        found[row.task].append(value)
    return [statistics.fmean(own) for own in found.values()]


def _least_take(model: GainModel, rows: Sequence[GainRow]) -> float:
    most = max(row.shots for row in rows)
    unknown = [row for row in rows if not row.evidence.known and row.shots == most]
    probabilities = [model.predict(row.evidence).probability for row in unknown]
    for percent in range(50, 96):
        worst = 0.0
        for count in {row.candidates for row in unknown}:
            picked = [(row, p) for row, p in zip(unknown, probabilities, strict=True) if row.candidates == count]
            gains = by_task([row for row, _ in picked], [row.gain * (100 * p >= percent) for row, p in picked])
            worst = max(worst, statistics.fmean(gain < -0.01 for gain in gains))
        if worst <= MOST_BELOW:
            break
    return percent / 100


def _columns(rows: Sequence[GainRow]) -> dict[str, torch.Tensor]:
    counts: dict[str, int] = defaultdict(int)
    for row in rows:
        counts[row.task] += 1
    names = ("base", "gain", "rows", "changed")
    columns = {name: torch.tensor([float(getattr(row, name)) for row in rows], dtype=torch.float64) for name in names}
    weights = torch.tensor([1 / counts[row.task] for row in rows], dtype=torch.float64)
    return columns | {"weights": weights / weights.mean()}
