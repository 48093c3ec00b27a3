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
from conftest import TARGETS, fingerprint, make_adapter, make_bert
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModel

from cond_pdiff import lora
from cond_pdiff.adapter import ADAPTER_FILES, LoraAdapter
from cond_pdiff.errors import AdapterError, OutputExistsError
from cond_pdiff.hub import Backbone
from cond_pdiff.lora import KEY_PREFIX, LoraSpec, base_fingerprint, same_base
from cond_pdiff.models.sentence_backbone import SentenceBackbone
from cond_pdiff.training.zoo.zoo import soup

TEXTS = ["the kitten purr", "good film", "the room was bad, the meal even worse, and the song awful"]
QUERY_A = "base_model.model.encoder.layer.0.attention.self.query.lora_A.weight"
QUERY_B = QUERY_A.replace("lora_A", "lora_B")


@pytest.fixture
def other_adapter(tiny_adapter: LoraAdapter) -> LoraAdapter:
    """Other B, the same A."""
    other = {key: tensor if "lora_A" in key else tensor.flip(0) for key, tensor in tiny_adapter.tensors.items()}
    return replace(tiny_adapter, tensors=other)


@pytest.fixture
def foreign_adapter(tiny_backbone: Backbone, sentence_backbone: SentenceBackbone) -> LoraAdapter:
    """Other B, other A."""
    return make_adapter(sentence_backbone.model, tiny_backbone.repo_id, seed=1)


def folder_hash(folder: Path) -> str:
    return hashlib.sha256(b"".join(path.name.encode() + path.read_bytes() for path in sorted(folder.iterdir()))).hexdigest()


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
from cond_pdiff import LoraAdapter, LoraSpec

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
    assert [process.wait(timeout=300) for process in processes] == [0, 0]
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


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float16, 1e-2), (torch.bfloat16, 5e-2)])
def test_a_half_precision_base_is_the_same_base(
    sentence_backbone: SentenceBackbone, tiny_adapter: LoraAdapter, dtype: torch.dtype, tolerance: float
) -> None:
    half = copy.deepcopy(sentence_backbone.model).to(dtype)
    found, recorded = base_fingerprint(half, tiny_adapter.spec), str(tiny_adapter.spec.base_fingerprint)
    assert found != recorded == base_fingerprint(sentence_backbone.model, tiny_adapter.spec)
    assert same_base(recorded, found)
    with tiny_adapter.attached(half):
        embeddings = SentenceBackbone(half, sentence_backbone.tokenizer).embed(TEXTS)
    with tiny_adapter.attached(sentence_backbone.model):
        torch.testing.assert_close(embeddings.float(), sentence_backbone.embed(TEXTS), atol=tolerance, rtol=0)


def test_fingerprints_of_the_first_release_are_read(sentence_backbone: SentenceBackbone, tiny_adapter: LoraAdapter) -> None:
    first = str(tiny_adapter.spec.base_fingerprint).partition("+")[0]
    old = replace(tiny_adapter, spec=replace(tiny_adapter.spec, base_fingerprint=first))
    for dtype in (torch.float32, torch.float16):
        old.check_base(copy.deepcopy(sentence_backbone.model).to(dtype))
    assert old.is_like(tiny_adapter)
    assert LoraAdapter.mean([old, tiny_adapter]).layout == old.layout
    other = replace(tiny_adapter, spec=replace(tiny_adapter.spec, base_fingerprint="0" * 64))
    with pytest.raises(AdapterError, match="same layout, rank, alpha and base model"):
        old.interpolate(other, 0.5)


