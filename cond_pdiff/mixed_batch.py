"""Many adapters on one base model, answering in one batch: each row goes through its own adapter."""

from __future__ import annotations

import contextlib
import threading
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch

from cond_pdiff.adapter import LoraAdapter
from cond_pdiff.attach import attach_to_rows
from cond_pdiff.classifier import LOGIT_SCALE, PrototypeClassifier, class_prototypes
from cond_pdiff.conditions.instruction import Instruction
from cond_pdiff.conditions.texts import Text, check_text
from cond_pdiff.defaults import ANSWER_TOKENS
from cond_pdiff.errors import AdapterError
from cond_pdiff.hub import Backbone
from cond_pdiff.locks import lock_of
from cond_pdiff.lora import adapted_module
from cond_pdiff.models.causal_backbone import CausalBackbone
from cond_pdiff.models.sentence_backbone import SentenceBackbone
from cond_pdiff.models.text_backbone import text_length
from cond_pdiff.models.token_batches import Tokens
from cond_pdiff.sampling import check_count

ROWS_AT_ONCE = 64
"""The number of texts that a sentence encoder reads at once."""


@contextlib.contextmanager
def attached_to_rows(base: Any, adapters: Sequence[LoraAdapter | None], check: bool = True) -> Iterator[Any]:
    """Attach an adapter to each row of the batches that the model is run on inside a block: row i goes through `adapters[i]`.

    One adapter may have several rows, anywhere in the batch; ranks, scales and adapted modules may differ. Padding, caches of keys and
    values, and transformers' `generate` (also with beams: neighbouring copies of each row) need nothing else. What a row becomes is
    what it becomes in a batch of its own, but for rounding. The thread has the model to itself, as in `LoraAdapter.attached`.

    Args:
        base: a transformers model, or what a family's `load` gives.
        adapters: of every row; None: the base model alone.
        check: verify the base first, for each adapter (see `LoraAdapter.check_base`); switch off only where that has been done.

    Raises:
        AdapterError: an adapter is of another base, brings a head or updates convolutions, or the model is in a state in which adapters
            do not act; inside the block, where the model is run on another number of rows.
    """
    distinct = {id(adapter): adapter for adapter in adapters if adapter is not None}
    for adapter in distinct.values() if check else ():
        adapter.check_base(base)
    module = adapted_module(base)
    with lock_of(module):
        attachment = attach_to_rows(module, [None if adapter is None else (adapter.spec, adapter.tensors) for adapter in adapters])
        try:
            yield base
        finally:
            attachment.detach()


@dataclass(frozen=True)
class Request:
    """A text for one of a pool's adapters.

    Args:
        adapter: its name in the pool.
        text: a text or a pair.
        max_tokens: of an answer that is written, from 1.
    """

    adapter: str
    text: Text
    max_tokens: int = ANSWER_TOKENS


@dataclass(frozen=True)
class Answer:
    """What an adapter makes of a text.

    Args:
        answer: a label, or what was written.
        probabilities: of the labels; none of what was written.
        complete: was the text read to its end, and the answer written to its end?
    """

    answer: str
    probabilities: Mapping[str, float] = field(default_factory=dict)
    complete: bool = True


Member = TypeVar("Member")
Ready = TypeVar("Ready")


