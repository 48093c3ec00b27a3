"""Shared fixtures: a tiny BERT on disk, a random adapter for it, and a few tasks that words separate."""

from __future__ import annotations

import copy
import hashlib
import json
import os
import pkgutil
import random
import string
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

os.environ["HF_HUB_OFFLINE"] = "1"  # before anything imports huggingface_hub

import huggingface_hub.constants
import numpy as np
import pytest
import torch
from diffusers import PixArtAlphaPipeline
from loopback_hub import LoopbackHub
from PIL import Image
from transformers import BertConfig, BertModel, BertTokenizerFast

from cond_pdiff import CondPDiffPipeline, TaskPrompt
from cond_pdiff.adapter import FACTORS, LoraAdapter
from cond_pdiff.cli import main
from cond_pdiff.hub import Backbone
from cond_pdiff.lora import KEY_PREFIX, LoraSpec, base_fingerprint, target_linears
from cond_pdiff.models.sentence_backbone import SentenceBackbone
from cond_pdiff.text_to_image import load_text_to_image
from cond_pdiff.training.config import CollectConfig, parse
from cond_pdiff.training.recipe import read_recipe
from cond_pdiff.training.stages.train import train
from cond_pdiff.training.tasks.styles import write_style
from cond_pdiff.training.tasks.tasks import Row, write_task
from cond_pdiff.training.text_to_image.drawing import render
from cond_pdiff.training.text_to_image.scenes import Scene
from cond_pdiff.training.text_to_image.train import train_base
from cond_pdiff.training.zoo.collect import collect
from cond_pdiff.training.zoo.zoo import Zoo

RANK = 2
TARGETS = ("query", "key", "value", "attention.output.dense")
HIDDEN = 32

GOOD, BAD = ("good", "great", "lovely", "fine"), ("bad", "awful", "poor", "dull")
ANIMALS = {"cat": ("kitten", "purr", "whisker"), "dog": ("puppy", "bark", "leash"), "bird": ("feather", "nest", "wing")}
NOUNS = ("film", "meal", "book", "room", "song")
LABELS = ("positive", "negative", "same", "different", *ANIMALS)
EXAMPLES = [("the good film", "positive"), ("the awful meal", "negative"), ("the lovely room", "positive"), ("the poor song", "negative")]
PROMPT = TaskPrompt("Is the remark kind?", EXAMPLES)
OTHER = TaskPrompt("Which animal is it about?", [("the kitten", "cat"), ("the leash", "dog"), ("a nest", "bird")])
WORDS = ("the", *GOOD, *BAD, *NOUNS, *LABELS, *(word for words in ANIMALS.values() for word in words))


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def make_bert(seed: int = 0) -> BertModel:
    """A random BERT of two layers; its weights are large enough for words to matter."""
    config = BertConfig(
        vocab_size=len(vocabulary()),
        hidden_size=HIDDEN,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        initializer_range=0.15,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return BertModel(config).eval()


def vocabulary() -> dict[str, int]:
    characters = string.ascii_lowercase + string.digits + string.punctuation
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *characters, *(f"##{c}" for c in characters), *WORDS]
    return {piece: index for index, piece in enumerate(pieces)}


def make_adapter(model: torch.nn.Module, base_model: str, seed: int = 0, **spec_entries: object) -> LoraAdapter:
    """A random adapter of rank 2 whose update is about as large as a trained one's."""
    spec = LoraSpec(base_model, RANK, 4.0, tuple(sorted(TARGETS)), **spec_entries)
    spec = LoraSpec(**{**spec.__dict__, "base_fingerprint": base_fingerprint(model, spec)})
    rng = torch.Generator().manual_seed(seed)
    tensors = {
        f"{KEY_PREFIX}{name}.{factor}.weight": 0.1 * torch.randn(shape, generator=rng)
        for name, linear in target_linears(model, spec).items()
        for factor, shape in zip(FACTORS, ((RANK, linear.in_features), (linear.out_features, RANK)), strict=True)
    }
    return LoraAdapter(spec, tensors, {"labels": ["positive", "negative"], "base": {"repo_id": base_model}})


