"""Fine-tuning of a causal language model: it learns to answer a task's prompts, with the loss on the answers alone."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch

from cond_pdiff.adapter import LoraAdapter
from cond_pdiff.errors import ConditionError, TaskDataError
from cond_pdiff.hub import Backbone
from cond_pdiff.lora import LANGUAGE_TASK
from cond_pdiff.models.causal_backbone import CausalBackbone
from cond_pdiff.models.text_backbone import text_length
from cond_pdiff.models.token_batches import Tokens
from cond_pdiff.training.config import CollectConfig
from cond_pdiff.training.finetuning.fine_tuning import batches_by_length
from cond_pdiff.training.precision import mixed_precision, training_device
from cond_pdiff.training.tasks.answers import accuracy, predict, prompts
from cond_pdiff.training.tasks.language import Exchange, LanguageTask


class PromptAndAnswer(NamedTuple):
    """The tokens of a prompt, and of the answer with its end."""

    prompt: Tokens
    answer: Tokens


def answer_losses(backbone: CausalBackbone, batches: Sequence[Sequence[PromptAndAnswer]]) -> torch.Tensor:
    """Return the mean negative log-likelihood of the answers' tokens, their ends included, of each batch, shape `(len(batches),)`.

    Args:
        batches: of equally many pairs, one for each adapter that is attached.
    """
    asked, answers = zip(*(pair for batch in batches for pair in batch), strict=True)
    found = backbone.log_likelihoods(asked, answers, len(batches)).view(len(batches), -1).sum(1)
    counts = [sum(len(answer) for _, answer in batch) for batch in batches]
    return -found / torch.tensor(counts, device=found.device)


class LanguageFineTuning:
    """Fine-tuning of a causal language model; see `cond_pdiff.training.finetuning.fine_tuning.FineTuning`.

    Raises:
        TaskDataError: a task has prompts or answers that are longer than `max_length` together, and may not be cut.
    """

    task_type: str | None = LANGUAGE_TASK

    def __init__(self, config: CollectConfig, tasks: Sequence[LanguageTask]) -> None:
        self.config = config
        self.backbone = CausalBackbone.load(Backbone.from_json(config.base))
        self.model = self.backbone.model.to(training_device())
        self.max_length = min(config.max_length, self.backbone.max_tokens)
        for task in tasks:
            self._check_lengths(task)

    def batches(self, task: LanguageTask, rng: random.Random) -> Iterator[list[PromptAndAnswer]]:
        """Yield batches of a random subset without end, of like length each, with one of the right answers to each text."""
        rows = task.exchanges("train")
        rows = rng.sample(rows, max(1, round(self.config.subset * len(rows))))
        for batch in batches_by_length(rows, self.config.batch_size, rng, _size):
            yield [self._tokens(task, exchange, rng.choice(exchange.answers)) for exchange in batch]

    def losses(self, batches: Sequence[list[PromptAndAnswer]], tasks: Sequence[LanguageTask]) -> torch.Tensor:
        """Return the loss of each task's batch; see `answer_losses`."""
        return answer_losses(self.backbone, batches)

    def metrics(self, adapter: LoraAdapter, task: LanguageTask) -> dict[str, Any]:
        """Measure the share of right answers on rows of the test split."""
        exchanges = task.test_exchanges(self.config.metric_rows)
        with adapter.attached(self.model, check=False), mixed_precision(self.config.precision, next(self.model.parameters()).device):
            found = accuracy(predict(self.backbone, task, exchanges, self.max_length), exchanges)
        return {"accuracy": round(found, 4), "split": task.reported_split}

    def _tokens(self, task: LanguageTask, exchange: Exchange, answer: str) -> PromptAndAnswer:
        (prompt,) = prompts(self.backbone, task, [exchange], self.max_length)
        return PromptAndAnswer(prompt, self.backbone.answer_tokens(answer))

    def _check_lengths(self, task: LanguageTask) -> None:
        """Refuse a task of which something does not fit; what is only found in the middle costs hours."""
        rows = task.exchanges("train")
        try:
            if task.cuts_texts:
                prompts(self.backbone, task, [min(rows, key=_size)], self.max_length)
                return
            for exchange in rows:
                for answer in exchange.answers:
                    prompt, tokens = self._tokens(task, exchange, answer)
                    if len(prompt) + len(tokens) > self.max_length:
                        raise ConditionError(
                            f"{len(prompt)} tokens of a prompt and {len(tokens)} of its answer are more than {self.max_length}: "
                            f"{exchange.text!r:.60} → {answer!r:.60}; allow more (max_length), the model reads {self.backbone.max_tokens}"
                        )
        except ConditionError as error:
            raise TaskDataError(f"{task.folder}: {error}") from error


def _size(exchange: Exchange) -> int:
    return text_length(exchange.text) + len(exchange.answers[0])
