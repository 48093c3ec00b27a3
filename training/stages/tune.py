"""`tune`: stage three. A text generator learns what its adapters are for: the loss of the base model with them, over many tasks.

The diffusion of stage two reconstructs trained adapters, which says little about tasks that were not trained on. Here latents are
denoised by the few-step sampler with gradients, decoded, and the base model with the adapter is asked to tell examples of a task
apart; the generator learns from its mistakes. (Text-to-LoRA found such training to generalise better than reconstruction.)
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from cond_pdiff.attach import adapted_names, attached_to_groups
from cond_pdiff.classifier import LOGIT_SCALE, held_out_logits
from cond_pdiff.conditions.task_prompt import TaskPrompt
from cond_pdiff.conditions.texts import Text, label_text
from cond_pdiff.errors import TrainingError
from cond_pdiff.lora import KEY_PREFIX
from cond_pdiff.pipelines.pipeline_cond_pdiff import CondPDiffPipeline
from cond_pdiff.refinement import LEARNING_RATE, halved_blocks
from cond_pdiff.sampling import denoise
from cond_pdiff.training.config import TuneConfig, parse, recorded
from cond_pdiff.training.evaluate.measure import weights_sha256
from cond_pdiff.training.processes import processes
from cond_pdiff.training.stages.loop import fit
from cond_pdiff.training.stages.train import save_generator
from cond_pdiff.training.tasks.tasks import WORD_DROPOUT, Task, load_tasks


@dataclass(frozen=True)
class Episode:
    """A small task: some of a task's classes, with a few examples of each.

    Args:
        task: where it is from.
        prompt: what the adapter is generated from: some words of the description, the classes' names, some of the examples.
        texts: all examples.
        targets: the class of each, shape `(len(texts),)`.
        asked: those that the loss is on: what the prompt does not hold, shape `(len(texts),)`.
    """

    task: Task
    prompt: TaskPrompt
    texts: list[Text]
    targets: torch.Tensor
    asked: torch.Tensor


class ParamsGenerator(nn.Module):
    """The part of a text generator that writes params from prompts, with gradients to the parts that are trained.

    Args:
        pipe: the generator; its U-Net is trained in place, and its decoder if the settings say so.
    """

    def __init__(self, pipe: CondPDiffPipeline, config: TuneConfig) -> None:
        super().__init__()
        autoencoder: Any = pipe.codec.autoencoder
        self.unet, self.autoencoder, self.config = pipe.unet, autoencoder, config
        self._pipe = (pipe,)  # in a tuple: what else belongs to the pipeline is not this module's
        if config.decoder and autoencoder.spans is not None:
            raise TrainingError(f"tune: the decoder of a {type(autoencoder).__name__} is not trained; leave \"decoder\" out")
        decoder = (autoencoder.from_latent, autoencoder.decoder) if config.decoder else ()
        self.requires_grad_(False)
        for part in (self.unet, *decoder):
            if part is not None:
                part.requires_grad_(True)

    def train(self, mode: bool = True) -> ParamsGenerator:
        """Stay in evaluation mode whatever is asked: norms stay as they are in use."""
        return super().train(False)

    def forward(self, prompts: Sequence[TaskPrompt], rng: torch.Generator) -> torch.Tensor:
        """Generate params for each prompt by the pipeline's own steps, fewer of them; shape `(len(prompts), num_params)`."""
        (pipe,), config = self._pipe, self.config
        if pipe.codec.normalizer.device != self.unet.device:
            pipe.to(self.unet.device)
        condition = pipe.condition_encoder.encode(prompts)[0]
        noise = pipe.prepare_latents(len(prompts), rng, None)
        steps, guidance = config.num_inference_steps, self.unet.config.guidance_scale
        return pipe.codec.decode(denoise(self.unet, pipe.scheduler, noise, condition, steps, guidance, rng))


