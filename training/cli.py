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
    from cond_pdiff.conditioning import StyleImage, TaskPrompt, Text
    from cond_pdiff.pipelines.pipeline_output import CondPDiffPipelineOutput

DEFAULT_GENERATOR = "cond-pdiff/minilm-text-tasks"
DEFAULT_STYLE_GENERATOR = "cond-pdiff/pixart-mini-styles"
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

    generate = commands.add_parser("generate", help="make an adapter from a task description and examples, or from a style image")
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

    preview = commands.add_parser("preview", help="make pictures with and without a style adapter")
    preview.add_argument("adapter", type=Path, help="adapter folder")
    preview.add_argument("--prompt", action="append", required=True, metavar="TEXT", help="what to show; give it again for more")
    preview.add_argument("--scale", type=float, default=1.0, help="strength of the adapter (default: %(default)s)")
    preview.add_argument("--mix", nargs=2, default=None, metavar=("ADAPTER", "SCALE"), help="a second adapter and its strength")
    preview.add_argument("--towards", type=Path, metavar="ADAPTER", help="show the way to this adapter in six steps instead")
    preview.add_argument("--out", type=Path, metavar="FILE", help="picture to write (default: ADAPTER-preview.png)")
    preview.add_argument("--steps", type=int, default=10, metavar="N", help="denoising steps (default: %(default)s)")
    preview.add_argument("--guidance-scale", type=float, default=3.0, metavar="G", help="guidance; 1 is none (default: %(default)s)")
    preview.add_argument("--seed", type=int, default=0, help="of the noise (default: %(default)s)")
    preview.add_argument("--base", metavar="FOLDER", help="the base model's folder (default: found by its recorded name)")
    preview.add_argument("--force", action="store_true", help="replace a picture that is already there")
    preview.set_defaults(run=_preview)

    verify = commands.add_parser("verify", help="make a generated adapter again from what it records, and compare every bit")
    verify.add_argument("adapter", type=Path, help="adapter folder")
    verify.add_argument("--generator", metavar="NAME", help="where its generator is now (default: by its recorded name and commit)")
    verify.add_argument("--image", type=Path, metavar="FILE", help="the style image that it was made from")
    verify.set_defaults(run=_verify)

    known = commands.add_parser("list", help="list the generators that work offline: bundled ones and those in the Hub cache")
    known.set_defaults(run=_list)

    info = commands.add_parser("info", help="say what a generator makes, of which tasks or styles, and what was measured")
    info.add_argument("generator", help="bundled name, folder, or Hub repository")
    info.set_defaults(run=_info)

    convert = commands.add_parser("convert", help="write an adapter as one file for ComfyUI, or the base model with it merged in")
    convert.add_argument("adapter", type=Path, help="adapter folder")
    convert.add_argument("--to", required=True, choices=("comfyui", "merged"), help="a LoRA file, or a folder with base weights W + ΔW")
    convert.add_argument("--out", required=True, type=Path, metavar="PATH", help="file or folder to write")
    convert.add_argument("--scale", type=float, default=1.0, help="strength of a merged adapter (default: %(default)s)")
    convert.add_argument("--base", metavar="FOLDER", help="the base model's folder (default: found by its recorded name)")
    convert.set_defaults(run=_convert)

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

    styles = commands.add_parser("make-styles", help="make style folders from pictures by a style-transfer network (resumable)")
    styles.add_argument("--images", required=True, type=Path, help="folder of PNG, JPEG or WebP pictures")
    styles.add_argument("--out", required=True, type=Path, help="folder to create or continue")
    styles.add_argument("--train", type=int, default=128, metavar="N", help="training pictures a style (default: %(default)s)")
    styles.add_argument("--test", type=int, default=64, metavar="N", help="held-out pictures a style (default: %(default)s)")
    styles.add_argument("--seed", type=int, default=0, help="of the scenes (default: %(default)s)")
    styles.add_argument("--recoloured", type=int, default=0, metavar="N", help="further styles a picture, in other colours (default: 0)")
    styles.set_defaults(run=_make_styles)

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

    continuum = commands.add_parser("make-continuum", help="mix two styles of a zoo in many ratios (paper, appendix C; resumable)")
    continuum.add_argument("first", help="a trained style of the zoo")
    continuum.add_argument("second", help="another one")
    continuum.add_argument("--zoo", required=True, type=Path, help="a zoo of styles")
    continuum.add_argument("--out", required=True, type=Path, help="folder to create or continue; train on its zoo/ and styles/")
    continuum.add_argument("--count", type=int, default=1000, metavar="N", help="mixtures (default: %(default)s)")
    continuum.add_argument("--seed", type=int, default=0, help="of the pictures (default: %(default)s)")
    continuum.set_defaults(run=_make_continuum)

    recover = commands.add_parser("evaluate-continuum", help="recover the ratios of unseen mixtures from their pictures")
    recover.add_argument("generator", help="trained on the continuum")
    recover.add_argument("--continuum", required=True, type=Path, help="made by make-continuum")
    recover.add_argument("--out", required=True, type=Path, help="folder for continuum.json and continuum.png")
    recover.set_defaults(run=_evaluate_continuum)

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


