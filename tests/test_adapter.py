from __future__ import annotations

import copy
import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TARGETS, make_adapter, make_bert
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModel

from cond_pdiff.adapter import ADAPTER_FILES, CONFIG_FILE, MAX_RANK, METADATA_FILE, WEIGHTS_FILE, LoraAdapter, LoraSpec, base_fingerprint
from cond_pdiff.errors import AdapterError, OutputExistsError
from cond_pdiff.hub import Backbone
from cond_pdiff.layout import ParamLayout
from cond_pdiff.models.sentence_backbone import SentenceBackbone

TEXTS = ["the kitten purr", "good film", "the room was bad, the meal even worse, and the song awful"]
QUERY_A = "base_model.model.encoder.layer.0.attention.self.query.lora_A.weight"
QUERY_B = QUERY_A.replace("lora_A", "lora_B")

Change = Callable[[dict[str, Any]], object]


@pytest.fixture
def saved(tiny_adapter: LoraAdapter, tmp_path: Path) -> Path:
    return tiny_adapter.save(tmp_path / "adapter")


@pytest.fixture
def other_adapter(tiny_adapter: LoraAdapter) -> LoraAdapter:
    """Other B, the same A."""
    other = {key: tensor if "lora_A" in key else tensor.flip(0) for key, tensor in tiny_adapter.tensors.items()}
    return replace(tiny_adapter, tensors=other)


@pytest.fixture
def foreign_adapter(tiny_backbone: Backbone, sentence_backbone: SentenceBackbone) -> LoraAdapter:
    """Other B, other A."""
    return make_adapter(sentence_backbone.model, tiny_backbone.repo_id, seed=1)


def fingerprint(model: torch.nn.Module) -> str:
    """Weights, module names and hooks."""
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        digest.update(name.encode() + tensor.numpy().tobytes())
    for name, module in model.named_modules():
        digest.update(f"{name} {type(module)} {len(module._forward_hooks)} {len(module._forward_pre_hooks)}".encode())
    return digest.hexdigest()


def folder_hash(folder: Path) -> str:
    return hashlib.sha256(b"".join(path.name.encode() + path.read_bytes() for path in sorted(folder.iterdir()))).hexdigest()


def edit_json(path: Path, change: Change) -> None:
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))


def edit_tensors(path: Path, change: Change) -> None:
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, {"format": "pt"})


def deltas(adapter: LoraAdapter) -> torch.Tensor:
    """ΔW of all modules in one vector."""
    return torch.cat([adapter.delta(name).flatten() for name in adapter.modules])


# --- disk --------------------------------------------------------------------------------------------------------------------


def test_save_and_load_keep_everything(tiny_adapter: LoraAdapter, saved: Path) -> None:
    assert sorted(path.name for path in saved.iterdir()) == sorted(ADAPTER_FILES)
    loaded = LoraAdapter.load(saved, tiny_adapter.layout)
    assert loaded.spec == tiny_adapter.spec
    assert loaded.metadata == tiny_adapter.metadata
    assert loaded.layout == tiny_adapter.layout
    assert all(torch.equal(loaded.tensors[key], tensor) for key, tensor in tiny_adapter.tensors.items())
    assert folder_hash(loaded.save(saved.parent / "again")) == folder_hash(saved)


SAVE_SCRIPT = """
import sys, torch
from cond_pdiff.adapter import LoraAdapter, LoraSpec

modules = {f"layer.{index}.{target}" for index in range(3) for target in ("query", "key", "value", "attention.output.dense")}
tensors = {}
for name in modules:  # a set: its order changes with PYTHONHASHSEED
    for factor, shape in {("lora_A", (2, 4)), ("lora_B", (4, 2))}:
        rng = torch.Generator().manual_seed(int.from_bytes(f"{name}{factor}".encode()[-6:], "big"))
        tensors[f"base_model.model.{name}.{factor}.weight"] = torch.randn(shape, generator=rng)
targets = tuple({"query", "key", "value", "attention.output.dense"})
metadata = {key: key for key in {"task", "labels", "seed", "condition"}}
LoraAdapter(LoraSpec("some/base", 2, 4.0, targets), tensors, metadata).save(sys.argv[1])
"""


