"""The generator's model card, filled with what was measured."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path
from string import Template
from typing import Any

from cond_pdiff.atomic import write_text
from cond_pdiff.errors import HubError
from cond_pdiff.pipelines.pipeline_cond_pdiff import CondPDiffPipeline
from cond_pdiff.training.evaluate.text_table import accuracy_table, facts, percent
from cond_pdiff.training.zoo import Zoo


def write_generator_card(generator: Path, zoo_folder: str | Path, evaluation: dict[str, Any]) -> Path:
    """Write `README.md` into a local generator folder.

    Raises:
        HubError: `generator` is not a local folder.
    """
    if not (generator / "model_index.json").is_file():
        raise HubError(f"{generator} is not a local generator folder; a card can only be written beside model_index.json")
    zoo = Zoo(zoo_folder)
    pipe = CondPDiffPipeline.from_pretrained(generator)
    template = Template(files("cond_pdiff.model_cards").joinpath("generator.md").read_text(encoding="utf-8"))
    collect, spec = zoo.facts["collect"], pipe.template.spec
    unseen = [result for result in evaluation["tasks"] if not result["seen"]]
    text = template.substitute(
        name=generator.name,
        base_model=spec.base_model,
        base_revision=zoo.base.revision or "unknown",
        rank=spec.rank,
        alpha=f"{spec.alpha:g}",
        target_modules=", ".join(f"`{name}`" for name in spec.target_modules),
        num_adapter_params=f"{pipe.template.layout.num_adapter_params:,}",
        num_params=f"{pipe.template.layout.num_params:,}",
        size=f"{sum(path.stat().st_size for path in generator.rglob('*.safetensors')) / 1e6:.1f}",
        autoencoder_size=_count(pipe.autoencoder),
        unet_size=_count(pipe.unet),
        latent_shape="×".join(map(str, pipe.autoencoder.latent_shape)),
        normalizer=pipe.normalizer.config.mode,
        prediction_type=pipe.scheduler.config.prediction_type,
        scheduler=type(pipe.scheduler).__name__,
        num_tasks=len(zoo.task_names),
        num_adapters=evaluation["settings"]["zoo_runs"],
        runs=collect["runs"],
        steps=collect["steps"],
        batch_size=collect["batch_size"],
        learning_rates=", ".join(f"{rate:g}" for rate in collect["learning_rates"][: collect["runs"]]),
        max_length=collect["max_length"],
        tuned="both `lora_A` and `lora_B`"
        if collect["train_lora_a"]
        else "`lora_B` only, from one frozen `lora_A` that all adapters share",
        accuracy_table="\n".join(accuracy_table(evaluation)),
        facts="\n".join(facts(evaluation)),
        samples=evaluation["settings"]["samples"],
        max_rows=evaluation["settings"]["max_rows"],
        unseen_section=_unseen_section(unseen),
        task_table="\n".join(_task_row(result) for result in evaluation["tasks"] if result["seen"]),
    )
    path = generator / "README.md"
    write_text(path, text)
    return path


def _count(module: Any) -> str:
    return f"{sum(parameter.numel() for parameter in module.parameters()) / 1e6:.1f} M"


def _unseen_section(results: list[dict[str, Any]]) -> str:
    if not results:
        return ""
    lines = [
        "## Unseen tasks",
        "",
        "Kept out of the zoo. The nearest trained task is given with its similarity, and whether the request is called in- or",
        "out-of-distribution.",
        "",
        "| task | nearest trained task | base | retrieval | multi-task | generated, best | trained |",
        "|---|---|---|---|---|---|---|",
        *(_unseen_row(result) for result in results),
    ]
    return "\n".join(lines) + "\n\n"


def _unseen_row(result: dict[str, Any]) -> str:
    accuracy = result["accuracy"]
    cells = [percent(accuracy[name]) for name in ("base", "retrieval", "multitask", "generated_best", "trained")]
    inside = "in" if result["in_distribution"] else "out"
    return f"| {result['task']} | {result['retrieved']} ({result['similarity']:.2f}, {inside}) | {' | '.join(cells)} |"


def _task_row(result: dict[str, Any]) -> str:
    accuracy = result["accuracy"]
    cells = [percent(accuracy[name]) for name in ("base", "trained", "soup", "generated_mean", "generated_best")]
    return f"| {result['task']} | {' | '.join(cells)} | {result['licence'].replace('|', '/')} |"
