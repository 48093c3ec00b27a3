"""How the candidates for one prompt do on its examples."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from cond_pdiff.adapter import LoraAdapter
from cond_pdiff.classifier import PrototypeClassifier
from cond_pdiff.conditioning import Text
from cond_pdiff.models.head_backbone import HeadBackbone
from cond_pdiff.models.sentence_backbone import SentenceBackbone
from cond_pdiff.pipelines.pipeline_output import CandidateScore


def score_candidates(
    base: SentenceBackbone | HeadBackbone,
    adapters: Sequence[LoraAdapter],
    examples: Sequence[tuple[Text, str]],
    labels: Sequence[str],
    max_length: int,
) -> list[CandidateScore]:
    """Accuracy and cross-entropy of each candidate on the prompt's own examples: nothing else is ever selected on.

    Args:
        base: what the adapters are for; with a head, if they bring one.
        labels: in the order of the logits.
    """
    texts = [text for text, _ in examples]
    targets = torch.tensor([labels.index(label) for _, label in examples])
    scores = []
    adapters[0].check_base(base.model)
    for adapter in adapters:
        if isinstance(base, HeadBackbone):
            with adapter.attached(base.model, check=False):
                logits = base.logits(texts, max_length).cpu()
        else:
            logits = PrototypeClassifier(base, labels, None, max_length).with_adapter(adapter).logits(texts).cpu()
        accuracy = (logits.argmax(1) == targets).float().mean()
        scores.append(CandidateScore(round(float(accuracy), 4), round(float(nn.functional.cross_entropy(logits, targets)), 6)))
    return scores
