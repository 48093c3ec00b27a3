"""What a language model answers to a task's texts, and how much of it is right."""

from __future__ import annotations

from collections.abc import Sequence

from cond_pdiff.models.causal_backbone import CausalBackbone
from cond_pdiff.models.token_batches import Tokens
from cond_pdiff.training.tasks.language import Exchange, LanguageTask

SLACK = 4
"""The tokens that an answer may have beyond the longest right one before it is given up: models write words in other pieces, too."""


def predict(
    backbone: CausalBackbone,
    task: LanguageTask,
    exchanges: Sequence[Exchange],
    max_length: int,
    shots: Sequence[Exchange] = (),
    groups: int = 1,
) -> list[str | None]:
    """Answer texts with the model as it is, with whatever adapter is attached; None: an answer that did not end.

    Where the task has label names, the answer is the one that is likeliest, its end included; else what the model writes, the likeliest
    token each time, up to a few tokens more than the longest right answer has.

    Args:
        max_length: tokens of prompt and answer, as in training; long texts are cut where their beginning is enough.
        shots: examples that stand before each text, cut in the same way, with the first of their answers.
        groups: adapters that are `attached_to_groups`: all texts are answered under each, group after group.
    """
    names = [backbone.answer_tokens(answer) for answer in task.instruction.answers]
    asked = prompts(backbone, task, exchanges, max_length, shots)
    if names:
        return [task.instruction.answers[place] for place in backbone.choices(asked, names, groups).argmax(1).tolist()]
    longest = max(len(backbone.answer_tokens(answer)) for _, answers in exchanges for answer in answers)
    return backbone.answers(asked, longest + SLACK, groups)


def prompts(
    backbone: CausalBackbone, task: LanguageTask, exchanges: Sequence[Exchange], max_length: int, shots: Sequence[Exchange] = ()
) -> list[Tokens]:
    """Return the prompts for texts; see `predict`."""
    room = max_length - max((len(backbone.answer_tokens(answer)) for answer in task.instruction.answers), default=0)

    def asked(exchange: Exchange) -> str:
        fits = backbone.fitted(task.instruction, exchange.text, room) if task.cuts_texts else exchange.text
        return task.instruction.prompt(fits)

    before = [(asked(shot), shot.answers[0]) for shot in shots]
    return [backbone.prompt_tokens(asked(exchange), before) for exchange in exchanges]


def accuracy(predicted: Sequence[str | None], exchanges: Sequence[Exchange]) -> float:
    """Return the share of answers that are one of the right ones (exact match), letter case and outer spaces aside."""
    right = [
        answer is not None and _plain(answer) in map(_plain, exchange.answers)
        for answer, exchange in zip(predicted, exchanges, strict=True)
    ]
    return sum(right) / len(right)


def _plain(answer: str) -> str:
    return answer.strip().casefold()