@pytest.fixture(scope="session")
def tiny_backbone(tmp_path_factory: pytest.TempPathFactory) -> Backbone:
    """A reference to a tiny BERT in a local folder."""
    folder = tmp_path_factory.mktemp("tiny-bert")
    make_bert().save_pretrained(folder)
    BertTokenizerFast(vocab=vocabulary(), do_lower_case=True, model_max_length=512).save_pretrained(folder)
    return Backbone(str(folder))


@pytest.fixture
def sentence_backbone(tiny_backbone: Backbone) -> SentenceBackbone:
    """The tiny BERT, loaded."""
    return SentenceBackbone.load(tiny_backbone)


@pytest.fixture(scope="session")
def tiny_adapter(tiny_backbone: Backbone) -> LoraAdapter:
    """A random adapter for the tiny BERT."""
    return make_adapter(SentenceBackbone.load(tiny_backbone).model, tiny_backbone.repo_id)


@pytest.fixture(scope="session")
def tasks_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three tasks: `moods` (two labels), `animals` (three), `likeness` (pairs)."""
    folder = tmp_path_factory.mktemp("tasks")
    moods: list[Row] = [(f"the {noun} {word}", label) for label, words in enumerate((GOOD, BAD)) for word in words for noun in NOUNS]
    animals: list[Row] = [(f"the {noun} {word}", label) for label, words in enumerate(ANIMALS.values()) for word in words for noun in NOUNS]
    likeness: list[Row] = [((f"the {a}", f"the {b}"), int(a != b)) for a in NOUNS for b in (a, a, a, *NOUNS)]
    for name, description, labels, rows in (
        ("moods", "Is the remark kind?", ["positive", "negative"], moods),
        ("animals", "Which animal is it about?", list(ANIMALS), animals),
        ("likeness", "Do both texts name the same thing?", ["same", "different"], likeness),
    ):
        write_task(folder / name, description, labels, {"train": rows, "test": rows[::3]}, group="toy", licence="CC0-1.0")
    return folder


# --- a zoo and a generator trained on it ---------------------------------------------------------------------------------------

TINY_COLLECT = {
    "tasks": ["moods", "animals"], "unseen": ["likeness"], "rank": 2, "alpha": 8.0, "runs": 2, "steps": 20, "batch_size": 8,
    "max_length": 16, "learning_rates": [3e-2, 2e-2], "multitask_steps": 4, "metric_rows": 10,
}  # fmt: skip
TINY_FIT = {"batch_size": 8, "warmup_steps": 3, "checkpoint_every": 20, "log_every": 5, "ema_decay": 0.9}
TINY_RECIPE = {
    "autoencoder": {
        "model": {"encoder_channels": [4, 8], "decoder_channels": [8, 4], "decoder_bottom_channels": 16, "stride": 4, "latent_dim": 8},
        "fit": {**TINY_FIT, "steps": 30, "learning_rate": 3e-3},
    },
    "unet": {
        "denoiser": {"type": "ParamUNet1D", "block_out_channels": [8, 8, 4], "embedding_dim": 32},
        "fit": {**TINY_FIT, "steps": 60, "learning_rate": 3e-3},
        "conditions_per_task": 6,
    },
}


def tiny_recipe(backbone: Backbone) -> dict[str, Any]:
    """A recipe for the tiny BERT, as JSON holds it, that is collected and trained in seconds."""
    encoder = {"type": "SentenceConditionEncoder", "backbone": backbone.to_json(), "embedding_dim": HIDDEN}
    recipe = {**TINY_RECIPE, "collect": {**TINY_COLLECT, "base": backbone.to_json()}}
    return copy.deepcopy({**recipe, "unet": {**TINY_RECIPE["unet"], "condition_encoder": encoder}})


@pytest.fixture(scope="session")
def tiny_zoo(tiny_backbone: Backbone, tasks_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A zoo of `moods` and `animals`, two runs each, with `likeness` unseen. Only to be read."""
    config = parse(CollectConfig, tiny_recipe(tiny_backbone)["collect"], "collect")
    return collect(config, tasks_folder, tmp_path_factory.mktemp("zoo")).folder


