"""Results as pictures: opaque, in Okabe and Ito's colours, and told apart by markers too."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cond_pdiff.training.tasks.metrics import NAMES

LOOKS = {
    "original": ("#0072B2", "o"),
    "generated": ("#D55E00", "^"),
    "soup": ("#009E73", "*"),
    "noise": ("#CC79A7", "s"),
    "base": ("#56B4E9", "x"),
    "full": ("#000000", "D"),
}
"""The colour and marker of each kind of adapter."""

WORDS = {"noise": "original + noise", "full": "full fine-tuning"}


def draw_figures(result: Mapping[str, Any], folder: Path) -> None:
    """Draw `figure3e.png`, `figure3f.png`, `figure4a.png`, `errors.png`, `noise.png`."""
    _panels(folder / "figure3f.png", result["performance"], _similarity, result["metrics"])
    _panels(folder / "figure3e.png", result["distribution"], _distribution, result["metrics"])
    _panels(folder / "figure4a.png", result["trajectories"], _trajectories, result["metrics"])
    _panels(folder / "noise.png", result["noise"], _noise, result["metrics"])
    _errors(folder / "errors.png", result["performance"])


def draw_table1(result: Mapping[str, Any], folder: Path) -> None:
    """Draw `table1.png`: means over the tasks by rank, a panel for each zoo."""
    ways: dict[str, list[dict[str, Any]]] = {}
    for row in result["means"]:
        ways.setdefault(row["zoo"], []).append(row)
    _panels(folder / "table1.png", ways, _ranks, {}, sharey=True)


def draw_table3(result: Mapping[str, Any], folder: Path) -> None:
    """Draw `table3.png`: the mean over the tasks of every ablation, with its deviation over the seeds."""
    pyplot = _pyplot()
    rows = result["rows"]
    figure, axes = pyplot.subplots(figsize=(7, 0.26 * len(rows) + 1), layout="constrained")
    groups = list(dict.fromkeys(row["group"] for row in rows))
    for place, row in enumerate(rows):
        colour, marker = list(LOOKS.values())[groups.index(row["group"]) % 2]
        axes.errorbar(100 * row["mean"], -place, xerr=100 * row["mean_deviation"], color=colour, marker=marker, capsize=3)
    axes.set_yticks([-place for place in range(len(rows))], [f"{row['group']}: {row['name']}" for row in rows])
    axes.set(xlabel="mean of the tasks' metrics in percent", title="generated adapters; bars: deviation over seeds")
    axes.grid(axis="x", alpha=0.3)
    _save(figure, folder / "table3.png")


def _similarity(axes: Any, cell: Mapping[str, Any], metric: str) -> None:
    for kind, points in cell["points"].items():
        _scatter(axes, kind, [[similarity, 100 * score] for similarity, score in points])
    axes.axhline(100 * cell["base"], color="0.5", ls=":", label="base model")
    axes.set(xlabel="cosine in ΔW to the nearest trained", ylabel=f"{NAMES[metric]}, percent")


def _distribution(axes: Any, cell: Mapping[str, Any], metric: str) -> None:
    for kind, points in cell.items():
        _scatter(axes, kind, points)
    axes.set(xticks=[], yticks=[])


def _trajectories(axes: Any, cell: Mapping[str, Any], metric: str) -> None:
    for path in cell["trajectories"]:
        axes.plot(*zip(*path, strict=True), color=LOOKS["generated"][0], lw=1, alpha=0.6)
        axes.plot(*path[0], marker="o", mfc="white", mec=LOOKS["generated"][0])
    _scatter(axes, "original", cell["original"])
    _scatter(axes, "generated", [path[-1] for path in cell["trajectories"]])
    _scatter(axes, "soup", cell["soup"])
    axes.set(xlabel="first principal direction", ylabel=f"second (both: {cell['explained']:.0%} of the variance)")


def _noise(axes: Any, cell: Sequence[Mapping[str, float]], metric: str) -> None:
    colour, marker = LOOKS["noise"]
    axes.plot([row["size"] for row in cell], [100 * row["score"] for row in cell], color=colour, marker=marker, label=WORDS["noise"])
    axes.set(xlabel="noise / update", ylabel=f"{NAMES[metric]}, percent")


def _ranks(axes: Any, rows: Sequence[Mapping[str, Any]], metric: str) -> None:
    places = range(len(rows))
    for column, (colour, marker) in LOOKS.items():
        means = [100 * row[column] for row in rows]
        axes.plot(places, means, color=colour, marker=marker, lw=1, label=WORDS.get(column, column))
    axes.set_xticks(places, [f"rank {row['rank']}" for row in rows])
    axes.set(ylabel="mean of the tasks' metrics in percent")


def _errors(path: Path, cells: Mapping[str, Any]) -> None:
    pyplot = _pyplot()
    figure, axes = pyplot.subplots(figsize=(6, 3.4), layout="constrained")
    words = {"generated": "generated, original", "original": "two originals", "soup": "soup, original", "noise": "noise, original"}
    for index, (kind, word) in enumerate(words.items()):
        places = [place + 0.2 * (index - 1.5) for place in range(len(cells))]
        heights = [100 * (cell["common_errors"][kind] or 0) for cell in cells.values()]
        axes.bar(places, heights, 0.18, color=LOOKS[kind][0], hatch=("", "//", "..", "xx")[index], edgecolor="white", label=word)
    axes.set_xticks(range(len(cells)), list(cells))
    axes.set(ylabel="common errors, percent")
    figure.legend(loc="outside lower center", ncols=2)
    _save(figure, path)


def _panels(path: Path, cells: Mapping[str, Any], draw: Any, metrics: Mapping[str, str], sharey: bool = False) -> None:
    """Draw one panel a cell, with one legend below them."""
    if not cells:
        return
    pyplot = _pyplot()
    size = (max(5, 3.2 * len(cells)), 3.8)
    figure, panels = pyplot.subplots(1, len(cells), figsize=size, layout="constrained", squeeze=False, sharey=sharey)
    for axes, (name, cell) in zip(panels[0], cells.items(), strict=True):
        draw(axes, cell, metrics.get(name, ""))
        axes.set_title(name)
    handles, labels = panels[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(len(labels), 2 + len(cells)))
    _save(figure, path)


def _scatter(axes: Any, kind: str, points: Sequence[Sequence[float]]) -> None:
    colour, marker = LOOKS[kind]
    size = 140 if marker == "*" else 28
    axes.scatter(*zip(*points, strict=True), c=colour, marker=marker, s=size, alpha=0.8, label=WORDS.get(kind, kind), zorder=3)


def _pyplot() -> Any:
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    return pyplot


def _save(figure: Any, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100, facecolor="white", metadata={"Software": None})
    _pyplot().close(figure)