def test_the_same_adapter_is_the_same_bytes_in_every_process(tmp_path: Path) -> None:
    processes = [
        subprocess.Popen([sys.executable, "-c", SAVE_SCRIPT, str(tmp_path / seed)], env={**os.environ, "PYTHONHASHSEED": seed})
        for seed in ("1", "2")
    ]
    assert [process.wait(timeout=120) for process in processes] == [0, 0]
    first, second = tmp_path / "1", tmp_path / "2"
    for name in ADAPTER_FILES:
        assert (first / name).read_bytes() == (second / name).read_bytes(), name
    again = LoraAdapter.load(first).save(tmp_path / "again")
    assert folder_hash(again) == folder_hash(first)


def test_save_replaces_only_adapters(tiny_adapter: LoraAdapter, other_adapter: LoraAdapter, saved: Path) -> None:
    with pytest.raises(OutputExistsError, match="not empty"):
        other_adapter.save(saved)
    (saved / "README.md").write_text("a card")
    other_adapter.save(saved, overwrite=True)
    assert torch.equal(LoraAdapter.load(saved).tensors[QUERY_B], other_adapter.tensors[QUERY_B])
    (saved / "notes.txt").write_text("mine")
    with pytest.raises(OutputExistsError, match=r"notes\.txt"):
        tiny_adapter.save(saved, overwrite=True)


def test_a_failing_save_leaves_nothing(tiny_adapter: LoraAdapter, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="JSON"):
        replace(tiny_adapter, metadata={"accuracy": float("nan")}).save(tmp_path / "adapter")
    assert list(tmp_path.iterdir()) == []


def test_an_adapter_that_peft_saved_is_read(sentence_backbone: SentenceBackbone, tmp_path: Path) -> None:
    config = LoraConfig(r=3, lora_alpha=6, target_modules=list(TARGETS), init_lora_weights=False)
    model = get_peft_model(copy.deepcopy(sentence_backbone.model), config)
    model.save_pretrained(tmp_path)
    adapter = LoraAdapter.load(tmp_path)
    assert (adapter.spec.rank, adapter.spec.alpha, adapter.spec.base_fingerprint) == (3, 6, None)
    assert set(adapter.spec.target_modules) == set(TARGETS)
    theirs = SentenceBackbone(model, sentence_backbone.tokenizer).embed(TEXTS)
    with adapter.attached(sentence_backbone.model):
        torch.testing.assert_close(sentence_backbone.embed(TEXTS), theirs, atol=1e-6, rtol=0)


# --- models ------------------------------------------------------------------------------------------------------------------


def test_stock_peft_gives_the_same_embeddings(
    tiny_backbone: Backbone, sentence_backbone: SentenceBackbone, tiny_adapter: LoraAdapter, saved: Path
) -> None:
    base = sentence_backbone.embed(TEXTS)
    with tiny_adapter.attached(sentence_backbone.model):
        ours = sentence_backbone.embed(TEXTS)
    stock = PeftModel.from_pretrained(AutoModel.from_pretrained(tiny_backbone.repo_id), saved)
    theirs = SentenceBackbone(stock, sentence_backbone.tokenizer).embed(TEXTS)
    assert (ours - base).norm() > 0.02
    torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=0)


def test_sentence_transformers_gives_the_same_embeddings(
    tiny_backbone: Backbone, sentence_backbone: SentenceBackbone, tiny_adapter: LoraAdapter, saved: Path
) -> None:
    from sentence_transformers import SentenceTransformer

    # For a plain transformers folder this is [Transformer, Pooling(mean)].
    stock = SentenceTransformer(tiny_backbone.repo_id, device="cpu")
    assert [type(module).__name__ for module in stock] == ["Transformer", "Pooling"]
    stock.load_adapter(str(saved))
    theirs = stock.encode(TEXTS, normalize_embeddings=True, convert_to_tensor=True)
    with tiny_adapter.attached(sentence_backbone.model):
        torch.testing.assert_close(sentence_backbone.embed(TEXTS), theirs, atol=1e-6, rtol=0)


