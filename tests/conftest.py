"""Shared fixtures: a tiny BERT on disk, a random adapter for it, and a few tasks that words separate."""

from __future__ import annotations

import os
import string
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # before anything imports huggingface_hub

import pytest
import torch
from transformers import BertConfig, BertModel, BertTokenizerFast

from cond_pdiff.adapter import FACTORS, KEY_PREFIX, LoraAdapter, LoraSpec, base_fingerprint, target_linears
from cond_pdiff.hub import Backbone
from cond_pdiff.models.sentence_backbone import SentenceBackbone
from cond_pdiff.training.tasks import Row, write_task

RANK = 2
TARGETS = ("query", "key", "value", "attention.output.dense")
HIDDEN = 32

GOOD, BAD = ("good", "great", "lovely", "fine"), ("bad", "awful", "poor", "dull")
ANIMALS = {"cat": ("kitten", "purr", "whisker"), "dog": ("puppy", "bark", "leash"), "bird": ("feather", "nest", "wing")}
NOUNS = ("film", "meal", "book", "room", "song")
LABELS = ("positive", "negative", "same", "different", *ANIMALS)
WORDS = ("the", *GOOD, *BAD, *NOUNS, *LABELS, *(word for words in ANIMALS.values() for word in words))


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def make_bert(seed: int = 0) -> BertModel:
    """A random BERT of two layers; its weights are large enough for words to matter."""
    config = BertConfig(
        vocab_size=len(vocabulary()),
        hidden_size=HIDDEN,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        initializer_range=0.15,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return BertModel(config).eval()


def vocabulary() -> dict[str, int]:
    characters = string.ascii_lowercase + string.digits + string.punctuation
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *characters, *(f"##{c}" for c in characters), *WORDS]
    return {piece: index for index, piece in enumerate(pieces)}


def make_adapter(model: torch.nn.Module, base_model: str, seed: int = 0, **spec_entries: object) -> LoraAdapter:
    """A random adapter of rank 2 whose update is about as large as a trained one's."""
    spec = LoraSpec(base_model, RANK, 4.0, tuple(sorted(TARGETS)), **spec_entries)
    spec = LoraSpec(**{**spec.__dict__, "base_fingerprint": base_fingerprint(model, spec)})
    rng = torch.Generator().manual_seed(seed)
    tensors = {
        f"{KEY_PREFIX}{name}.{factor}.weight": 0.1 * torch.randn(shape, generator=rng)
        for name, linear in target_linears(model, spec).items()
        for factor, shape in zip(FACTORS, ((RANK, linear.in_features), (linear.out_features, RANK)), strict=True)
    }
    return LoraAdapter(spec, tensors, {"labels": ["positive", "negative"], "base": {"repo_id": base_model}})


@pytest.fixture(scope="session")
def tiny_backbone(tmp_path_factory: pytest.TempPathFactory) -> Backbone:
    """A reference to a tiny BERT in a local folder."""
    folder = tmp_path_factory.mktemp("tiny-bert")
    make_bert().save_pretrained(folder)
    BertTokenizerFast(vocab=vocabulary(), do_lower_case=True, model_max_length=512).save_pretrained(folder)
    return Backbone(str(folder))


@pytest.fixture
def sentence_backbone(tiny_backbone: Backbone) -> SentenceBackbone:
    """The tiny BERT, loaded."""
    return SentenceBackbone.load(tiny_backbone)


@pytest.fixture(scope="session")
def tiny_adapter(tiny_backbone: Backbone) -> LoraAdapter:
    """A random adapter for the tiny BERT."""
    return make_adapter(SentenceBackbone.load(tiny_backbone).model, tiny_backbone.repo_id)


@pytest.fixture(scope="session")
def tasks_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three tasks: `moods` (two labels), `animals` (three), `likeness` (pairs)."""
    folder = tmp_path_factory.mktemp("tasks")
    moods: list[Row] = [(f"the {noun} {word}", label) for label, words in enumerate((GOOD, BAD)) for word in words for noun in NOUNS]
    animals: list[Row] = [(f"the {noun} {word}", label) for label, words in enumerate(ANIMALS.values()) for word in words for noun in NOUNS]
    likeness: list[Row] = [((f"the {a}", f"the {b}"), int(a != b)) for a in NOUNS for b in (a, a, a, *NOUNS)]
    for name, description, labels, rows in (
        ("moods", "Is the remark kind?", ["positive", "negative"], moods),
        ("animals", "Which animal is it about?", list(ANIMALS), animals),
        ("likeness", "Do both texts name the same thing?", ["same", "different"], likeness),
    ):
        write_task(folder / name, description, labels, {"train": rows, "test": rows[::3]}, group="toy", licence="CC0-1.0")
    return folder
