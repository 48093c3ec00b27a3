"""Commands that make adapters and show them: `generate`, `preview`, `demo`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cond_pdiff.cli.options import (
    AdapterName,
    Address,
    AsJson,
    Base,
    Executor,
    Force,
    GuidanceScale,
    LabelColumn,
    Labels,
    PerJobOption,
    Seed,
    Shard,
    ShardOption,
    Steps,
    StoreOption,
    TextColumns,
    Workers,
    execution,
)
from cond_pdiff.cli.output import hide_loading_bars, note, report
from cond_pdiff.cli.texts import LabelledTexts, read_descriptions, read_labelled, spread
from cond_pdiff.defaults import (
    CHOOSE_FROM,
    DEFAULT_STEPS,
    MAX_EXAMPLES,
    REFINE_STEPS,
    STYLE_GENERATOR,
    TEXT_GENERATOR,
)
from cond_pdiff.errors import ConditionError, CondPDiffError
from cond_pdiff.notation import PAIR_SEPARATOR, parse_description, parse_example

if TYPE_CHECKING:
    from cond_pdiff.adapter import LoraAdapter
    from cond_pdiff.conditions.condition import Condition
    from cond_pdiff.conditions.texts import Text
    from cond_pdiff.pipelines.pipeline_cond_pdiff import CondPDiffPipeline
    from cond_pdiff.training.jobs.run import Execution

commands = typer.Typer()


@commands.command()
def generate(
    description: Annotated[str | None, typer.Argument(metavar="DESCRIPTION", help="What to decide, in a sentence or two.")] = None,
    *,
    image: Annotated[
        list[Path] | None,
        typer.Option(metavar="FILE", help="A style image (PNG, JPEG or WebP) instead of a description; repeatable: several of one style."),
    ] = None,
    vector: Annotated[Path | None, typer.Option(metavar="FILE", help="A .npy or .safetensors file with numbers instead.")] = None,
    example: Annotated[
        list[str] | None,
        typer.Option(metavar="TEXT=LABEL", help=f"A labelled example; repeatable; 'A {PAIR_SEPARATOR} B=LABEL' for pairs."),
    ] = None,
    examples: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Labelled examples: CSV, TSV or JSON Lines, or a task folder.")
    ] = None,
    max_examples: Annotated[int, typer.Option(metavar="N", help="Take so many of them, spread over the labels.")] = MAX_EXAMPLES,
    text_column: TextColumns = None,
    label_column: LabelColumn = None,
    label: Labels = None,
    label_description: Annotated[
        list[str] | None, typer.Option(metavar="NAME=TEXT", help="What a label's name means; repeatable, also for one label.")
    ] = None,
    labels: Annotated[
        Path | None, typer.Option(metavar="FILE", help="CSV, TSV or JSON Lines with the columns label and description instead.")
    ] = None,
    free_answers: Annotated[
        bool, typer.Option("--free-answers", help="The examples' answers are texts of their own, and no labels; for language models.")
    ] = False,
    out: Annotated[Path, typer.Option(metavar="FOLDER", help="Where to write the adapter.")],
    generator: Annotated[
        str | None,
        typer.Option(
            metavar="NAME", help=f"Bundled name, folder, or Hub repository (default: {TEXT_GENERATOR}; for images {STYLE_GENERATOR})."
        ),
    ] = None,
    num_adapters: Annotated[
        int | None, typer.Option(metavar="N", help=f"Candidates (default: {CHOOSE_FROM} with examples, else 1).")
    ] = None,
    steps: Steps = DEFAULT_STEPS,
    guidance_scale: GuidanceScale = None,
    seed: Seed = 0,
    refine: Annotated[
        int,
        typer.Option(
            metavar="STEPS", help="Go on from the chosen adapter with so many steps on the examples, say 12, or the pictures, say 20."
        ),
    ] = 0,
    refine_seconds: Annotated[
        float | None, typer.Option(metavar="S", help=f"The same on examples, for so many seconds ({REFINE_STEPS} steps, or --refine's).")
    ] = None,
    caption: Annotated[
        list[str] | None, typer.Option(metavar="TEXT", help="What a picture shows, for --refine; one for each, in order, or none.")
    ] = None,
    batch: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Requests, JSON Lines: an adapter each, below --out; see docs/cluster.md.")
    ] = None,
    shard: ShardOption = None,
    executor: Executor = "local",
    workers: Workers = 0,
    address: Address = None,
    per_job: PerJobOption = None,
    store: StoreOption = None,
    force: Force = False,
    as_json: AsJson = False,
) -> None:
    """Make an adapter from a description or a style image.

    Candidate i uses the seed plus i. With examples, the candidate that does best on them is written, or the base model if it is expected to
    do better. A task folder given as examples has a description and label names, too, which need not be repeated.
    """
    where = execution(executor, workers, address, per_job, store)
    if batch is not None:
        if any((description, image, vector, example, examples, label, label_description, labels, refine, refine_seconds, caption)):
            raise ConditionError("a batch has its conditions, examples and labels in its file, and its adapters are not refined")
        _generate_batch(batch, out, generator or TEXT_GENERATOR, num_adapters, steps, guidance_scale, seed, shard, where, force, as_json)
        return
    if where.is_elsewhere or shard:
        raise CondPDiffError("--executor, --workers, --per-job, --store and --shard are for a --batch of requests")
    described, shown = _descriptions(label_description or [], labels), [parse_example(one) for one in example or []]
    names = label or ([*described] if labels or not (shown or examples) else [])
    if examples is not None:
        found = read_labelled(examples, "train", text_column or (), label_column)
        description, free_answers = description or found.description, free_answers or found.free
        names = names or ([] if free_answers else list(dict.fromkeys([*found.labels, *(name for _, name in shown)])))
        shown = [*_spread(found, max_examples, examples), *shown]
    condition, count = _condition(description, image or [], caption or [], vector, shown, names, free_answers, described), num_adapters
    if count is None:
        count = CHOOSE_FROM if condition.examples else 1
    _check_generation(condition, count, steps, guidance_scale, refine, refine_seconds, out, force)

    from cond_pdiff.sampling import seeded

    pipe = _load(generator or (STYLE_GENERATOR if image else TEXT_GENERATOR))
    drawn = seeded(seed, count)
    output = pipe(condition, count, steps, guidance_scale, drawn, refine_steps=refine, refine_seed=seed, refine_seconds=refine_seconds)
    lines = [str(output.report), *(f"{title:<10} {fact}" for title, fact in output.refinement(condition).items())]
    output.save_adapter(out, overwrite=force)
    facts = {"adapter": str(out), "num_adapters": count, "chosen": output.chosen, "refined": output.adapter.metadata.get("refined")}
    facts["report"] = output.report.to_json()
    report(facts, "\n".join([*lines, f"adapter    {out}"]), as_json)


def _generate_batch(
    file: Path,
    out: Path,
    generator: str,
    num_adapters: int | None,
    steps: int,
    guidance_scale: float | None,
    seed: int,
    shard: Shard | None,
    where: Execution,
    force: bool,
    as_json: bool,
) -> None:
    """Make an adapter for each line of a file, and tell which lines gave none."""
    from cond_pdiff.training.jobs.generate import GenerateWork, generate_batch

    _check_numbers(num_adapters or 1, steps, guidance_scale)
    if not file.is_file():
        raise ConditionError(f"there is no file of requests {file}")
    hide_loading_bars()
    work = GenerateWork(generator, file, out, num_adapters, steps, guidance_scale, seed)
    made = generate_batch(work, where, shard or (0, 1), force)
    for number, why in made.wrong.items():
        note(f"line {number} of {file} was skipped: {why}")
    facts = {"folder": str(out), "adapters": made.jobs.done, "skipped": made.wrong, "failed": made.jobs.failed}
    rest = f"; {len(made.wrong)} lines skipped" if made.wrong else ""
    report(facts, f"{made.jobs.done} adapters in {out}{rest}", as_json)
    made.jobs.check()


def _spread(found: LabelledTexts, most: int, where: Path) -> list[tuple[Text, str]]:
    """Return up to `most` examples, spread over the labels, and note how many are left."""
    from cond_pdiff.sampling import check_count

    check_count("max_examples", most, 10_000)
    if len(found.rows) > most:
        note(f"{most} of {len(found.rows)} rows of {where} are the examples, spread over the labels; --max-examples takes more")
    return spread(found, most)


def _descriptions(written: list[str], file: Path | None) -> dict[str, list[str]]:
    """Return label → descriptions, of both options."""
    described = {} if file is None else read_descriptions(file)
    for name, text in map(parse_description, written):
        described.setdefault(name, []).append(text)
    return described


def _condition(
    description: str | None,
    image: list[Path],
    captions: list[str],
    vector: Path | None,
    examples: list[tuple[Text, str]],
    labels: list[str],
    free: bool,
    descriptions: dict[str, list[str]],
) -> Condition:
    from cond_pdiff.conditions.style_image import StyleImage
    from cond_pdiff.conditions.task_prompt import TaskPrompt
    from cond_pdiff.conditions.vector import Vector

    if captions and not image:
        raise ConditionError("captions say what pictures show; give the pictures with --image")
    if vector is not None:
        if image or description is not None or examples or labels or free or descriptions:
            raise ConditionError("give a vector, or another condition, not both")
        return Vector.of(vector)
    if not image:
        if description is None:
            raise ConditionError("say what to decide, or show a style: give a description, or --image FILE")
        return TaskPrompt(description, examples, labels, free, descriptions)
    if description is not None or examples or labels or free or descriptions:
        raise ConditionError("give a style image, or a description with examples and labels, not both")
    return StyleImage.of(image, captions)


def _check_generation(
    condition: Condition,
    count: int,
    steps: int,
    guidance_scale: float | None,
    refine: int,
    seconds: float | None,
    out: Path,
    force: bool,
) -> None:
    """Refuse numbers out of their ranges, and a folder that is not to be replaced, before a generator is loaded."""
    from cond_pdiff.adapter import ADAPTER_FILES, PREVIEW_FILE
    from cond_pdiff.atomic import check_output_folder
    from cond_pdiff.pipelines.inputs import check_refinement

    _check_numbers(count, steps, guidance_scale)
    check_refinement(condition, refine, 0, seconds)
    check_output_folder(out, (*ADAPTER_FILES, PREVIEW_FILE), force)


def _check_numbers(count: int, steps: int, guidance_scale: float | None) -> None:
    from cond_pdiff.pipelines.inputs import MAX_STEPS
    from cond_pdiff.pipelines.pipeline_cond_pdiff import MAX_ADAPTERS
    from cond_pdiff.sampling import check_count, check_guidance

    check_count("num_adapters", count, MAX_ADAPTERS)
    check_count("num_inference_steps", steps, MAX_STEPS)
    if guidance_scale is not None:
        check_guidance(guidance_scale)


def _load(generator: str) -> CondPDiffPipeline:
    """Load a generator so that it prints nothing while it is loaded and used."""
    from cond_pdiff.pipelines.pipeline_cond_pdiff import CondPDiffPipeline

    hide_loading_bars()
    pipe: CondPDiffPipeline = CondPDiffPipeline.from_pretrained(generator)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@commands.command()
def preview(
    adapter: AdapterName,
    *,
    prompt: Annotated[list[str], typer.Option(metavar="TEXT", help="What to show; repeatable.")],
    scale: Annotated[float, typer.Option(metavar="S", help="Strength of the adapter.")] = 1.0,
    mix: Annotated[tuple[str, float] | None, typer.Option(metavar="ADAPTER SCALE", help="A second adapter and its strength.")] = None,
    towards: Annotated[str | None, typer.Option(metavar="ADAPTER", help="Show the way to this adapter in six steps instead.")] = None,
    out: Annotated[Path | None, typer.Option(metavar="FILE", help="Picture to write (default: ADAPTER-preview.png).")] = None,
    card: Annotated[bool, typer.Option("--card", help="Show the picture in the adapter's card too.")] = False,
    steps: Annotated[int | None, typer.Option(metavar="N", help="Denoising steps (default: the base model's own).")] = None,
    guidance_scale: Annotated[
        float | None, typer.Option(metavar="G", help="Classifier-free guidance; 1 is none (default: the base model's own).")
    ] = None,
    side: Annotated[
        int | None, typer.Option(metavar="PIXELS", min=8, help="Height and width of a picture (default: the base model's own).")
    ] = None,
    seed: Seed = 0,
    base: Base = None,
    force: Force = False,
    as_json: AsJson = False,
) -> None:
    """Make pictures with and without a style adapter."""
    folder = Path(adapter)
    out = out or Path(f"{folder if folder.is_dir() else folder.name}-preview.png")
    if out.exists() and not force:
        raise CondPDiffError(f"{out} is already there; choose another name, or --force to replace it")
    if out.suffix.lower() != ".png":
        raise CondPDiffError(f"previews are PNG files; name one that ends in .png, got {out}")
    if mix and towards:
        raise CondPDiffError("--mix adds a second adapter, --towards shows the way to one; give one of them")
    if card and "/" in adapter and not folder.is_dir():
        raise CondPDiffError(f"--card writes into the adapter's folder, and there is no folder {adapter}")
    places = [(adapter, scale), *([mix] if mix else [])]

    from cond_pdiff.adapter import LoraAdapter
    from cond_pdiff.adapter_card import CARD_FILE
    from cond_pdiff.atomic import write_bytes
    from cond_pdiff.preview import comparison_sheet, interpolation_sheet, load_base
    from cond_pdiff.text_to_image import check_picture_settings, encode_png, unknown_words

    check_picture_settings(prompt, [strength for _, strength in places], steps, guidance_scale)
    adapters = [(Path(name).name, _style_adapter(name), strength) for name, strength in places]
    end = LoraAdapter.load(towards) if towards else None
    _, start, _ = adapters[0]
    hide_loading_bars(of_transformers=True)
    pipe = load_base(start, base)
    if unknown := dict.fromkeys(word for one in prompt for word in unknown_words(pipe, one)):
        note(f"words that the base model does not know: {', '.join(unknown)}")
    if end is not None:
        sheet = interpolation_sheet(pipe, prompt, start, end, scale, seed, steps, guidance_scale, side)
    else:
        sheet = comparison_sheet(pipe, prompt, adapters, seed, steps, guidance_scale, side)
    picture = encode_png(sheet)
    write_bytes(out, picture)
    if card:
        start.save(folder, overwrite=True, preview=picture)
    shown = folder / CARD_FILE if card else None
    text = f"pictures   {out}" + (f"\ncard       {shown}" if shown else "")
    report({"pictures": str(out), "card": str(shown) if shown else None}, text, as_json)


def _style_adapter(name: str) -> LoraAdapter:
    from cond_pdiff.adapter import LoraAdapter

    adapter = LoraAdapter.load(name)
    if not (adapter.family and adapter.family.paints):
        raise CondPDiffError(f"{name} is not a style adapter (one for texts? `cond-pdiff classify` tries those)")
    return adapter


@commands.command()
def demo(as_json: AsJson = False) -> None:
    """Compare a generated adapter with the base model."""
    from cond_pdiff.demo import DESCRIPTION, EXAMPLES, demonstrate

    if not as_json:
        print(f"task       {DESCRIPTION}\nexamples   {'; '.join(EXAMPLES)}", flush=True)
    made = demonstrate(_load(TEXT_GENERATOR))
    report(made.to_json(), made, as_json)