class AdapterPool(ABC, Generic[Member, Ready]):
    """Adapters on one base model, by name, which answer requests for any of them in one batch; threads may share a pool.

    Args:
        base: the base model, as its family's `load` gives it.
    """

    def __init__(self, base: Any) -> None:
        self.base = base
        self._members: dict[str, Member] = {}
        self._changes = threading.Lock()

    @staticmethod
    def load(adapters: Mapping[str, str | Path], base: str | None = None) -> AdapterPool[Any, Any]:
        """Load adapters, by names of your choice, and the base model of the first, which has to be that of all.

        Args:
            adapters: name → folder, or repository on the Hub.
            base: a folder with the base model; default: found by the recorded reference.

        Raises:
            AdapterError: there is no adapter, one is of another base, or the base's family has no pool.
        """
        loaded = {name: LoraAdapter.load(folder) for name, folder in adapters.items()}
        first = next(iter(loaded.values()), None)
        if first is None or first.family is None:
            raise AdapterError("expected at least one adapter, and one whose base model is of a known family")
        pool = first.family.pool(first.family.load(Backbone(base) if base else first.base, first.spec))
        for name, adapter in loaded.items():
            pool.add(name, adapter)
        return pool

    @property
    def adapters(self) -> dict[str, LoraAdapter]:
        """The adapters, by name."""
        return {name: self._adapter(member) for name, member in self._members.items()}

    def add(self, name: str, adapter: LoraAdapter) -> None:
        """Add an adapter: from then on, requests may name it.

        Raises:
            AdapterError: the name is taken, the adapter is for another base, or it is none for a mixed batch (see `attached_to_rows`).
        """
        with attached_to_rows(self.base, [adapter]):
            pass  # refuses here what could not be in a batch
        member = self._prepare(adapter)
        with self._changes:
            if name in self._members:
                raise AdapterError(f"there is an adapter {name!r} already; remove it first, or take another name")
            self._members = {**self._members, name: member}

    def remove(self, name: str) -> None:
        """Remove an adapter; requests that are ready are still answered. `AdapterError` if there is none of that name."""
        with self._changes:
            self._member(name)
            self._members = {other: member for other, member in self._members.items() if other != name}

    def answer(self, requests: Sequence[Request]) -> list[Answer]:
        """Answer requests for any of the adapters, in one batch (64 rows at most; more are several).

        Raises:
            AdapterError: there is no adapter of that name.
            ConditionError: a text is empty, or with its answer too long for the model.
            CondPDiffError: `max_tokens` is out of its range.
        """
        return self.answer_ready([self.ready(request) for request in requests])

    @abstractmethod
    def ready(self, request: Request) -> Ready:
        """Check a request and make it ready for `answer_ready`; raises what `answer` raises."""

    @abstractmethod
    def answer_ready(self, ready: Sequence[Ready]) -> list[Answer]:
        """Answer requests that are ready; nothing about a single one of them can fail any more."""

    @abstractmethod
    def _prepare(self, adapter: LoraAdapter) -> Member:
        """Make what is kept of an adapter, which has been checked."""

    @abstractmethod
    def _adapter(self, member: Member) -> LoraAdapter:
        """Return the adapter of a member."""

    def _member(self, name: str) -> Member:
        try:
            return self._members[name]
        except KeyError:
            known = ", ".join(map(repr, sorted(self._members)[:12])) or "none"
            raise AdapterError(f"there is no adapter {name!r} here; known are {known}") from None


# --- classifying with a sentence encoder ---------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _Classifier:
    adapter: LoraAdapter
    labels: Sequence[str]
    prototypes: torch.Tensor
    max_length: int


@dataclass(frozen=True, eq=False)
class _Text:
    member: _Classifier
    text: Text
    complete: bool


class ClassifierPool(AdapterPool[_Classifier, _Text]):
    """Adapters for a sentence encoder, each with its labels; their prototypes are embedded once, when an adapter is added.

    An answer is that of a `PrototypeClassifier` with the labels and examples that the adapter records.
    """

    base: SentenceBackbone

    def ready(self, request: Request) -> _Text:
        """Check a text."""
        member, text = self._member(request.adapter), check_text(request.text, "the text")
        return _Text(member, text, self.base.count_tokens(text) <= min(member.max_length, self.base.max_tokens))

    @torch.no_grad()
    def answer_ready(self, ready: Sequence[_Text]) -> list[Answer]:
        """Classify texts, in batches of like length: a batch is cut where its adapters say, and those with other limits are in another."""
        answers: list[Answer | None] = [None] * len(ready)
        for limit in {text.member.max_length for text in ready}:
            order = [place for place, text in enumerate(ready) if text.member.max_length == limit]
            order.sort(key=lambda place: -text_length(ready[place].text))
            for start in range(0, len(order), ROWS_AT_ONCE):
                places = order[start : start + ROWS_AT_ONCE]
                with attached_to_rows(self.base, [ready[place].member.adapter for place in places], check=False):
                    embeddings = self.base.forward([ready[place].text for place in places], limit).cpu()
                for place, embedding in zip(places, embeddings, strict=True):
                    answers[place] = _chosen(ready[place], embedding)
        return [answer for answer in answers if answer is not None]

    def _prepare(self, adapter: LoraAdapter) -> _Classifier:
        labels = adapter.metadata.get("labels")
        if not labels:
            raise AdapterError("the adapter records no labels, so it cannot classify; generate it with labels, or with examples")
        classifier = PrototypeClassifier(self.base, labels, adapter, examples=adapter.metadata.get("prototype_examples", ()))
        names, examples = classifier.example_embeddings()
        prototypes = class_prototypes(names, examples, classifier.targets.to(names.device)).cpu()
        return _Classifier(adapter, classifier.labels, prototypes, classifier.max_length)

    def _adapter(self, member: _Classifier) -> LoraAdapter:
        return member.adapter