@pytest.fixture(scope="session")
def tiny_generator(tiny_backbone: Backbone, tiny_zoo: Path, tasks_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A generator's folder, trained on the tiny zoo. Only to be read."""
    return train(tiny_recipe(tiny_backbone), tiny_zoo, tasks_folder, tmp_path_factory.mktemp("run"))


TINY_BASE_FIT = {"steps": 3, "batch_size": 2, "warmup_steps": 1, "checkpoint_every": 2, "log_every": 1}
TINY_BASE: dict[str, Any] = {
    "image_autoencoder": {
        "model": {**read_recipe("pixart-mini")["image_autoencoder"]["model"], "block_out_channels": [8, 8]},
        "scenes": 6, "fit": TINY_BASE_FIT,
    },
    "transformer": {
        "model": {**read_recipe("pixart-mini")["transformer"]["model"], "num_attention_heads": 2, "attention_head_dim": 8,
                  "cross_attention_dim": 16, "num_layers": 1},
        "text_encoder": {"d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2}, "scenes": 6, "fit": TINY_BASE_FIT,
    },
    "scene_classifier": {"channels": [8, 8], "scenes": 6, "fit": TINY_BASE_FIT},
    "samples": {"scenes": 3, "steps": 2, "batch_size": 2},
}  # fmt: skip


@pytest.fixture
def pipe(tiny_generator: Path) -> CondPDiffPipeline:
    return quiet(CondPDiffPipeline.from_pretrained(tiny_generator))


def quiet(pipe: CondPDiffPipeline) -> CondPDiffPipeline:
    pipe.set_progress_bar_config(disable=True)
    return pipe


def same(first: LoraAdapter, second: LoraAdapter) -> bool:
    return first.layout == second.layout and all(torch.equal(first.tensors[key], second.tensors[key]) for key in first.tensors)


def seeds(*numbers: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(number) for number in numbers]


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder of a tiny base model. Only to be read."""
    return train_base(copy.deepcopy(TINY_BASE), tmp_path_factory.mktemp("base") / "run").parent


TINTS = {"embers": (230, 60, 30), "lagoon": (20, 160, 190), "moss": (60, 120, 40)}
STYLE_TARGETS = ["to_q", "to_k", "to_v", "to_out.0"]


def tinted(pixels: np.ndarray, tint: tuple[int, int, int]) -> np.ndarray:
    return (pixels.mean(2, keepdims=True) / 255 * np.array(tint)).astype(np.uint8)


@pytest.fixture(scope="session")
def styles_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three styles that are nothing but a colour."""
    folder = tmp_path_factory.mktemp("styles")
    scene = Scene("house", "red", "meadow", "day")
    for name, tint in TINTS.items():
        made = [torch.from_numpy(tinted(render(scene, random.Random(index)), tint)) for index in range(8)]
        captions = [scene.caption(random.Random(index)) for index in range(8)]
        pictures = {"train": (torch.stack(made[:6]), captions[:6]), "test": (torch.stack(made[6:]), captions[6:])}
        noise = np.random.default_rng(len(name)).integers(0, 255, (90, 120, 3), dtype=np.uint8)
        write_style(folder / name, Image.fromarray(tinted(noise, tint)), pictures, group="tint", licence="CC0-1.0")
    return folder


@pytest.fixture(scope="session")
def tiny_base(tiny_run: Path) -> Backbone:
    return Backbone(str(tiny_run / "pipeline"))


@pytest.fixture(scope="session")
def text_to_image(tiny_base: Backbone) -> PixArtAlphaPipeline:
    return load_text_to_image(tiny_base)


@pytest.fixture(scope="session")
def style_recipe(tiny_base: Backbone) -> dict[str, Any]:
    fit = {"steps": 6, "batch_size": 2, "warmup_steps": 1, "checkpoint_every": 3, "log_every": 1}
    encoder = {"type": "StyleCnnConditionEncoder", "channels": [4, 8], "condition_dim": 8, "image_side": 32}
    return {
        "collect": {
            "tasks": ["embers", "lagoon"], "unseen": ["moss"], "family": "text-to-image", "base": tiny_base.to_json(),
            "rank": 2, "alpha": 4,
            "target_modules": STYLE_TARGETS, "runs": 2, "steps": 4, "batch_size": 2, "max_length": 16, "learning_rates": [0.02],
            "multitask_steps": 2, "last_checkpoints": 2, "checkpoint_every": 1,
        },
        "autoencoder": {"model": {"encoder_channels": [4], "decoder_channels": [4], "latent_dim": 8}, "fit": fit},
        "unet": {"denoiser": {"type": "ParamUNet1D", "block_out_channels": [8, 4], "embedding_dim": 16}, "fit": fit,
                 "conditions_per_task": 4, "condition_encoder": encoder},
    }  # fmt: skip


@pytest.fixture(scope="session")
def style_zoo(style_recipe: dict[str, Any], styles_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Zoo:
    return collect(parse(CollectConfig, style_recipe["collect"], "collect"), styles_folder, tmp_path_factory.mktemp("zoo"))


@pytest.fixture(scope="session")
def style_generator(style_recipe: dict[str, Any], style_zoo: Zoo, styles_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(copy.deepcopy(style_recipe), style_zoo.folder, styles_folder, tmp_path_factory.mktemp("run"))


def bits(run: Path) -> dict[str, str]:
    """Hashes of all that a run ends in: checkpoints, metrics and the generator."""
    paths = [path for path in run.rglob("*") if path.suffix in (".safetensors", ".jsonl", ".json")]
    return {str(path.relative_to(run)): hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(paths)}


def interrupt_at(patch: pytest.MonkeyPatch, where: str, calls: int) -> None:
    """Raise `KeyboardInterrupt` at the n-th call of the function `where`."""
    owner, _, name = where.rpartition(".")
    original: Callable[..., Any] = getattr(pkgutil.resolve_name(owner), name)
    count = 0

    def counting(*args: Any, **kwargs: Any) -> Any:
        nonlocal count
        count += 1
        if count == calls:
            raise KeyboardInterrupt
        return original(*args, **kwargs)

    patch.setattr(where, counting)


@pytest.fixture
def recipe(tiny_backbone: Backbone) -> dict[str, Any]:
    return tiny_recipe(tiny_backbone)


@pytest.fixture
def saved(tiny_adapter: LoraAdapter, tmp_path: Path) -> Path:
    return tiny_adapter.save(tmp_path / "adapter")


def fingerprint(model: torch.nn.Module) -> str:
    """Weights, module names and hooks."""
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        digest.update(name.encode() + tensor.numpy().tobytes())
    for name, module in model.named_modules():
        digest.update(f"{name} {type(module)} {len(module._forward_hooks)} {len(module._forward_pre_hooks)}".encode())
    return digest.hexdigest()


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[LoopbackHub]:
    """An empty Hub, which is the one that huggingface_hub knows."""
    hub = LoopbackHub()
    constants = huggingface_hub.constants
    monkeypatch.setattr(constants, "ENDPOINT", hub.endpoint)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.endpoint + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)  # the server speaks plain LFS
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub-cache"))
    with hub.running():
        yield hub


class Done(NamedTuple):
    status: int
    out: list[str]
    err: list[str]


@pytest.fixture
def run(capfd: pytest.CaptureFixture[str]) -> Any:
    """Run a command; anything that it prints, libraries included, is caught."""

    def run(*arguments: object) -> Done:
        capfd.readouterr()
        status = main([str(argument) for argument in arguments])
        out, err = capfd.readouterr()
        return Done(status, out.splitlines(), err.splitlines())

    return run


def told(done: Done) -> Any:
    """What a command says with --json, which is all that stands on stdout."""
    assert done.status == 0, done.err
    return json.loads("\n".join(done.out))


def refused(done: Done, message: str) -> None:
    assert (done.status, done.out) == (1, [])
    (line,) = done.err
    assert line.startswith("cond-pdiff: error: ")
    assert message in line
