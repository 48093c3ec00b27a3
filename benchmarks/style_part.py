"""Write a recipe for a part of the style zoo that is enough to evaluate the bundled generator on: a zoo of all styles takes many hours.

    cond-pdiff make-styles --images paintings --out styles --recoloured 5
    python benchmarks/style_part.py --tasks styles --out part.json --trained 8     # says how to go on

The part holds the unseen styles of the recipe, a random choice of the trained ones, and every trained style that is nearest to a
condition of these, so that retrieval finds what it would find in the whole zoo. What a style starts from, the multi-task adapter, is
trained on the trained styles (without recoloured forms of them), in a zoo of its own.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Sequence
from pathlib import Path

from cond_pdiff import CondPDiffPipeline
from cond_pdiff.atomic import dump_json, write_text
from cond_pdiff.training.evaluate.styles import shown_picture
from cond_pdiff.training.recipe import read_recipe
from cond_pdiff.training.tasks.styles import load_styles

RECIPE, GENERATOR = "pixart-mini-styles", "cond-pdiff/pixart-mini-styles"


def choose_trained(names: Sequence[str], count: int, seed: int) -> tuple[list[str], list[str]]:
    """Return the trained styles that are no recoloured forms, and a random choice of them."""
    originals = [name for name in names if "_recoloured_" not in name]
    return originals, sorted(random.Random(seed).sample(originals, count))


def main() -> None:
    """Write the two recipes, and print the commands."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", required=True, type=Path, help="made by make-styles")
    parser.add_argument("--out", required=True, type=Path, help="the recipe to write; another one ends in -multitask.json")
    parser.add_argument("--trained", type=int, default=8, help="how many trained styles (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of their choice, and of the evaluation (default: %(default)s)")
    arguments = parser.parse_args()
    recipe = read_recipe(RECIPE)
    pipe = CondPDiffPipeline.from_pretrained(GENERATOR)
    index, unseen = pipe.condition_index, recipe["collect"]["unseen"]
    originals, chosen = choose_trained(index.names, arguments.trained, arguments.seed)
    conditions = [shown_picture(style, arguments.seed, name in chosen) for name in chosen for style in load_styles(arguments.tasks, [name])]
    conditions += [style.image for style in load_styles(arguments.tasks, unseen)]
    embeddings, _ = pipe.condition_encoder.encode(conditions)
    nearest = dict.fromkeys(index.nearest(embedding)[0].task for embedding in embeddings)
    part = [*chosen, *(name for name in nearest if name not in chosen)]  # runs are collected in this order
    multitask = arguments.out.with_name(f"{arguments.out.stem}-multitask.json")
    write_text(multitask, dump_json({**recipe, "collect": {**recipe["collect"], "tasks": originals}}))
    write_text(arguments.out, dump_json({**recipe, "collect": {**recipe["collect"], "tasks": part}}))
    only = " ".join(f"--only {name}" for name in (*chosen, *unseen))
    print(f"""\
cond-pdiff collect --recipe {multitask} --tasks {arguments.tasks} --zoo multitask-zoo --shard 0/1000    # the first job alone
cond-pdiff collect --recipe {arguments.out} --tasks {arguments.tasks} --zoo part-zoo --shard 999/1000   # no job yet
cp -r multitask-zoo/multitask part-zoo/
cond-pdiff collect --recipe {arguments.out} --tasks {arguments.tasks} --zoo part-zoo
cond-pdiff evaluate {GENERATOR} --tasks {arguments.tasks} --zoo part-zoo --out evaluation --seed {arguments.seed} {only}""")


if __name__ == "__main__":
    main()
