"""Language models of random weights with a vocabulary of words, as folders: Llama-style with a chat template, and GPT-2 without."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import GPT2Config, GPT2LMHeadModel, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

TEMPLATE = (
    "{% for message in messages %}<s>{{ message['role'] }}\n{{ message['content'] }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant\n{% endif %}"
)
LINEARS = {
    "llama": ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
    "gpt2": ("c_attn", "c_proj", "c_fc"),
}


def tokenizer(template: str | None = TEMPLATE, **special: Any) -> PreTrainedTokenizerFast:
    """A tokenizer of bytes, as GPT-2's and SmolLM2's is, with one merge."""
    pieces = ["<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet()), "th"]
    inner = Tokenizer(models.BPE({piece: index for index, piece in enumerate(pieces)}, [("t", "h")]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    named = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "</s>", **special}
    made = PreTrainedTokenizerFast(tokenizer_object=inner, model_max_length=512, **named)
    made.chat_template = template
    return made


def save_llama(folder: Path, template: str | None = TEMPLATE, kind: type[PreTrainedModel] = LlamaForCausalLM, **changes: Any) -> Path:
    config = kind.config_class(
        vocab_size=259, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        max_position_embeddings=512, initializer_range=0.2, bos_token_id=0, eos_token_id=1, pad_token_id=1, **changes,
    )  # fmt: skip
    return _save(kind, config, folder, tokenizer(template))


def save_gpt2(folder: Path, **special: Any) -> Path:
    config = GPT2Config(
        vocab_size=259, n_embd=32, n_layer=2, n_head=4, n_positions=512, initializer_range=0.2, bos_token_id=0, eos_token_id=1,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
    )  # fmt: skip
    return _save(GPT2LMHeadModel, config, folder, tokenizer(None, **special))


def _save(kind: type[PreTrainedModel], config: Any, folder: Path, words: PreTrainedTokenizerFast) -> Path:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        kind(config).eval().save_pretrained(folder)
    words.save_pretrained(folder)
    return folder