def test_attach_adds_delta_w(sentence_backbone: SentenceBackbone, tiny_adapter: LoraAdapter) -> None:
    merged = copy.deepcopy(sentence_backbone)
    for name in tiny_adapter.modules:
        merged.model.get_submodule(name).weight.data += 0.5 * tiny_adapter.delta(name)
    with tiny_adapter.attached(sentence_backbone.model, scale=0.5):
        torch.testing.assert_close(sentence_backbone.embed(TEXTS), merged.embed(TEXTS), atol=1e-6, rtol=0)
    base = sentence_backbone.embed(TEXTS)
    with tiny_adapter.attached(sentence_backbone.model, scale=0):
        torch.testing.assert_close(sentence_backbone.embed(TEXTS), base, atol=1e-7, rtol=0)


def test_detached_models_are_bit_identical(
    sentence_backbone: SentenceBackbone, tiny_adapter: LoraAdapter, other_adapter: LoraAdapter
) -> None:
    model = sentence_backbone.model
    state, outputs = fingerprint(model), sentence_backbone.embed(TEXTS)

    attachment = tiny_adapter.attach(model)
    assert fingerprint(model) != state
    assert not torch.equal(sentence_backbone.embed(TEXTS), outputs)
    attachment.detach()
    attachment.detach()
    assert fingerprint(model) == state
    assert torch.equal(sentence_backbone.embed(TEXTS), outputs)

    with tiny_adapter.attached(model) as attached, pytest.raises(AttributeError):
        attached("not tokens")
    with pytest.raises(ZeroDivisionError), tiny_adapter.attached(model), other_adapter.attached(model):
        _ = sentence_backbone.embed(TEXTS) / (1 // 0)
    assert fingerprint(model) == state
    assert torch.equal(sentence_backbone.embed(TEXTS), outputs)


def test_gradients_pass_through_an_attached_adapter(sentence_backbone: SentenceBackbone, tiny_adapter: LoraAdapter) -> None:
    tensors = {key: tensor.clone().requires_grad_() for key, tensor in tiny_adapter.tensors.items()}
    with replace(tiny_adapter, tensors=tensors).attached(sentence_backbone.model):
        sentence_backbone.forward(TEXTS, 64)[:, 0].sum().backward()
    assert all(tensor.grad is not None and tensor.grad.abs().sum() > 0 for tensor in tensors.values())


def test_a_half_precision_base_has_the_same_fingerprint(sentence_backbone: SentenceBackbone, tiny_adapter: LoraAdapter) -> None:
    half = copy.deepcopy(sentence_backbone.model).half()
    assert base_fingerprint(half, tiny_adapter.spec) == base_fingerprint(sentence_backbone.model, tiny_adapter.spec)
    with tiny_adapter.attached(half):
        embeddings = SentenceBackbone(half, sentence_backbone.tokenizer).embed(TEXTS)
    with tiny_adapter.attached(sentence_backbone.model):
        torch.testing.assert_close(embeddings.float(), sentence_backbone.embed(TEXTS), atol=1e-2, rtol=0)


def test_fingerprint_sees_every_targeted_weight_and_the_config(sentence_backbone: SentenceBackbone, tiny_adapter: LoraAdapter) -> None:
    model = sentence_backbone.model
    known = {base_fingerprint(model, tiny_adapter.spec)}
    for name in tiny_adapter.modules:
        changed = copy.deepcopy(model)
        changed.get_submodule(name).weight.data[-1, -1] += 0.01
        known.add(base_fingerprint(changed, tiny_adapter.spec))
    changed = copy.deepcopy(model)
    changed.config.num_attention_heads = 4
    known.add(base_fingerprint(changed, tiny_adapter.spec))
    assert len(known) == len(tiny_adapter.modules) + 2


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (lambda: make_bert(seed=1), "weights are not those of.*fingerprints differ"),
        (lambda: torch.nn.Sequential(torch.nn.Linear(2, 2)), r"\(Sequential\) has no module named"),
        (lambda: get_peft_model(make_bert(), LoraConfig(r=1, target_modules=["query"])), r"'.*layer\.0.*query' is a Linear|already merged"),
        (lambda: drop_last_layer(make_bert()), r"'encoder\.layer\.1\..*' is in the adapter but not in the model"),
        (lambda: widen(make_bert()), r"'encoder\.layer\.1\.attention\.self\.value' is 8×32, but the adapter's update is 32×32"),
    ],
    ids=["other weights", "another kind of model", "peft model", "one layer less", "another shape"],
)
@pytest.mark.parametrize("enter", ["attach", "attached", "check_base"])
def test_a_wrong_base_is_refused_and_stays_untouched(
    tiny_adapter: LoraAdapter, model: Callable[[], torch.nn.Module], message: str, enter: str
) -> None:
    base = model()
    before = fingerprint(base)
    act = {
        "attach": tiny_adapter.attach,
        "attached": lambda base: tiny_adapter.attached(base).__enter__(),
        "check_base": tiny_adapter.check_base,
    }
    with pytest.raises(AdapterError, match=message):
        act[enter](base)
    assert fingerprint(base) == before