def _check_seed(seed: int) -> None:
    if not 0 <= seed < 2**63 - 1001:
        raise CondPDiffError(f"seed must be a non-negative 63-bit number, got {seed}")


def _run_generator(
    condition: TaskPrompt | StyleImage, generator: str, num_adapters: int, seed: int, steps: int, guidance_scale: float
) -> CondPDiffPipelineOutput:
    # The command line never needs the Hub for a generator that is bundled; quiet loading bars are not for people.
    import torch
    from diffusers.utils import logging as diffusers_logging

    from cond_pdiff import CondPDiffPipeline
    from cond_pdiff.pipelines.pipeline_cond_pdiff import MAX_ADAPTERS

    diffusers_logging.disable_progress_bar()
    pipe = CondPDiffPipeline.from_pretrained(generator)
    pipe.set_progress_bar_config(disable=True)
    _check_seed(seed)
    generators = [torch.Generator().manual_seed(seed + index) for index in range(min(max(num_adapters, 0), MAX_ADAPTERS))]
    return pipe(condition, num_adapters=num_adapters, generator=generators, num_inference_steps=steps, guidance_scale=guidance_scale)


def _condition(arguments: argparse.Namespace) -> TaskPrompt | StyleImage:
    from cond_pdiff import StyleImage, TaskPrompt

    if arguments.image is None:
        if arguments.description is None:
            raise ConditionError("say what to decide, or show a style: give a description, or --image FILE")
        return TaskPrompt(arguments.description, [_parse_example(example) for example in arguments.example], arguments.label)
    if arguments.description is not None or arguments.example or arguments.label:
        raise ConditionError("give a style image, or a description with examples and labels, not both")
    return StyleImage.open(arguments.image)


def _generate(arguments: argparse.Namespace) -> None:
    from cond_pdiff.adapter import OWN_FILES
    from cond_pdiff.atomic import check_output_folder

    check_output_folder(arguments.out, OWN_FILES, arguments.force)
    condition = _condition(arguments)
    generator = arguments.generator or (DEFAULT_GENERATOR if arguments.image is None else DEFAULT_STYLE_GENERATOR)
    count = arguments.num_adapters if arguments.num_adapters is not None else (20 if arguments.example else 1)
    output = _run_generator(condition, generator, count, arguments.seed, arguments.steps, arguments.guidance_scale)
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


def _preview(arguments: argparse.Namespace) -> None:
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    from cond_pdiff.adapter import LoraAdapter
    from cond_pdiff.atomic import write_bytes
    from cond_pdiff.hub import Backbone
    from cond_pdiff.text_to_image import encode_png, load_text_to_image, make_pictures, picture_sheet

    out = arguments.out or Path(f"{str(arguments.adapter).rstrip('/')}-preview.png")
    if out.exists() and not arguments.force:
        raise CondPDiffError(f"{out} is already there; choose another name, or --force to replace it")
    _check_seed(arguments.seed)
    diffusers_logging.disable_progress_bar()
    transformers_logging.disable_progress_bar()
    mixed = [(arguments.adapter, arguments.scale)]
    if arguments.mix:
        mixed.append((Path(arguments.mix[0]), _number(arguments.mix[1], "the strength of the second adapter")))
    adapters = [(LoraAdapter.load(folder), scale) for folder, scale in mixed]
    reference = adapters[0][0].metadata.get("base") or {"repo_id": adapters[0][0].spec.base_model}
    pipe = load_text_to_image(Backbone(arguments.base) if arguments.base else Backbone.from_json(reference))
    settings = (arguments.seed, arguments.steps, arguments.guidance_scale)
    if arguments.towards:
        start, end, captions = adapters[0][0], LoraAdapter.load(arguments.towards), [f"{step / 5:.0%}" for step in range(6)]
        steps = [[(start.interpolate(end, step / 5), arguments.scale)] for step in range(6)]
        rows = {prompt: [make_pictures(pipe, [prompt], mixture, *settings)[0] for mixture in steps] for prompt in arguments.prompt}
    else:
        captions, title = arguments.prompt, "with " + " and ".join(f"{folder.name} × {scale:g}" for folder, scale in mixed)
        rows = {"base": make_pictures(pipe, captions, (), *settings), title: make_pictures(pipe, captions, adapters, *settings)}
    write_bytes(out, encode_png(picture_sheet(rows, captions)))
    print(f"pictures   {out}")


