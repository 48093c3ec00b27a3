from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import fingerprint
from safetensors.torch import load_file, save_file

from cond_pdiff.adapter import LoraAdapter
from cond_pdiff.errors import AdapterError
from cond_pdiff.layout import ParamLayout
from cond_pdiff.lora import MAX_RANK
from cond_pdiff.models.sentence_backbone import SentenceBackbone
from cond_pdiff.peft_files import CONFIG_FILE, METADATA_FILE, WEIGHTS_FILE

QUERY_A = "base_model.model.encoder.layer.0.attention.self.query.lora_A.weight"
QUERY_B = QUERY_A.replace("lora_A", "lora_B")

Change = Callable[[dict[str, Any]], object]


def edit_json(path: Path, change: Change) -> None:
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))


def edit_tensors(path: Path, change: Change) -> None:
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, {"format": "pt"})


TENSOR_CORRUPTIONS: dict[str, tuple[Change, str]] = {
    "missing key": (lambda t: t.pop(QUERY_A), rf"missing.*{QUERY_A}"),
    "extra key": (lambda t: t.update({"base_model.model.head.weight": torch.zeros(2)}), r"unexpected.*base_model\.model\.head\.weight"),
    "extra module": (lambda t: t.update({QUERY_A.replace("query", "other"): torch.zeros(2, 32)}), "other"),
    "renamed key": (lambda t: t.update({QUERY_A.replace("lora_A", "lora_X"): t.pop(QUERY_A)}), "lora_X"),
    "wrong rank": (lambda t: t.update({QUERY_A: torch.zeros(5, 32)}), rf"{QUERY_A}.*\(5, 32\)"),
    "wrong shape": (lambda t: t.update({QUERY_B: torch.zeros(32, 2, 1)}), rf"{QUERY_B}.*\(32, 2, 1\)"),
    "transposed": (lambda t: t.update({QUERY_B: torch.zeros(2, 32)}), rf"{QUERY_B}.*\(2, 32\)"),
    "wrong dtype": (lambda t: t.update({QUERY_A: torch.zeros(2, 32, dtype=torch.int32)}), rf"{QUERY_A}.*int32"),
    "double": (lambda t: t.update({QUERY_A: torch.zeros(2, 32, dtype=torch.float64)}), rf"{QUERY_A}.*float64"),
    "nan": (lambda t: t[QUERY_B].__setitem__((3, 1), float("nan")), rf"{QUERY_B}.*NaN"),
    "inf": (lambda t: t[QUERY_B].__setitem__((3, 1), float("inf")), rf"{QUERY_B}.*infinite"),
    "huge": (lambda t: t[QUERY_B].__setitem__((3, 1), -1e6), rf"{QUERY_B}.*1e\+06"),
    "no tensors": (lambda t: t.clear(), "missing|no tensors"),
}


@pytest.mark.parametrize("foreign", [False, True], ids=["ours", "peft's"])
@pytest.mark.parametrize(("change", "message"), TENSOR_CORRUPTIONS.values(), ids=TENSOR_CORRUPTIONS)
def test_corrupted_tensors_are_refused(saved: Path, change: Change, message: str, foreign: bool) -> None:
    if foreign:
        (saved / METADATA_FILE).unlink()
        LoraAdapter.load(saved)
    edit_tensors(saved / WEIGHTS_FILE, change)
    with pytest.raises(AdapterError, match=message):
        LoraAdapter.load(saved)


FILE_CORRUPTIONS: dict[str, tuple[Callable[[Path], object], str]] = {
    "no folder": (lambda f: f.rename(f.parent / "elsewhere"), "no adapter folder at"),
    "no config": (lambda f: (f / CONFIG_FILE).unlink(), "no adapter folder at"),
    "no weights": (lambda f: (f / WEIGHTS_FILE).unlink(), rf"{WEIGHTS_FILE} is missing"),
    "empty weights": (lambda f: (f / WEIGHTS_FILE).write_bytes(b""), f"{WEIGHTS_FILE} is not a complete safetensors file"),
    "truncated": (lambda f: (f / WEIGHTS_FILE).write_bytes((f / WEIGHTS_FILE).read_bytes()[:-8]), f"{WEIGHTS_FILE} is not a complete"),
    "header cut": (lambda f: (f / WEIGHTS_FILE).write_bytes((f / WEIGHTS_FILE).read_bytes()[:50]), f"{WEIGHTS_FILE} is not a complete"),
    "a pickle": (lambda f: (f / WEIGHTS_FILE).write_bytes(b"\x80\x04K\x01." * 99), f"{WEIGHTS_FILE} is not a complete safetensors file"),
    "config not json": (lambda f: (f / CONFIG_FILE).write_text("{'r': 2}"), f"{CONFIG_FILE} is not valid JSON"),
    "config not utf-8": (lambda f: (f / CONFIG_FILE).write_bytes(b"\xff\xfe{}"), f"{CONFIG_FILE} is not valid JSON"),
    "config a list": (lambda f: (f / CONFIG_FILE).write_text("[]"), f"{CONFIG_FILE} must hold a JSON object, got list"),
    "config too deep": (lambda f: (f / CONFIG_FILE).write_text("[" * 200_000), f"{CONFIG_FILE} is not valid JSON"),
    "config too large": (lambda f: (f / CONFIG_FILE).write_text(" " * (5 << 20)), f"{CONFIG_FILE} has 5242880 bytes"),
    "metadata not json": (lambda f: (f / METADATA_FILE).write_text("layout"), f"{METADATA_FILE} is not valid JSON"),
}


