"""The command `cond-pdiff`. Heavy imports happen inside the commands, so that help is instant."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from cond_pdiff import __version__
from cond_pdiff.errors import ConditionError, CondPDiffError

if TYPE_CHECKING:
    from cond_pdiff.conditioning import Text
    from cond_pdiff.pipelines.pipeline_output import CondPDiffPipelineOutput

DEFAULT_GENERATOR = "cond-pdiff/minilm-text-tasks"
PAIR_SEPARATOR = "|||"
DEMO_DESCRIPTION = "Decide whether a sentence from a review of an electronic product is negative or positive."
DEMO_EXAMPLES = ("battery died after a week=negative", "crisp, bright screen=positive")
DEMO_SENTENCES = (
    ("it keeps disconnecting", "negative"),
    ("worth every penny", "positive"),
    ("the manual is useless and support never answered", "negative"),
    ("sets up in a minute and just works", "positive"),
    ("returned it the same day", "negative"),
    ("i would buy it again without thinking twice", "positive"),
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; errors that a user can meet are printed on one line and give exit status 1."""
    arguments = _parser().parse_args(argv)
    try:
        arguments.run(arguments)
    except (CondPDiffError, OSError) as error:  # OSError: no space left, no permission …
        print(f"cond-pdiff: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("cond-pdiff: interrupted; finished parts are kept, run the same command again to go on", file=sys.stderr)
        return 130
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="cond-pdiff", description="Turn a task description into a LoRA adapter.")
    parser.add_argument("--version", action="version", version=f"cond-pdiff {__version__}")
    commands = parser.add_subparsers(required=True, metavar="command")

    generate = commands.add_parser("generate", help="make an adapter from a task description and examples")
    generate.add_argument("description", help="what to decide, in a sentence or two")
    generate.add_argument(
        "--example", action="append", default=[], metavar="TEXT=LABEL", help=f"a labelled example; 'A {PAIR_SEPARATOR} B=LABEL' for pairs"
    )
    generate.add_argument("--label", action="append", default=[], metavar="NAME", help="a label name (default: those of the examples)")
    generate.add_argument("--out", required=True, type=Path, metavar="FOLDER", help="where to write the adapter")
    generate.add_argument("--generator", default=DEFAULT_GENERATOR, metavar="NAME", help="bundled name, folder, or Hub repository")
    generate.add_argument("--num-adapters", type=int, default=None, metavar="N", help="candidates (default: 20 with examples, else 1)")
    generate.add_argument("--steps", type=int, default=10, metavar="N", help="denoising steps (default: %(default)s)")
    generate.add_argument("--guidance-scale", type=float, default=1.5, metavar="G", help="guidance; 1 is none (default: %(default)s)")
    generate.add_argument("--seed", type=int, default=0, help="candidate i uses seed + i (default: %(default)s)")
    generate.add_argument("--force", action="store_true", help="replace an adapter that is already there")
    generate.set_defaults(run=_generate)

    classify = commands.add_parser("classify", help="classify texts with an adapter")
    classify.add_argument("adapter", type=Path, help="adapter folder")
    classify.add_argument("text", nargs="+", help=f"texts; 'A {PAIR_SEPARATOR} B' for pairs")
    classify.add_argument(
        "--label", action="append", default=[], metavar="NAME", help="label names (default: those recorded with the adapter)"
    )
    classify.add_argument("--base", metavar="FOLDER", help="the base model's folder (default: found by its recorded name)")
    classify.set_defaults(run=_classify)

    demo = commands.add_parser("demo", help="generate an adapter and compare it with the base model")
    demo.set_defaults(run=_demo)

    collect = commands.add_parser("collect", help="fine-tune adapters for a folder of tasks into a zoo (resumable)")
    collect.add_argument("--recipe", default="minilm-text-tasks", help="recipe name or JSON file (default: %(default)s)")
    collect.add_argument("--tasks", required=True, type=Path, help="folder of task folders")
    collect.add_argument("--zoo", required=True, type=Path, help="folder to create or continue")
    collect.add_argument("--shard", type=_shard, default=(0, 1), metavar="I/N", help="do every N-th job beginning with I")
    collect.set_defaults(run=_collect)

    train = commands.add_parser("train", help="train a generator on a zoo (resumable)")
    train.add_argument("--recipe", default="minilm-text-tasks", help="recipe name or JSON file (default: %(default)s)")
    train.add_argument("--zoo", required=True, type=Path, help="made by collect")
    train.add_argument("--tasks", required=True, type=Path, help="folder of task folders, for prompts")
    train.add_argument("--out", required=True, type=Path, help="run folder to create or continue")
    train.add_argument("--tensorboard", action="store_true", help="also write tensorboard events")
    train.set_defaults(run=_train)

    base = commands.add_parser("train-base", help="train a small text-to-image base model from scratch (resumable)")
    base.add_argument("--recipe", default="pixart-mini", help="recipe name or JSON file (default: %(default)s)")
    base.add_argument("--out", required=True, type=Path, help="run folder to create or continue")
    base.add_argument("--tensorboard", action="store_true", help="also write tensorboard events")
    base.set_defaults(run=_train_base)

    evaluate = commands.add_parser("evaluate", help="measure a generator beside its baselines (resumable)")
    evaluate.add_argument("generator", help="bundled name, folder, or Hub repository")
    evaluate.add_argument("--zoo", required=True, type=Path, help="the zoo that the generator was trained on")
    evaluate.add_argument("--tasks", required=True, type=Path, help="folder of task folders")
    evaluate.add_argument("--out", required=True, type=Path, help="folder for evaluation.json and evaluation.md")
    evaluate.add_argument("--samples", type=int, default=20, help="adapters generated a task (default: %(default)s)")
    evaluate.add_argument("--max-rows", type=int, default=200, help="rows of the reported split a task (default: %(default)s)")
    evaluate.add_argument("--guidance-scale", type=float, default=1.5, help="classifier-free guidance (default: %(default)s)")
    evaluate.add_argument("--steps", type=int, default=10, help="denoising steps (default: %(default)s)")
    evaluate.add_argument("--seed", type=int, default=0)
    evaluate.add_argument("--shard", type=_shard, default=(0, 1), metavar="I/N", help="measure every N-th task beginning with I")
    evaluate.add_argument("--card", action="store_true", help="also write the generator's model card (a local generator folder)")
    evaluate.set_defaults(run=_evaluate)

    import_task = commands.add_parser("import-task", help="convert a data set (Hub name or local CSV/JSON/Parquet folder) to a task folder")
    import_task.add_argument("dataset", help="Hub name, or a folder with train.csv, test.csv, … (or .json, .parquet)")
    import_task.add_argument("--description", required=True, help="what to decide, in a sentence or two")
    import_task.add_argument("--text-column", action="append", required=True, help="give it twice for pairs")
    import_task.add_argument("--label-column", default="label", help="(default: %(default)s)")
    import_task.add_argument("--out", required=True, type=Path, help="task folder to create")
    import_task.set_defaults(run=_import_task)
    return parser


