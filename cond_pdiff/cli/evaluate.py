"""Commands that measure generators: `evaluate`, `calibrate`, `reproduce`, `make-continuum`, `evaluate-continuum`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from cond_pdiff.cli.options import (
    Address,
    AsJson,
    Executor,
    GeneratorName,
    GuidanceScale,
    OwnTasks,
    PerJobOption,
    ResultFolder,
    Seed,
    ShardOption,
    Steps,
    StoreOption,
    Tasks,
    Workers,
    ZooFolder,
    execution,
)
from cond_pdiff.cli.output import hide_loading_bars, hide_peft_warning, report
from cond_pdiff.defaults import (
    CALIBRATION_DRAWS,
    CALIBRATION_ROWS,
    CONTINUUM_MIXTURES,
    DEFAULT_STEPS,
    EVALUATED_ROWS,
    EVALUATED_SAMPLES,
)
from cond_pdiff.errors import CondPDiffError

commands = typer.Typer()


@commands.command()
def evaluate(
    generator: GeneratorName,
    *,
    zoo: ZooFolder,
    tasks: OwnTasks = None,
    out: ResultFolder,
    samples: Annotated[int, typer.Option(metavar="N", help="Adapters generated a task.")] = EVALUATED_SAMPLES,
    max_rows: Annotated[int, typer.Option(metavar="N", help="Rows or held-out pictures a task.")] = EVALUATED_ROWS,
    only: Annotated[list[str] | None, typer.Option(metavar="TASK", help="Measure this task only; repeatable.")] = None,
    guidance_scale: GuidanceScale = None,
    steps: Steps = DEFAULT_STEPS,
    seed: Seed = 0,
    shard: ShardOption = None,
    executor: Executor = "local",
    workers: Workers = 0,
    address: Address = None,
    per_job: PerJobOption = None,
    store: StoreOption = None,
    card: Annotated[bool, typer.Option("--card", help="Also write the generator's model card (a local generator folder).")] = False,
    as_json: AsJson = False,
) -> None:
    """Measure a generator beside its baselines (resumable).

    The zoo is the one that the generator was trained on, or one of some of its tasks.
    """
    if card and only:
        raise CondPDiffError("a card tells of all tasks: give --card or --only, not both")

    from cond_pdiff.training.config import parse
    from cond_pdiff.training.evaluate.card import check_card_place, check_collected, write_generator_card
    from cond_pdiff.training.evaluate.evaluate import evaluate
    from cond_pdiff.training.evaluate.measure import EvaluateConfig

    settings = {"samples": samples, "max_rows": max_rows, "num_inference_steps": steps, "guidance_scale": guidance_scale, "seed": seed}
    config = parse(EvaluateConfig, settings, "evaluate")
    if card:
        check_card_place(generator)
        check_collected(zoo)
    where = execution(executor, workers, address, per_job, store)
    evaluation = evaluate(generator, zoo, tasks, out, config, shard or (0, 1), tuple(only or ()), where)
    if evaluation is None:
        told = "this shard is done; tasks of other shards are missing: the process that finishes last writes the tables"
        report({"finished": False}, told, as_json)
        return
    told = (out / "evaluation.md").read_text(encoding="utf-8")
    if card:
        told += f"\ncard       {write_generator_card(Path(generator), zoo, evaluation, out / 'pictures')}"
    report({"finished": True, **evaluation}, told, as_json)


@commands.command()
def calibrate(
    generator: GeneratorName,
    *,
    tasks: Tasks,
    out: ResultFolder,
    draws: Annotated[int, typer.Option(metavar="N", help="Prompts a task.")] = CALIBRATION_DRAWS,
    rows: Annotated[int, typer.Option(metavar="N", help="Rows of the test split.")] = CALIBRATION_ROWS,
    precision: Annotated[
        Literal["no", "bf16"], typer.Option(metavar="no|bf16", help="bf16: where the processor is faster with it.")
    ] = "no",
    write: Annotated[bool, typer.Option("--write", help="Also write the fitted numbers into the generator (a local folder).")] = False,
    as_json: AsJson = False,
) -> None:
    """Fit what gains a text generator predicts (resumable).

    That is measured on those of the tasks that it was not trained on.
    """
    from cond_pdiff.training.config import parse
    from cond_pdiff.training.evaluate.calibrate import CalibrateConfig, calibrate, check_local, write_gain_model

    hide_loading_bars()
    if write:
        check_local(generator)
    config = parse(CalibrateConfig, {"draws": draws, "rows": rows, "precision": precision}, "calibrate")
    result = calibrate(generator, tasks, out, config)
    if write:
        write_gain_model(generator, result["model"])
    report(result, (out / "gain_model.json").read_text(encoding="utf-8"), as_json)


@commands.command()
def reproduce(
    name: Annotated[str, typer.Argument(metavar="NAME", help="table1, table2, table3 or figures.")],
    *,
    tasks: Tasks,
    out: ResultFolder,
    recipe: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Recipe name[+VARIANT] or JSON file (default: reproduce-minilm; for table2 pixart-mini-styles)."),
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Few steps and few rows: some minutes instead of hours.")] = False,
    executor: Executor = "local",
    workers: Workers = 0,
    address: Address = None,
    per_job: PerJobOption = None,
    as_json: AsJson = False,
) -> None:
    """Measure a table or figures of the paper (resumable).

    All of them can share one folder. For table2, the tasks are a folder of styles.
    """
    from cond_pdiff.training.reproduce.reproduce import reproduce

    hide_loading_bars()
    hide_peft_warning()
    result = reproduce(name, tasks, out, recipe, quick, execution(executor, workers, address, per_job, None))
    report(result, (out / f"{name}.md").read_text(encoding="utf-8"), as_json)


@commands.command("make-continuum")
def make_continuum(
    first: Annotated[str, typer.Argument(metavar="FIRST", help="A trained style of the zoo.")],
    second: Annotated[str, typer.Argument(metavar="SECOND", help="Another one.")],
    *,
    zoo: ZooFolder,
    out: Annotated[Path, typer.Option(metavar="FOLDER", help="Folder to create or continue; train on its zoo/ and styles/.")],
    count: Annotated[int, typer.Option(metavar="N", help="Mixtures.")] = CONTINUUM_MIXTURES,
    seed: Seed = 0,
    as_json: AsJson = False,
) -> None:
    """Mix two styles in many ratios (resumable).

    See the paper's appendix C.
    """
    from cond_pdiff.training.reproduce.continuum import make_continuum
    from cond_pdiff.training.zoo.zoo import Zoo

    made = make_continuum(Zoo(zoo), first, second, out, count, seed)
    report({"continuum": str(made)}, f"continuum  {made}", as_json)


@commands.command("evaluate-continuum")
def evaluate_continuum(
    generator: GeneratorName,
    *,
    continuum: Annotated[Path, typer.Option(metavar="FOLDER", help="Made by make-continuum; the generator was trained on it.")],
    out: ResultFolder,
    as_json: AsJson = False,
) -> None:
    """Recover the ratios of unseen mixtures."""
    from cond_pdiff.training.reproduce.continuum import evaluate_continuum

    result = evaluate_continuum(generator, continuum, out)
    errors = f"mean error of the ratio {result['mean_error']}, worst {result['worst_error']}"
    report(result, f"{errors}, of {result['tests']} unseen mixtures", as_json)