class TuneStage:
    """The stage (see `cond_pdiff.training.stages.loop`) that trains a text generator on the loss of its adapters.

    Args:
        pipe: a text generator, which is trained in place.
        tasks: whose training rows the episodes are drawn from.
    """

    name = "tune"
    at_once = None

    def __init__(self, pipe: CondPDiffPipeline, tasks: Sequence[Task], config: TuneConfig) -> None:
        self.pipe, self.tasks, self.config = pipe, list(tasks), config
        self.rows = [_texts_by_class(task) for task in tasks]
        self.identity: dict[str, Any] = {
            "config": recorded(config),
            "generator": weights_sha256(pipe),
            "tasks": [task.name for task in tasks],
            "rows": self._sha256(),
        }
        self.module: nn.Module = ParamsGenerator(pipe, config)

    def _sha256(self) -> str:
        """Return the sha256 of all that episodes are drawn from."""
        digest = hashlib.sha256()
        for task, rows in zip(self.tasks, self.rows, strict=True):
            digest.update(json.dumps([task.description, task.labels, rows], sort_keys=True).encode())
        return digest.hexdigest()

    def draw(self, batch_size: int, rng: torch.Generator) -> list[Episode]:
        """Draw `batch_size` episodes of tasks that are all equally likely."""
        choice = random.Random(int(torch.randint(2**31, (1,), generator=rng)))
        return [self._episode(choice, index) for index in choice.choices(range(len(self.tasks)), k=batch_size)]

    def loss(self, module: nn.Module, batch: list[Episode], rng: torch.Generator) -> torch.Tensor:
        """Return the mean cross-entropy of episodes' examples under generated adapters, against prototypes with and without examples."""
        template = self.pipe.codec.template
        tensors = torch.vmap(template.to_tensors)(module([episode.prompt for episode in batch], rng))
        texts = [[*map(label_text, episode.prompt.labels), *episode.texts] for episode in batch]
        base = self.pipe.base_model()
        if self.config.refine_steps:
            tensors = self._refined(batch, tensors)
        with attached_to_groups(base.model, template.spec, tensors):
            rows = base.forward_groups(texts, self.config.max_length)
        losses = [self._episode_loss(episode, embeddings) for episode, embeddings in zip(batch, rows, strict=True)]
        return torch.stack(losses).mean()

    def _refined(self, batch: list[Episode], tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Return adapters after some steps on the examples that their conditions hold; an episode without any stays as it is.

        Gradients are those at the refined point (first order, as Reptile and FOMAML take them): what the steps do is a constant.

        Args:
            tensors: of all adapters, shape `(episodes, *shape)`.
        """
        base, spec = self.pipe.base_model(), self.pipe.codec.template.spec
        _, upper = halved_blocks(base.model, adapted_names(tensors))
        start = {key: tensor.detach() for key, tensor in tensors.items()}
        moving = {key: start[key].clone().requires_grad_() for key in (f"{KEY_PREFIX}{name}.lora_B.weight" for name in upper)}
        optimizer = torch.optim.AdamW(moving.values(), lr=LEARNING_RATE, weight_decay=0.0)
        shown = [(episode, (~episode.asked).nonzero()[:, 0]) for episode in batch]
        texts = [[*map(label_text, episode.prompt.labels), *(episode.texts[place] for place in places)] for episode, places in shown]
        for _ in range(self.config.refine_steps if any(len(places) for _, places in shown) else 0):
            with attached_to_groups(base.model, spec, {**start, **moving}):
                rows = base.forward_groups(texts, self.config.max_length)
            losses = []
            for (episode, places), embeddings in zip(shown, rows, strict=True):
                if len(places):
                    targets = episode.targets[places].to(embeddings.device)
                    names, examples = embeddings.split([len(episode.prompt.labels), len(places)])
                    losses.append(nn.functional.cross_entropy(held_out_logits(names, examples, targets), targets))
            optimizer.zero_grad()
            torch.stack(losses).sum().backward()
            optimizer.step()
        return {**tensors, **{key: tensors[key] + (moved.detach() - start[key]) for key, moved in moving.items()}}

    @staticmethod
    def _episode_loss(episode: Episode, embeddings: torch.Tensor) -> torch.Tensor:
        """Return the loss of an episode from the embeddings of label names and examples, shape `(rows, embedding_dim)`."""
        names, examples = embeddings.split([len(episode.prompt.labels), len(episode.texts)])
        targets, asked = episode.targets.to(examples.device), episode.asked.to(examples.device)
        both = (LOGIT_SCALE * examples @ names.T, held_out_logits(names, examples, targets))
        return torch.stack([nn.functional.cross_entropy(logits[asked], targets[asked]) for logits in both]).mean()

    def describe(self, batch: list[Episode]) -> str:
        """Return the names of the episodes' tasks."""
        return ", ".join(episode.task.name for episode in batch)

    def _episode(self, rng: random.Random, index: int) -> Episode:
        task, by_class, config = self.tasks[index], self.rows[index], self.config
        most = min(len(by_class), config.most_labels)
        # Tasks with few classes are mostly asked as they are; of many classes, any few make a task.
        count = most if rng.random() < config.whole_tasks else rng.randint(2, most)
        classes = sorted(rng.sample(sorted(by_class), count))
        each = max(2, config.examples // count)
        picked: list[tuple[Text, int]] = []
        for place, label in enumerate(classes):
            picked += [(text, place) for text in rng.sample(by_class[label], min(each, len(by_class[label])))]
        labels = [task.labels[label] for label in classes]
        hidden = [rng.random() >= config.shown for _ in picked]
        if rng.random() < config.without_examples or not any(hidden):
            hidden = [True] * len(picked)
        words = task.description.split()
        description = " ".join([word for word in words if rng.random() >= WORD_DROPOUT] or words)
        shown = [(text, labels[place]) for (text, place), asked in zip(picked, hidden, strict=True) if not asked]
        targets = torch.tensor([place for _, place in picked])
        return Episode(task, TaskPrompt(description, shown, labels), [text for text, _ in picked], targets, torch.tensor(hidden))


def tune(
    recipe: dict[str, Any], generator: str | Path, tasks_folder: str | Path, run_folder: str | Path, tensorboard: bool = False
) -> Path:
    """Train a finished text generator on the loss of its own tasks.

    Args:
        recipe: its `tune` section (see `TuneConfig`).
        generator: bundled name, folder, or Hub repository.
        tasks_folder: a task collection with the tasks that the generator was trained on.
        run_folder: gets `tune/` (checkpoints, metrics.jsonl) and `generator/`.
        tensorboard: also write tensorboard events.

    Returns:
        The tuned generator's folder. Its U-Net is stored in half precision (and loaded in float32 by default).

    Raises:
        TrainingError: the generator is not of text adapters, or the run folder holds a run with other settings.
        TaskDataError: a task is missing or malformed.
    """
    run_folder = Path(run_folder)
    config = parse(TuneConfig, recipe.get("tune", {}), "tune")
    pipe = CondPDiffPipeline.from_pretrained(generator)
    if not pipe.family.has_prototypes:
        raise TrainingError(
            f"tune needs adapters under which texts are classified by prototypes; this generator makes adapters for a {pipe.family.name}"
        )
    stage = TuneStage(pipe, load_tasks(tasks_folder, list(pipe.condition_index.config.tasks)), config)
    fit(stage, config.fit, run_folder / "tune", tensorboard)
    if processes().is_main_process:
        save_generator(pipe, run_folder / "generator")
    processes().wait_for_everyone()
    return run_folder / "generator"


def _texts_by_class(task: Task) -> dict[int, list[Text]]:
    """Return the training texts of each class that has at least two."""
    by_class: dict[int, list[Text]] = {}
    for text, label in task.rows("train"):
        by_class.setdefault(label, []).append(text)
    found = {label: texts for label, texts in by_class.items() if len(texts) > 1}
    if len(found) < 2:
        raise TrainingError(f"{task.folder}: tune needs two classes with at least two training rows each")
    return found