def _shard(text: str) -> tuple[int, int]:
    try:
        index, count = (int(part) for part in text.split("/"))
    except ValueError:
        index, count = -1, 0
    if not 0 <= index < count:
        raise argparse.ArgumentTypeError(f"expected I/N with 0 ≤ I < N, got {text!r}")
    return index, count


def _parse_text(text: str) -> Text:
    """A text, or a pair written 'A ||| B'."""
    parts = text.split(PAIR_SEPARATOR)
    if len(parts) > 2:
        raise ConditionError(f"a pair has two parts, got {len(parts)} in {text!r:.80}")
    return (parts[0], parts[1]) if len(parts) == 2 else text


def _parse_example(example: str) -> tuple[Text, str]:
    text, separator, label = example.rpartition("=")
    if not separator:
        raise ConditionError(f"an example is written TEXT=LABEL, got {example!r:.80}")
    return _parse_text(text), label


def _run_generator(
    description: str,
    examples: Sequence[str],
    labels: Sequence[str],
    generator: str,
    num_adapters: int | None,
    seed: int,
    steps: int,
    guidance_scale: float,
) -> CondPDiffPipelineOutput:
    # The command line never needs the Hub for a generator that is bundled; quiet loading bars are not for people.
    import torch
    from diffusers.utils import logging as diffusers_logging

    from cond_pdiff import CondPDiffPipeline, TaskPrompt
    from cond_pdiff.pipelines.pipeline_cond_pdiff import MAX_ADAPTERS

    prompt = TaskPrompt(description, [_parse_example(example) for example in examples], labels)
    diffusers_logging.disable_progress_bar()
    pipe = CondPDiffPipeline.from_pretrained(generator)
    pipe.set_progress_bar_config(disable=True)
    count = num_adapters if num_adapters is not None else (20 if prompt.examples else 1)
    if not 0 <= seed < 2**63 - 1001:
        raise CondPDiffError(f"seed must be a non-negative 63-bit number, got {seed}")
    generators = [torch.Generator().manual_seed(seed + index) for index in range(min(max(count, 0), MAX_ADAPTERS))]
    return pipe(prompt, num_adapters=count, generator=generators, num_inference_steps=steps, guidance_scale=guidance_scale)


