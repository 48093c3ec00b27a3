"""Draw the pictures of the pages on concepts, as SVG: two schemes, and two of measured numbers (`results/*.json`).

    python benchmarks/concept_pictures.py --results results --out docs/pictures
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import matplotlib
import matplotlib.pyplot as plt
from matplotlib.patches import FancyBboxPatch

from cond_pdiff import ConditionIndex
from cond_pdiff.hub import BUNDLED_FOLDER

BLUE, ORANGE, GREY, GREEN = "#3949ab", "#b45309", "#6b7280", "#15803d"
FACES = {BLUE: "#e8eaf6", ORANGE: "#fef3e2", GREY: "#f3f4f6", GREEN: "#e7f6ec"}
SETTINGS = {"svg.fonttype": "none", "svg.hashsalt": "cond-pdiff", "font.family": "sans-serif", "font.size": 11}
K_SHOT = {"base": "base model", "multi-task": "multi-task LoRA", "one": "generated, one", "generated": "generated, best of 8",
          "refined": "refined, 12 steps", "trained": "trained on all data"}  # fmt: skip


def canvas(width: float, height: float) -> Any:
    """Return axes of a scheme, in inches, without lines and numbers."""
    figure, axes = plt.subplots(figsize=(width, height))
    axes.set(xlim=(0, width), ylim=(0, height))
    axes.axis("off")
    figure.subplots_adjust(0, 0, 1, 1)
    return axes


def box(axes: Any, left: float, bottom: float, width: float, text: str, colour: str, height: float = 0.8) -> None:
    """Draw a box with words."""
    shape = FancyBboxPatch((left, bottom), width, height, boxstyle="round,pad=0,rounding_size=0.08", ec=colour, fc=FACES[colour], lw=1.4)
    axes.add_patch(shape)
    axes.text(left + width / 2, bottom + height / 2, text, ha="center", va="center")


def arrow(axes: Any, start: tuple[float, float], end: tuple[float, float], text: str = "", colour: str = GREY) -> None:
    """Draw an arrow with words above it."""
    axes.annotate("", end, start, arrowprops={"arrowstyle": "-|>", "color": colour, "lw": 1.6})
    if text:
        axes.text((start[0] + end[0]) / 2, (start[1] + end[1]) / 2 + 0.1, text, ha="center", va="bottom", fontsize=9, color="#374151")


def codec(_: Path) -> None:
    """Draw the way of an adapter into latents and back."""
    axes = canvas(9.2, 3.1)
    names = ("adapter\n48 tensors", "params\n36,864 numbers", "normalised\nand statistics", "latents\n1 × 96")
    for number, name in enumerate(names):
        box(axes, 0.1 + 2.4 * number, 1.15, 1.5, name, BLUE if number in (0, 3) else GREY)
    for number, (there, back) in enumerate((("layout", "layout"), ("normaliser", "its inverse"), ("encoder", "decoder"))):
        left = 1.6 + 2.4 * number
        arrow(axes, (left, 1.75), (left + 0.9, 1.75), there)
        axes.annotate("", (left, 1.35), (left + 0.9, 1.35), arrowprops={"arrowstyle": "-|>", "color": ORANGE, "lw": 1.6})
        axes.text(left + 0.45, 1.24, back, ha="center", va="top", fontsize=9, color=ORANGE)
    axes.text(0.1, 2.7, "training: the zoo's adapters are encoded", color="#374151")
    axes.text(0.1, 0.55, "use: a generated latent is decoded", color=ORANGE)
    axes.text(0.1, 0.15, "tensors that are equal throughout the zoo (the frozen lora_A) are stored once and never modelled", fontsize=9)


def denoiser(_: Path) -> None:
    """Draw the loop from noise to latents."""
    axes = canvas(9.2, 3.3)
    box(axes, 0.1, 2.2, 1.8, "condition\nwords or picture", GREEN)
    box(axes, 2.9, 2.2, 1.8, "condition\nencoder", GREY)
    box(axes, 0.1, 0.6, 1.8, "noise\none seed a sample", BLUE)
    box(axes, 2.9, 0.6, 2.2, "denoiser (U-Net)\nv(latents, time, condition)", ORANGE)
    box(axes, 6.0, 0.6, 1.3, "scheduler\n20 steps", GREY)
    box(axes, 8.0, 0.6, 1.1, "latents", BLUE)
    arrow(axes, (1.9, 2.6), (2.9, 2.6))
    arrow(axes, (3.8, 2.2), (3.8, 1.4), "", GREEN)
    axes.text(3.95, 1.75, "embedding, or none for guidance", fontsize=9, va="center")
    arrow(axes, (1.9, 1.0), (2.9, 1.0))
    arrow(axes, (5.1, 1.0), (6.0, 1.0))
    arrow(axes, (7.3, 1.0), (8.0, 1.0))
    back = {"arrowstyle": "-|>", "color": GREY, "lw": 1.6, "connectionstyle": "arc3,rad=-0.35"}
    axes.annotate("", (4.2, 0.6), (6.6, 0.6), arrowprops=back)
    axes.text(5.4, 0.05, "a little less noise, again", fontsize=9, ha="center", va="bottom")


def k_shot(results: Path) -> None:
    """Draw the means over the unseen tasks, by names only and with eight examples a class."""
    measured = json.loads((results / "few_shot.json").read_text(encoding="utf-8"))
    none, eight = measured["names only"]["means"], measured["with examples"]["means"]
    none["one"] = none.pop("generated")  # without examples there is nothing to choose by
    figure, axes = plt.subplots(figsize=(7.6, 3.9))
    for number, name in enumerate(reversed(K_SHOT)):
        for values, shift, colour in ((none, 0.2, GREY), (eight, -0.2, BLUE)):
            if name in values:
                axes.barh(number + shift, 100 * values[name], 0.36, color=colour)
                axes.text(100 * values[name] + 0.6, number + shift, f"{100 * values[name]:.1f}", va="center", fontsize=10)
    axes.set_yticks(range(len(K_SHOT)), list(reversed(K_SHOT.values())))
    axes.set(xlim=(40, 84), xlabel="mean accuracy in percent over 16 unseen tasks")
    axes.barh(0, 0, color=GREY, label="label names only (zero-shot)")
    axes.barh(0, 0, color=BLUE, label="and eight examples a class, in the prototypes")
    axes.legend(loc="upper center", bbox_to_anchor=(0.4, 1.17), ncols=2, frameon=False, fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()


def distribution(results: Path) -> None:
    """Draw every task of the evaluation: its similarity to the nearest trained task, and what the generated adapter gained."""
    measured = json.loads((results / "text_tasks.json").read_text(encoding="utf-8"))
    figure, axes = plt.subplots(figsize=(7.6, 4.2))
    for seen, colour, mark, label in ((True, GREY, "o", "58 trained tasks"), (False, BLUE, "D", "16 unseen tasks")):
        rows = [task for task in measured["tasks"] if task["seen"] == seen]
        gains = [100 * (task["accuracy"]["generated_best"] - task["accuracy"]["base"]) for task in rows]
        axes.scatter([task["similarity"] for task in rows], gains, s=34, c=colour, marker=mark, label=label, alpha=0.85, linewidths=0)
    axes.axhline(0, color="black", lw=0.8)
    threshold = float(ConditionIndex.from_pretrained(BUNDLED_FOLDER / "minilm-text-tasks" / "condition_index").threshold)
    axes.axvline(threshold, color=ORANGE, ls="--", lw=1.4)
    axes.text(threshold + 0.006, axes.get_ylim()[1], "in distribution →", color=ORANGE, va="top", fontsize=10)
    axes.set(xlabel="similarity to the nearest trained task", ylabel="points of accuracy over the base model")
    axes.legend(loc="lower left", frameon=False, fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()


def main() -> None:
    """Write the four files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", required=True, type=Path, help="the folder of measured results")
    parser.add_argument("--out", required=True, type=Path, help="the folder of pictures")
    arguments = parser.parse_args()
    matplotlib.use("svg")
    matplotlib.rcParams.update(SETTINGS)
    arguments.out.mkdir(parents=True, exist_ok=True)
    for draw in (codec, denoiser, k_shot, distribution):
        draw(arguments.results)
        plt.savefig(arguments.out / f"{draw.__name__}.svg", metadata={"Date": None})
        plt.close()


if __name__ == "__main__":
    main()