def drop_last_layer(model: torch.nn.Module) -> torch.nn.Module:
    del model.encoder.layer[-1]
    return model


def widen(model: torch.nn.Module) -> torch.nn.Module:
    model.encoder.layer[1].attention.self.value = torch.nn.Linear(32, 8)
    return model


# --- corrupted adapters ------------------------------------------------------------------------------------------------------

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
    "targets a regex": ({"target_modules": r".*(a+)+query"}, r"target_modules must be a list of module names, got '\.\*\(a\+\)\+query'"),
    "targets numbers": ({"target_modules": [1]}, "target_modules must be a list"),
    "targets nothing": ({"target_modules": []}, "target_modules is empty"),
    "targets too few": ({"target_modules": ["query", "key", "value"]}, "is outside target_modules"),
    "targets too many": ({"target_modules": [*TARGETS, "intermediate.dense"]}, "target_modules names 'intermediate.dense'"),
    "another method": ({"peft_type": "IA3"}, "peft_type is 'IA3', expected 'LORA'"),
    "biases": ({"bias": "all"}, "bias is 'all'"),
    "dora": ({"use_dora": True}, "use_dora is True"),
    "rank-stabilised": ({"use_rslora": True}, "use_rslora is True"),
    "rank pattern": ({"rank_pattern": {"query": 4}}, "rank_pattern"),
    "alpha pattern": ({"alpha_pattern": {"query": 4}}, "alpha_pattern"),
    "some layers": ({"layers_to_transform": [0]}, "layers_to_transform"),
    "whole modules": ({"modules_to_save": ["pooler"]}, "modules_to_save"),
    "transposed weights": ({"fan_in_fan_out": True}, "fan_in_fan_out"),
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
        (lambda m: m["base"].update(repo_id="some/other-base"), "some/other-base"),
    ],
    ids=["layout short", "layout shape", "layout words", "lora more", "lora less", "lora a list", "lora rank", "base reference"],
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


