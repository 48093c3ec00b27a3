"""What stock peft saves is read, and acts as with stock peft: many architectures, heads, ranks, scales and ways to name modules."""

from __future__ import annotations

import copy
import json
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from cond_pdiff import LoraAdapter, plain_lora
from cond_pdiff.errors import AdapterError
from cond_pdiff.lora import KEY_PREFIX
from cond_pdiff.peft_files import CONFIG_FILE, METADATA_FILE, WEIGHTS_FILE

SIZE = {"vocab_size": 60, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
GROUPED = {**SIZE, "num_key_value_heads": 1, "head_dim": 8, "max_position_embeddings": 40}
SEQ2SEQ = {"vocab_size": 60, "d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2} | {
    "decoder_attention_heads": 2, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24, "max_position_embeddings": 40
}  # fmt: skip
ENDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
TOKENS = {"input_ids": torch.tensor([[5, 6, 7, 8], [9, 8, 7, 6]])}
PAIRS = {**TOKENS, "decoder_input_ids": torch.tensor([[1, 5, 6], [1, 9, 3]])}
PICTURES = {"pixel_values": torch.linspace(-1, 1, 2 * 3 * 16 * 16).reshape(2, 3, 16, 16)}
SOUNDS = {"input_features": torch.linspace(-1, 1, 8 * 40).reshape(1, 8, 40), "decoder_input_ids": torch.tensor([[1, 5, 6]])}

Case = tuple[Callable[[], torch.nn.Module], dict[str, Any], dict[str, torch.Tensor]]


def encoder(name: str, **entries: Any) -> Callable[[], torch.nn.Module]:
    """A class of transformers, for its own configuration at tiny size."""
    kind = getattr(tf, name)
    return lambda: kind(kind.config_class(**{**SIZE, "max_position_embeddings": 40, **entries}))


def decoder(name: str, **entries: Any) -> Callable[[], torch.nn.Module]:
    return encoder(name, **{**GROUPED, **ENDS, **entries})


def other(name: str, **entries: Any) -> Callable[[], torch.nn.Module]:
    kind = getattr(tf, name)
    return lambda: kind(kind.config_class(**entries))


GPT2 = {"vocab_size": 60, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 40, **ENDS}
DEBERTA = {"relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_biased_input": False, "type_vocab_size": 0}
DISTIL = {"vocab_size": 60, "dim": 16, "hidden_dim": 24, "n_layers": 2, "n_heads": 2, "max_position_embeddings": 40}
T5 = {"vocab_size": 60, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 1, "num_heads": 2, "decoder_start_token_id": 0}
FALCON = {"vocab_size": 60, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, **ENDS}
VIT = {**SIZE, "image_size": 16, "patch_size": 8}
WHISPER = {**SEQ2SEQ, "num_mel_bins": 8, "max_source_positions": 20, "max_target_positions": 10, **ENDS, "decoder_start_token_id": 1}
WHISPER.pop("max_position_embeddings")
FEATURES, CLASSES, TEXT, SEQUENCES = ({"task_type": kind} for kind in ("FEATURE_EXTRACTION", "SEQ_CLS", "CAUSAL_LM", "SEQ_2_SEQ_LM"))
ATTENTION = {"target_modules": ["q_proj", "v_proj"]}

CASES: dict[str, Case] = {
    "bert": (encoder("BertModel"), {**FEATURES, "target_modules": ["query", "value"]}, TOKENS),
    "bert, only the last layer": (
        encoder("BertModel"), {**FEATURES, "target_modules": ["query"], "layers_to_transform": [1], "layers_pattern": "layer"}, TOKENS
    ),
    "bert, without a layer": (encoder("BertModel"), {"target_modules": ["dense"], "exclude_modules": ["layer.0.output.dense"]}, TOKENS),
    "bert, embeddings and norms": (
        encoder("BertModel"), {"target_modules": ["query"], "modules_to_save": ["word_embeddings", "LayerNorm"]}, TOKENS
    ),
    "bert, classifier": (encoder("BertForSequenceClassification"), {**CLASSES, "target_modules": ["query"]}, TOKENS),
    "bert, tokens": (encoder("BertForTokenClassification"), {"task_type": "TOKEN_CLS", "target_modules": ["key"]}, TOKENS),
    "bert, answers": (encoder("BertForQuestionAnswering"), {"task_type": "QUESTION_ANS", "target_modules": ["key"]}, TOKENS),
    "roberta, classifier": (encoder("RobertaForSequenceClassification"), {**CLASSES, "target_modules": "all-linear"}, TOKENS),
    "xlm-r": (encoder("XLMRobertaModel"), {**FEATURES, "target_modules": r".*\.(query|key)"}, TOKENS),
    "deberta-v2": (
        encoder("DebertaV2ForSequenceClassification", **DEBERTA),
        {**CLASSES, "target_modules": ["query_proj", "value_proj"], "modules_to_save": ["pooler"]},
        TOKENS,
    ),
    "distilbert": (other("DistilBertForSequenceClassification", **DISTIL), {**CLASSES, "target_modules": ["q_lin"]}, TOKENS),
    "albert": (encoder("AlbertModel", embedding_size=8), {**FEATURES, "target_modules": ["query", "ffn"]}, TOKENS),
    "electra": (encoder("ElectraForSequenceClassification", embedding_size=8), {**CLASSES, "target_modules": ["query"]}, TOKENS),
    "mpnet": (encoder("MPNetModel"), {**FEATURES, "target_modules": ["attn.q", "attn.v"]}, TOKENS),
    "gpt2": (other("GPT2LMHeadModel", **GPT2), {**TEXT, "target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}, TOKENS),
    "gpt2, classifier": (
        other("GPT2ForSequenceClassification", **GPT2), {**CLASSES, "target_modules": ["c_attn"], "fan_in_fan_out": True}, TOKENS
    ),
    "gpt-neox": (encoder("GPTNeoXForCausalLM"), {**TEXT, "target_modules": ["query_key_value"], "use_rslora": True}, TOKENS),
    "opt": (
        other("OPTForCausalLM", **{**SIZE, "ffn_dim": 24, "word_embed_proj_dim": 16, "max_position_embeddings": 40, **ENDS}),
        {**TEXT, **ATTENTION, "rank_pattern": {"v_proj": 5}, "alpha_pattern": {r"layers\.1\.self_attn\.(q|v)_proj": 3}},
        TOKENS,
    ),
    "bloom": (
        other("BloomForCausalLM", vocab_size=60, hidden_size=16, n_layer=2, n_head=2),
        {**TEXT, "target_modules": ["query_key_value"]},
        TOKENS,
    ),
    "llama": (decoder("LlamaForCausalLM"), {**TEXT, "target_modules": "all-linear"}, TOKENS),
    "llama, embeddings": (
        decoder("LlamaForCausalLM"), {**TEXT, **ATTENTION, "modules_to_save": ["embed_tokens", "lm_head", "input_layernorm"]}, TOKENS
    ),
    "llama, classifier": (decoder("LlamaForSequenceClassification"), {**CLASSES, **ATTENTION}, TOKENS),
    "mistral": (decoder("MistralForCausalLM"), {**TEXT, **ATTENTION, "alpha_pattern": {"model.layers.0.self_attn.q_proj": 1}}, TOKENS),
    "qwen2": (decoder("Qwen2ForCausalLM"), {**TEXT, **ATTENTION, "rank_pattern": {"^model.layers.1.self_attn.v_proj": 1}}, TOKENS),
    "gemma": (decoder("GemmaForCausalLM"), {**TEXT, "target_modules": ["gate_proj", "q_proj", "to_k"]}, TOKENS),
    "phi": (encoder("PhiForCausalLM", **ENDS), {**TEXT, "target_modules": ["q_proj", "fc1"]}, TOKENS),
    "falcon": (other("FalconForCausalLM", **FALCON), {**TEXT, "target_modules": ["query_key_value", "dense_4h_to_h"]}, TOKENS),
    "t5": (other("T5ForConditionalGeneration", **T5), {**SEQUENCES, "target_modules": ["q", "v"]}, PAIRS),
    "bart": (other("BartForConditionalGeneration", **SEQ2SEQ), {**SEQUENCES, **ATTENTION}, PAIRS),
    "vit": (
        other("ViTForImageClassification", **VIT),
        {"target_modules": ["query", "q_proj"], "modules_to_save": ["classifier", "layernorm"]},
        PICTURES,
    ),
    "clip text": (encoder("CLIPTextModel", **ENDS), {"target_modules": ["q_proj", "out_proj"]}, TOKENS),
    "whisper": (other("WhisperForConditionalGeneration", **WHISPER), ATTENTION, SOUNDS),
}  # fmt: skip
"""name → the base model, peft's configuration but for rank and alpha, inputs."""


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    level = tf.logging.get_verbosity()
    tf.logging.set_verbosity_error()
    yield
    tf.logging.set_verbosity(level)


def made(base: torch.nn.Module, folder: Path, **config: Any) -> torch.nn.Module:
    """An adapter by stock peft, with random factors and heads, saved; returns the adapted model."""
    torch.manual_seed(1)
    with torch.random.fork_rng():
        stock = get_peft_model(copy.deepcopy(base), LoraConfig(**{"r": 3, "lora_alpha": 6, "init_lora_weights": False, **config}))
        for name, parameter in stock.named_parameters():
            if "modules_to_save" in name:
                torch.nn.init.normal_(parameter, std=0.3)
    stock.save_pretrained(folder)
    return stock.eval()


def edit(folder: Path, **changes: Any) -> None:
    path = folder / CONFIG_FILE
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@torch.no_grad()
def output(model: torch.nn.Module, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    return model(**inputs)[0]


def acts_as(stock: torch.nn.Module, base: torch.nn.Module, folder: Path, inputs: dict[str, torch.Tensor]) -> LoraAdapter:
    """Load, attach, compare with the adapted model; save, and let stock peft load what was saved."""
    wanted, plain = output(stock, inputs), output(base, inputs)
    assert (wanted - plain).abs().max() > 1e-4
    adapter = LoraAdapter.load(folder)
    with adapter.attached(base):
        torch.testing.assert_close(output(base, inputs), wanted, atol=1e-6, rtol=1e-6)
    assert torch.equal(output(base, inputs), plain)
    again = PeftModel.from_pretrained(copy.deepcopy(base), adapter.save(folder.parent / "again")).eval()
    torch.testing.assert_close(output(again, inputs), wanted, atol=1e-6, rtol=1e-6)
    names = {key for key in again.state_dict() if ".lora_A." in key}
    assert {name.removeprefix(KEY_PREFIX).partition(".lora_A")[0] for name in names} == set(adapter.modules)
    assert LoraAdapter.load(folder.parent / "again").spec == adapter.spec
    return adapter


def base_model(name: str) -> torch.nn.Module:
    return random_model(CASES[name][0])


def random_model(make: Callable[[], torch.nn.Module]) -> torch.nn.Module:
    """A model whose weights are so large that adapters matter."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = make().eval()
        for parameter in model.parameters():
            if parameter.ndim > 1:
                torch.nn.init.normal_(parameter, std=0.1)
    return model


@pytest.mark.parametrize("name", CASES)
def test_adapters_of_stock_peft_act_as_with_stock_peft(name: str, tmp_path: Path) -> None:
    base = base_model(name)
    _, config, inputs = CASES[name]
    stock = made(base, tmp_path / "adapter", **config)
    acts_as(stock, base, tmp_path / "adapter", inputs)


def test_there_are_twenty_architectures() -> None:
    assert len({name.partition(",")[0] for name in CASES}) >= 20


# --- ranks and scales -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "config",
    [
        {"use_rslora": True},
        {"rank_pattern": {"value": 2}},
        {"rank_pattern": {"value": 3}},
        {"alpha_pattern": {"query": 7.5}},
        {"alpha_pattern": {"^encoder.layer.0.attention.self.query": 2, "query": 5, r"(.*)\.1\.(.*)\.value": 9}},
        {"use_rslora": True, "rank_pattern": {"layer.1.attention.self.value": 5, "query": 1}, "alpha_pattern": {"value": 1}},
    ],
    ids=lambda config: " ".join(config),
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_ranks_and_scales_are_folded_and_no_update_changes(config: dict[str, Any], dtype: torch.dtype, tmp_path: Path) -> None:
    stock = made(base_model("bert"), tmp_path, target_modules=["query", "value"], **config)
    saved = {key: tensor.to(dtype) for key, tensor in load_file(tmp_path / WEIGHTS_FILE).items()}
    save_file(saved, tmp_path / WEIGHTS_FILE)
    adapter = LoraAdapter.load(tmp_path)
    assert len({tuple(tensor.shape)[:1] for key, tensor in adapter.tensors.items() if ".lora_A." in key}) == 1
    for name in adapter.modules:
        lora_a, lora_b = (saved[f"{KEY_PREFIX}{name}.{factor}.weight"].float() for factor in ("lora_A", "lora_B"))
        wanted = stock.base_model.model.get_submodule(name).scaling["default"] * (lora_b @ lora_a)
        assert (adapter.delta(name) - wanted).abs().max() <= 1e-6 * wanted.abs().max()


def test_equal_scales_leave_the_numbers_alone(tmp_path: Path) -> None:
    made(base_model("bert"), tmp_path, target_modules=["query"], use_rslora=True)
    adapter, saved = LoraAdapter.load(tmp_path), load_file(tmp_path / WEIGHTS_FILE)
    assert adapter.spec.scaling == pytest.approx(6 / math.sqrt(3))
    assert all(torch.equal(adapter.tensors[key], tensor) for key, tensor in saved.items())


def test_ranks_that_blow_an_adapter_up_are_refused(tmp_path: Path) -> None:
    tensors = {}
    for name, rank, size in (("first", 200, 1), *((f"layer.{index}.q", 1, 50) for index in range(9))):
        tensors[f"{KEY_PREFIX}{name}.lora_A.weight"] = torch.ones(rank, size)
        tensors[f"{KEY_PREFIX}{name}.lora_B.weight"] = torch.ones(size, rank)
    save_file(tensors, tmp_path / WEIGHTS_FILE)
    config = {"peft_type": "LORA", "r": 1, "lora_alpha": 2, "target_modules": ["q", "first"], "rank_pattern": {"first": 200}}
    (tmp_path / CONFIG_FILE).write_text(json.dumps(config))
    with pytest.raises(AdapterError, match="ranks up to 200 would make the adapter more than 64 times larger"):
        LoraAdapter.load(tmp_path)


# --- names of modules ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "targets",
    ["all-linear", None, r".*(a+)+query", "(", "", ["query", "value", "q_proj", "to_k"], ["attention.self.query", "self.value"]],
    ids=repr,
)
def test_tensors_name_the_modules(targets: Any, tmp_path: Path) -> None:
    base = base_model("bert")
    stock = made(base, tmp_path / "adapter", target_modules=["query", "value"])
    edit(tmp_path / "adapter", target_modules=targets)
    adapter = acts_as(stock, base, tmp_path / "adapter", TOKENS)
    listed = [name for name in targets if name not in ("q_proj", "to_k")] if isinstance(targets, list) else adapter.modules
    assert adapter.spec.target_modules == tuple(sorted(listed))


def test_some_modules_of_a_name_are_named_whole(tmp_path: Path) -> None:
    made(base_model("bert"), tmp_path, target_modules=["query"], layers_to_transform=1)
    adapter = LoraAdapter.load(tmp_path)
    assert adapter.spec.target_modules == adapter.modules == ("encoder.layer.1.attention.self.query",)
    assert not adapter.spec.targets("encoder.layer.0.attention.self.query")


def test_patterns_of_strangers_are_bounded_in_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A module's name that makes (a|a)*-like patterns take for ever."""
    monkeypatch.setattr(plain_lora, "MATCHING_SECONDS", 0.5)
    key = f"{KEY_PREFIX}{'a' * 60}.query."
    save_file({f"{key}lora_A.weight": torch.ones(2, 4), f"{key}lora_B.weight": torch.ones(4, 2)}, tmp_path / WEIGHTS_FILE)
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["query"], "alpha_pattern": {r"(a|a)*b\.query": 1}}
    (tmp_path / CONFIG_FILE).write_text(json.dumps(config))
    start = time.monotonic()
    with pytest.raises(AdapterError, match=r"patterns .*\(a\|a\)\*b.* take longer than 0\.5 s; name the modules"):
        LoraAdapter.load(tmp_path)
    assert time.monotonic() - start < 10


# --- heads -----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "heads"),
    [("gpt2, classifier", ("score",)), ("bert, classifier", ("classifier",)), ("distilbert", ("classifier", "pre_classifier"))],
)
def test_heads_need_no_name(name: str, heads: tuple[str, ...], tmp_path: Path) -> None:
    """peft before 0.11 saved classifiers' heads without naming them; all its versions save DistilBERT's two and name one."""
    base = base_model(name)
    _, config, inputs = CASES[name]
    stock = made(base, tmp_path / "adapter", **config)
    edit(tmp_path / "adapter", modules_to_save=None)
    adapter = acts_as(stock, base, tmp_path / "adapter", inputs)
    assert adapter.spec.modules_to_save == heads


def test_embeddings_of_a_larger_vocabulary_need_no_name(tmp_path: Path) -> None:
    base = base_model("llama")
    stock = made(base, tmp_path / "adapter", task_type="CAUSAL_LM", target_modules=["q_proj"])
    torch.nn.init.normal_(stock.get_input_embeddings().weight)
    stock.save_pretrained(tmp_path / "adapter", save_embedding_layers=True)
    adapter = acts_as(stock, base, tmp_path / "adapter", TOKENS)
    assert adapter.spec.modules_to_save == ("lm_head", "model.embed_tokens")


def test_a_classifier_without_the_heads_that_peft_names(tmp_path: Path) -> None:
    """BART's head has another name, so that peft neither trains nor saves it."""
    base = random_model(other("BartForSequenceClassification", **SEQ2SEQ, num_labels=2))
    inputs = {"input_ids": torch.tensor([[5, 6, 7, base.config.eos_token_id], [9, 8, 7, base.config.eos_token_id]])}
    stock = made(base, tmp_path / "adapter", task_type="SEQ_CLS", target_modules=["q_proj"])
    assert acts_as(stock, base, tmp_path / "adapter", inputs).spec.modules_to_save == ()


def test_gradients_reach_embeddings_and_norms(tmp_path: Path) -> None:
    base = base_model("bert, embeddings and norms")
    made(base, tmp_path, **CASES["bert, embeddings and norms"][1])
    loaded = LoraAdapter.load(tmp_path)
    tensors = {key: tensor.requires_grad_() for key, tensor in loaded.tensors.items()}
    with LoraAdapter(loaded.spec, tensors).attached(base):
        base(**TOKENS)[0].square().sum().backward()
    assert all(tensor.grad is not None and tensor.grad.abs().sum() > 0 for tensor in tensors.values())


# --- what lies the other way, what is kept, what has no family ---------------------------------------------------------------------


@pytest.mark.parametrize("name", ["gpt2", "bert"])
def test_a_wrong_fan_in_fan_out(name: str, tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    base = base_model(name)
    _, config, inputs = CASES[name]
    stock = made(base, tmp_path / "adapter", **config)
    edit(tmp_path / "adapter", fan_in_fan_out=not config.get("fan_in_fan_out", False))
    acts_as(stock, base, tmp_path / "adapter", inputs)  # stock peft warns, and takes the right way as well


def test_the_base_revision_is_kept(tmp_path: Path) -> None:
    made(base_model("bert"), tmp_path / "adapter", target_modules=["query"])
    edit(tmp_path / "adapter", base_model_name_or_path="owner/base", revision="refs/pr/3")
    adapter = LoraAdapter.load(tmp_path / "adapter")
    assert (adapter.base.repo_id, adapter.base.revision) == ("owner/base", "refs/pr/3")
    assert LoraAdapter.load(adapter.save(tmp_path / "again")).base == adapter.base
    assert "`owner/base` at revision `refs/pr/3`" in (tmp_path / "again" / "README.md").read_text()


def test_adapters_of_no_known_family_have_a_card(tmp_path: Path) -> None:
    base = random_model(decoder("LlamaForCausalLM", num_hidden_layers=3))
    made(base, tmp_path / "adapter", **CASES["llama"][1])
    # peft itself writes down what it found
    edit(tmp_path / "adapter", target_modules="all-linear", task_type="SEQ_2_SEQ_LM")
    adapter = LoraAdapter.load(tmp_path / "adapter")
    assert (adapter.family, len(adapter.spec.target_modules)) == (None, 21)
    card = (adapter.save(tmp_path / "again") / "README.md").read_text()
    assert "rank 3, alpha 6, on `model.layers.0.mlp.down_proj`, " in card
    assert "`, 5 more: 2,088 parameters" in card
    assert not (tmp_path / "adapter" / METADATA_FILE).exists()

