"""Adapters that bring a classification head: strict, whole, and the same to us and to stock peft."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import RANK, TARGETS, fingerprint
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer, GPT2Config

from cond_pdiff import AdapterTemplate, LoraAdapter, LoraSpec, PrototypeClassifier
from cond_pdiff.adapter import FACTORS
from cond_pdiff.convert import save_merged
from cond_pdiff.errors import AdapterError
from cond_pdiff.formats.lora_writer import save_lora_file
from cond_pdiff.hub import Backbone
from cond_pdiff.lora import HEAD_TASK, KEY_PREFIX, base_fingerprint, head_modules, target_linears, update_shape
from cond_pdiff.models.sentence_backbone import SentenceBackbone
from cond_pdiff.peft_files import CONFIG_FILE, METADATA_FILE, WEIGHTS_FILE, peft_config
from cond_pdiff.training.evaluate.similarity import ZooSpace
from cond_pdiff.training.zoo.zoo import soup

WEIGHT, BIAS = f"{KEY_PREFIX}classifier.weight", f"{KEY_PREFIX}classifier.bias"
TEXTS = ["the kitten purr", "good film", "the room was bad, the meal even worse, and the song awful"]


def head_adapter(model: torch.nn.Module, base: str, seed: int = 0, heads: tuple[str, ...] = ("classifier",), **entries: Any) -> LoraAdapter:
    """A random adapter of rank 2 with random heads."""
    spec = LoraSpec(base, RANK, 4.0, **{"target_modules": TARGETS, "task_type": HEAD_TASK, "modules_to_save": heads, **entries})
    spec = replace(spec, base_fingerprint=base_fingerprint(model, spec))
    rng = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, linear in target_linears(model, spec).items():
        rows, columns = update_shape(linear)
        for factor, shape in zip(FACTORS, ((RANK, columns), (rows, RANK)), strict=True):
            tensors[f"{KEY_PREFIX}{name}.{factor}.weight"] = 0.1 * torch.randn(shape, generator=rng)
    for name, linear in head_modules(model, spec).items():
        for part, parameter in linear.named_parameters():
            tensors[f"{KEY_PREFIX}{name}.{part}"] = torch.randn(parameter.shape, generator=rng)
    return LoraAdapter(spec, tensors, {"labels": ["positive", "negative"], "base": {"repo_id": base}})


def load_classifier(folder: str, num_labels: int = 2) -> torch.nn.Module:
    torch.manual_seed(7)
    return AutoModelForSequenceClassification.from_pretrained(folder, num_labels=num_labels).eval()


@pytest.fixture
def model(tiny_backbone: Backbone) -> torch.nn.Module:
    return load_classifier(tiny_backbone.repo_id)


@pytest.fixture
def adapter(model: torch.nn.Module, tiny_backbone: Backbone) -> LoraAdapter:
    return head_adapter(model, tiny_backbone.repo_id)


@pytest.fixture
def saved(adapter: LoraAdapter, tmp_path: Path) -> Path:
    return adapter.save(tmp_path / "adapter")


@pytest.fixture
def logits(tiny_backbone: Backbone) -> Callable[[torch.nn.Module], torch.Tensor]:
    tokenizer = AutoTokenizer.from_pretrained(tiny_backbone.repo_id)

    def logits(model: torch.nn.Module) -> torch.Tensor:
        with torch.no_grad():
            return model(**tokenizer(TEXTS, padding=True, return_tensors="pt")).logits

    return logits


# --- disk --------------------------------------------------------------------------------------------------------------------


def test_saved_adapters_come_back_with_their_head(adapter: LoraAdapter, saved: Path) -> None:
    loaded = LoraAdapter.load(saved, adapter.layout)
    assert loaded.spec == adapter.spec
    assert sorted(loaded.head) == [BIAS, WEIGHT]
    assert all(torch.equal(loaded.tensors[key], tensor) for key, tensor in adapter.tensors.items())
    assert json.loads((saved / CONFIG_FILE).read_text())["modules_to_save"] == ["classifier"]
    assert "AutoModelForSequenceClassification" in (saved / "README.md").read_text()
    assert "head `classifier`" in (saved / "README.md").read_text()


@pytest.mark.parametrize("heads", [[1], [""], [None, "classifier"], 5])
def test_heads_have_names(adapter: LoraAdapter, heads: Any) -> None:
    with pytest.raises(AdapterError, match=r"modules_to_save must name modules|not a LoRA specification"):
        LoraSpec.from_json({**adapter.spec.to_json(), "modules_to_save": heads})


def test_specifications_without_a_head_are_written_as_before(tiny_adapter: LoraAdapter) -> None:
    assert not {"modules_to_save", "fan_in_fan_out"} & set(tiny_adapter.spec.to_json())
    config = peft_config(tiny_adapter.spec)
    assert (config["modules_to_save"], config["fan_in_fan_out"]) == (None, False)


def test_stock_peft_gives_the_same_logits_bit_for_bit(
    model: torch.nn.Module, adapter: LoraAdapter, saved: Path, tiny_backbone: Backbone, logits: Any
) -> None:
    stock = PeftModel.from_pretrained(load_classifier(tiny_backbone.repo_id), saved).eval()
    with adapter.attached(model):
        ours = logits(model)
    assert torch.equal(ours, logits(stock))
    assert (ours - logits(model)).norm() > 0.1


def test_an_adapter_that_peft_saved_is_read(model: torch.nn.Module, tmp_path: Path, logits: Any) -> None:
    config = LoraConfig(r=2, lora_alpha=4, target_modules=list(TARGETS), task_type=HEAD_TASK, init_lora_weights=False)
    stock = get_peft_model(copy.deepcopy(model), config)
    for key, parameter in stock.named_parameters():
        if "modules_to_save" in key:
            torch.nn.init.normal_(parameter)
    stock.save_pretrained(tmp_path)
    assert json.loads((tmp_path / CONFIG_FILE).read_text())["modules_to_save"] == ["classifier", "score"]  # peft names both, always
    adapter = LoraAdapter.load(tmp_path)
    assert adapter.spec.modules_to_save == ("classifier",)
    with adapter.attached(model):
        assert torch.equal(logits(model), logits(stock.eval()))


Change = Callable[[dict[str, torch.Tensor]], object]
BEFORE_ATTACHING: dict[str, tuple[Change, str]] = {
    "not finite": (lambda t: t[BIAS].__setitem__(0, float("nan")), rf"{BIAS}.*NaN"),
    "huge": (lambda t: t[WEIGHT].__setitem__((0, 0), 1e6), rf"{WEIGHT}.*1e\+06"),
    "whole numbers": (lambda t: t.update({BIAS: torch.zeros(2, dtype=torch.int64)}), rf"{BIAS}.*int64"),
    "no head": (lambda t: (t.pop(WEIGHT), t.pop(BIAS)), "modules_to_save names 'classifier', but there is no tensor"),
    "another head": (lambda t: t.update({f"{KEY_PREFIX}score.weight": torch.zeros(2, 32)}), r"unexpected tensor.*score\.weight"),
}
WHEN_ATTACHING: dict[str, tuple[Change, str]] = {
    "no bias": (lambda t: t.pop(BIAS), f"missing tensor '{BIAS}' of the head"),
    "no weight": (lambda t: t.pop(WEIGHT), f"missing tensor '{WEIGHT}' of the head"),
    "more": (lambda t: t.update({f"{KEY_PREFIX}classifier.scale": torch.zeros(2)}), r"unexpected tensor '.*classifier\.scale' of the head"),
    "three labels": (lambda t: t.update({BIAS: torch.zeros(3), WEIGHT: torch.zeros(3, 32)}), rf"{BIAS}'.*\(3,\), but the model's is"),
    "transposed": (lambda t: t.update({WEIGHT: torch.zeros(32, 2)}), rf"{WEIGHT}'.*\(32, 2\), but the model's is \(2, 32\)"),
}


@pytest.mark.parametrize(("change", "message"), BEFORE_ATTACHING.values(), ids=BEFORE_ATTACHING)
def test_corrupted_heads_are_refused(adapter: LoraAdapter, saved: Path, change: Change, message: str) -> None:
    (saved / METADATA_FILE).unlink()
    tensors = load_file(saved / WEIGHTS_FILE)
    change(tensors)
    with pytest.raises(AdapterError, match=message):
        replace(adapter, tensors=tensors)
    save_file(tensors, saved / WEIGHTS_FILE, {"format": "pt"})
    with pytest.raises(AdapterError, match=message):
        LoraAdapter.load(saved)


@pytest.mark.parametrize(("change", "message"), WHEN_ATTACHING.values(), ids=WHEN_ATTACHING)
def test_heads_that_do_not_fit_are_refused_before_a_module_is_touched(
    model: torch.nn.Module, adapter: LoraAdapter, saved: Path, change: Change, message: str
) -> None:
    tensors = dict(adapter.tensors)
    change(tensors)
    before = fingerprint(model)
    with pytest.raises(AdapterError, match=message):
        replace(adapter, tensors=tensors).attach(model)
    assert fingerprint(model) == before
    save_file(tensors, saved / WEIGHTS_FILE, {"format": "pt"})
    with pytest.raises(AdapterError, match="classifier"):  # the recorded layout knows the head without a model
        LoraAdapter.load(saved)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"modules_to_save": "classifier"}, "modules_to_save must be a list of module names"),
        ({"modules_to_save": [1]}, "modules_to_save must be a list of module names"),
        ({"modules_to_save": None, "task_type": "FEATURE_EXTRACTION"}, r"unexpected tensor '.*classifier\.(bias|weight)'"),
        ({"modules_to_save": ["score"], "task_type": None}, r"unexpected tensor '.*classifier\.(bias|weight)'"),
        ({"modules_to_save": ["classifier", "pooler"]}, "modules_to_save names 'pooler', but there is no tensor"),
        ({"fan_in_fan_out": 1}, "fan_in_fan_out must be true or false, got 1"),
    ],
)
def test_corrupted_configs_are_refused(saved: Path, change: dict[str, Any], message: str) -> None:
    (saved / METADATA_FILE).unlink()
    config = json.loads((saved / CONFIG_FILE).read_text())
    (saved / CONFIG_FILE).write_text(json.dumps({**config, **change}))
    with pytest.raises(AdapterError, match=message):
        LoraAdapter.load(saved)


def test_config_and_metadata_may_not_contradict_each_other(saved: Path) -> None:
    config = json.loads((saved / CONFIG_FILE).read_text())
    (saved / CONFIG_FILE).write_text(json.dumps({**config, "fan_in_fan_out": True}))
    with pytest.raises(AdapterError, match=f"fan_in_fan_out is True, but {METADATA_FILE} records False"):
        LoraAdapter.load(saved)


# --- models ------------------------------------------------------------------------------------------------------------------


def test_detached_models_have_their_own_head_again(model: torch.nn.Module, adapter: LoraAdapter, logits: Any) -> None:
    state, outputs = fingerprint(model), logits(model)
    attachment = adapter.attach(model)
    assert fingerprint(model) != state
    attachment.detach()
    assert fingerprint(model) == state
    assert torch.equal(logits(model), outputs)
    with pytest.raises(ZeroDivisionError), adapter.attached(model):
        _ = logits(model) / (1 // 0)
    assert fingerprint(model) == state


def test_strength_is_of_the_update_and_the_head_is_whole(model: torch.nn.Module, adapter: LoraAdapter, logits: Any) -> None:
    for scale in (0.0, 0.5):
        merged = copy.deepcopy(model)
        for name in adapter.modules:
            merged.get_submodule(name).weight.data += scale * adapter.delta(name)
        merged.classifier.load_state_dict({"weight": adapter.tensors[WEIGHT], "bias": adapter.tensors[BIAS]})
        with adapter.attached(model, scale=scale):
            torch.testing.assert_close(logits(model), logits(merged), atol=1e-5, rtol=1e-5)


def test_a_model_has_one_head_at_a_time(model: torch.nn.Module, adapter: LoraAdapter, tiny_backbone: Backbone) -> None:
    other = head_adapter(model, tiny_backbone.repo_id, seed=1)
    with adapter.attached(model):
        state = fingerprint(model)
        with pytest.raises(AdapterError, match="another adapter has its head on 'classifier'"):
            other.attach(model)
        assert fingerprint(model) == state
    with other.attached(model):
        pass


def test_models_without_the_head_are_refused(model: torch.nn.Module, adapter: LoraAdapter) -> None:
    del model.classifier
    with pytest.raises(AdapterError, match=r"no module 'classifier'.*AutoModelForSequenceClassification"):
        adapter.attach(model)
    model.classifier = torch.nn.Sequential(torch.nn.LayerNorm(32), torch.nn.Linear(32, 2))
    with pytest.raises(AdapterError, match=r"missing tensor '.*classifier\.0\.bias' of the head"):
        adapter.attach(model)


def test_gradients_reach_an_attached_head(model: torch.nn.Module, adapter: LoraAdapter) -> None:
    tensors = {key: tensor.clone().requires_grad_() for key, tensor in adapter.tensors.items()}
    with replace(adapter, tensors=tensors).attached(model):
        model(torch.tensor([[5, 6, 7]])).logits[:, 0].sum().backward()
    assert all(tensor.grad is not None and tensor.grad.abs().sum() > 0 for tensor in tensors.values())


def test_targets_inside_a_head_are_no_targets(model: torch.nn.Module, adapter: LoraAdapter) -> None:
    spec = replace(adapter.spec, target_modules=(*TARGETS, "classifier"))
    assert target_linears(model, spec).keys() == target_linears(model, adapter.spec).keys()


# --- arithmetic, distances, other forms --------------------------------------------------------------------------------------


@pytest.mark.parametrize("space", ["factors", "delta"])
def test_heads_are_interpolated(model: torch.nn.Module, adapter: LoraAdapter, tiny_backbone: Backbone, space: Any) -> None:
    other = head_adapter(model, tiny_backbone.repo_id, seed=1)
    between = adapter.interpolate(other, 0.25, space)
    assert between.layout == adapter.layout
    for key in (WEIGHT, BIAS):
        torch.testing.assert_close(between.tensors[key], 0.75 * adapter.tensors[key] + 0.25 * other.tensors[key])
    torch.testing.assert_close(soup([adapter, other]).tensors[WEIGHT], (adapter.tensors[WEIGHT] + other.tensors[WEIGHT]) / 2)


def test_distances_are_of_the_update_alone(model: torch.nn.Module, adapter: LoraAdapter, tiny_backbone: Backbone) -> None:
    other = head_adapter(model, tiny_backbone.repo_id, seed=1)
    space = ZooSpace([adapter, other], ["first", "second"])
    ((index, distance),) = space.nearest([replace(adapter, tensors={**adapter.tensors, **other.head})])
    assert index == 0
    assert distance < 1e-3


def test_heads_are_modelled_or_constant(model: torch.nn.Module, adapter: LoraAdapter, tiny_backbone: Backbone) -> None:
    other = head_adapter(model, tiny_backbone.repo_id, seed=1)
    own = AdapterTemplate.from_adapters([adapter, other], tiny_backbone, 16)
    frozen = replace(other, tensors={**other.tensors, **adapter.head})
    shared = AdapterTemplate.from_adapters([adapter, frozen], tiny_backbone, 16)
    assert own.layout.constants == ()
    assert shared.layout.constants == (BIAS, WEIGHT)
    assert own.layout.num_params - shared.layout.num_params == 2 * 32 + 2
    for template, made in ((own, other), (shared, frozen)):
        again = template.to_adapter(template.to_params(made))
        assert all(torch.equal(again.tensors[key], tensor) for key, tensor in made.tensors.items())


def test_heads_of_different_shapes_make_no_generator(adapter: LoraAdapter, tiny_backbone: Backbone) -> None:
    three = head_adapter(load_classifier(tiny_backbone.repo_id, 3), tiny_backbone.repo_id)
    with pytest.raises(AdapterError, match=r"heads of one shape: '.*classifier\.bias' is \(3,\) in one and \(2,\) in another"):
        AdapterTemplate.from_adapters([adapter, three], tiny_backbone, 16)
    with pytest.raises(AdapterError, match="same layout"):
        adapter.interpolate(three, 0.5)


def test_what_cannot_take_a_head_refuses_it(
    adapter: LoraAdapter, sentence_backbone: SentenceBackbone, saved: Path, tmp_path: Path
) -> None:
    with pytest.raises(AdapterError, match="adapters with a head, as those of sequence classifiers, cannot be converted"):
        save_merged(adapter, tmp_path / "merged")
    with pytest.raises(AdapterError, match="adapters with a head, as those of sequence classifiers, cannot be converted"):
        save_lora_file(adapter, tmp_path / "lora.safetensors", "comfyui")
    with pytest.raises(AdapterError, match="brings a trained head"):
        PrototypeClassifier(sentence_backbone, ["positive", "negative"], adapter)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter"]


# --- GPT-2 keeps its weights transposed ---------------------------------------------------------------------------------------


@pytest.fixture
def gpt2() -> torch.nn.Module:
    config = GPT2Config(vocab_size=50, n_embd=16, n_layer=2, n_head=2, n_positions=32, pad_token_id=0, num_labels=2)
    return AutoModelForSequenceClassification.from_config(config).eval()


GPT2 = {"target_modules": ("attn.c_attn", "attn.c_proj"), "heads": ("score",), "fan_in_fan_out": True}


def test_transposed_weights(gpt2: torch.nn.Module, tmp_path: Path) -> None:
    adapter = head_adapter(gpt2, "some/gpt2", **GPT2)
    assert adapter.delta("transformer.h.0.attn.c_attn").shape == (48, 16)
    folder, tokens = adapter.save(tmp_path / "adapter"), torch.tensor([[5, 6, 7, 0], [5, 9, 8, 7]])
    stock = PeftModel.from_pretrained(copy.deepcopy(gpt2), folder).eval()
    with torch.no_grad(), LoraAdapter.load(folder).attached(gpt2):
        assert torch.equal(gpt2(tokens).logits, stock(tokens).logits)
    merged = copy.deepcopy(gpt2)
    for name in adapter.modules:
        merged.get_submodule(name).weight.data += adapter.delta(name).T
    merged.score.weight.data = adapter.tensors[f"{KEY_PREFIX}score.weight"]
    with torch.no_grad():
        torch.testing.assert_close(merged(tokens).logits, stock(tokens).logits, atol=1e-5, rtol=1e-5)


def test_the_modules_tell_how_their_weights_lie(
    gpt2: torch.nn.Module, model: torch.nn.Module, adapter: LoraAdapter, logits: Callable[[torch.nn.Module], torch.Tensor]
) -> None:
    """Many configurations have a wrong `fan_in_fan_out`; peft goes by the module, too."""
    tokens = torch.tensor([[5, 6, 7, 0], [5, 9, 8, 7]])
    outputs = []
    for flag in (True, False):
        with torch.no_grad(), head_adapter(gpt2, "some/gpt2", **{**GPT2, "fan_in_fan_out": flag}).attached(gpt2):
            outputs.append(gpt2(tokens).logits)
    assert torch.equal(*outputs)
    with adapter.attached(model):
        right = logits(model)
    with replace(adapter, spec=replace(adapter.spec, fan_in_fan_out=True)).attached(model):
        assert torch.equal(logits(model), right)
    model.bert.encoder.layer[0].attention.self.query = torch.nn.Conv1d(32, 32, 1)
    with pytest.raises(AdapterError, match=r"query' is a Conv1d, expected a Linear, Conv2d or Conv1D"):
        adapter.attach(model)