def _number(text: str, what: str) -> float:
    try:
        return float(text)
    except ValueError as error:
        raise CondPDiffError(f"{what} must be a number, got {text!r}") from error


def _convert(arguments: argparse.Namespace) -> None:
    from cond_pdiff.adapter import LoraAdapter
    from cond_pdiff.convert import save_comfyui, save_merged
    from cond_pdiff.hub import Backbone

    adapter = LoraAdapter.load(arguments.adapter)
    if arguments.to == "comfyui":
        print(f"LoRA file  {save_comfyui(adapter, arguments.out)}")
        return
    base = Backbone(arguments.base) if arguments.base else None
    print(f"model      {save_merged(adapter, arguments.out, base, arguments.scale)}")


def _verify(arguments: argparse.Namespace) -> None:
    from diffusers.utils import logging as diffusers_logging

    from cond_pdiff.adapter import LoraAdapter
    from cond_pdiff.verify import verify

    diffusers_logging.disable_progress_bar()
    result = verify(LoraAdapter.load(arguments.adapter), arguments.generator, arguments.image)
    if not result.same:
        raise CondPDiffError(str(result))
    print(result)


def _list(arguments: argparse.Namespace) -> None:
    from cond_pdiff.generator_info import known_generators

    rows = [("generator", "makes", "of", "size", "base model")]
    for info in known_generators():
        name = info.name + (f" at {info.revision[:8]}" if info.revision else "")
        kind = "styles" if info.makes == "style" else "tasks"
        rows.append((name, f"{info.makes} adapters", f"{len(info.tasks)} {kind}", f"{info.megabytes:.1f} MB", info.base.repo_id))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def _info(arguments: argparse.Namespace) -> None:
    from cond_pdiff.generator_info import GeneratorInfo

    print(GeneratorInfo.read(arguments.generator))


def _demo(arguments: argparse.Namespace) -> None:
    import tempfile

    from cond_pdiff import PrototypeClassifier, TaskPrompt

    print(f"task       {DEMO_DESCRIPTION}\nexamples   {'; '.join(DEMO_EXAMPLES)}")
    prompt = TaskPrompt(DEMO_DESCRIPTION, [_parse_example(example) for example in DEMO_EXAMPLES])
    output = _run_generator(prompt, DEFAULT_GENERATOR, 20, 0, 10, 1.5)
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


def _make_styles(arguments: argparse.Namespace) -> None:
    from cond_pdiff.training.make_styles import make_styles

    styles = make_styles(arguments.images, arguments.out, arguments.train, arguments.test, arguments.seed, arguments.recoloured)
    print(f"{len(styles)} styles in {arguments.out}")


def _train_base(arguments: argparse.Namespace) -> None:
    from cond_pdiff.training.config import read_recipe
    from cond_pdiff.training.text_to_image.train import train_base

    print(f"base model {train_base(read_recipe(arguments.recipe), arguments.out, arguments.tensorboard)}")


def _evaluate(arguments: argparse.Namespace) -> None:
    from cond_pdiff.training.evaluate.evaluate import evaluate
    from cond_pdiff.training.evaluate.measure import EvaluateConfig

    config = EvaluateConfig(arguments.samples, arguments.max_rows, arguments.steps, arguments.guidance_scale, arguments.seed)
    evaluation = evaluate(arguments.generator, arguments.zoo, arguments.tasks, arguments.out, config, arguments.shard)
    if evaluation is None:
        print("this shard is done; tasks of other shards are missing: the process that finishes last writes the tables")
        return
    print((arguments.out / "evaluation.md").read_text(encoding="utf-8"))
    if arguments.card:
        from cond_pdiff.training.evaluate.card import write_generator_card

        card = write_generator_card(Path(arguments.generator), arguments.zoo, evaluation, arguments.out / "pictures")
        print(f"card       {card}")


def _make_continuum(arguments: argparse.Namespace) -> None:
    from cond_pdiff.training.continuum import make_continuum
    from cond_pdiff.training.zoo import Zoo

    zoo, out = Zoo(arguments.zoo), arguments.out
    print(f"continuum  {make_continuum(zoo, arguments.first, arguments.second, out, arguments.count, arguments.seed)}")


def _evaluate_continuum(arguments: argparse.Namespace) -> None:
    from cond_pdiff.training.continuum import evaluate_continuum

    result = evaluate_continuum(arguments.generator, arguments.continuum, arguments.out)
    print(f"mean error of the ratio {result['mean_error']}, worst {result['worst_error']}, of {result['tests']} unseen mixtures")


def _import_task(arguments: argparse.Namespace) -> None:
    from cond_pdiff.training.tasks import import_dataset

    task = import_dataset(arguments.dataset, arguments.out, arguments.description, arguments.text_column, arguments.label_column)
    print(f"task       {task.folder} with the labels {', '.join(task.labels)}")
