"""The paper's figures 3(e), 3(f) and 4(a), and two of ours: whose errors are shared, and what isotropic noise does."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch

from cond_pdiff.adapter import LoraAdapter
from cond_pdiff.training.card import markdown_table
from cond_pdiff.training.evaluate.measure import mean
from cond_pdiff.training.evaluate.similarity import ZooSpace, common_errors, delta_gram
from cond_pdiff.training.reproduce.cells import Cell, Plan, Step
from cond_pdiff.training.reproduce.experiment import Experiment, generator_path, rounded, spread
from cond_pdiff.training.reproduce.table1 import noise_controls, percent
from cond_pdiff.training.tasks.metrics import metric_names

POINTS = 10
"""The number of generated adapters that are measured for figure 3(f)."""

ORIGINALS = 40
"""The most trained adapters of a task that figures 3(e) and 4(a) show."""

NOISES = 5
"""The number of trajectories of figure 4(a), as in the paper."""

NOISE_SEEDS = 2
PICTURES = {
    "figure3f": "Figure 3(f): similarity in ΔW to the nearest other trained adapter, against performance",
    "figure3e": "Figure 3(e): t-SNE of params",
    "figure4a": "Figure 4(a): five noises on their way to an adapter, in the two principal directions of params",
    "errors": "Share of common errors: of all rows that either of two adapters gets wrong, those that both do",
    "noise": "A trained adapter plus isotropic noise",
}


def plan(experiment: Experiment) -> Plan:
    """Plan cells on the two zoos of the figures' rank: several runs for performance, the checkpoints of one run for distributions."""
    config, cells = experiment.config, dict[str, Cell | Step]()
    performance = (generator_path(config.performance_zoo, config.figure_rank),)
    distribution = (generator_path(config.distribution_zoo, config.figure_rank),)
    for name in config.performance_tasks:
        cells[f"figures/performance/{name}"] = Cell(partial(_performance, experiment, name), performance)
        cells[f"figures/noise/{name}"] = Cell(partial(_noise, experiment, name), performance)
    for name in config.distribution_tasks:
        cells[f"figures/distribution/{name}"] = Cell(partial(_distribution, experiment, name), distribution)
    for name in config.distribution_tasks[:1]:
        cells[f"figures/trajectories/{name}"] = Cell(partial(_trajectories, experiment, name), distribution)
    return cells


def summarize(experiment: Experiment, values: Mapping[str, Any]) -> dict[str, Any]:
    """Arrange the cells by figure and task."""
    result: dict[str, Any] = {"metrics": {name: metric_names(task)[0] for name, task in experiment.tasks.items()}}
    for path, value in values.items():
        _, figure, name = path.split("/")
        result.setdefault(figure, {})[name] = value
    return result


def _performance(experiment: Experiment, name: str) -> dict[str, Any]:
    """Measure figure 3(f): (similarity, main metric) of each adapter by kind; and the errors that adapters of two kinds share."""
    task, trained_zoo = experiment.tasks[name], experiment.with_generator(experiment.config.performance_zoo, experiment.config.figure_rank)
    trained = spread(trained_zoo.trained[name], experiment.config.reported_samples)
    generated = trained_zoo.generate(trained_zoo.prompt(task), min(POINTS, experiment.config.samples))
    controls = [noise_controls(trained_zoo, name, adapter)[0] for adapter in generated[: experiment.config.reported_samples]]
    kinds = {"original": trained, "generated": generated, "soup": [trained_zoo.soups[name]], "noise": controls}
    predicted = {kind: [experiment.predict(task, adapter) for adapter in adapters] for kind, adapters in kinds.items()}
    labels, metric = experiment.labels(task), metric_names(task)[0]
    points = {
        kind: [[s, experiment.score(task, row)[metric]] for s, row in zip(_similarities(adapters, trained), predicted[kind], strict=True)]
        for kind, adapters in kinds.items()
    }
    pairs = {kind: list(itertools.product(predicted[kind], predicted["original"])) for kind in ("generated", "soup", "noise")}
    pairs["original"] = list(itertools.combinations(predicted["original"], 2))
    shared = {kind: mean([common_errors(*pair, labels) for pair in rows]) for kind, rows in pairs.items()}
    return {"points": points, "common_errors": shared, "base": experiment.score(task, experiment.predict(task, None))[metric]}


def _similarities(adapters: Sequence[LoraAdapter], trained: Sequence[LoraAdapter]) -> list[float]:
    """Return the largest cosine, in ΔW, of each adapter with a trained one that is not itself."""
    similarities = []
    for adapter in adapters:
        others = [other for other in trained if other is not adapter] or [adapter]
        products = delta_gram([adapter], others)[0]
        norms = torch.tensor([float(delta_gram([other], [other])) for other in others], dtype=torch.float64)
        similarities.append(round(float((products / (norms * delta_gram([adapter], [adapter])[0]).sqrt()).max()), 4))
    return similarities