def _generate(arguments: argparse.Namespace) -> None:
    from cond_pdiff.adapter import OWN_FILES
    from cond_pdiff.atomic import check_output_folder

    check_output_folder(arguments.out, OWN_FILES, arguments.force)
    output = _run_generator(
        arguments.description,
        arguments.example,
        arguments.label,
        arguments.generator,
        arguments.num_adapters,
        arguments.seed,
        arguments.steps,
        arguments.guidance_scale,
    )
    output.save_adapter(arguments.out, overwrite=arguments.force)
    print(output.report)
    print(f"adapter    {arguments.out}")


def _classify(arguments: argparse.Namespace) -> None:
    from cond_pdiff import PrototypeClassifier
    from cond_pdiff.conditioning import check_text

    texts = [check_text(_parse_text(text), f"text {index}") for index, text in enumerate(arguments.text, 1)]
    classifier = PrototypeClassifier.load(arguments.adapter, arguments.label or None, arguments.base)
    cut = sum(classifier.backbone.count_tokens(text) > classifier.max_length for text in texts)
    if cut:
        limit = classifier.max_length
        print(f"note: {cut} of {len(texts)} texts longer than {limit} tokens; the rest of them is not read", file=sys.stderr)
    probabilities = classifier.logits(texts).softmax(1)
    for text, row in zip(arguments.text, probabilities, strict=True):
        best = int(row.argmax())
        print(f"{classifier.labels[best]:<24} {row[best]:>4.0%}  {text[:100]}")


def _demo(arguments: argparse.Namespace) -> None:
    import tempfile

    from cond_pdiff import PrototypeClassifier

    print(f"task       {DEMO_DESCRIPTION}\nexamples   {'; '.join(DEMO_EXAMPLES)}")
    output = _run_generator(DEMO_DESCRIPTION, DEMO_EXAMPLES, (), DEFAULT_GENERATOR, None, 0, 10, 1.5)
    print(output.report)
    with tempfile.TemporaryDirectory() as folder:
        adapted = PrototypeClassifier.load(output.save_adapter(Path(folder) / "adapter"))
    base = adapted.with_adapter(None)
    texts = [text for text, _ in DEMO_SENTENCES]
    print(f"\n{'base model':<18} {'with the adapter':<18} sentence")
    columns = [classifier.logits(texts).softmax(1) for classifier in (base, adapted)]
    for index, (text, label) in enumerate(DEMO_SENTENCES):
        cells = []
        for probabilities in columns:
            best = int(probabilities[index].argmax())
            mark = "✓" if adapted.labels[best] == label else "✗"
            cells.append(f"{mark} {adapted.labels[best]} {probabilities[index, best]:.0%}")
        print(f"{cells[0]:<18} {cells[1]:<18} {text}")


def _collect(arguments: argparse.Namespace) -> None:
    import warnings

    from cond_pdiff.training.collect import collect
    from cond_pdiff.training.config import CollectConfig, parse, read_recipe

    # peft reads every attribute of a transformers model while looking for modules, this deprecated one included.
    warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated", category=FutureWarning)
    config = parse(CollectConfig, read_recipe(arguments.recipe).get("collect", {}), "collect")
    zoo = collect(config, arguments.tasks, arguments.zoo, arguments.shard)
    print(f"{sum(len(zoo.runs(name)) for name in (*zoo.task_names, *zoo.unseen_names))} adapters in {zoo.folder}")


def _train(arguments: argparse.Namespace) -> None:
    from cond_pdiff.training.config import read_recipe
    from cond_pdiff.training.train import train

    print(f"generator  {train(read_recipe(arguments.recipe), arguments.zoo, arguments.tasks, arguments.out, arguments.tensorboard)}")


def _train_base(arguments: argparse.Namespace) -> None:
    from cond_pdiff.training.config import read_recipe
    from cond_pdiff.training.text_to_image.train import train_base

    print(f"base model {train_base(read_recipe(arguments.recipe), arguments.out, arguments.tensorboard)}")


def _evaluate(arguments: argparse.Namespace) -> None:
    from cond_pdiff.training.evaluate.evaluate import EvaluateConfig, evaluate

    config = EvaluateConfig(arguments.samples, arguments.max_rows, arguments.steps, arguments.guidance_scale, arguments.seed)
    evaluation = evaluate(arguments.generator, arguments.zoo, arguments.tasks, arguments.out, config, arguments.shard)
    if evaluation is None:
        print("this shard is done; tasks of other shards are missing: the process that finishes last writes the tables")
        return
    print((arguments.out / "evaluation.md").read_text(encoding="utf-8"))
    if arguments.card:
        from cond_pdiff.training.evaluate.card import write_generator_card

        print(f"card       {write_generator_card(Path(arguments.generator), arguments.zoo, evaluation)}")


def _import_task(arguments: argparse.Namespace) -> None:
    from cond_pdiff.training.tasks import import_dataset

    task = import_dataset(arguments.dataset, arguments.out, arguments.description, arguments.text_column, arguments.label_column)
    print(f"task       {task.folder} with the labels {', '.join(task.labels)}")
