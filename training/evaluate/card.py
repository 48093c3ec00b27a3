"""The generator's model card, filled with what was measured."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from cond_pdiff.adapter_card import CARD_FILE, base_fields
from cond_pdiff.atomic import dump_json, write_bytes, write_text
from cond_pdiff.errors import HubError, TaskDataError
from cond_pdiff.hub import BUNDLED_FOLDER, BUNDLED_NAMESPACE, EVAL_RESULTS
from cond_pdiff.pipelines.pipeline_cond_pdiff import CondPDiffPipeline
from cond_pdiff.training.card import millions, write_card
from cond_pdiff.training.evaluate.evaluate import evaluation_of
from cond_pdiff.training.evaluate.table import EvaluationTable, part
from cond_pdiff.training.zoo.zoo import Zoo
from cond_pdiff.weights import weights_megabytes

TUNED = {
    "both": "both `lora_A` and `lora_B`",
    "lora_b": "`lora_B` only, from one frozen `lora_A` that all adapters share",
    "from_multitask": "`lora_B` only, from one adapter that was trained on everything; its `lora_A` all adapters share",
}
"""What fine-tuning changes, in a card's words."""


def check_card_place(generator: str | Path) -> Path:
    """Return the folder of a local generator, into which a card can be written; raise `HubError` if it is none."""
    folder = Path(generator)
    if not (folder / "model_index.json").is_file():
        raise HubError(f"{generator} is not a local generator folder; a card can only be written beside model_index.json")
    return folder


def check_collected(zoo_folder: str | Path) -> None:
    """Raise `TaskDataError` if the zoo was imported, as a card tells how its adapters were trained, or if its family has no card."""
    zoo = Zoo(zoo_folder)
    if zoo.is_imported:
        raise TaskDataError(f"{zoo_folder} was imported: no card tells how its adapters were trained; use evaluation.md as it is")
    if zoo.family.generator_card is None:
        raise TaskDataError(f"there is no card for generators of adapters for a {zoo.family.name}; use evaluation.md as it is")


def write_generator_card(generator: Path, zoo_folder: str | Path, evaluation: dict[str, Any], pictures: Path | None = None) -> Path:
    """Write `README.md` into a local generator folder.

    Args:
        pictures: the evaluation's sheets of pictures; those of the middle of the table, trained and unseen, go into the card.

    Raises:
        HubError: `generator` is not a local folder.
        TaskDataError: the evaluation is of a part of the generator's tasks.
    """
    check_card_place(generator)
    check_collected(zoo_folder)
    zoo, settings = Zoo(zoo_folder), evaluation["settings"]
    if settings["zoo_tasks"] < settings["generator_tasks"]:
        raise TaskDataError(
            f"{zoo_folder} holds {settings['zoo_tasks']} of the {settings['generator_tasks']} tasks that the generator was trained on; "
            "a card tells of all of them: evaluate it beside its whole zoo"
        )
    _, table = evaluation_of(zoo)
    fields = {**_generator_fields(generator, zoo, evaluation), **table.card_fields(evaluation)}
    fields["model_index"] = json.dumps(table.model_index(evaluation, generator.name), ensure_ascii=False)
    fields["pictures"] = _show_pictures(generator, table, evaluation, pictures) if pictures and pictures.is_dir() else ""
    if entries := table.eval_results(evaluation):
        write_text(generator / EVAL_RESULTS / "evaluation.yaml", dump_json(entries))  # JSON is YAML
    return write_card(generator, str(zoo.family.generator_card), fields)


def _show_pictures(generator: Path, table: EvaluationTable, evaluation: dict[str, Any], pictures: Path) -> str:
    """Copy the sheets of the trained and of the unseen style in the middle of the table, and say how the card shows them."""
    lines = []
    main = next(iter(table.metrics))
    for where, title in table.titles.items():
        rows = sorted(part(evaluation["tasks"], seen=where == "zoo"), key=lambda result: result[main]["generated"])
        if rows:
            name = rows[len(rows) // 2]["task"]
            write_bytes(generator / "pictures" / f"{where}.png", (pictures / f"{name}.png").read_bytes())
            lines.append(f"The middle one of the {title}, `{name}`:\n\n![{name}](pictures/{where}.png)\n")
    return "\n".join(lines)


def _own_words(generator: Path, tasks: dict[str, dict[str, Any]]) -> dict[str, str]:
    """Return what a card says of the generator's owner and tasks.

    That is the licence that its card names already: nobody else can choose one. And how it is loaded, and the trained task of the fewest
    labels, to ask for in the example.
    """
    card = generator / CARD_FILE
    text = card.read_text(encoding="utf-8") if card.is_file() else ""
    head = text.split("---\n")[1] if text.startswith("---\n") else ""
    task = min(tasks.values(), key=lambda facts: len(facts.get("labels", ())))
    return {
        "license": "".join(f"{line}\n" for line in head.splitlines() if line.startswith("license")),
        "loads": BUNDLED_NAMESPACE * (generator.resolve().parent == BUNDLED_FOLDER) + generator.name,
        "example_description": json.dumps(task.get("description", ""), ensure_ascii=False),
        "example_labels": json.dumps(task.get("labels", []), ensure_ascii=False),
    }


def _generator_fields(generator: Path, zoo: Zoo, evaluation: dict[str, Any]) -> dict[str, Any]:
    pipe = CondPDiffPipeline.from_pretrained(generator)
    collect, spec = zoo.facts["collect"], pipe.template.spec
    return {
        "name": generator.name,
        **base_fields(spec.base_model),
        **_own_words(generator, pipe.condition_index.config.tasks),
        "base_revision": zoo.base.revision or "unknown",
        "rank": spec.rank,
        "alpha": f"{spec.alpha:g}",
        "target_modules": ", ".join(f"`{name}`" for name in spec.target_modules),
        "num_adapter_params": f"{pipe.template.layout.num_adapter_params:,}",
        "num_params": f"{pipe.template.layout.num_params:,}",
        "size": f"{weights_megabytes(generator):.1f}",
        "autoencoder_size": millions(pipe.components["autoencoder"]),
        "unet_size": millions(pipe.components["unet"]),
        "encoder": type(pipe.condition_encoder).__name__,
        "encoder_size": millions(pipe.components["condition_encoder"]),
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
        "tuned": TUNED["both" if collect["train_lora_a"] else "from_multitask" if collect.get("from_multitask") else "lora_b"],
        "samples": evaluation["settings"]["samples"],
        "max_rows": evaluation["settings"]["max_rows"],
    }