def _noise(experiment: Experiment, name: str) -> list[dict[str, Any]]:
    """Measure the main metric of a trained adapter plus noise of several lengths, in units of the adapter's own."""
    task, trained_zoo = experiment.tasks[name], experiment.with_generator(experiment.config.performance_zoo, experiment.config.figure_rank)
    adapter = trained_zoo.trained[name][0]
    length = float(ZooSpace([adapter], [name]).norms)
    rows = []
    for size in experiment.config.noise_sizes:
        noisy = [trained_zoo.with_noise(adapter, size * length, seed=10 + seed) for seed in range(NOISE_SEEDS if size else 1)]
        scores = [experiment.score(task, experiment.predict(task, one))[metric_names(task)[0]] for one in noisy]
        rows.append({"size": size, "score": round(statistics.fmean(scores), 4)})
    return rows


def _distribution(experiment: Experiment, name: str) -> dict[str, Any]:
    """Measure figure 3(e): places of originals, generated adapters and the soup on a plane, by t-SNE."""
    from sklearn.manifold import TSNE

    task, trained_zoo = experiment.tasks[name], experiment.with_generator(experiment.config.distribution_zoo, experiment.config.figure_rank)
    kinds = {
        "original": spread(trained_zoo.trained[name], ORIGINALS),
        "generated": trained_zoo.generate(trained_zoo.prompt(task), experiment.config.samples),
        "soup": [trained_zoo.soups[name]],
    }
    params = trained_zoo.params([adapter for adapters in kinds.values() for adapter in adapters])
    perplexity = min(15.0, (len(params) - 1) / 3)
    placed = TSNE(perplexity=perplexity, init="pca", random_state=experiment.config.seed).fit_transform(params.numpy())
    places = torch.from_numpy(placed).split([len(adapters) for adapters in kinds.values()])
    return {kind: rounded(points, 2) for kind, points in zip(kinds, places, strict=True)}


def _trajectories(experiment: Experiment, name: str) -> dict[str, Any]:
    """Measure figure 4(a): params after every denoising step of five noises, in the principal directions of all that is shown."""
    task, trained_zoo = experiment.tasks[name], experiment.with_generator(experiment.config.distribution_zoo, experiment.config.figure_rank)
    steps: list[torch.Tensor] = []

    def keep(pipe: Any, step: int, timestep: Any, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        steps.append(pipe.codec.decode(tensors["latents"]))
        return {}

    trained_zoo.generate(trained_zoo.prompt(task), NOISES, callback_on_step_end=keep)
    original = trained_zoo.params(spread(trained_zoo.trained[name], ORIGINALS))
    points = torch.cat([torch.stack(steps, 1).flatten(0, 1), original, original.mean(0, keepdim=True)])
    centred = points - points.mean(0)
    _, lengths, directions = torch.linalg.svd(centred, full_matrices=False)
    placed = centred @ directions[:2].T
    ways, originals, soup = placed.split([NOISES * len(steps), len(original), 1])
    share = float(lengths[:2].square().sum() / lengths.square().sum())
    parts = {"trajectories": ways.unflatten(0, (NOISES, -1)), "original": originals, "soup": soup}
    return {kind: rounded(part) for kind, part in parts.items()} | {"explained": round(share, 4)}


def to_markdown(result: Mapping[str, Any], about: str) -> str:
    """Return the pictures, and the numbers that are few enough to be read, as Markdown."""
    shared = [
        [name, result["metrics"][name], *(percent(cell["common_errors"][kind]) for kind in ("generated", "original", "soup", "noise"))]
        for name, cell in result.get("performance", {}).items()
    ]
    noise = [[name, *(percent(row["score"]) for row in rows)] for name, rows in result.get("noise", {}).items()]
    sizes = [f"{row['size']:g}" for row in next(iter(result.get("noise", {}).values()), [])]
    lines = ["# Figures", "", about, ""]
    for picture, title in PICTURES.items():
        lines += [f"![{title}]({picture}.png)", "", f"{title}.", ""]
    heads = ["task", "metric", "generated, original", "two originals", "soup, original", "noise, original"]
    lines += ["## Common errors", "", markdown_table(heads, shared), "", "## Noise", ""]
    lines += ["Length of the noise in units of the update's.", "", markdown_table(["task", *sizes], noise), ""]
    return "\n".join(lines)
