"""The episodes of `tune` for sentence encoders: small classification tasks, told apart by prototypes."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from cond_pdiff.attach import attached_to_groups
from cond_pdiff.classifier import LOGIT_SCALE, held_out_logits
from cond_pdiff.conditions.task_prompt import TaskPrompt
from cond_pdiff.conditions.texts import Text, label_text
from cond_pdiff.errors import TrainingError
from cond_pdiff.refinement import LEARNING_RATE
from cond_pdiff.training.stages.tune import TuneStage, with_words_left_out
from cond_pdiff.training.tasks.tasks import Task


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


class TextTuneStage(TuneStage):
    """The stage for sentence encoders: adapters put examples of a class near its name, and near each other."""

    def read(self, task: Task) -> dict[int, list[Text]]:
        """Return the training texts of each class that has at least two."""
        by_class: dict[int, list[Text]] = {}
        for text, label in task.rows("train"):
            by_class.setdefault(label, []).append(text)
        found = {label: texts for label, texts in by_class.items() if len(texts) > 1}
        if len(found) < 2:
            raise TrainingError(f"{task.folder}: tune needs two classes with at least two training rows each")
        return found

    def episodes_loss(self, batch: Sequence[Episode]) -> torch.Tensor:
        """Return the mean cross-entropy of episodes' examples, against prototypes with and without examples."""
        texts = [[*map(label_text, episode.prompt.labels), *episode.texts] for episode in batch]
        rows = self.pipe.base_model().forward_groups(texts, self.config.max_length)
        losses = [self._episode_loss(episode, embeddings) for episode, embeddings in zip(batch, rows, strict=True)]
        return torch.stack(losses).mean()

    def refined(self, batch: Sequence[Episode], tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Return adapters after some steps on the examples that their conditions hold; an episode without any stays as it is.

        Gradients are those at the refined point (first order, as Reptile and FOMAML take them): what the steps do is a constant.

        Args:
            tensors: of all adapters, shape `(episodes, *shape)`.
        """
        if not self.config.refine_steps:
            return tensors
        base, spec = self.pipe.base_model(), self.pipe.codec.template.spec
        start = {key: tensor.detach() for key, tensor in tensors.items()}
        moving = {key: tensor.clone().requires_grad_() for key, tensor in start.items() if ".lora_B." in key}
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

    def episode(self, rng: random.Random, index: int) -> Episode:
        """See `TuneStage`."""
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
        description = with_words_left_out(task.description, rng)
        shown = [(text, labels[place]) for (text, place), asked in zip(picked, hidden, strict=True) if not asked]
        targets = torch.tensor([place for _, place in picked])
        return Episode(task, TaskPrompt(description, shown, labels), [text for text, _ in picked], targets, torch.tensor(hidden))
