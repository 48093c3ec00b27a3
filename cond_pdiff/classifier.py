"""PrototypeClassifier: label names become class prototypes, so an adapter and its base classify without a trained head."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import nn

from cond_pdiff.adapter import LoraAdapter
from cond_pdiff.attach import attached_to_groups
from cond_pdiff.conditions.texts import Text, check_described, check_examples, check_text, label_text, with_descriptions
from cond_pdiff.errors import AdapterError, ConditionError
from cond_pdiff.hub import Backbone
from cond_pdiff.models.sentence_backbone import SentenceBackbone

LOGIT_SCALE = 20.0
"""The factor of cosine similarities in front of the softmax, in training and in use."""

DEFAULT_MAX_LENGTH = 128
"""The number of tokens at which a text is cut, where neither the caller nor the adapter says it."""

SIDE_BY_SIDE = 8
"""The most adapters that texts are embedded under at once: more take as long, and more memory."""

NAME_WEIGHT = 2.0
"""The weight of a class's name in its prototype: it counts as much as so many of the class's examples."""


def held_out_logits(names: torch.Tensor, examples: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Return scaled cosine similarities of examples to prototypes that do not hold them, nor one example of each other class.

    Without the judged example alone, its own class would have fewer examples than the others: of classes that cannot be told apart
    by more than chance, every example would then be called wrong. So the first examples of all classes are held out together, then
    the second ones …

    Args:
        names: embeddings of the label names, shape `(num_labels, embedding_dim)`.
        examples: their embeddings, shape `(num_examples, embedding_dim)`.
        targets: index of each example's label, shape `(num_examples,)`.

    Returns:
        shape `(num_examples, num_labels)`.
    """
    fold = place_in_class(targets, len(names))
    folds = int(fold.max()) + 1 if len(fold) else 0
    place, shape = fold * len(names) + targets, (folds, len(names))
    sums = _summed(examples, targets, len(names)) - _summed(examples, place, folds * len(names)).unflatten(0, shape)
    counts = targets.bincount(minlength=len(names)) - place.bincount(minlength=folds * len(names)).unflatten(0, shape)
    return LOGIT_SCALE * torch.einsum("ed,eld->el", examples, _prototypes(names, sums, counts)[fold])


def place_in_class(targets: torch.Tensor, num_labels: int) -> torch.Tensor:
    """Return how many examples of its class stand before each, shape of `targets`."""
    of_class = nn.functional.one_hot(targets, num_labels)
    return (of_class.cumsum(0) * of_class).sum(1) - 1


def prototype_logits(names: torch.Tensor, examples: torch.Tensor, targets: torch.Tensor, asked: torch.Tensor) -> torch.Tensor:
    """Return scaled cosine similarities of texts to prototypes of names and examples.

    Args:
        names, examples, targets: see `held_out_logits`.
        asked: embeddings of the texts, shape `(num_texts, embedding_dim)`.

    Returns:
        shape `(num_texts, num_labels)`.
    """
    return LOGIT_SCALE * asked @ class_prototypes(names, examples, targets).T


