"""`push-zoo`: a zoo as a data-set repository on the Hub, with a card."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from cond_pdiff.adapter_card import base_fields
from cond_pdiff.hub import Push, push_folder
from cond_pdiff.training.card import markdown_table, write_card
from cond_pdiff.training.jobs.work import FAILURES, RECEIPTS
from cond_pdiff.training.zoo.zoo import Zoo

COLLECTED = "fine-tuned with `cond-pdiff collect`, several runs a task that differ in data, order and learning rate"
IMPORTED = "trained elsewhere, and brought into one canonical form with `cond-pdiff import-adapters`, which keeps their updates"


def push_zoo(zoo: Zoo, repo_id: str, **options: Any) -> Push:
    """Write the zoo's manifest and card into its folder, and push it all; run it again to go on where it stopped.

    Args:
        options: as for `cond_pdiff.hub.push_folder`.

    Raises:
        TaskDataError: the zoo is not complete.
        HubError: see `push_folder`.
    """
    zoo.check_complete()
    zoo.write_manifest()
    write_zoo_card(zoo, repo_id)
    own = [f"{folder}/*" for folder in (RECEIPTS, FAILURES)]  # they name the machines that collected it
    facts = {"repo_type": "dataset", "commit_message": "Push a zoo of LoRA adapters", "left_out": own}
    return push_folder(zoo.folder, repo_id, **{**facts, **options})


def write_zoo_card(zoo: Zoo, repo_id: str) -> Path:
    """Write `README.md` into the zoo's folder."""
    names = (*zoo.task_names, *zoo.unseen_names)
    runs = {name: zoo.runs(name) for name in names}
    settings = {**zoo.facts["lora"], **zoo.facts["collect"]}
    rows = []
    for name in names:
        facts = zoo.facts["tasks" if name in zoo.task_names else "unseen"][name]
        licence = " ".join(str(facts.get("licence") or "unknown").split()).replace("|", "/")
        metrics = ", ".join(f"{key} {value}" for key, value in runs[name][0].facts.items() if key.startswith("test_"))
        rows.append([name, "yes" if name in zoo.task_names else "no", str(len(runs[name])), metrics or "–", licence])
    fields = {
        "repo_id": repo_id,
        "origin": IMPORTED if zoo.is_imported else COLLECTED,
        "tasks": "" if zoo.is_imported else " --tasks TASKS",
        "num_adapters": sum(map(len, runs.values())),
        "num_tasks": len(zoo.task_names),
        "num_unseen": len(zoo.unseen_names),
        "family": zoo.family.name,
        "condition": zoo.facts["condition"],
        "recipe": zoo.family.recipe or "your recipe",
        "base_model": base_fields(zoo.base.repo_id)["base_model"],
        "base_revision": f" at revision `{zoo.base.revision}`" if zoo.base.revision else "",
        "settings": "\n".join(f"| {key} | `{json.dumps(value)}` |" for key, value in sorted(settings.items())),
        "task_table": markdown_table(["task", "for training", "adapters", "metrics", "licence"], rows),
    }
    return write_card(zoo.folder, "zoo.md", fields)
