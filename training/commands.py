"""What the commands of `cond-pdiff` do. Heavy imports happen inside them, so that help is instant."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cond_pdiff.errors import ConditionError, CondPDiffError

if TYPE_CHECKING:
    from cond_pdiff.adapter import LoraAdapter
    from cond_pdiff.conditions.style_image import StyleImage
    from cond_pdiff.conditions.task_prompt import TaskPrompt
    from cond_pdiff.conditions.texts import Text
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


def _sampling(arguments: argparse.Namespace) -> dict[str, Any]:
    """What was said about the sampler; the rest is the pipeline's to decide."""
    said = {"num_inference_steps": arguments.steps, "guidance_scale": arguments.guidance_scale}
    return {name: value for name, value in said.items() if value is not None}


def _run_generator(
    condition: TaskPrompt | StyleImage, generator: str, num_adapters: int, seed: int, sampling: dict[str, Any]
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
    return pipe(condition, num_adapters=num_adapters, generator=generators, **sampling)


def _condition(arguments: argparse.Namespace) -> TaskPrompt | StyleImage:
    from cond_pdiff import StyleImage, TaskPrompt

    if arguments.image is None:
        if arguments.description is None:
            raise ConditionError("say what to decide, or show a style: give a description, or --image FILE")
        return TaskPrompt(arguments.description, [_parse_example(example) for example in arguments.example], arguments.label)
    if arguments.description is not None or arguments.example or arguments.label:
        raise ConditionError("give a style image, or a description with examples and labels, not both")
    return StyleImage.open(arguments.image)


def generate(arguments: argparse.Namespace) -> None:
    """Make an adapter from a condition."""
    from cond_pdiff.adapter import ADAPTER_FILES, PREVIEW_FILE
    from cond_pdiff.atomic import check_output_folder

    check_output_folder(arguments.out, (*ADAPTER_FILES, PREVIEW_FILE), arguments.force)
    condition = _condition(arguments)
    if arguments.refine and not arguments.example:
        raise ConditionError("--refine takes its steps on labelled examples; give some with --example")
    generator = arguments.generator or (DEFAULT_GENERATOR if arguments.image is None else DEFAULT_STYLE_GENERATOR)
    count = arguments.num_adapters if arguments.num_adapters is not None else (20 if arguments.example else 1)
    output = _run_generator(condition, generator, count, arguments.seed, _sampling(arguments))
    adapter = output.adapter
    if arguments.refine:
        # Also where the examples prefer the base model: on the mean, a generated adapter is the better start.
        adapter = _refine(output.adapters[output.chosen], condition, arguments.refine)
    adapter.save(arguments.out, overwrite=arguments.force)
    print(output.report)
    if arguments.refine:
        print(f"refined    {arguments.refine} steps on {len(arguments.example)} examples, from candidate {output.chosen + 1} of {count}")
    print(f"adapter    {arguments.out}")


def _refine(adapter: LoraAdapter, condition: TaskPrompt | StyleImage, steps: int) -> LoraAdapter:
    from cond_pdiff import PrototypeClassifier
    from cond_pdiff.few_shot import refine
    from cond_pdiff.hub import Backbone
    from cond_pdiff.models.sentence_backbone import SentenceBackbone

    assert condition.examples
    backbone = SentenceBackbone.load(Backbone.from_json(adapter.metadata["base"]))
    return refine(PrototypeClassifier(backbone, condition.labels, adapter, examples=condition.examples), steps)


def classify(arguments: argparse.Namespace) -> None:
    """Classify texts with an adapter."""
    from cond_pdiff import PrototypeClassifier
    from cond_pdiff.conditions.texts import check_text

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


def preview(arguments: argparse.Namespace) -> None:
    """A sheet of pictures: base and styled, or one style turning into another."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    from cond_pdiff.adapter import LoraAdapter
    from cond_pdiff.atomic import write_bytes
    from cond_pdiff.hub import Backbone
    from cond_pdiff.text_to_image import encode_png, load_text_to_image, make_pictures, picture_sheet, unknown_words

    out = arguments.out or Path(f"{str(arguments.adapter).rstrip('/')}-preview.png")
    if out.exists() and not arguments.force:
        raise CondPDiffError(f"{out} is already there; choose another name, or --force to replace it")
    if out.suffix.lower() != ".png":
        raise CondPDiffError(f"previews are PNG files; name one that ends in .png, got {out}")
    if arguments.mix and arguments.towards:
        raise CondPDiffError("--mix adds a second adapter, --towards shows the way to one; give one of them")
    _check_seed(arguments.seed)
    diffusers_logging.disable_progress_bar()
    transformers_logging.disable_progress_bar()
    mixed = [(arguments.adapter, arguments.scale)]
    if arguments.mix:
        mixed.append((Path(arguments.mix[0]), _number(arguments.mix[1], "the strength of the second adapter")))
    adapters = [(LoraAdapter.load(folder), scale) for folder, scale in mixed]
    for (folder, _), (adapter, _) in zip(mixed, adapters, strict=True):
        if not (adapter.family and adapter.family.paints):
            raise CondPDiffError(f"{folder} is not a style adapter (one for texts? `cond-pdiff classify` tries those)")
    reference = adapters[0][0].metadata.get("base") or {"repo_id": adapters[0][0].spec.base_model}
    pipe = load_text_to_image(Backbone(arguments.base) if arguments.base else Backbone.from_json(reference))
    settings = (arguments.seed, arguments.steps, arguments.guidance_scale)
    if unknown := dict.fromkeys(word for prompt in arguments.prompt for word in unknown_words(pipe, prompt)):
        print(f"note: words that the base model does not know: {', '.join(unknown)}", file=sys.stderr)
    if arguments.towards:
        start, end, captions = adapters[0][0], LoraAdapter.load(arguments.towards), [f"{step / 5:.0%}" for step in range(6)]
        steps = [[(start.interpolate(end, step / 5), arguments.scale)] for step in range(6)]
        rows = {prompt: [make_pictures(pipe, [prompt], mixture, *settings)[0] for mixture in steps] for prompt in arguments.prompt}
    else:
        captions, title = arguments.prompt, "with " + " and ".join(f"{folder.name} at strength {scale:g}" for folder, scale in mixed)
        rows = {"base": make_pictures(pipe, captions, (), *settings), title: make_pictures(pipe, captions, adapters, *settings)}
    sheet = encode_png(picture_sheet(rows, captions))
    write_bytes(out, sheet)
    print(f"pictures   {out}")
    if arguments.card:
        adapters[0][0].save(arguments.adapter, overwrite=True, preview=sheet)
        print(f"card       {arguments.adapter / 'README.md'}")


def _number(text: str, what: str) -> float:
    try:
        return float(text)
    except ValueError as error:
        raise CondPDiffError(f"{what} must be a number, got {text!r}") from error


def convert(arguments: argparse.Namespace) -> None:
    """An adapter as merged weights, or in the keys that ComfyUI reads."""
    from cond_pdiff.adapter import LoraAdapter
    from cond_pdiff.convert import save_comfyui, save_merged
    from cond_pdiff.hub import Backbone

    adapter = LoraAdapter.load(arguments.adapter)
    if arguments.to == "comfyui":
        print(f"LoRA file  {save_comfyui(adapter, arguments.out, arguments.force)}")
        return
    base = Backbone(arguments.base) if arguments.base else None
    print(f"model      {save_merged(adapter, arguments.out, base, arguments.scale, arguments.force)}")


def verify(arguments: argparse.Namespace) -> None:
    """Make an adapter again and compare."""
    from diffusers.utils import logging as diffusers_logging

    from cond_pdiff.adapter import LoraAdapter
    from cond_pdiff.verify import verify

    diffusers_logging.disable_progress_bar()
    result = verify(LoraAdapter.load(arguments.adapter), arguments.generator, arguments.image)
    if not result.only_rounding:
        raise CondPDiffError(str(result))
    print(result)


def list_known(arguments: argparse.Namespace) -> None:
    """The generators that can be loaded without a network."""
    from cond_pdiff.generator_info import known_generators

    rows = [("generator", "makes", "of", "size", "base model")]
    for info in known_generators():
        name = info.name + (f" at {info.revision[:8]}" if info.revision else "")
        kind = info.condition
        rows.append((name, f"{kind.adapters} adapters", f"{len(info.tasks)} {kind.noun}s", f"{info.megabytes:.1f} MB", info.base.repo_id))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def info(arguments: argparse.Namespace) -> None:
    """What a generator is."""
    from cond_pdiff.generator_info import GeneratorInfo

    print(GeneratorInfo.read(arguments.generator))


def push(arguments: argparse.Namespace) -> None:
    """A generator or an adapter → Hub."""
    from cond_pdiff.adapter import PREVIEW_FILE, LoraAdapter
    from cond_pdiff.adapter_card import CARD_FILE
    from cond_pdiff.hub import push_folder
    from cond_pdiff.peft_files import CONFIG_FILE
    from cond_pdiff.publish import push_generator

    options, folder = _push_options(arguments), Path(arguments.folder)
    if (folder / CONFIG_FILE).is_file():
        adapter = LoraAdapter.load(folder)
        if (folder / CARD_FILE).is_file():
            print(push_folder(folder, arguments.repo, commit_message="Push a LoRA adapter", **options))
        else:
            preview = (folder / PREVIEW_FILE).read_bytes() if (folder / PREVIEW_FILE).is_file() else None
            print(adapter.push_to_hub(arguments.repo, preview, **options))
    else:
        print(push_generator(arguments.folder, arguments.repo, **options))


def push_zoo(arguments: argparse.Namespace) -> None:
    """A zoo → data set on the Hub."""
    from cond_pdiff.training.zoo.push import push_zoo
    from cond_pdiff.training.zoo.zoo import Zoo

    print(push_zoo(Zoo(arguments.zoo), arguments.repo, **_push_options(arguments)))


def push_space(arguments: argparse.Namespace) -> None:
    """The demo → Space."""
    from cond_pdiff.publish import push_space

    print(push_space(arguments.app, arguments.repo, tuple(arguments.generator), **_push_options(arguments)))


def _push_options(arguments: argparse.Namespace) -> dict[str, Any]:
    options = {"private": arguments.private, "revision": arguments.revision, "dry_run": arguments.dry_run}
    return options | ({"commit_message": arguments.message} if arguments.message else {})


def demo(arguments: argparse.Namespace) -> None:
    """The main job on the bundled generator."""
    import tempfile

    from cond_pdiff import PrototypeClassifier, TaskPrompt

    print(f"task       {DEMO_DESCRIPTION}\nexamples   {'; '.join(DEMO_EXAMPLES)}")
    prompt = TaskPrompt(DEMO_DESCRIPTION, [_parse_example(example) for example in DEMO_EXAMPLES])
    output = _run_generator(prompt, DEFAULT_GENERATOR, 20, 0, {})
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


def collect(arguments: argparse.Namespace) -> None:
    """Tasks → zoo."""
    import warnings

    from cond_pdiff.training.config import CollectConfig, parse, read_recipe
    from cond_pdiff.training.zoo.collect import collect

    # peft reads every attribute of a transformers model while looking for modules, this deprecated one included.
    warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated", category=FutureWarning)
    config = parse(CollectConfig, read_recipe(arguments.recipe).get("collect", {}), "collect")
    zoo = collect(config, arguments.tasks, arguments.zoo, arguments.shard, arguments.together)
    rest = f"; {len(zoo.missing)} of {len(zoo.jobs)} runs are missing, of other shards" if zoo.missing else ""
    print(f"{sum(len(zoo.runs(name)) for name in (*zoo.task_names, *zoo.unseen_names))} adapters in {zoo.folder}{rest}")


def train(arguments: argparse.Namespace) -> None:
    """Zoo → generator."""
    from cond_pdiff.training.config import read_recipe
    from cond_pdiff.training.processes import processes
    from cond_pdiff.training.stages.train import train

    generator = train(read_recipe(arguments.recipe), arguments.zoo, arguments.tasks, arguments.out, arguments.tensorboard)
    processes().print(f"generator  {generator}")


def tune(arguments: argparse.Namespace) -> None:
    """Generator → generator, by task loss."""
    from diffusers.utils import logging as diffusers_logging

    from cond_pdiff.training.config import read_recipe
    from cond_pdiff.training.processes import processes
    from cond_pdiff.training.stages.tune import tune

    diffusers_logging.disable_progress_bar()
    recipe = read_recipe(arguments.recipe)
    generator = tune(recipe, arguments.generator, arguments.tasks, arguments.out, arguments.tensorboard)
    processes().print(f"generator  {generator}")


def calibrate(arguments: argparse.Namespace) -> None:
    """Generator → what gains it predicts."""
    from diffusers.utils import logging as diffusers_logging

    from cond_pdiff.training.config import parse
    from cond_pdiff.training.evaluate.calibrate import CalibrateConfig, calibrate, check_local, write_gain_model

    diffusers_logging.disable_progress_bar()
    if arguments.write:
        check_local(arguments.generator)
    settings = {name: getattr(arguments, name) for name in ("draws", "rows", "precision")}
    result = calibrate(arguments.generator, arguments.tasks, arguments.out, parse(CalibrateConfig, settings, "calibrate"))
    print((arguments.out / "gain_model.json").read_text(encoding="utf-8"))
    if arguments.write:
        write_gain_model(arguments.generator, result["model"])


def make_styles(arguments: argparse.Namespace) -> None:
    """Style pictures → style folders."""
    from cond_pdiff.training.tasks.make_styles import make_styles

    styles = make_styles(arguments.images, arguments.out, arguments.train, arguments.test, arguments.seed, arguments.recoloured)
    print(f"{len(styles)} styles in {arguments.out}")


def train_base(arguments: argparse.Namespace) -> None:
    """A text-to-image base model from nothing."""
    from cond_pdiff.training.config import read_recipe
    from cond_pdiff.training.processes import processes
    from cond_pdiff.training.text_to_image.train import train_base

    folder = train_base(read_recipe(arguments.recipe), arguments.out, arguments.tensorboard)
    processes().print(f"base model {folder}")


def evaluate(arguments: argparse.Namespace) -> None:
    """Measure a generator beside its baselines."""
    from cond_pdiff.training.config import parse
    from cond_pdiff.training.evaluate.evaluate import evaluate
    from cond_pdiff.training.evaluate.measure import EvaluateConfig

    settings = {name: getattr(arguments, name) for name in ("samples", "max_rows", "seed")}
    config = parse(EvaluateConfig, {**settings, **_sampling(arguments)}, "evaluate")
    if arguments.card and arguments.only:
        raise CondPDiffError("a card tells of all tasks: give --card or --only, not both")
    only = tuple(arguments.only)
    evaluation = evaluate(arguments.generator, arguments.zoo, arguments.tasks, arguments.out, config, arguments.shard, only)
    if evaluation is None:
        print("this shard is done; tasks of other shards are missing: the process that finishes last writes the tables")
        return
    print((arguments.out / "evaluation.md").read_text(encoding="utf-8"))
    if arguments.card:
        from cond_pdiff.training.evaluate.card import write_generator_card

        card = write_generator_card(Path(arguments.generator), arguments.zoo, evaluation, arguments.out / "pictures")
        print(f"card       {card}")


def make_continuum(arguments: argparse.Namespace) -> None:
    """Two styles → mixtures."""
    from cond_pdiff.training.reproduce.continuum import make_continuum
    from cond_pdiff.training.zoo.zoo import Zoo

    zoo, out = Zoo(arguments.zoo), arguments.out
    print(f"continuum  {make_continuum(zoo, arguments.first, arguments.second, out, arguments.count, arguments.seed)}")


def evaluate_continuum(arguments: argparse.Namespace) -> None:
    """How well ratios of mixtures are recovered."""
    from cond_pdiff.training.reproduce.continuum import evaluate_continuum

    result = evaluate_continuum(arguments.generator, arguments.continuum, arguments.out)
    print(f"mean error of the ratio {result['mean_error']}, worst {result['worst_error']}, of {result['tests']} unseen mixtures")


def reproduce(arguments: argparse.Namespace) -> None:
    """A table or the figures of the paper, with their baselines."""
    import warnings

    from diffusers.utils import logging as diffusers_logging

    from cond_pdiff.training.reproduce.reproduce import reproduce

    diffusers_logging.disable_progress_bar()
    # As in `collect`.
    warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated", category=FutureWarning)
    reproduce(arguments.name, arguments.tasks, arguments.out, arguments.recipe, arguments.quick)
    print((arguments.out / f"{arguments.name}.md").read_text(encoding="utf-8"))


def import_task(arguments: argparse.Namespace) -> None:
    """A data set → task folder."""
    from cond_pdiff.training.tasks.tasks import import_dataset

    task = import_dataset(arguments.dataset, arguments.out, arguments.description, arguments.text_column, arguments.label_column)
    print(f"task       {task.folder} with the labels {', '.join(task.labels)}")