# --- interpolation -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("space", ["factors", "delta"])
@pytest.mark.parametrize("weight", [0.0, 0.25, 0.5, 1.0])
def test_interpolation_with_a_shared_a_is_exact(tiny_adapter: LoraAdapter, other_adapter: LoraAdapter, space: Any, weight: float) -> None:
    between = tiny_adapter.interpolate(other_adapter, weight, space)
    for key, tensor in between.tensors.items():
        if "lora_A" in key:
            assert torch.equal(tensor, tiny_adapter.tensors[key])
        else:
            expected = (1 - weight) * tiny_adapter.tensors[key] + weight * other_adapter.tensors[key]
            torch.testing.assert_close(tensor, expected, atol=1e-7, rtol=1e-6)
    expected = (1 - weight) * deltas(tiny_adapter) + weight * deltas(other_adapter)
    torch.testing.assert_close(deltas(between), expected, atol=1e-6, rtol=1e-5)
    if weight in (0, 1):
        end = other_adapter if weight else tiny_adapter
        assert all(torch.equal(tensor, end.tensors[key]) for key, tensor in between.tensors.items())


def test_interpolation_of_factors_with_different_a_has_the_right_ends(tiny_adapter: LoraAdapter, foreign_adapter: LoraAdapter) -> None:
    for weight, end in ((0.0, tiny_adapter), (1.0, foreign_adapter)):
        between = tiny_adapter.interpolate(foreign_adapter, weight, "factors")
        assert all(torch.equal(tensor, end.tensors[key]) for key, tensor in between.tensors.items())


def test_interpolation_of_deltas_with_different_a(tiny_adapter: LoraAdapter, foreign_adapter: LoraAdapter) -> None:
    for weight, end in ((0.0, tiny_adapter), (1.0, foreign_adapter)):
        torch.testing.assert_close(deltas(tiny_adapter.interpolate(foreign_adapter, weight)), deltas(end), atol=1e-5, rtol=1e-4)
    there = tiny_adapter.interpolate(foreign_adapter, 0.3)
    back = foreign_adapter.interpolate(tiny_adapter, 0.7)
    torch.testing.assert_close(deltas(there), deltas(back), atol=1e-5, rtol=1e-4)
    assert there.layout == tiny_adapter.layout

    # The best approximation of its rank (Eckart-Young) loses exactly the smaller singular values.
    exact = 0.7 * deltas(tiny_adapter) + 0.3 * deltas(foreign_adapter)
    factors = tiny_adapter.interpolate(foreign_adapter, 0.3, "factors")
    assert (deltas(there) - exact).norm() < 0.9 * (deltas(factors) - exact).norm()
    name = tiny_adapter.modules[0]
    wanted = 0.7 * tiny_adapter.delta(name) + 0.3 * foreign_adapter.delta(name)
    lost = torch.linalg.svdvals(wanted)[tiny_adapter.spec.rank :].norm()
    torch.testing.assert_close((there.delta(name) - wanted).norm(), lost, atol=1e-5, rtol=1e-4)


def test_interpolation_refuses_other_kinds(tiny_adapter: LoraAdapter) -> None:
    other = replace(tiny_adapter, spec=replace(tiny_adapter.spec, alpha=1.0))
    with pytest.raises(AdapterError, match="same layout, rank, alpha and base"):
        tiny_adapter.interpolate(other, 0.5)
    with pytest.raises(AdapterError, match="'factors' or 'delta', got 'svd'"):
        tiny_adapter.interpolate(tiny_adapter, 0.5, "svd")  # type: ignore[arg-type]


def test_the_order_of_target_modules_does_not_make_another_adapter(tiny_adapter: LoraAdapter, tmp_path: Path) -> None:
    spec = replace(tiny_adapter.spec, target_modules=tuple(reversed(tiny_adapter.spec.target_modules)))
    adapter = replace(tiny_adapter, spec=spec)
    loaded = LoraAdapter.load(adapter.save(tmp_path / "adapter"))
    assert loaded.spec == adapter.spec == tiny_adapter.spec
    adapter.interpolate(loaded, 0.5)


def test_spec_json_round_trip(tiny_adapter: LoraAdapter) -> None:
    spec = tiny_adapter.spec
    assert LoraSpec.from_json(json.loads(json.dumps(spec.to_json()))) == spec
    assert spec.scale == 2.0
    assert spec.targets("encoder.layer.0.attention.self.query")
    assert not spec.targets("encoder.layer.0.attention.self.my_query")
