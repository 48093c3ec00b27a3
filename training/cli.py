"""The command `cond-pdiff`: what can be asked. Heavy imports happen inside the commands, so that help is instant."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from cond_pdiff import __version__
from cond_pdiff.errors import CondPDiffError
from cond_pdiff.training import commands
from cond_pdiff.training.commands import DEFAULT_GENERATOR, DEFAULT_STYLE_GENERATOR, PAIR_SEPARATOR


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; errors that a user can meet are printed on one line and give exit status 1."""
    arguments = _parser().parse_args(argv)
    try:
        arguments.run(arguments)
    except (CondPDiffError, OSError) as error:  # OSError: no space left, no permission …
        print(f"cond-pdiff: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    except ModuleNotFoundError as error:
        print(f"cond-pdiff: error: this needs the package {error.name}: pip install 'cond-pdiff[train]'", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("cond-pdiff: interrupted; finished parts are kept, run the same command again to go on", file=sys.stderr)
        return 130
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="cond-pdiff", description="Turn a task description into a LoRA adapter.")
    parser.add_argument("--version", action="version", version=f"cond-pdiff {__version__}")
    add = parser.add_subparsers(required=True, metavar="command").add_parser

    generate = add("generate", help="make an adapter from a task description and examples, or from a style image")
    generate.add_argument("description", nargs="?", help="what to decide, in a sentence or two")
    generate.add_argument("--image", type=Path, metavar="FILE", help="a style image (PNG, JPEG or WebP) instead of a description")
    generate.add_argument(
        "--example", action="append", default=[], metavar="TEXT=LABEL", help=f"a labelled example; 'A {PAIR_SEPARATOR} B=LABEL' for pairs"
    )
    generate.add_argument("--label", action="append", default=[], metavar="NAME", help="a label name (default: those of the examples)")
    generate.add_argument("--out", required=True, type=Path, metavar="FOLDER", help="where to write the adapter")
    generate.add_argument(
        "--generator",
        metavar="NAME",
        help=f"bundled name, folder, or Hub repository (default: {DEFAULT_GENERATOR}; for images {DEFAULT_STYLE_GENERATOR})",
    )
    generate.add_argument("--num-adapters", type=int, default=None, metavar="N", help="candidates (default: 20 with examples, else 1)")
    generate.add_argument("--steps", type=int, metavar="N", help="denoising steps (default: 20)")
    generate.add_argument("--guidance-scale", type=float, metavar="G", help="guidance; 1 is none (default: the generator's own)")
    generate.add_argument("--seed", type=int, default=0, help="candidate i uses seed + i (default: %(default)s)")
    generate.add_argument(
        "--refine", type=int, default=0, metavar="STEPS", help="go on from the chosen adapter with so many steps on the examples, say 12"
    )
    generate.add_argument("--force", action="store_true", help="replace an adapter that is already there")
    generate.set_defaults(run=commands.generate)

    classify = add("classify", help="classify texts with an adapter")
    classify.add_argument("adapter", type=Path, help="adapter folder")
    classify.add_argument("text", nargs="+", help=f"texts; 'A {PAIR_SEPARATOR} B' for pairs")
    classify.add_argument(
        "--label", action="append", default=[], metavar="NAME", help="label names (default: those recorded with the adapter)"
    )
    classify.add_argument("--base", metavar="FOLDER", help="the base model's folder (default: found by its recorded name)")
    classify.set_defaults(run=commands.classify)

    preview = add("preview", help="make pictures with and without a style adapter")
    preview.add_argument("adapter", type=Path, help="adapter folder")
    preview.add_argument("--prompt", action="append", required=True, metavar="TEXT", help="what to show; give it again for more")
    preview.add_argument("--scale", type=float, default=1.0, help="strength of the adapter (default: %(default)s)")
    preview.add_argument("--mix", nargs=2, default=None, metavar=("ADAPTER", "SCALE"), help="a second adapter and its strength")
    preview.add_argument("--towards", type=Path, metavar="ADAPTER", help="show the way to this adapter in six steps instead")
    preview.add_argument("--out", type=Path, metavar="FILE", help="picture to write (default: ADAPTER-preview.png)")
    preview.add_argument("--card", action="store_true", help="show the picture in the adapter's card too")
    preview.add_argument("--steps", type=int, default=10, metavar="N", help="denoising steps (default: %(default)s)")
    preview.add_argument("--guidance-scale", type=float, default=2.0, metavar="G", help="guidance; 1 is none (default: %(default)s)")
    preview.add_argument("--seed", type=int, default=0, help="of the noise (default: %(default)s)")
    preview.add_argument("--base", metavar="FOLDER", help="the base model's folder (default: found by its recorded name)")
    preview.add_argument("--force", action="store_true", help="replace a picture that is already there")
    preview.set_defaults(run=commands.preview)

    verify = add("verify", help="make a generated adapter again from what it records: the same bytes, or but for rounding?")
    verify.add_argument("adapter", type=Path, help="adapter folder")
    verify.add_argument("--generator", metavar="NAME", help="where its generator is now (default: by its recorded name and commit)")
    verify.add_argument("--image", type=Path, metavar="FILE", help="the style image that it was made from")
    verify.set_defaults(run=commands.verify)

    known = add("list", help="list the generators that work offline: bundled ones and those in the Hub cache")
    known.set_defaults(run=commands.list_known)

    info = add("info", help="say what a generator makes, of which tasks or styles, and what was measured")
    info.add_argument("generator", help="bundled name, folder, or Hub repository")
    info.set_defaults(run=commands.info)

    convert = add("convert", help="write an adapter as one file for ComfyUI, or the base model with it merged in")
    convert.add_argument("adapter", type=Path, help="adapter folder")
    convert.add_argument("--to", required=True, choices=("comfyui", "merged"), help="a LoRA file, or a folder with base weights W + ΔW")
    convert.add_argument("--out", required=True, type=Path, metavar="PATH", help="file or folder to write")
    convert.add_argument("--scale", type=float, default=1.0, help="strength of a merged adapter (default: %(default)s)")
    convert.add_argument("--base", metavar="FOLDER", help="the base model's folder (default: found by its recorded name)")
    convert.add_argument("--force", action="store_true", help="replace what an earlier conversion wrote there")
    convert.set_defaults(run=commands.convert)

    push = add("push", help="push a generator or an adapter, with its card, to the Hub")
    push.add_argument("folder", help="a generator (folder or bundled name), or an adapter folder")
    push.set_defaults(run=commands.push)

    zoo = add("push-zoo", help="push a zoo to the Hub as a data set; run it again to go on where it stopped")
    zoo.add_argument("zoo", type=Path, help="a finished zoo")
    zoo.set_defaults(run=commands.push_zoo)

    space = add("push-space", help="push the demo to the Hub as a Space")
    space.add_argument("--app", type=Path, default=Path("app.py"), help="the demo (default: %(default)s)")
    space.add_argument("--generator", action="append", default=[], metavar="NAME", help="a Hub repository to show instead of a bundled one")
    space.set_defaults(run=commands.push_space)
    for command in (push, zoo, space):
        command.add_argument("--repo", required=True, metavar="OWNER/NAME", help="repository, created if there is none")
        command.add_argument("--private", action="store_true", default=None, help="make a new repository private")
        command.add_argument("--revision", metavar="BRANCH", help="branch to push to, created if there is none")
        command.add_argument("--message", metavar="TEXT", help="of the commit")
        command.add_argument("--dry-run", action="store_true", help="only say what would be sent")

    demo = add("demo", help="generate an adapter and compare it with the base model")
    demo.set_defaults(run=commands.demo)

    collect = add("collect", help="fine-tune adapters for a folder of tasks into a zoo (resumable)")
    collect.add_argument("--recipe", default="minilm-text-tasks", help="recipe name[+VARIANT] or JSON file (default: %(default)s)")
    collect.add_argument("--tasks", required=True, type=Path, help="folder of task folders")
    collect.add_argument("--zoo", required=True, type=Path, help="folder to create or continue")
    collect.add_argument("--shard", type=_shard, default=(0, 1), metavar="I/N", help="do every N-th job beginning with I")
    collect.add_argument(
        "--together", type=int, default=1, metavar="N", help="adapters trained side by side in one batch: many on a GPU (default: 1)"
    )
    collect.set_defaults(run=commands.collect)

    train = add("train", help="train a generator on a zoo (resumable)")
    train.add_argument("--recipe", default="minilm-text-tasks", help="recipe name[+VARIANT] or JSON file (default: %(default)s)")
    train.add_argument("--zoo", required=True, type=Path, help="made by collect")
    train.add_argument("--tasks", required=True, type=Path, help="folder of task folders, for prompts")
    train.add_argument("--out", required=True, type=Path, help="run folder to create or continue")
    train.add_argument("--tensorboard", action="store_true", help="also write tensorboard events")
    train.set_defaults(run=commands.train)

    tune = add("tune", help="go on training a text generator on what its adapters are for: the loss of its tasks (resumable)")
    tune.add_argument("generator", help="bundled name, folder, or Hub repository")
    tune.add_argument("--recipe", default="minilm-text-tasks", help="recipe name or JSON file (default: %(default)s)")
    tune.add_argument("--tasks", required=True, type=Path, help="folder of task folders")
    tune.add_argument("--out", required=True, type=Path, help="run folder to create or continue")
    tune.add_argument("--tensorboard", action="store_true", help="also write tensorboard events")
    tune.set_defaults(run=commands.tune)

    calibrate = add("calibrate", help="fit what gains a text generator predicts, on tasks that it has not seen (resumable)")
    calibrate.add_argument("generator", help="bundled name, folder, or Hub repository")
    calibrate.add_argument("--tasks", required=True, type=Path, help="folder of task folders; those that it was not trained on count")
    calibrate.add_argument("--out", required=True, type=Path, help="folder for tasks/*.json and gain_model.json")
    calibrate.add_argument("--draws", type=int, default=3, metavar="N", help="prompts a task (default: %(default)s)")
    calibrate.add_argument("--rows", type=int, default=160, metavar="N", help="rows of the reported split (default: %(default)s)")
    calibrate.add_argument("--precision", choices=("no", "bf16"), default="no", help="bf16: where the processor is faster with it")
    calibrate.add_argument("--write", action="store_true", help="also write the fitted numbers into the generator (a local folder)")
    calibrate.set_defaults(run=commands.calibrate)

    styles = add("make-styles", help="make style folders from pictures by a style-transfer network (resumable)")
    styles.add_argument("--images", required=True, type=Path, help="folder of PNG, JPEG or WebP pictures")
    styles.add_argument("--out", required=True, type=Path, help="folder to create or continue")
    styles.add_argument("--train", type=int, default=128, metavar="N", help="training pictures a style (default: %(default)s)")
    styles.add_argument("--test", type=int, default=64, metavar="N", help="held-out pictures a style (default: %(default)s)")
    styles.add_argument("--seed", type=int, default=0, help="of the scenes (default: %(default)s)")
    styles.add_argument("--recoloured", type=int, default=0, metavar="N", help="further styles a picture, in other colours (default: 0)")
    styles.set_defaults(run=commands.make_styles)

    base = add("train-base", help="train a small text-to-image base model from scratch (resumable)")
    base.add_argument("--recipe", default="pixart-mini", help="recipe name or JSON file (default: %(default)s)")
    base.add_argument("--out", required=True, type=Path, help="run folder to create or continue")
    base.add_argument("--tensorboard", action="store_true", help="also write tensorboard events")
    base.set_defaults(run=commands.train_base)

    evaluate = add("evaluate", help="measure a generator beside its baselines (resumable)")
    evaluate.add_argument("generator", help="bundled name, folder, or Hub repository")
    evaluate.add_argument("--zoo", required=True, type=Path, help="the zoo that the generator was trained on, or one of some of its tasks")
    evaluate.add_argument("--tasks", required=True, type=Path, help="folder of task folders")
    evaluate.add_argument("--out", required=True, type=Path, help="folder for evaluation.json and evaluation.md")
    evaluate.add_argument("--samples", type=int, default=20, help="adapters generated a task (default: %(default)s)")
    evaluate.add_argument("--max-rows", type=int, default=200, help="rows or held-out pictures a task (default: %(default)s)")
    evaluate.add_argument("--only", action="append", default=[], metavar="TASK", help="measure this task only; repeatable")
    evaluate.add_argument("--guidance-scale", type=float, help="classifier-free guidance (default: the generator's own)")
    evaluate.add_argument("--steps", type=int, help="denoising steps (default: 20)")
    evaluate.add_argument("--seed", type=int, default=0)
    evaluate.add_argument("--shard", type=_shard, default=(0, 1), metavar="I/N", help="measure every N-th task beginning with I")
    evaluate.add_argument("--card", action="store_true", help="also write the generator's model card (a local generator folder)")
    evaluate.set_defaults(run=commands.evaluate)

    continuum = add("make-continuum", help="mix two styles of a zoo in many ratios (paper, appendix C; resumable)")
    continuum.add_argument("first", help="a trained style of the zoo")
    continuum.add_argument("second", help="another one")
    continuum.add_argument("--zoo", required=True, type=Path, help="a zoo of styles")
    continuum.add_argument("--out", required=True, type=Path, help="folder to create or continue; train on its zoo/ and styles/")
    continuum.add_argument("--count", type=int, default=1000, metavar="N", help="mixtures (default: %(default)s)")
    continuum.add_argument("--seed", type=int, default=0, help="of the pictures (default: %(default)s)")
    continuum.set_defaults(run=commands.make_continuum)

    recover = add("evaluate-continuum", help="recover the ratios of unseen mixtures from their pictures")
    recover.add_argument("generator", help="trained on the continuum")
    recover.add_argument("--continuum", required=True, type=Path, help="made by make-continuum")
    recover.add_argument("--out", required=True, type=Path, help="folder for ratios.json and continuum.png")
    recover.set_defaults(run=commands.evaluate_continuum)

    reproduce = add("reproduce", help="measure a table or the figures of the paper anew (resumable)")
    reproduce.add_argument("name", help="table1, table2, table3 or figures")
    reproduce.add_argument("--tasks", required=True, type=Path, help="folder of task folders; for table2, of styles")
    reproduce.add_argument("--out", required=True, type=Path, help="folder to create or continue; all of them can share one")
    reproduce.add_argument("--recipe", help="recipe name or JSON file (default: reproduce-minilm; for table2 pixart-mini-styles)")
    reproduce.add_argument("--quick", action="store_true", help="few steps and few rows: some minutes instead of hours")
    reproduce.set_defaults(run=commands.reproduce)

    import_task = add("import-task", help="convert a data set (Hub name or local CSV/JSON/Parquet folder) to a task folder")
    import_task.add_argument("dataset", help="Hub name, or a folder with train.csv, test.csv, … (or .json, .parquet)")
    import_task.add_argument("--description", required=True, help="what to decide, in a sentence or two")
    import_task.add_argument("--text-column", action="append", required=True, help="give it twice for pairs")
    import_task.add_argument("--label-column", default="label", help="(default: %(default)s)")
    import_task.add_argument("--out", required=True, type=Path, help="task folder to create")
    import_task.set_defaults(run=commands.import_task)
    return parser


def _shard(text: str) -> tuple[int, int]:
    try:
        index, count = (int(part) for part in text.split("/"))
    except ValueError:
        index, count = -1, 0
    if not 0 <= index < count:
        raise argparse.ArgumentTypeError(f"expected I/N with 0 ≤ I < N, got {text!r}")
    return index, count
