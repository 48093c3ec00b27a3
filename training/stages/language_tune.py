"""The episodes of `tune` for language models: some texts of a task, answered under an adapter that is generated from others of them."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from cond_pdiff.conditions.task_prompt import TaskPrompt
from cond_pdiff.conditions.texts import Text
from cond_pdiff.errors import TrainingError
from cond_pdiff.training.finetuning.language_fine_tuning import PromptAndAnswer, answer_losses
from cond_pdiff.training.stages.tune import TuneStage, with_words_left_out
from cond_pdiff.training.tasks.answers import prompts
from cond_pdiff.training.tasks.language import Exchange, LanguageTask

Example = tuple[Text, str]


@dataclass(frozen=True)
class LanguageEpisode:
    """Some texts of a task, with their answers.

    Args:
        task: where it is from.
        prompt: what the adapter is generated from: some words of the description, label names where there are some, a few examples.
        asked: what the loss is on: texts that the prompt does not hold, and a right answer to each.
    """

    task: LanguageTask
    prompt: TaskPrompt
    asked: list[Exchange]


class LanguageTuneStage(TuneStage):
    """The stage for causal language models: adapters make the right answers likely, as in fine-tuning.

    An episode has all label names of its task, as its instruction names them all. Of its `examples`, the same number is asked whatever the
    prompt holds, as adapters side by side get equally many rows.
    """

    def read(self, task: LanguageTask) -> list[tuple[Example, Exchange]]:
        """Return the training rows, as examples of a condition and as what is asked."""
        rows, need = list(zip(task.examples("train"), task.exchanges("train"), strict=True)), self.config.examples
        if len(rows) < need:
            raise TrainingError(f"{task.folder}: tune draws {need} training rows an episode (examples), and there are {len(rows)}")
        return rows

    def episodes_loss(self, batch: Sequence[LanguageEpisode]) -> torch.Tensor:
        """Return the mean negative log-likelihood of the answers' tokens, over episodes."""
        base, length = self.pipe.base_model(), self.config.max_length
        pairs = []
        for episode in batch:
            asked = prompts(base, episode.task, episode.asked, length)
            answers = [base.answer_tokens(exchange.answers[0]) for exchange in episode.asked]
            pairs.append([PromptAndAnswer(*pair) for pair in zip(asked, answers, strict=True)])
        return answer_losses(base, pairs).mean()

    def episode(self, rng: random.Random, index: int) -> LanguageEpisode:
        """See `TuneStage`."""
        task, rows, config = self.tasks[index], self.rows[index], self.config
        picked = rng.sample(rows, config.examples)
        shown = min(round(config.shown * len(picked)), len(picked) - 1)
        examples = [] if rng.random() < config.without_examples else [example for example, _ in picked[:shown]]
        plain = task.prompt("tune", 0)
        prompt = replace(plain, description=with_words_left_out(plain.description, rng), examples=examples)
        return LanguageEpisode(task, prompt, [exchange for _, exchange in picked[shown:]])
