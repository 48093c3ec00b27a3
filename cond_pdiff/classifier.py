"""PrototypeClassifier: label names become class prototypes, so an adapter and its base classify without a trained head."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from cond_pdiff.adapter import LoraAdapter
from cond_pdiff.conditioning import Text, check_labels, check_text, label_text
from cond_pdiff.errors import AdapterError
from cond_pdiff.hub import Backbone
from cond_pdiff.models.sentence_backbone import SentenceBackbone

LOGIT_SCALE = 20.0
"""Cosine similarities are multiplied by this before the softmax, in training and in use."""


class PrototypeClassifier:
    """Classify texts by the nearest class prototype in the embedding space of the adapted base model.

    Each class's prototype is the embedding of its label name, under the same adapter as the texts.

    Args:
        backbone: the base model; adapters are attached only while it works.
        labels: label names.
        adapter: None classifies with the base model alone.
        max_length: texts are cut at this many tokens.

    Raises:
        ConditionError: fewer than two labels, or two equal ones.
        AdapterError: the adapter is not for this base model.
    """

    def __init__(
        self, backbone: SentenceBackbone, labels: Sequence[str], adapter: LoraAdapter | None = None, max_length: int = 128
    ) -> None:
        self.backbone = backbone
        self.labels = check_labels(labels)
        self.adapter = adapter
        self.max_length = max_length
        if adapter is not None:
            adapter.check_base(backbone.model)

    @classmethod
    def load(cls, folder: str | Path, labels: Sequence[str] | None = None, base: str | None = None) -> PrototypeClassifier:
        """A classifier from an adapter folder that this package wrote.

        Args:
            labels: default: the labels recorded with the adapter.
            base: a local folder with the base model; default: found by the recorded reference.
        """
        adapter = LoraAdapter.load(folder)
        labels = labels or adapter.metadata.get("labels")
        if not labels:
            raise AdapterError(f"{folder} records no labels; name them (labels=[…], or --label on the command line)")
        reference = adapter.metadata.get("base") or {"repo_id": adapter.spec.base_model}
        backbone = SentenceBackbone.load(Backbone(base) if base else Backbone.from_json(reference))
        return cls(backbone, labels, adapter)

    def with_adapter(self, adapter: LoraAdapter | None) -> PrototypeClassifier:
        """The same classifier with another adapter of an already checked base; for going through many adapters."""
        other = PrototypeClassifier(self.backbone, self.labels, None, self.max_length)
        other.adapter = adapter
        return other

    @torch.no_grad()
    def logits(self, texts: Sequence[Text]) -> torch.Tensor:
        """Scaled cosine similarities, shape `(len(texts), len(labels))`; softmax gives class probabilities."""
        checked = [check_text(text, f"text {index}") for index, text in enumerate(texts, 1)]
        attachment = self.adapter.attach(self.backbone.model, check=False) if self.adapter else None
        try:
            embeddings = self.backbone.embed([*map(label_text, self.labels), *checked], self.max_length)
            prototypes = embeddings[: len(self.labels)]
            return LOGIT_SCALE * embeddings[len(self.labels) :] @ prototypes.T
        finally:
            if attachment:
                attachment.detach()

    def predict(self, texts: Sequence[Text]) -> list[str]:
        """The label of each text."""
        return [self.labels[index] for index in self.logits(texts).argmax(-1).tolist()]
