from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import WORDS
from test_pooling import decoder, save_decoder
from torch import nn

from cond_pdiff.adapter import LoraAdapter
from cond_pdiff.attach import attached_to_groups
from cond_pdiff.hub import Backbone
from cond_pdiff.models.sentence_backbone import SentenceBackbone
from cond_pdiff.models.upper_blocks import ROWS, FixedTexts, blocks_of, skipped

TEXTS = [" ".join(WORDS[place % len(WORDS)] for place in range(start, start + 1 + start % 7)) for start in range(ROWS + 5)]


def changed(adapter: LoraAdapter, blocks: tuple[str, ...]) -> dict[str, torch.Tensor]:
    """The adapter's tensors side by side with no other's; in some blocks, `lora_B` is another one."""
    return {
        key: (3 * tensor if ".lora_B." in key and any(block in key for block in blocks) else tensor)[None]
        for key, tensor in adapter.tensors.items()
    }


@pytest.mark.parametrize("lower", [0, 1])
def test_upper_blocks_alone_embed_as_the_whole_model(sentence_backbone: SentenceBackbone, tiny_adapter: LoraAdapter, lower: int) -> None:
    model, spec = sentence_backbone.model, tiny_adapter.spec
    blocks = blocks_of(model, tiny_adapter.modules)
    assert [type(block).__name__ for block in blocks] == ["BertLayer"] * 2
    with attached_to_groups(model, spec, changed(tiny_adapter, ())):
        fixed = FixedTexts(sentence_backbone, TEXTS, 16, blocks[:lower])
        torch.testing.assert_close(fixed.embeddings, sentence_backbone.embed(TEXTS, 16), atol=1e-5, rtol=0)
    assert sorted(place for part in fixed.parts for place in part) == list(range(len(TEXTS)))
    with attached_to_groups(model, spec, changed(tiny_adapter, (".layer.1.",))):
        expected = sentence_backbone.embed(TEXTS, 16)
        rows, places = fixed.embed()
        torch.testing.assert_close(rows, expected[places], atol=1e-5, rtol=0)
        some, where = fixed.embed([1])
        torch.testing.assert_close(some, expected[where], atol=1e-5, rtol=0)
    assert not torch.allclose(expected, fixed.embeddings, atol=1e-3)
    assert all("forward" not in vars(block) for block in blocks)


def test_gradients_are_those_of_the_whole_model(sentence_backbone: SentenceBackbone, tiny_adapter: LoraAdapter) -> None:
    blocks = blocks_of(sentence_backbone.model, tiny_adapter.modules)
    found = []
    for lower in (0, 1):
        tensors = {key: tensor.clone().requires_grad_(".layer.1." in key) for key, tensor in changed(tiny_adapter, ()).items()}
        with attached_to_groups(sentence_backbone.model, tiny_adapter.spec, tensors):
            rows, places = FixedTexts(sentence_backbone, TEXTS, 16, blocks[:lower]).embed()
            (rows * torch.arange(len(TEXTS))[places][:, None]).square().sum().backward()
        found.append({key: tensor.grad for key, tensor in tensors.items() if tensor.requires_grad})
    assert found[0].keys() == found[1].keys()
    for key, gradient in found[0].items():
        torch.testing.assert_close(found[1][key], gradient, atol=1e-4 * float(gradient.abs().max()), rtol=1e-3)


@pytest.mark.parametrize(("kind", "targets"), [("gpt2", ("c_attn",)), ("llama", ("q_proj", "v_proj"))])
def test_models_of_other_kinds(tmp_path: Path, kind: str, targets: tuple[str, ...]) -> None:
    folder = save_decoder(tmp_path, decoder(kind), pad_token="<pad>")
    backbone = SentenceBackbone.load(Backbone(str(folder)))
    names = [name for name, _ in backbone.model.named_modules() if name.endswith(targets)]
    blocks = blocks_of(backbone.model, names)
    assert len(blocks) == 2
    fixed = FixedTexts(backbone, TEXTS, 16, blocks[:1])
    rows, places = fixed.embed()
    torch.testing.assert_close(rows, fixed.embeddings[places], atol=1e-5, rtol=0)


def test_modules_outside_of_blocks_leave_none() -> None:
    model: Any = nn.Module()
    model.first, model.layers = nn.Linear(2, 2), nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)])
    assert blocks_of(model, ["layers.0", "layers.1"]) == list(model.layers)
    assert blocks_of(model, ["first", "layers.0"]) == []


def test_no_texts_have_no_embeddings(sentence_backbone: SentenceBackbone) -> None:
    assert FixedTexts(sentence_backbone, [], 16).embeddings.shape == (0, sentence_backbone.embedding_dim)


def test_skipped_blocks_run_again_afterwards() -> None:
    block = nn.Linear(2, 2)
    own = vars(block)["forward"] = block.forward
    with contextlib.suppress(KeyError), skipped([block], "kept"):
        assert block(torch.ones(2)) == "kept"
        raise KeyError
    assert vars(block)["forward"] is own
