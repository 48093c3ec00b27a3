from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import EXAMPLES, make_bert, seeds
from peft import PeftModel
from transformers import AutoModel

from cond_pdiff import CondPDiffPipeline, TaskPrompt
from cond_pdiff.adapter import LoraAdapter
from cond_pdiff.classifier import LOGIT_SCALE, PrototypeClassifier
from cond_pdiff.conditions.texts import Text, label_text
from cond_pdiff.errors import AdapterError, ConditionError, HubError
from cond_pdiff.hub import Backbone
from cond_pdiff.models.sentence_backbone import SentenceBackbone

LABELS = ("positive", "negative", "not_the_same")
TEXTS: list[Text] = [
    "the good film",
    "bad",
    ("the good film", "the bad meal in the room"),
    "этот фильм 👩‍👩‍👧 好",
    "the kitten " * 10_000,
    ("a", "the song " * 500),
]


@pytest.fixture
def classifier(sentence_backbone: SentenceBackbone, tiny_adapter: LoraAdapter) -> PrototypeClassifier:
    return PrototypeClassifier(sentence_backbone, LABELS, tiny_adapter)


def base_without_hooks(backbone: SentenceBackbone) -> bool:
    return not any(module._forward_hooks for module in backbone.model.modules())


def test_logits_are_scaled_cosines_to_the_label_names(classifier: PrototypeClassifier, tiny_adapter: LoraAdapter) -> None:
    logits = classifier.logits(TEXTS)
    assert logits.shape == (len(TEXTS), len(LABELS))
    assert logits.abs().max() <= LOGIT_SCALE + 1e-4
    with tiny_adapter.attached(classifier.backbone.model):
        prototypes = torch.cat([classifier.backbone.embed([words]) for words in ("positive", "negative", "not the same")])
        texts = torch.cat([classifier.backbone.embed([text], max_length=128) for text in TEXTS])
    torch.testing.assert_close(logits, LOGIT_SCALE * texts @ prototypes.T, atol=1e-4, rtol=0)
    assert classifier.predict(TEXTS) == [LABELS[index] for index in logits.argmax(1)]
    assert classifier.predict(list(LABELS)[:2]) == ["positive", "negative"]


def test_a_batch_is_as_its_texts_one_by_one(classifier: PrototypeClassifier) -> None:
    together = classifier.logits(TEXTS)
    torch.testing.assert_close(together, torch.cat([classifier.logits([text]) for text in TEXTS]), atol=1e-4, rtol=0)
    torch.testing.assert_close(together.flip(0), classifier.logits(TEXTS[::-1]), atol=1e-4, rtol=0)


def test_one_text_is_no_list_of_texts(classifier: PrototypeClassifier) -> None:
    with pytest.raises(ConditionError, match="give a list of texts, got the single string 'great'"):
        classifier.predict("great")


def test_no_texts_give_no_predictions(classifier: PrototypeClassifier) -> None:
    assert classifier.logits([]).shape == (0, len(LABELS))
    assert classifier.predict([]) == []


def test_stock_peft_gives_the_same_predictions(classifier: PrototypeClassifier, tiny_backbone: Backbone, tmp_path: Path) -> None:
    folder = classifier.adapter.save(tmp_path / "adapter")
    stock = PeftModel.from_pretrained(AutoModel.from_pretrained(tiny_backbone.repo_id), folder)
    theirs = PrototypeClassifier(SentenceBackbone(stock, classifier.backbone.tokenizer), LABELS)
    torch.testing.assert_close(theirs.logits(TEXTS), classifier.logits(TEXTS), atol=1e-5, rtol=0)


def test_the_adapter_matters_and_is_only_attached_while_working(
    classifier: PrototypeClassifier, sentence_backbone: SentenceBackbone
) -> None:
    plain = PrototypeClassifier(sentence_backbone, LABELS)
    base = plain.logits(TEXTS)
    assert (classifier.logits(TEXTS) - base).norm() > 0.5
    assert base_without_hooks(sentence_backbone)
    assert torch.equal(plain.logits(TEXTS), base)
    assert torch.equal(classifier.with_adapter(None).logits(TEXTS), base)
    assert torch.equal(plain.with_adapter(classifier.adapter).logits(TEXTS), classifier.logits(TEXTS))


@pytest.mark.parametrize(
    ("text", "message"), [("", "text 2 is empty"), (5, "text 2 must be a string"), (("a", " "), "text 2, part 2 is empty")]
)
def test_bad_texts_are_named_and_leave_nothing_attached(classifier: PrototypeClassifier, text: Any, message: str) -> None:
    with pytest.raises(ConditionError, match=message):
        classifier.logits(["good", text])
    assert base_without_hooks(classifier.backbone)


