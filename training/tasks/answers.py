"""What a language model answers to a task's texts, and how much of it is right."""

from __future__ import annotations

from collections.abc import Sequence

from cond_pdiff.models.causal_backbone import CausalBackbone
from cond_pdiff.training.tasks.language import Exchange, LanguageTask

SLACK = 4
"""The tokens that an answer may have beyond the longest right one before it is given up: models write words in other pieces, too."""


def predict(backbone: CausalBackbone, task: LanguageTask, exchanges: Sequence[Exchange], max_length: int) -> list[str | None]:
    """Answer texts with the model as it is, with whatever adapter is attached; None: an answer that did not end.

    Where the task has label names, the answer is the one that is likeliest, its end included; else what the model writes, the likeliest
    token each time, up to a few tokens more than the longest right answer has.

    Args:
        max_length: tokens of prompt and answer, as in training; long texts are cut where their beginning is enough.
    """
    instruction = task.instruction
    if instruction.labels:
        answers = [backbone.answer_tokens(answer) for answer in instruction.answers]
        limit = max_length - max(map(len, answers))
        prompts = [backbone.fitting_prompt(instruction, text, limit) for text, _ in exchanges]
        return [instruction.answers[place] for place in backbone.choices(prompts, answers).argmax(1).tolist()]
    prompts = [backbone.prompt_tokens(instruction.prompt(text)) for text, _ in exchanges]
    longest = max(len(backbone.answer_tokens(answer)) for _, answers in exchanges for answer in answers)
    return backbone.answers(prompts, longest + SLACK)


def accuracy(predicted: Sequence[str | None], exchanges: Sequence[Exchange]) -> float:
    """Return the share of answers that are one of the right ones (exact match), letter case and outer spaces aside."""
    right = [
        answer is not None and _plain(answer) in map(_plain, exchange.answers)
        for answer, exchange in zip(predicted, exchanges, strict=True)
    ]
    return sum(right) / len(right)


def _plain(answer: str) -> str:
    return answer.strip().casefold()