@pytest.mark.parametrize(("corrupt", "message"), FILE_CORRUPTIONS.values(), ids=FILE_CORRUPTIONS)
def test_corrupted_files_are_refused(saved: Path, corrupt: Callable[[Path], object], message: str) -> None:
    corrupt(saved)
    with pytest.raises(AdapterError, match=message):
        LoraAdapter.load(saved)


CONFIG_CORRUPTIONS: dict[str, tuple[dict[str, Any], str]] = {
    "r too large": ({"r": 10**6}, rf"rank \(r\) must be a whole number from 1 to {MAX_RANK}, got 1000000"),
    "r zero": ({"r": 0}, "rank"),
    "r not whole": ({"r": 2.0}, "rank"),
    "r a flag": ({"r": True}, "rank"),
    "r missing": ({"r": None}, "rank"),
    "r of other tensors": ({"r": 3}, r"tensor '.*lora_A\.weight' has shape \(2, 32\), which does not fit rank 3"),
    "alpha zero": ({"lora_alpha": 0}, "lora_alpha must be a positive number"),
    "alpha nan": ({"lora_alpha": float("nan")}, "lora_alpha must be a positive number"),
    "alpha beyond float": ({"lora_alpha": 10**400}, "lora_alpha must be a positive number"),
    "alpha words": ({"lora_alpha": "4"}, "lora_alpha must be a positive number"),
    "targets a mapping": ({"target_modules": {"query": 1}}, r"target_modules must be a list of module names, got {'query': 1}"),
    "targets numbers": ({"target_modules": [1]}, "target_modules must be a list"),
    "targets nothing": ({"target_modules": []}, "target_modules is empty"),
    "targets too few": ({"target_modules": ["query", "key", "value"]}, "is outside target_modules"),
    "targets excluded": ({"exclude_modules": ["layer.1.attention.self.query"]}, "layer.1.attention.self.query.*is of a module in exclude"),
    "excluded numbers": ({"exclude_modules": [1]}, "exclude_modules must be a list"),
    "another method": ({"peft_type": "IA3"}, "peft_type is 'IA3', expected 'LORA'; it is an adapter of another method"),
    "no method": ({"peft_type": None}, "peft_type is None, expected 'LORA'$"),
    "AdapterHub's": ({"peft_type": None, "config": {"reduction_factor": 16}}, "looks like an adapter of the AdapterHub library"),
    "MLX's": ({"peft_type": None, "lora_parameters": {"rank": 8}}, "looks like an adapter of MLX"),
    "biases": ({"bias": "all"}, "bias is 'all'"),
    "dora": ({"use_dora": True}, "use_dora is True: DoRA"),
    "biases of its own": ({"lora_bias": True}, "lora_bias is True: LoRA with biases of its own"),
    "rank pattern": ({"rank_pattern": {"query": 4}}, r"query\.lora_A\.weight' has shape \(2, 32\).* rank 4 \(r and rank_pattern\)"),
    "rank pattern zero": ({"rank_pattern": {"query": 0}}, "rank_pattern: 'query' is 0, expected a whole number from 1 to 1024"),
    "rank pattern huge": ({"rank_pattern": {"query": 10**9}}, "expected a whole number from 1 to 1024"),
    "task type list": ({"task_type": ["SEQ_CLS"]}, "task_type must be a name or null"),
    "base number": ({"base_model_name_or_path": 5}, "base_model_name_or_path must be a name or null"),
    "alpha pattern words": ({"alpha_pattern": {"query": "4"}}, "alpha_pattern: 'query' is '4', expected a positive number"),
    "alpha pattern a list": ({"alpha_pattern": [4]}, "alpha_pattern must map names"),
    "alpha pattern broken": ({"alpha_pattern": {"(query": 4}}, "are no regular expressions: .*missing"),
    "base revision": ({"revision": 3}, "revision must be the base model's branch, tag or commit, got 3"),
    "another base": ({"init_lora_weights": "pissa"}, "init_lora_weights is 'pissa': peft changes the base model's own weights"),
    "some layers": ({"layers_to_transform": [0]}, r"layer\.1\..* is of none of the layers in layers_to_transform \[0\]"),
    "layers in words": ({"layers_to_transform": "0"}, "layers_to_transform must be whole numbers"),
    "whole modules": ({"modules_to_save": ["pooler"]}, "modules_to_save"),
    "transposed weights": ({"fan_in_fan_out": "yes"}, "fan_in_fan_out must be true or false, got 'yes'"),
}