def test_an_error_while_working_leaves_nothing_attached(classifier: PrototypeClassifier) -> None:
    del classifier.backbone.model.encoder.layer[1].output
    with pytest.raises(AttributeError):
        classifier.logits(["good"])
    assert base_without_hooks(classifier.backbone)


@pytest.mark.parametrize("labels", [[], ["one"], ["one", "one"], "one", ["one", ""]])
def test_bad_labels_are_refused(sentence_backbone: SentenceBackbone, labels: Any) -> None:
    with pytest.raises(ConditionError, match="label"):
        PrototypeClassifier(sentence_backbone, labels)


def test_an_adapter_for_another_base_is_refused(sentence_backbone: SentenceBackbone, tiny_adapter: LoraAdapter) -> None:
    with pytest.raises(AdapterError, match="fingerprints differ"):
        PrototypeClassifier(SentenceBackbone(make_bert(seed=1), sentence_backbone.tokenizer), LABELS, tiny_adapter)


@pytest.mark.parametrize(("label", "words"), [("not_paraphrase", "not paraphrase"), ("e-mail", "e mail"), (" a_b-c ", "a b c")])
def test_label_names_are_read_as_words(label: str, words: str) -> None:
    assert label_text(label) == words


# --- from disk ---------------------------------------------------------------------------------------------------------------


def test_load_finds_base_and_labels_in_the_adapter(classifier: PrototypeClassifier, tiny_adapter: LoraAdapter, tmp_path: Path) -> None:
    folder = tiny_adapter.save(tmp_path / "adapter")
    loaded = PrototypeClassifier.load(folder)
    assert loaded.labels == ("positive", "negative")
    assert torch.equal(PrototypeClassifier.load(folder, LABELS).logits(TEXTS), classifier.logits(TEXTS))
    assert loaded.predict(["good"]) == PrototypeClassifier(classifier.backbone, loaded.labels, tiny_adapter).predict(["good"])


def test_load_takes_another_folder_with_the_same_base(tiny_backbone: Backbone, tiny_adapter: LoraAdapter, tmp_path: Path) -> None:
    moved = replace(tiny_adapter, spec=replace(tiny_adapter.spec, base_model="nobody/gone"), metadata={"labels": list(LABELS)})
    folder = moved.save(tmp_path / "adapter")
    with pytest.raises(HubError, match="nobody/gone"):
        PrototypeClassifier.load(folder)
    assert PrototypeClassifier.load(folder, base=tiny_backbone.repo_id).labels == LABELS


def test_load_refuses_what_cannot_work(tiny_backbone: Backbone, tiny_adapter: LoraAdapter, tmp_path: Path) -> None:
    nameless = replace(tiny_adapter, metadata={})
    with pytest.raises(AdapterError, match="records no labels"):
        PrototypeClassifier.load(nameless.save(tmp_path / "no-labels"))
    baseless = replace(tiny_adapter, spec=replace(tiny_adapter.spec, base_model=None), metadata={"labels": list(LABELS)})
    folder = baseless.save(tmp_path / "no-base")
    assert PrototypeClassifier.load(folder, base=tiny_backbone.repo_id).labels == LABELS
    with pytest.raises(HubError, match="repo_id is None; name the base model"):
        PrototypeClassifier.load(folder)
    with pytest.raises(HubError, match=r"model\.safetensors"):
        PrototypeClassifier.load(folder, base=str(tmp_path))


# --- the backbone ------------------------------------------------------------------------------------------------------------


def test_embeddings_are_unit_length_in_order_and_independent_of_the_batch(sentence_backbone: SentenceBackbone) -> None:
    assert sentence_backbone.embedding_dim == 32
    embeddings = sentence_backbone.embed(TEXTS, max_length=64, batch_size=2)
    torch.testing.assert_close(embeddings.norm(dim=1), torch.ones(len(TEXTS)), atol=1e-5, rtol=0)
    for text, embedding in zip(TEXTS, embeddings, strict=True):
        torch.testing.assert_close(sentence_backbone.embed([text], max_length=64)[0], embedding, atol=1e-5, rtol=0)
    assert torch.pdist(embeddings).min() > 1e-3
    assert sentence_backbone.embed([]).shape == (0, 32)


def test_a_pair_is_not_its_halves_joined_and_both_halves_count(sentence_backbone: SentenceBackbone) -> None:
    texts: list[Text] = [("good film", "bad meal"), "good film bad meal", ("bad meal", "good film"), ("good film", "bad room")]
    assert torch.pdist(sentence_backbone.embed(texts)).min() > 1e-3
    long_first = sentence_backbone.embed([("the song " * 300, "good"), ("the song " * 300, "bad")], max_length=32)
    assert torch.pdist(long_first).min() > 1e-4