def test_a_base_is_hashed_once_until_it_changes(
    sentence_backbone: SentenceBackbone, tiny_adapter: LoraAdapter, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, hashed = copy.deepcopy(sentence_backbone.model), []
    whole = lora._digest
    monkeypatch.setattr(lora, "_digest", lambda *arguments: hashed.append(1) or whole(*arguments))
    for _ in range(3):
        tiny_adapter.attach(model).detach()
    assert len(hashed) == 2  # in float16 and in bfloat16
    weight = model.get_submodule(tiny_adapter.modules[0]).weight
    with torch.no_grad():
        weight[0, 0] += 0.01
    with pytest.raises(AdapterError, match="fingerprints differ"):
        tiny_adapter.attach(model)
    with torch.no_grad():
        weight.copy_(sentence_backbone.model.get_submodule(tiny_adapter.modules[0]).weight)
    tiny_adapter.attach(model).detach()
    weight.data.mul_(2)  # autograd does not notice
    with pytest.raises(AdapterError, match="fingerprints differ"):
        tiny_adapter.attach(model)


@torch.inference_mode()
def test_a_base_made_in_inference_mode_is_recognised(tiny_adapter: LoraAdapter) -> None:
    tiny_adapter.check_base(make_bert())


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
        (lambda: get_peft_model(make_bert(), LoraConfig(r=1, target_modules=["query"])), r"the model is peft's PeftModel: .*unload\(\)"),
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


def test_the_factors_of_a_mixture_do_not_depend_on_the_order(tiny_adapter: LoraAdapter, foreign_adapter: LoraAdapter) -> None:
    there, back = tiny_adapter.interpolate(foreign_adapter, 0.3), foreign_adapter.interpolate(tiny_adapter, 0.7)
    for key, tensor in there.tensors.items():
        torch.testing.assert_close(back.tensors[key], tensor, atol=1e-4, rtol=1e-4)


def test_a_soup_is_the_mean_of_the_updates(tiny_adapter: LoraAdapter, other_adapter: LoraAdapter, foreign_adapter: LoraAdapter) -> None:
    """Exactly where `lora_A` is shared; else the best approximation of its rank, which the mean of the factors is not."""
    shared = soup([tiny_adapter, other_adapter, tiny_adapter])
    assert all(torch.equal(shared.tensors[key], tensor) for key, tensor in tiny_adapter.tensors.items() if ".lora_A." in key)
    torch.testing.assert_close(deltas(shared), (2 * deltas(tiny_adapter) + deltas(other_adapter)) / 3, atol=1e-6, rtol=1e-5)

    adapters = [tiny_adapter, other_adapter, foreign_adapter]
    souped, factors = soup(adapters), LoraAdapter.mean(adapters, space="factors")
    for name in tiny_adapter.modules:
        wanted = torch.stack([adapter.delta(name) for adapter in adapters]).mean(0)
        lost = torch.linalg.svdvals(wanted)[tiny_adapter.spec.rank :].norm()
        torch.testing.assert_close((souped.delta(name) - wanted).norm(), lost, atol=1e-5, rtol=1e-4)
        assert (factors.delta(name) - wanted).norm() > 1.05 * lost
    assert souped.layout == tiny_adapter.layout


def test_a_mixture_keeps_what_its_adapters_agree_on(tiny_adapter: LoraAdapter, other_adapter: LoraAdapter, tmp_path: Path) -> None:
    """How it is used, that is; the seed of two different adapters, equal or not, makes neither of them again."""
    shared = {"base": {"repo_id": "tiny"}, "max_length": 48, "labels": ["bad", "good"]}
    first = replace(tiny_adapter, metadata={**shared, "seed": 0, "condition": {"description": "Is it good?"}, "task": None})
    second = replace(other_adapter, metadata={**shared, "seed": 0, "condition": {"description": "Is it kind?"}})
    between = first.interpolate(second, 0.5)
    assert between.metadata == shared
    assert soup([first, first]).metadata == {name: fact for name, fact in first.metadata.items() if name != "seed"}
    card = (between.save(tmp_path / "mixture") / "README.md").read_text(encoding="utf-8")
    assert "read up to 48 tokens" in card
    assert "makes it again" not in card


@pytest.mark.parametrize(("out", "inputs"), [(30_000, 40_000), (2, 40)])
def test_mixtures_of_large_and_of_narrow_modules(out: int, inputs: int) -> None:
    """Of a large module, whose ΔW would take 4.8 GB; and of one whose ΔW has fewer rows than the rank."""
    rng = torch.Generator().manual_seed(0)
    stem = f"{KEY_PREFIX}layer.query"
    first, second = (
        LoraAdapter(
            LoraSpec("base", 3, 3.0, ("query",)),
            {
                f"{stem}.lora_A.weight": torch.randn(3, inputs, generator=rng),
                f"{stem}.lora_B.weight": torch.randn(out, 3, generator=rng),
            },
        )
        for _ in range(2)
    )
    rows, columns = slice(0, 50), slice(0, 50)
    same = first.interpolate(second, 1.0)
    (lora_a, lora_b), (wanted_a, wanted_b) = same.factors("layer.query"), second.factors("layer.query")
    torch.testing.assert_close(lora_b[rows] @ lora_a[:, columns], wanted_b[rows] @ wanted_a[:, columns], atol=1e-3, rtol=1e-3)


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
    assert spec.scaling == 2.0
    assert spec.targets("encoder.layer.0.attention.self.query")
    assert not spec.targets("encoder.layer.0.attention.self.my_query")
