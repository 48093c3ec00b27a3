"""The generator's model card, filled with what was measured."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path
from string import Template
from typing import Any

from cond_pdiff.atomic import write_text
from cond_pdiff.errors import HubError
from cond_pdiff.pipelines.pipeline_cond_pdiff import CondPDiffPipeline
from cond_pdiff.training.evaluate import style_table, text_table
from cond_pdiff.training.evaluate.text_table import percent
from cond_pdiff.training.zoo import Zoo


def write_generator_card(generator: Path, zoo_folder: str | Path, evaluation: dict[str, Any]) -> Path:
    """Write `README.md` into a local generator folder.

    Raises:
        HubError: `generator` is not a local folder.
    """
    if not (generator / "model_index.json").is_file():
        raise HubError(f"{generator} is not a local generator folder; a card can only be written beside model_index.json")
    zoo = Zoo(zoo_folder)
    fields = {**_common_fields(generator, zoo, evaluation), **(_style_fields if zoo.kind == "style" else _text_fields)(evaluation)}
    template = Template(files("cond_pdiff.model_cards").joinpath(f"{zoo.kind}_generator.md").read_text(encoding="utf-8"))
    path = generator / "README.md"
    write_text(path, template.substitute(fields))
    return path


def _common_fields(generator: Path, zoo: Zoo, evaluation: dict[str, Any]) -> dict[str, Any]:
    pipe = CondPDiffPipeline.from_pretrained(generator)
    collect, spec = zoo.facts["collect"], pipe.template.spec
    return {
        "name": generator.name,
        "base_model": spec.base_model,
        "base_revision": zoo.base.revision or "unknown",
        "rank": spec.rank,
        "alpha": f"{spec.alpha:g}",
        "target_modules": ", ".join(f"`{name}`" for name in spec.target_modules),
        "num_adapter_params": f"{pipe.template.layout.num_adapter_params:,}",
        "num_params": f"{pipe.template.layout.num_params:,}",
        "size": f"{sum(path.stat().st_size for path in generator.rglob('*.safetensors')) / 1e6:.1f}",
        "autoencoder_size": _count(pipe.autoencoder),
        "unet_size": _count(pipe.unet),
        "encoder": type(pipe.condition_encoder).__name__,
        "encoder_size": _count(pipe.condition_encoder),
        "latent_shape": "×".join(map(str, pipe.autoencoder.latent_shape)),
        "normalizer": pipe.normalizer.config.mode,
        "prediction_type": pipe.scheduler.config.prediction_type,
        "scheduler": type(pipe.scheduler).__name__,
        "num_tasks": len(zoo.task_names),
        "num_adapters": evaluation["settings"]["zoo_runs"],
        "runs": collect["runs"],
        "steps": collect["steps"],
        "batch_size": collect["batch_size"],
        "learning_rates": ", ".join(f"{rate:g}" for rate in collect["learning_rates"][: collect["runs"]]),
        "max_length": collect["max_length"],
        "tuned": "both `lora_A` and `lora_B`"
        if collect["train_lora_a"]
        else "`lora_B` only, from one frozen `lora_A` that all adapters share",
        "samples": evaluation["settings"]["samples"],
        "max_rows": evaluation["settings"]["max_rows"],
    }


def _count(module: Any) -> str:
    return f"{sum(parameter.numel() for parameter in module.parameters()) / 1e6:.1f} M"


def _text_fields(evaluation: dict[str, Any]) -> dict[str, str]:
    return {
        "accuracy_table": "\n".join(text_table.accuracy_table(evaluation)),
        "facts": "\n".join(text_table.facts(evaluation)),
        "unseen_section": _section(
            "Unseen tasks",
            "Kept out of the zoo. The nearest trained task is given with its similarity, and whether the request is called in- or\n"
            "out-of-distribution.",
            ["task", "nearest trained task", "base", "retrieval", "multi-task", "generated, best", "trained"],
            [
                _row(result, "accuracy", ("base", "retrieval", "multitask", "generated_best", "trained"), percent)
                for result in _unseen(evaluation)
            ],
        ),
        "task_table": "\n".join(
            _licence_row(result, "accuracy", ("base", "trained", "soup", "generated_mean", "generated_best"), percent)
            for result in _seen(evaluation)
        ),
    }


def _style_fields(evaluation: dict[str, Any]) -> dict[str, str]:
    number = style_table.number
    return {
        "extractor": evaluation["extractor"]["name"],
        "extractor_sha256": evaluation["extractor"]["sha256"],
        "means_table": "\n".join(style_table.means_table(evaluation)),
        "facts": "\n".join(style_table.facts(evaluation)),
        "unseen_section": _section(
            "Unseen styles",
            "Kept out of the zoo; Fréchet distances. The nearest trained style is given with its similarity, and whether the picture is\n"
            "called in- or out-of-distribution.",
            ["style", "nearest trained style", "no LoRA", "retrieval", "multi-task", "generated", "trained"],
            [
                _row(result, "frechet", ("base", "retrieval", "multitask", "generated", "trained"), number)
                for result in _unseen(evaluation)
            ],
        ),
        "task_table": "\n".join(
            _licence_row(result, "frechet", ("base", "trained", "soup", "generated"), number) for result in _seen(evaluation)
        ),
    }


def _seen(evaluation: dict[str, Any]) -> list[dict[str, Any]]:
    return [result for result in evaluation["tasks"] if result["seen"]]


def _unseen(evaluation: dict[str, Any]) -> list[dict[str, Any]]:
    return [result for result in evaluation["tasks"] if not result["seen"]]


def _section(title: str, words: str, columns: list[str], rows: list[str]) -> str:
    """A section with a table, or nothing where there are no rows."""
    if not rows:
        return ""
    lines = [f"## {title}", "", words, "", "| " + " | ".join(columns) + " |", "|---" * len(columns) + "|", *rows]
    return "\n".join(lines) + "\n\n"


def _row(result: dict[str, Any], metric: str, columns: tuple[str, ...], show: Any) -> str:
    inside = "in" if result["in_distribution"] else "out"
    cells = " | ".join(show(result[metric][name]) for name in columns)
    return f"| {result['task']} | {result['retrieved']} ({result['similarity']:.2f}, {inside}) | {cells} |"


def _licence_row(result: dict[str, Any], metric: str, columns: tuple[str, ...], show: Any) -> str:
    cells = " | ".join(show(result[metric][name]) for name in columns)
    return f"| {result['task']} | {cells} | {result['licence'].replace('|', '/')} |"