@pytest.mark.parametrize(("change", "message"), CONFIG_CORRUPTIONS.values(), ids=CONFIG_CORRUPTIONS)
def test_corrupted_configs_are_refused_without_metadata_too(saved: Path, change: dict[str, Any], message: str) -> None:
    (saved / METADATA_FILE).unlink()
    edit_json(saved / CONFIG_FILE, lambda config: config.update(change))
    with pytest.raises(AdapterError, match=message):
        LoraAdapter.load(saved)


CONTRADICTIONS: dict[str, tuple[str, dict[str, Any], str]] = {
    "alpha": ("lora_alpha", {"alpha": 8.0}, "alpha"),
    "base": ("base_model_name_or_path", {"base_model": "bert-base-uncased"}, "base_model"),
    "rank": ("r", {"rank": 3}, "rank"),
    "targets": ("target_modules", {"target_modules": ["query"]}, "target_modules"),
    "task type": ("task_type", {"task_type": "CAUSAL_LM"}, "task_type"),
}


@pytest.mark.parametrize("edited", [CONFIG_FILE, METADATA_FILE])
@pytest.mark.parametrize(("field", "entry", "message"), CONTRADICTIONS.values(), ids=CONTRADICTIONS)
def test_config_and_metadata_may_not_contradict_each_other(
    saved: Path, field: str, entry: dict[str, Any], message: str, edited: str
) -> None:
    (value,) = entry.values()
    if edited == CONFIG_FILE:
        edit_json(saved / CONFIG_FILE, lambda config: config.update({field: value}))
    else:
        edit_json(saved / METADATA_FILE, lambda metadata: metadata["lora"].update(entry))
    with pytest.raises(AdapterError, match=rf"{CONFIG_FILE}: {message} is .*but {METADATA_FILE} records"):
        LoraAdapter.load(saved)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m["layout"]["shapes"].pop(), "unexpected"),
        (lambda m: m["layout"]["shapes"][0].__setitem__(1, [2, 31]), r"expected \(2, 31\)"),
        (lambda m: m.update(layout="none"), "not a layout"),
        (lambda m: m["lora"].update(surprise=1), "surprise"),
        (lambda m: m["lora"].pop("rank"), "rank"),
        (lambda m: m.update(lora=[]), "not a LoRA specification"),
        (lambda m: m["lora"].update(rank=10**6), "rank"),
        (lambda m: m["lora"].update(base_fingerprint=5), "base_fingerprint must be a string or null, got 5"),
        (lambda m: m["lora"].update(family=["x"]), r"family must be a string or null, got \['x'\]"),
        (lambda m: m["base"].update(repo_id="some/other-base"), "some/other-base"),
    ],
    ids=[
        *("layout short", "layout shape", "layout words", "lora more", "lora less", "lora a list", "lora rank"),
        *("fingerprint a number", "family a list", "base reference"),
    ],
)
def test_contradictory_or_malformed_metadata_is_refused(saved: Path, change: Change, message: str) -> None:
    edit_json(saved / METADATA_FILE, change)
    with pytest.raises(AdapterError, match=message):
        LoraAdapter.load(saved)


def test_another_layout_is_refused(saved: Path, tiny_adapter: LoraAdapter) -> None:
    shapes = dict(tiny_adapter.layout.shapes)
    shapes.pop(QUERY_A)
    with pytest.raises(AdapterError, match=rf"unexpected '{QUERY_A}'"):
        LoraAdapter.load(saved, ParamLayout(shapes))


def test_an_adapter_whose_fingerprint_was_edited_is_refused_by_its_base(saved: Path, sentence_backbone: SentenceBackbone) -> None:
    edit_json(saved / METADATA_FILE, lambda metadata: metadata["lora"].update(base_fingerprint="0" * 64))
    before = fingerprint(sentence_backbone.model)
    with pytest.raises(AdapterError, match="fingerprints differ"):
        LoraAdapter.load(saved).attach(sentence_backbone.model)
    assert fingerprint(sentence_backbone.model) == before


@pytest.mark.parametrize(("change", "message"), TENSOR_CORRUPTIONS.values(), ids=TENSOR_CORRUPTIONS)
def test_corrupted_adapters_cannot_be_made_in_memory(tiny_adapter: LoraAdapter, change: Change, message: str) -> None:
    tensors = {key: tensor.clone() for key, tensor in tiny_adapter.tensors.items()}
    change(tensors)
    with pytest.raises(AdapterError, match=message):
        replace(tiny_adapter, tensors=tensors)