def class_prototypes(names: torch.Tensor, examples: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Return the unit-length prototypes of names and examples (see `held_out_logits`), shape of `names`."""
    return _prototypes(names, _summed(examples, targets, len(names)), targets.bincount(minlength=len(names)))


def _summed(examples: torch.Tensor, groups: torch.Tensor, count: int) -> torch.Tensor:
    """Return the sum of each group's examples, shape `(count, embedding_dim)`."""
    return examples.new_zeros(count, examples.shape[1]).index_add(0, groups, examples)


def _prototypes(names: torch.Tensor, sums: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    """Return unit-length prototypes, shape of `sums`.

    Texts are more like texts than like names, so that classes with examples would attract all texts: a class without examples gets
    the mean of the others' sums.

    Args:
        names: embeddings of the label names, shape `(num_labels, embedding_dim)`.
        sums: of the embeddings of each class's examples, shape `(…, num_labels, embedding_dim)`.
        counts: examples of each class, shape `(…, num_labels)`.
    """
    without = (counts == 0)[..., None]
    share = sums.sum(-2, keepdim=True) / (~without).sum(-2, keepdim=True).clamp(min=1)
    return nn.functional.normalize(NAME_WEIGHT * names + sums + without * share, dim=-1)


def recorded_labels(adapter: LoraAdapter) -> dict[str, Sequence[str]]:
    """Return the label names that an adapter records, each with its descriptions; none where it records none."""
    labels, described = adapter.metadata.get("labels") or (), adapter.metadata.get("label_descriptions") or {}
    return with_descriptions(labels, described)


def _recorded_length(adapter: LoraAdapter | None) -> int:
    length = adapter.metadata.get("max_length", DEFAULT_MAX_LENGTH) if adapter else DEFAULT_MAX_LENGTH
    if isinstance(length, bool) or not isinstance(length, int) or length < 1:
        raise AdapterError(f"the adapter records a max_length of {length!r}; expected a number of tokens, at least 1")
    return length


def _stacked(adapters: Sequence[LoraAdapter], model: nn.Module) -> dict[str, torch.Tensor]:
    """Return the tensors of adapters of one specification, shape `(adapters, *shape)` each, as the model's weights are."""
    weight = next(model.parameters())
    return {key: torch.stack([adapter.tensors[key] for adapter in adapters]).to(weight) for key in adapters[0].tensors}


class PrototypeClassifier:
    """A classifier of texts by the nearest class prototype in the embedding space of the adapted base model.

    Zero-shot (names only), a class's prototype is the embedding of its label name, under the same adapter as the texts; k-shot (with
    examples), it is the direction of the sum of its examples' embeddings and `NAME_WEIGHT` times its name's. A class without examples,
    where others have some, gets the mean over those others of their sums.

    Args:
        backbone: the base model; adapters are attached only while it works.
        labels: label names, or name → description (see `TaskPrompt`): the mean of both is then taken in the name's place.
        adapter: None classifies with the base model alone.
        max_length: texts are cut at this many tokens; default: as many as the adapter records, which is what it was trained with, else
            `DEFAULT_MAX_LENGTH`.
        examples: `(text, label)` pairs.

    Raises:
        ConditionError: fewer than two labels, or two equal ones, or an example of another label.
        AdapterError: the adapter is not for this base model.
    """

    def __init__(
        self,
        backbone: SentenceBackbone,
        labels: Sequence[str] | Mapping[str, str | Sequence[str]],
        adapter: LoraAdapter | None = None,
        max_length: int | None = None,
        examples: Sequence[tuple[Text, str]] = (),
    ) -> None:
        self.backbone = backbone
        self.labels, self.descriptions = check_described(labels)
        self.examples = check_examples(examples, self.labels)
        self.adapter = adapter
        self.max_length = _recorded_length(adapter) if max_length is None else max_length
        if adapter is not None and adapter.spec.modules_to_save:
            raise AdapterError(
                f"the adapter brings a trained head ({', '.join(adapter.spec.modules_to_save)}), so it needs no prototypes: "
                "attach it to an AutoModelForSequenceClassification, or load it there with peft"
            )
        if adapter is not None:
            if adapter.family and not adapter.family.has_prototypes:
                raise AdapterError(f"texts are not classified by prototypes under adapters for a {adapter.family.name}")
            adapter.check_base(backbone.model)

    @classmethod
    def load(
        cls,
        folder: str | Path,
        labels: Sequence[str] | Mapping[str, str | Sequence[str]] | None = None,
        base: str | None = None,
        examples: Sequence[tuple[Text, str]] | None = None,
    ) -> PrototypeClassifier:
        """Load a classifier from an adapter folder that this package wrote.

        Args:
            labels: default: the labels recorded with the adapter, and their descriptions.
            base: a local folder with the base model; default: found by the recorded reference.
            examples: `(text, label)` pairs for the prototypes; default: those recorded with the adapter when it was chosen or
                refined, unless other labels are given.
        """
        adapter = LoraAdapter.load(folder)
        if adapter.family and not (adapter.family.has_prototypes or adapter.family.brings_head):
            raise AdapterError(f"{folder} is not an adapter for texts (is it a style? `cond-pdiff preview` shows those)")
        if examples is None:
            examples = () if labels else adapter.metadata.get("prototype_examples", ())
        labels = labels or recorded_labels(adapter)
        if not labels:
            raise AdapterError(f"{folder} records no labels; name them (labels=[…], or --label on the command line)")
        backbone = SentenceBackbone.load(Backbone(base) if base else adapter.base)
        return cls(backbone, labels, adapter, examples=examples)

    def with_adapter(self, adapter: LoraAdapter | None) -> PrototypeClassifier:
        """Return the same classifier with another adapter of an already checked base; for going through many adapters."""
        other = PrototypeClassifier(self.backbone, self.labels, None, self.max_length, self.examples)
        other.descriptions, other.adapter = self.descriptions, adapter
        return other

    @property
    def targets(self) -> torch.Tensor:
        """The index of each example's label, shape `(num_examples,)`."""
        return torch.tensor([self.labels.index(label) for _, label in self.examples], dtype=torch.long)

    @torch.no_grad()
    def logits(self, texts: Sequence[Text]) -> torch.Tensor:
        """Return scaled cosine similarities, shape `(len(texts), len(labels))`; softmax gives class probabilities.

        Raises:
            ConditionError: not a list of texts or pairs, or an empty one among them.
        """
        if isinstance(texts, str):
            raise ConditionError(f"give a list of texts, got the single string {texts!r:.80}")
        names, examples, asked = self._embed([check_text(text, f"text {index}") for index, text in enumerate(texts, 1)])
        return prototype_logits(names, examples, self.targets.to(names.device), asked)

    def probabilities(self, texts: Sequence[Text]) -> list[dict[str, float]]:
        """Return label → probability of each text, in the order of the labels; see `logits`."""
        return [dict(zip(self.labels, row, strict=True)) for row in self.logits(texts).softmax(1).tolist()]

    @torch.no_grad()
    def example_embeddings(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Embed the label names and the examples, shapes `(len(labels), embedding_dim)`, `(len(examples), embedding_dim)`."""
        names, examples, _ = self._embed([])
        return names, examples

    @torch.no_grad()
    def base_embeddings(self, at_hand: Mapping[Text, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """Return what `example_embeddings` returns without an adapter; to rounding.

        Args:
            at_hand: the base model's own embeddings of texts that were read whole; of shorter ones than `max_length`, they are taken.
        """
        texts = self._own_texts
        tokens = dict(zip(texts, self.backbone.token_counts(texts), strict=True))
        rows = {text: at_hand[text] for text, count in tokens.items() if text in at_hand and count <= self.max_length}
        missing = [text for text in tokens if text not in rows]
        rows |= dict(zip(missing, self.backbone.embed(missing, self.max_length), strict=True))
        device = next(self.backbone.model.parameters()).device
        names, examples, _ = self._parted(torch.stack([rows[text].to(device) for text in texts]))
        return names, examples

    def embeddings_under(self, adapters: Sequence[LoraAdapter]) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Return what `example_embeddings` returns `with_adapter` each of several; to rounding.

        Neighbours of one specification go through the base model side by side, up to `SIDE_BY_SIDE` of them.

        Args:
            adapters: for the classifier's base.
        """
        found: list[torch.Tensor] = []
        for spec, alike in itertools.groupby(adapters, key=lambda adapter: adapter.spec):
            while some := list(itertools.islice(alike, SIDE_BY_SIDE)):
                with attached_to_groups(self.backbone.model, spec, _stacked(some, self.backbone.model)):
                    found += self.backbone.embed_under(len(some), self._own_texts, self.max_length)
        return [self._parted(rows)[:2] for rows in found]

    def _embed(self, texts: Sequence[Text]) -> tuple[torch.Tensor, ...]:
        """Return unit-length embeddings of the label names, the examples and the texts, under the adapter; a row each."""
        with self.adapter.attached(self.backbone.model, check=False) if self.adapter else contextlib.nullcontext():
            return self._parted(self.backbone.embed([*self._own_texts, *texts], self.max_length))

    @property
    def name_texts(self) -> list[Text]:
        """The label names as words, then all descriptions."""
        return [*map(label_text, self.labels), *(text for texts in self._described for text in texts)]

    @property
    def _described(self) -> list[Sequence[str]]:
        return [self.descriptions.get(label, ()) for label in self.labels]

    @property
    def _own_texts(self) -> list[Text]:
        return [*self.name_texts, *(text for text, _ in self.examples)]

    def names_of(self, rows: torch.Tensor) -> torch.Tensor:
        """Return an embedding a label, of those of `name_texts`: of a described label, the direction of the mean of all its texts'."""
        names, described = rows[: len(self.labels)], rows[len(self.labels) :]
        if not len(described):
            return names
        owners = [place for place, texts in enumerate(self._described) for _ in texts]
        return nn.functional.normalize(names.index_add(0, torch.tensor(owners, device=rows.device), described), dim=-1)

    def _parted(self, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return the names', the examples' and the other embeddings, of those of `_own_texts` and others."""
        count, end = len(self.name_texts), len(self.name_texts) + len(self.examples)
        return self.names_of(rows[:count]), rows[count:end], rows[end:]

    def predict(self, texts: Sequence[Text]) -> list[str]:
        """Return the label of each text."""
        return [self.labels[index] for index in self.logits(texts).argmax(-1).tolist()]