def test_tokens_are_counted_before_any_cut(sentence_backbone: SentenceBackbone) -> None:
    assert sentence_backbone.count_tokens("the film") == 4
    assert sentence_backbone.count_tokens(("the film", "the")) == 6
    assert sentence_backbone.count_tokens("the " * 1000) == 1002
    assert sentence_backbone.max_tokens == 512


def test_a_backbone_that_changed_is_refused(tiny_backbone: Backbone, tmp_path: Path) -> None:
    with pytest.raises(HubError, match="sha256"):
        SentenceBackbone.load(replace(tiny_backbone, sha256="0" * 64))
    make_bert().save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "no such model"}')
    with pytest.raises(HubError, match="cannot be loaded"):
        SentenceBackbone.load(Backbone(str(tmp_path)))


def test_a_frozen_backbone_gets_no_gradients(sentence_backbone: SentenceBackbone) -> None:
    assert not sentence_backbone.model.training
    assert not any(parameter.requires_grad for parameter in sentence_backbone.model.parameters())
    assert not sentence_backbone.forward(["good"], 8).requires_grad


def test_texts_are_read_at_the_recorded_length(sentence_backbone: SentenceBackbone, tiny_adapter: LoraAdapter, tmp_path: Path) -> None:
    """They were read at 48 tokens for choosing and at 128 in use: another classifier than the one that was chosen."""
    short = replace(tiny_adapter, metadata={**tiny_adapter.metadata, "max_length": 4})
    loaded = PrototypeClassifier.load(short.save(tmp_path / "adapter"))
    assert loaded.max_length == loaded.with_adapter(None).max_length == 4
    assert PrototypeClassifier(sentence_backbone, LABELS, short).max_length == 4
    assert PrototypeClassifier(sentence_backbone, LABELS, short, max_length=9).max_length == 9
    cut = loaded.logits(["the good bad bad bad bad", "the good"])
    torch.testing.assert_close(cut[0], cut[1])  # [CLS] the good [SEP]
    for wrong in (0, "48", True):
        broken = replace(tiny_adapter, metadata={**tiny_adapter.metadata, "max_length": wrong})
        with pytest.raises(AdapterError, match="records a max_length of"):
            PrototypeClassifier(sentence_backbone, LABELS, broken)


def test_descriptions_are_averaged_into_the_names(sentence_backbone: SentenceBackbone, tiny_adapter: LoraAdapter, tmp_path: Path) -> None:
    labels = {"positive": ["the good film", "a lovely song"], "negative": None}
    described = PrototypeClassifier(sentence_backbone, labels, tiny_adapter)
    with tiny_adapter.attached(sentence_backbone.model):
        texts, name, other = (sentence_backbone.embed(part) for part in (["the good film", "a lovely song"], ["positive"], ["negative"]))
        asked = sentence_backbone.embed(["a bad meal"])
    expected = torch.stack([torch.nn.functional.normalize(name[0] + texts.sum(0), dim=0), other[0]])
    torch.testing.assert_close(described.logits(["a bad meal"]), LOGIT_SCALE * asked @ expected.T, atol=1e-4, rtol=0)
    assert described.with_adapter(None).descriptions == described.descriptions
    plain = PrototypeClassifier(sentence_backbone, dict.fromkeys(labels), tiny_adapter)
    assert torch.equal(plain.logits(["a bad meal"]), PrototypeClassifier(sentence_backbone, [*labels], tiny_adapter).logits(["a bad meal"]))


def test_descriptions_are_recorded_with_the_adapter(pipe: CondPDiffPipeline, tmp_path: Path) -> None:
    names, labels = ["positive", "negative"], {"positive": ["the good film"], "negative": "the awful meal"}
    plain, described = (
        pipe(TaskPrompt("Is the remark kind?", EXAMPLES, given), generator=seeds(3), num_inference_steps=2) for given in (names, labels)
    )
    assert all(torch.equal(described.adapters[0].tensors[key], tensor) for key, tensor in plain.adapters[0].tensors.items())
    assert described.report.choice.scores != plain.report.choice.scores
    assert "label_descriptions" not in plain.adapter.metadata
    loaded = PrototypeClassifier.load(described.adapter.save(tmp_path / "adapter"))
    assert loaded.labels == ("positive", "negative")
    assert loaded.descriptions == {"negative": ("the awful meal",), "positive": ("the good film",)}
    assert PrototypeClassifier.load(tmp_path / "adapter", names).descriptions == {}
