"""`collect`: fine-tune adapters for a folder of tasks into a zoo. Run the same command again to go on where it stopped."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import random
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file, save
from torch import nn
from tqdm.auto import tqdm

from cond_pdiff.adapter import ADAPTER_FILES, WEIGHTS_FILE, LoraAdapter, LoraSpec, base_fingerprint
from cond_pdiff.atomic import atomic_folder, check_output_folder, dump_json, write_bytes, write_text
from cond_pdiff.classifier import LOGIT_SCALE, PrototypeClassifier
from cond_pdiff.conditioning import label_text
from cond_pdiff.errors import TrainingError
from cond_pdiff.hub import Backbone
from cond_pdiff.models.sentence_backbone import SentenceBackbone, text_length
from cond_pdiff.training.config import CollectConfig
from cond_pdiff.training.tasks import Row, Task, load_tasks
from cond_pdiff.training.zoo import RUN_FILE, Zoo

MULTITASK = "multitask"


def collect(config: CollectConfig, tasks_folder: str | Path, zoo_folder: str | Path, shard: tuple[int, int] = (0, 1)) -> Zoo:
    """Collect every missing adapter of the zoo.

    A finished job is a folder that exists; an interrupted one left nothing. Jobs are ordered by run, so that a zoo cut
    short covers all tasks.

    Args:
        config: see `CollectConfig`.
        tasks_folder: a task collection (see `cond_pdiff.training.tasks`).
        zoo_folder: created, or continued if it was collected with the same settings.
        shard: (i, n) does every n-th job beginning with i, so n processes can share the work.
    """
    tasks = {task.name: task for task in load_tasks(tasks_folder, [*config.tasks, *config.unseen])}
    backbone = SentenceBackbone.load(Backbone.from_json(config.base))
    zoo, lora_a = _open_zoo(config, tasks, Path(zoo_folder), backbone)
    jobs = [(name, run) for run in range(config.runs) for name in (*config.tasks, *(config.unseen if run == 0 else ()))]
    if config.multitask_steps:
        jobs.append((MULTITASK, 0))
    mine = jobs[shard[0] :: shard[1]]
    tuner = _Tuner(backbone, config, zoo, lora_a)
    for name, run in tqdm(mine, desc="collect", unit="adapter"):
        folder = zoo.folder / MULTITASK if name == MULTITASK else zoo.run_folder(name, run)
        if not (folder / RUN_FILE).exists():
            tuner.finetune([tasks[task] for task in config.tasks] if name == MULTITASK else [tasks[name]], name, run, folder)
    zoo.write_manifest()
    return zoo


def _open_zoo(
    config: CollectConfig, tasks: dict[str, Task], folder: Path, backbone: SentenceBackbone
) -> tuple[Zoo, dict[str, torch.Tensor]]:
    """Create the zoo's settings and its `lora_A`, or check that they are the ones asked for."""
    spec = LoraSpec(str(config.base["repo_id"]), config.rank, config.alpha, tuple(sorted(config.target_modules)))
    spec = dataclasses.replace(spec, base_fingerprint=base_fingerprint(backbone.model, spec))
    facts = {
        "base": config.base,
        "lora": spec.to_json(),
        "collect": {name: value for name, value in dataclasses.asdict(config).items() if name not in ("tasks", "unseen", "base")},
        "tasks": {name: _task_facts(tasks[name]) for name in config.tasks},
        "unseen": {name: _task_facts(tasks[name]) for name in config.unseen},
    }
    facts = json.loads(json.dumps(facts))
    if not (folder / "zoo.json").exists():
        # Another shard may be writing the same files aside at this moment.
        temporary = [path.name for path in folder.glob(".*.json.*")] + [path.name for path in folder.glob(".*.safetensors.*")]
        check_output_folder(folder, ("lora_a.safetensors", "zoo.json", *temporary), overwrite=True)
        folder.mkdir(parents=True, exist_ok=True)
        torch.manual_seed(config.seed)
        model = get_peft_model(backbone.model, _peft_config(config))
        lora_a = {key: value for key, value in get_peft_model_state_dict(model).items() if ".lora_A." in key}
        write_bytes(folder / "lora_a.safetensors", save({key: value.contiguous() for key, value in lora_a.items()}))
        model.unload()
        write_text(folder / "zoo.json", dump_json(facts))
    zoo = Zoo(folder)
    if zoo.facts != facts:
        different = sorted(name for name in facts if zoo.facts.get(name) != facts[name])
        raise TrainingError(f"{folder} was collected with other settings ({', '.join(different)} differ); choose another folder")
    return zoo, load_file(folder / "lora_a.safetensors")


def _task_facts(task: Task) -> dict[str, Any]:
    return {"description": task.description, "labels": list(task.labels), "group": task.group, "licence": task.licence}


def _peft_config(config: CollectConfig) -> LoraConfig:
    # peft declares lora_alpha as a whole number, and works with any.
    alpha: Any = config.alpha
    return LoraConfig(r=config.rank, lora_alpha=alpha, target_modules=list(config.target_modules), task_type="FEATURE_EXTRACTION")


