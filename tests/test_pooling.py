"""Embeddings are those of sentence-transformers for what its own classes save, or the base model is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_bert, vocabulary
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Dense, Normalize, Transformer
from sentence_transformers.sentence_transformer.modules import LayerNorm, Pooling
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import (
    BertTokenizerFast,
    GPT2Config,
    GPT2Model,
    LlamaConfig,
    LlamaModel,
    PreTrainedTokenizerFast,
    T5Config,
    T5Model,
)

from cond_pdiff import PrototypeClassifier
from cond_pdiff.errors import HubError
from cond_pdiff.hub import MINILM, Backbone, find_backbone
from cond_pdiff.models.sentence_backbone import SentenceBackbone

TEXTS = ["the good film", "bad", "the awful meal in the room by the song", "a cat", "kitten purr"]
WORDS = ("<unk>", "the", "good", "bad", "awful", "film", "meal", "room", "song", "cat", "in", "by", "a", "kitten", "purr")
POOLINGS = ("mean", "cls", "max", "lasttoken", "weightedmean", "mean_sqrt_len_tokens", ("cls", "mean"))


@pytest.fixture(scope="module")
def bert_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bert")
    make_bert().save_pretrained(folder)
    BertTokenizerFast(vocab=vocabulary(), do_lower_case=True, model_max_length=512).save_pretrained(folder)
    return folder


def save_decoder(folder: Path, model: nn.Module, **tokens: str) -> Path:
    """A decoder with a tokenizer of whole words, whose special tokens are the given ones."""
    words = Tokenizer(models.WordLevel({word: index for index, word in enumerate([*WORDS, "<eos>", "<pad>"])}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    model.save_pretrained(folder)
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>", model_max_length=64, **tokens).save_pretrained(folder)
    return folder


def decoder(kind: str) -> nn.Module:
    torch.manual_seed(0)
    if kind == "gpt2":
        return GPT2Model(GPT2Config(vocab_size=17, n_embd=32, n_layer=2, n_head=2, n_positions=64, initializer_range=0.3)).eval()
    sizes: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    return LlamaModel(LlamaConfig(vocab_size=17, max_position_embeddings=64, initializer_range=0.3, **sizes)).eval()


def saved(folder: Path, out: Path, *modules: nn.Module) -> Path:
    SentenceTransformer(modules=[Transformer(str(folder)), *modules]).save(str(out))
    return out


def ours(folder: Path) -> torch.Tensor:
    return SentenceBackbone.load(Backbone(str(folder))).embed(TEXTS)


def theirs(folder: Path) -> torch.Tensor:
    """One text at a time, so that no padding can matter."""
    encoder = SentenceTransformer(str(folder), device="cpu")
    rows = [encoder.encode([text], normalize_embeddings=True, convert_to_tensor=True, show_progress_bar=False) for text in TEXTS]
    return torch.cat(rows).clone()


@pytest.mark.parametrize("mode", POOLINGS, ids=str)
def test_every_pooling_is_theirs(bert_folder: Path, tmp_path: Path, mode: Any) -> None:
    folder = saved(bert_folder, tmp_path / "encoder", Pooling(32, mode), Normalize())
    torch.testing.assert_close(ours(folder), theirs(folder), atol=1e-5, rtol=0)
    assert SentenceBackbone.load(Backbone(str(folder))).embedding_dim == ours(folder).shape[1]
    if mode in ("cls", "max", "lasttoken", "weightedmean"):  # of unit length, mean_sqrt_len_tokens is the mean
        assert (ours(folder) - ours(bert_folder)).norm() > 0.1


def test_settings_of_older_versions_are_read(bert_folder: Path, tmp_path: Path) -> None:
    folder = saved(bert_folder, tmp_path / "encoder", Pooling(32, "cls"))
    new = ours(folder)
    keys = ("cls_token", "mean_tokens", "max_tokens", "mean_sqrt_len_tokens")
    old = {"word_embedding_dimension": 32, **{f"pooling_mode_{key}": key == "cls_token" for key in keys}}
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(old))
    assert torch.equal(ours(folder), new)
    torch.testing.assert_close(new, theirs(folder), atol=1e-5, rtol=0)


@pytest.mark.parametrize("activation", [nn.Tanh(), nn.Identity(), nn.GELU(), nn.ReLU(), nn.SiLU(), nn.Sigmoid()], ids=str)
@pytest.mark.parametrize("normalized", [True, False])
def test_dense_layers_are_theirs(bert_folder: Path, tmp_path: Path, activation: nn.Module, normalized: bool) -> None:
    torch.manual_seed(3)
    layers = [Dense(32, 24, activation_function=activation), Dense(24, 12, bias=False, activation_function=nn.Identity())]
    folder = saved(bert_folder, tmp_path / "encoder", Pooling(32, "mean"), Normalize(), *layers, *([Normalize()] if normalized else []))
    torch.testing.assert_close(ours(folder), theirs(folder), atol=1e-5, rtol=0)
    assert SentenceBackbone.load(Backbone(str(folder))).embedding_dim == 12


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_decoders_pool_their_last_token_whatever_their_padding(tmp_path: Path, kind: str, side: str) -> None:
    tokens = {"eos_token": "<eos>", "pad_token": "<pad>", "padding_side": side}
    folder = saved(save_decoder(tmp_path / "model", decoder(kind), **tokens), tmp_path / "encoder", Pooling(32, "lasttoken"), Normalize())
    torch.testing.assert_close(ours(folder), theirs(folder), atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_without_a_padding_token_the_end_of_text_pads(tmp_path: Path, kind: str) -> None:
    padded = save_decoder(tmp_path / "padded", decoder(kind), eos_token="<eos>", pad_token="<pad>")
    bare = save_decoder(tmp_path / "bare", decoder(kind), eos_token="<eos>")
    assert torch.equal(ours(bare), ours(padded))
    with pytest.raises(HubError, match="neither a padding token nor an end-of-text token; set its pad_token"):
        ours(save_decoder(tmp_path / "none", decoder(kind)))


def test_an_adapter_of_a_decoder_without_a_padding_token_classifies(tmp_path: Path) -> None:
    bare = save_decoder(tmp_path / "bare", decoder("llama"), eos_token="<eos>")
    config = LoraConfig(r=2, target_modules=["q_proj"], task_type="FEATURE_EXTRACTION")
    get_peft_model(decoder("llama"), config).save_pretrained(tmp_path / "a")
    classifier = PrototypeClassifier.load(tmp_path / "a", ["good", "bad"], base=str(bare))
    assert classifier.predict(["good", "bad", "the good film in the room"])[:2] == ["good", "bad"]


def test_the_bundled_base_keeps_its_bits() -> None:
    """Its pooling is the mean, as it was when it was the only one."""
    backbone = SentenceBackbone.load(MINILM)
    assert (backbone.pooling.modes, len(backbone.pooling.layers)) == (("mean",), 0)
    batch = backbone.tokenize(TEXTS, 64)
    with torch.no_grad():
        hidden = backbone.run(batch).last_hidden_state
        mask = batch["attention_mask"][..., None].to(hidden.dtype)
        former = nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)
        assert torch.equal(backbone.forward(TEXTS, 64), former)
    torch.testing.assert_close(backbone.embed(TEXTS), theirs(find_backbone(MINILM)), atol=1e-5, rtol=0)


# --- refusals ----------------------------------------------------------------------------------------------------------------


def edit(path: Path, **entries: Any) -> None:
    path.write_text(json.dumps({**(json.loads(path.read_text()) if path.exists() else {}), **entries}))


@pytest.fixture
def encoder(bert_folder: Path, tmp_path: Path) -> Path:
    return saved(bert_folder, tmp_path / "encoder", Pooling(32, "mean"), Dense(32, 8), Normalize())


@pytest.mark.parametrize(
    ("file", "entries", "message"),
    [
        ("1_Pooling/config.json", {"pooling_mode": "middle"}, "the pooling 'middle' is not known; known are cls, max"),
        ("1_Pooling/config.json", {"pooling_mode_middle_tokens": True}, "the pooling 'pooling_mode_middle_tokens' is not known"),
        ("2_Dense/config.json", {"activation_function": "mine.Swoosh"}, "the activation 'mine.Swoosh' is not known"),
        ("2_Dense/config.json", {"use_residual": True}, "use_residual is True, which is not supported"),
        ("2_Dense/config.json", {"module_input_name": "token_embeddings"}, "module_input_name is 'token_embeddings'"),
        ("2_Dense/config.json", {"in_features": 31}, "cannot be read: RuntimeError"),
        ("2_Dense/config.json", {"in_features": "x"}, "cannot be read: TypeError"),
        ("sentence_bert_config.json", {"do_lower_case": True}, "do_lower_case = True, which changes all texts"),
        ("config_sentence_transformers.json", {"default_prompt_name": "query"}, "default_prompt_name = 'query'"),
    ],
)
def test_settings_that_are_not_known_are_named(encoder: Path, file: str, entries: dict[str, Any], message: str) -> None:
    edit(encoder / file, **entries)
    with pytest.raises(HubError, match=message):
        SentenceBackbone.load(Backbone(str(encoder)))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[]", "IndexError|cannot be read"),
        ("{", "cannot be read: JSONDecodeError"),
        ('[{"type": "sentence_transformers.models.Transformer", "path": ""}]', "no module Pooling"),
        ('[{"type": "mine.Transformer", "path": ""}]', "begins with 'mine.Transformer'"),
        ('[{"type": "sentence_transformers.models.WordEmbeddings", "path": ""}]', "expected a Transformer"),
        ('[{"type": "sentence_transformers.models.Transformer", "path": "0_Transformer"}]', "in '0_Transformer'; expected"),
        (
            '[{"type": "sentence_transformers.models.Transformer", "path": ""}, {"type": "mine.Pooling", "path": "1_Pooling"}]',
            "a module 'mine.Pooling' that is not known",
        ),
        (
            '[{"type": "sentence_transformers.models.Transformer", "path": ""}, '
            '{"type": "sentence_transformers.models.Pooling", "path": "../elsewhere"}]',
            "names a folder that is not in",
        ),
    ],
)
def test_modules_that_are_not_known_are_named(encoder: Path, content: str, message: str) -> None:
    (encoder / "modules.json").write_text(content)
    with pytest.raises(HubError, match=message):
        SentenceBackbone.load(Backbone(str(encoder)))


def test_other_modules_and_models_are_refused(bert_folder: Path, tmp_path: Path) -> None:
    folder = saved(bert_folder, tmp_path / "normed", Pooling(32, "mean"), LayerNorm(32))
    with pytest.raises(HubError, match=r"LayerNorm' that is not known here"):
        SentenceBackbone.load(Backbone(str(folder)))
    t5 = T5Model(T5Config(vocab_size=17, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2))
    with pytest.raises(HubError, match="has an encoder and a decoder"):
        SentenceBackbone.load(Backbone(str(save_decoder(tmp_path / "t5", t5, eos_token="<eos>"))))


def test_dense_weights_are_read_from_safetensors_only(encoder: Path) -> None:
    weights = encoder / "2_Dense" / "model.safetensors"
    tensors = load_file(weights)
    save_file({**tensors, "extra": torch.zeros(1)}, weights)
    with pytest.raises(HubError, match="cannot be read: RuntimeError"):
        SentenceBackbone.load(Backbone(str(encoder)))
    shutil.move(weights, encoder / "2_Dense" / "pytorch_model.bin")
    with pytest.raises(HubError, match=r"has no model\.safetensors, the only format"):
        SentenceBackbone.load(Backbone(str(encoder)))