def _chosen(text: _Text, embedding: torch.Tensor) -> Answer:
    shares = (LOGIT_SCALE * text.member.prototypes @ embedding).softmax(0)
    probabilities = dict(zip(text.member.labels, shares.tolist(), strict=True))
    return Answer(text.member.labels[int(shares.argmax())], probabilities, text.complete)


# --- asking a language model -------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _Writer:
    adapter: LoraAdapter
    instruction: Instruction
    names: Sequence[Tokens]
    max_length: int


@dataclass(frozen=True, eq=False)
class _Prompt:
    member: _Writer
    tokens: Tokens
    max_tokens: int
    complete: bool


class WriterPool(AdapterPool[_Writer, _Prompt]):
    """Adapters for a causal language model, each with its instruction; an answer is that of `cond-pdiff ask`.

    It is written, the likeliest token each time, or where the adapter has labels it is the likeliest one of them.
    """

    base: CausalBackbone

    def ready(self, request: Request) -> _Prompt:
        """Check a text and make its prompt; under an adapter with labels, a text is cut where it was in training."""
        check_count("max_tokens", request.max_tokens, 100_000)
        member, text = self._member(request.adapter), check_text(request.text, "the text")
        fits = text
        if member.names:
            fits = self.base.fitted(member.instruction, text, member.max_length - max(map(len, member.names)))
        prompt = self.base.prompt_tokens(member.instruction.prompt(fits))
        if not member.names:
            self.base.check_room(prompt, request.max_tokens)
        return _Prompt(member, prompt, request.max_tokens, fits == text)

    def answer_ready(self, ready: Sequence[_Prompt]) -> list[Answer]:
        """Answer prompts: those whose answers are labels in one batch, those whose answers are written in another."""
        answers: dict[int, Answer] = {}
        labelled = [place for place, prompt in enumerate(ready) if prompt.member.names]
        written = [place for place, prompt in enumerate(ready) if not prompt.member.names]
        if labelled:
            names = [ready[place].member.names for place in labelled]
            rows = self.base.own_choices([ready[place].tokens for place in labelled], names, self._under(ready, labelled))
            for place, row in zip(labelled, rows, strict=True):
                labels, shares = ready[place].member.instruction.labels, row.softmax(0)
                probabilities = dict(zip(labels, shares.tolist(), strict=True))
                answers[place] = Answer(labels[int(shares.argmax())], probabilities, ready[place].complete)
        if written:
            limits = [ready[place].max_tokens for place in written]
            told = self.base.write([ready[place].tokens for place in written], limits, self._under(ready, written))
            answers |= {place: Answer(text, complete=ended) for place, (text, ended) in zip(written, told, strict=True)}
        return [answers[place] for place in range(len(ready))]

    def _under(self, ready: Sequence[_Prompt], asked: Sequence[int]) -> Any:
        """Return what attaches the adapters of some of the asked prompts, by their places among these."""
        adapters = [ready[place].member.adapter for place in asked]
        return lambda places: attached_to_rows(self.base, [adapters[place] for place in places], check=False)

    def _prepare(self, adapter: LoraAdapter) -> _Writer:
        if adapter.family is None or not adapter.family.writes:
            raise AdapterError("the adapter is not for a language model, which this pool's base is")
        instruction = Instruction.recorded(adapter.metadata)
        names = [self.base.answer_tokens(name) for name in instruction.answers]
        limit = min(int(adapter.metadata.get("max_length") or self.base.max_tokens), self.base.max_tokens)
        return _Writer(adapter, instruction, names, limit)

    def _adapter(self, member: _Writer) -> LoraAdapter:
        return member.adapter