class _Tuner:
    """Fine-tunes one adapter after another on one base model."""

    def __init__(self, backbone: SentenceBackbone, config: CollectConfig, zoo: Zoo, lora_a: dict[str, torch.Tensor]) -> None:
        self.backbone, self.config, self.zoo, self.lora_a = backbone, config, zoo, lora_a
        self.spec = LoraSpec.from_json(zoo.facts["lora"])

    def finetune(self, tasks: Sequence[Task], name: str, run: int, folder: Path) -> None:
        """Train one adapter on one task (or, for the multi-task baseline, on many) and save it with its `run.json`."""
        config, started = self.config, time.monotonic()
        seed = int.from_bytes(hashlib.sha256(f"{config.seed}/{name}/{run}".encode()).digest()[:4], "big")
        steps = config.multitask_steps if name == MULTITASK else config.steps
        rate = config.learning_rates[run % len(config.learning_rates)]
        torch.manual_seed(seed)
        model = get_peft_model(self.backbone.model, _peft_config(config))
        try:
            set_peft_model_state_dict(model, self.lora_a)
            trained = []
            for key, parameter in model.named_parameters():
                parameter.requires_grad = ".lora_B." in key or (config.train_lora_a and ".lora_A." in key)
                if parameter.requires_grad:
                    trained.append(parameter)
            loss = self._train(trained, tasks, steps, rate, seed)
            tensors = {key: value.detach().clone() for key, value in get_peft_model_state_dict(model).items()}
        finally:
            model.unload()
        adapter = LoraAdapter(self.spec, tensors, {"base": config.base, "task": name})
        facts = {"task": name, "run": run, "seed": seed, "steps": steps, "learning_rate": rate, "loss": round(loss, 4)}
        if name != MULTITASK:
            adapter = dataclasses.replace(adapter, metadata={**adapter.metadata, "labels": list(tasks[0].labels)})
            facts["accuracy"] = round(self._accuracy(adapter, tasks[0]), 4)
            facts["split"] = tasks[0].report_split
        facts["seconds"] = round(time.monotonic() - started, 1)
        with atomic_folder(folder, (*ADAPTER_FILES, RUN_FILE)) as aside:
            adapter.save(aside)
            facts["sha256"] = hashlib.sha256((aside / WEIGHTS_FILE).read_bytes()).hexdigest()
            (aside / RUN_FILE).write_text(dump_json(facts), encoding="utf-8")

    def _train(self, parameters: list[nn.Parameter], tasks: Sequence[Task], steps: int, rate: float, seed: int) -> float:
        config = self.config
        optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=0.0)
        warmup = max(1, round(config.warmup * steps))
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer,
            lambda step: (step + 1) / warmup if step < warmup else 0.5 + 0.5 * math.cos(math.pi * (step - warmup) / max(1, steps - warmup)),
        )
        rng = random.Random(seed)
        streams = [(task, self._batches(task, rng)) for task in tasks]
        recent: list[float] = []
        for step in range(steps):
            task, batches = streams[0] if len(streams) == 1 else rng.choice(streams)
            loss = self._loss(next(batches), task.labels)
            if not math.isfinite(loss.item()):
                raise TrainingError(f"{task.name}: the loss is {loss.item()} at step {step}; lower the learning rate ({rate})")
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            schedule.step()
            recent = [*recent[-19:], loss.item()]
        return sum(recent) / len(recent)

    def _batches(self, task: Task, rng: random.Random) -> Iterator[list[Row]]:
        """Endless batches of a random subset; texts of like length share a batch, which halves the padding."""
        rows = task.rows("train")
        rows = rng.sample(rows, max(1, round(self.config.subset * len(rows))))
        size = self.config.batch_size
        while True:
            pool = [rng.choice(rows) for _ in range(8 * size)]
            pool.sort(key=lambda row: text_length(row[0]))
            batches = [pool[start : start + size] for start in range(0, len(pool), size)]
            rng.shuffle(batches)
            yield from batches

    def _loss(self, batch: list[Row], labels: Sequence[str]) -> torch.Tensor:
        """Cross-entropy over cosine similarities to the label names' embeddings."""
        prototypes = self.backbone.forward([label_text(label) for label in labels], self.config.max_length)
        embeddings = self.backbone.forward([text for text, _ in batch], self.config.max_length)
        return nn.functional.cross_entropy(LOGIT_SCALE * embeddings @ prototypes.T, torch.tensor([label for _, label in batch]))

    def _accuracy(self, adapter: LoraAdapter, task: Task) -> float:
        rows = task.report_rows(self.config.metric_rows)
        classifier = PrototypeClassifier(self.backbone, task.labels, adapter, self.config.max_length)
        predicted = classifier.logits([text for text, _ in rows]).argmax(-1)
        return float((predicted == torch.tensor([label for _, label in rows])).float().mean())
