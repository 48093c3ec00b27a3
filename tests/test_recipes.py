from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from conftest import HIDDEN, TINY_RECIPE
from diffusers.models.transformers.pixart_transformer_2d import PixArtTransformer2DModel
from PIL import Image
from transformers import LlamaConfig, LlamaForCausalLM

from cond_pdiff import AdapterTemplate, LoraAdapter, LoraSpec, ParamUNet1D
from cond_pdiff.adapter import FACTORS
from cond_pdiff.errors import TrainingError
from cond_pdiff.hub import SMOLLM2, Backbone
from cond_pdiff.lora import KEY_PREFIX, target_linears
from cond_pdiff.models.param_autoencoder import ParamAutoencoder
from cond_pdiff.training.config import AutoencoderConfig, CollectConfig, FitConfig, TuneConfig, UNetConfig, as_recorded, parse
from cond_pdiff.training.evaluate.measure import EvaluateConfig
from cond_pdiff.training.recipe import RECIPES_FOLDER, read_recipe
from cond_pdiff.training.reproduce.ablations import Ablation
from cond_pdiff.training.reproduce.config import AblationConfig, ReproduceConfig
from cond_pdiff.training.stages.autoencoder import AutoencoderStage
from cond_pdiff.training.stages.condition_bank import ConditionBank
from cond_pdiff.training.stages.denoiser import DenoiserStage
from cond_pdiff.training.stages.loop import _Run
from cond_pdiff.training.stages.train import train
from cond_pdiff.training.tasks.styles import load_styles
from cond_pdiff.training.tasks.tasks import load_tasks
from cond_pdiff.training.text_to_image.config import ImageAutoencoderConfig, SampleConfig, SceneClassifierConfig, TransformerConfig
from cond_pdiff.training.zoo.params import ZooParams

AE_STEPS, UNET_STEPS = (TINY_RECIPE[stage]["fit"]["steps"] for stage in ("autoencoder", "unet"))
TINY_AE = TINY_RECIPE["autoencoder"]["model"]


@pytest.mark.parametrize(
    ("config_class", "section", "message"),
    [
        (FitConfig, {"stepz": 1}, r"here: unknown entry 'stepz'; known are \['batch_size',"),
        (FitConfig, {"steps": "5"}, "here: steps must be a valid integer, got '5'"),
        (FitConfig, {"steps": 5.0}, "here: steps must be a valid integer, got 5.0"),
        (FitConfig, {"steps": True}, "here: steps must be a valid integer, got True"),
        (FitConfig, {"learning_rate": None}, "here: learning_rate must be a valid number, got None"),
        (FitConfig, {"precision": 16}, "here: precision must be 'no', 'bf16' or 'fp16', got 16"),
        (FitConfig, {"log_every": 0}, "here: log_every must be greater than or equal to 1, got 0"),
        (UNetConfig, {"prediction_type": "v-prediction"}, "prediction_type must be 'epsilon', 'v_pred.*' or 'sample', got 'v-prediction'"),
        (FitConfig, 5, "here must be an object, got 5"),
        (FitConfig, ["steps"], "here must be an object"),
        (AutoencoderConfig, {"fit": {"step": 1}}, r"here, fit: unknown entry 'step'; known are \['batch_size',"),
        (AutoencoderConfig, {"fit": 5}, "here: fit must be an object"),
        (AutoencoderConfig, {"model": [1]}, "here: model must be"),
        (UNetConfig, {"condition_encoder": "ClipConditionEncoder"}, "here: condition_encoder must be"),
        (CollectConfig, {"learning_rates": []}, "here: learning_rates must have at least 1 item"),
        (CollectConfig, ["tasks"], "here must be an object"),
        (CollectConfig, {"kind": ["text"]}, "here: unknown entry 'kind'"),
        (CollectConfig, {"tasks": "moods"}, "here: tasks must be"),
        (CollectConfig, {"tasks": ["moods", 1]}, "here, tasks: entry 1 must be a valid string, got 1"),
        (CollectConfig, {"tasks": ["moods"], "train_lora_a": 1}, "here: train_lora_a must be a valid boolean, got 1"),
        (CollectConfig, {"tasks": ["moods"], "learning_rates": 1e-3}, "here: learning_rates must be"),
    ],
)
def test_unknown_and_mistyped_entries_are_refused(config_class: type[Any], section: Any, message: str) -> None:
    with pytest.raises(TrainingError, match=message):
        parse(config_class, section, "here")


@pytest.mark.parametrize(
    ("config_class", "section", "message"),
    [
        (FitConfig, {"learning_rate": -0.001}, "learning_rate must be greater than 0, got -0.001"),
        (FitConfig, {"ema_decay": 7}, "ema_decay must be less than 1, got 7"),
        (FitConfig, {"seed": -1}, "seed must be greater than or equal to 0, got -1"),
        (AutoencoderConfig, {"fit": {"warmup_steps": -1}}, "here, fit: warmup_steps must be greater than or equal to 0, got -1"),
        (AutoencoderConfig, {"normalizer": "zscore"}, "normalizer must be 'none', .*, got 'zscore'"),
        (AutoencoderConfig, {"latent_noise": math.nan}, "latent_noise must be a finite number, got nan"),
        (AutoencoderConfig, {"model": {"decoder_channels": [4, math.inf]}}, "here: model: its numbers must be finite"),
        (UNetConfig, {"beta_schedule": "sigmoid"}, "beta_schedule must be 'linear', .* got 'sigmoid'"),
        (UNetConfig, {"cond_drop_prob": 1.1}, "cond_drop_prob must be less than or equal to 1"),
        (TuneConfig, {"num_inference_steps": 0}, "num_inference_steps must be greater than or equal to 1"),
        (CollectConfig, {"learning_rates": [0.1, -0.1]}, "here, learning_rates: entry 1 must be greater than 0, got -0.1"),
        (CollectConfig, {"base": {}}, "here: base: not a backbone reference"),
        (CollectConfig, {"base": {"repo_id": "a", "sha": "b"}}, "here: base: not a backbone reference"),
        (CollectConfig, {"steps": 8, "last_checkpoints": 3}, "here: a run of 8 steps has no 3 checkpoints 5 steps apart"),
        (ImageAutoencoderConfig, {"plain_share": -0.1}, "plain_share must be greater than or equal to 0"),
        (SceneClassifierConfig, {"channels": []}, "channels must have at least 1 item"),
        (ReproduceConfig, {"alphas": {"4": 0}}, "here, alphas: 4 must be greater than 0, got 0"),
        (AblationConfig, {"ablations": [{"unet": {"mixing": math.nan}}]}, "here, ablations: entry 0: its numbers must be finite"),
        (Ablation, {"name": "x"}, "here: group is missing"),
        (EvaluateConfig, {"samples": 1001}, "samples must be less than or equal to 1000, got 1001"),
    ],
)
def test_values_out_of_range_are_refused(config_class: type[Any], section: Any, message: str) -> None:
    with pytest.raises(TrainingError, match=message):
        parse(config_class, section, "here")


@pytest.mark.parametrize(
    "config_class",
    [
        *(CollectConfig, FitConfig, AutoencoderConfig, UNetConfig, TuneConfig, ReproduceConfig, AblationConfig, Ablation, EvaluateConfig),
        *(ImageAutoencoderConfig, TransformerConfig, SceneClassifierConfig, SampleConfig),
    ],
)
def test_every_number_is_finite_and_every_entry_has_a_meaning(config_class: type[Any]) -> None:
    entries = config_class.__pydantic_fields__
    required = {name: "" for name, entry in entries.items() if entry.is_required()}
    for name, entry in entries.items():
        assert entry.description
        with pytest.raises(TrainingError, match=name):
            parse(config_class, {**required, name: math.nan}, "here")


def test_parse_fills_in_defaults_and_reads_lists() -> None:
    assert parse(FitConfig, {"steps": 7, "learning_rate": 1}, "fit") == FitConfig(steps=7, learning_rate=1)
    assert parse(AutoencoderConfig, {"fit": {"steps": 7}}, "autoencoder").fit == FitConfig(steps=7)
    assert parse(CollectConfig, {"tasks": ["a", "b"]}, "collect").tasks == ("a", "b")


def test_numbers_are_written_as_they_were_given() -> None:
    for alpha in (8, 8.0):
        assert json.dumps(parse(CollectConfig, {"alpha": alpha}, "collect").record()["alpha"]) == str(alpha)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not valid JSON"),
        ("\xff", "not valid JSON"),
        ("[]", "must hold a JSON object"),
        ('{"autoencodr": {}}', "unknown section 'autoencodr'"),
    ],
)
def test_files_that_are_no_recipes_are_refused(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "recipe.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(TrainingError, match=message):
        read_recipe(tmp_path / "recipe.json")
    with pytest.raises(TrainingError, match=r"no recipe 'nonsense'; there are .*'minilm-text-tasks'"):
        read_recipe("nonsense")
    with pytest.raises(TrainingError, match="no recipe"):
        read_recipe(tmp_path / "missing.json")


def test_variants_replace_entries(tmp_path: Path) -> None:
    variants = {"wide": {"collect": {"rank": 2}}, "loud": {"collect": {"alpha": 16}, "unet": {}}}
    path = tmp_path / "my.recipe.json"
    path.write_text(json.dumps({"collect": {"rank": 1, "alpha": 8}, "variants": variants}))
    assert read_recipe(path) == {"collect": {"rank": 1, "alpha": 8}}
    assert read_recipe(f"{path}+wide+loud") == {"collect": {"rank": 2, "alpha": 16}, "unet": {}}
    path.rename(tmp_path / "one+two.json")
    assert read_recipe(tmp_path / "one+two.json")["collect"]["rank"] == 1


@pytest.mark.parametrize(
    ("variants", "message"),
    [
        ({}, r"has no variant 'wide'; there are \[\]"),
        ({"narrow": {}}, r"has no variant 'wide'; there are \['narrow'\]"),
        (1, "variants must be a JSON object"),
        ({"wide": []}, "variant 'wide' must hold a JSON object of sections"),
        ({"wide": {"colect": {}}}, "variant 'wide': unknown section 'colect'"),
        ({"wide": {"collect": 2}}, "variant 'wide': collect must be a JSON object"),
    ],
)
def test_variants_that_are_none_are_refused(tmp_path: Path, variants: Any, message: str) -> None:
    (tmp_path / "my.json").write_text(json.dumps({"collect": {}, "variants": variants}))
    with pytest.raises(TrainingError, match=message):
        read_recipe(tmp_path / "my.json+wide")


@pytest.mark.parametrize(
    ("stage", "section", "message"),
    [
        ("autoencoder", {"model": {"latent_dims": 8}}, "latent_dims"),
        ("autoencoder", {"model": {"num_params": 8}}, "num_params"),
        ("autoencoder", {"model": {"latent_dim": -8}}, "autoencoder, model: .*negative dimension"),
        ("unet", {"denoiser": {"heads": 8}}, "unet, denoiser: .*heads"),
        ("unet", {"denoiser": {"type": "Nonsense"}}, r"unet, denoiser: type must be one of \[.*'ParamUNet1D'.*\], got 'Nonsense'"),
        ("unet", {"denoiser": {"guidance_scale": 3.0}}, "unet, denoiser: guidance_scale follows from the rest of the recipe"),
        ("unet", {"condition_encoder": {"type": "Nonsense"}}, "type must be one of .*'SentenceConditionEncoder'.*, got 'Nonsense'"),
        ("unet", {"condition_encoder": {"type": "ClipConditionEncoder", "layers": 2}}, "layers"),
    ],
)
def test_unknown_arguments_of_networks_are_refused(
    recipe: dict[str, Any], tiny_zoo: Path, tasks_folder: Path, tmp_path: Path, stage: str, section: dict[str, Any], message: str
) -> None:
    recipe["autoencoder"]["fit"]["steps"] = 1
    recipe[stage].update(section)
    with pytest.raises(TrainingError, match=message):
        train(recipe, tiny_zoo, tasks_folder, tmp_path / "run")


def test_recipes_of_the_first_release_name_the_same_denoiser() -> None:
    entries = {"block_out_channels": [8, 4], "embedding_dim": 32}
    forms: list[dict[str, Any]] = [{"model": entries}, {"denoiser": {"type": "ParamUNet1D", **entries}}, {"denoiser": entries}]
    old, new, short = (parse(UNetConfig, form, "unet") for form in forms)
    assert old == new == short
    assert new.record()["model"] == entries  # as their runs have it
    assert "denoiser" not in new.record()
    assert [as_recorded(form) for form in forms] == 3 * [{"model": entries}]
    assert parse(UNetConfig, {}, "unet").record()["model"] == {}
    assert as_recorded({"fit": {}}) == {"fit": {}}
    assert as_recorded({"denoiser": {"type": "Other", "width": 8}}) == {"model": {"type": "Other", "width": 8}}
    with pytest.raises(TrainingError, match=r"unet: unknown entry 'model'; known are .*'denoiser'"):
        parse(UNetConfig, {**forms[0], **forms[1]}, "unet")


def test_reproductions_of_the_first_release_are_read() -> None:
    zoos: dict[str, Any] = {"runs": {}, "both": {"train_lora_a": True}}
    old = {"ways": zoos, "table_ways": ["both"], "distribution_way": "both", "performance_way": "both"}
    new = {"zoos": zoos, "table_zoos": ["both"], "distribution_zoo": "both", "performance_zoo": "both"}
    assert parse(ReproduceConfig, old, "reproduce") == parse(ReproduceConfig, new, "reproduce")
    rows: list[dict[str, Any]] = [{"group": "g", "name": "n", word: "both"} for word in ("way", "zoo")]
    assert parse(Ablation, rows[0], "ablation") == parse(Ablation, rows[1], "ablation")
    assert parse(AblationConfig, {"variants": rows}, "ablation") == parse(AblationConfig, {"ablations": rows}, "ablation")


BERT = [f"layer.{layer}.attention.{name}" for layer in range(12) for name in ("self.query", "self.key", "self.value", "output.dense")]
PIXART = [
    f"transformer_blocks.{block}.{attention}.{name}"
    for block in range(28)
    for attention in ("attn1", "attn2")
    for name in ("to_q", "to_k", "to_v", "to_out.0")
]
LLAMA = [f"model.layers.{layer}.{part}_proj" for layer in range(30) for part in ("self_attn.v", "self_attn.o", "mlp.down")]
# Recipe → modules, their width, rank, number of modelled params, latents of one adapter, size of a condition.
SHAPES: dict[str, tuple[list[str], int, int, int, tuple[int, int], int]] = {
    "minilm-text-tasks": (BERT[:24], 384, 4, 36_864, (1, 96), 1152),
    "paper-language-half": (BERT, 768, 1, 73_728, (4, 117), 512),
    "paper-style-half": (PIXART, 1152, 1, 516_096, (1, 256), 256),
    "pixart-mini-continuum": (PIXART[:64], 160, 4, 81_920, (1, 96), 256),
    "pixart-mini-styles": (PIXART[:64], 160, 4, 40_960, (1, 88), 256),
    "reproduce-minilm": (BERT[:24], 384, 4, 36_864, (1, 96), 1152),
}


def random_zoo(modules: list[str], width: int, rank: int, shared_a: bool, folder: Path) -> ZooParams:
    """Two random adapters for each of two tasks."""
    spec = LoraSpec("nobody/base", rank, 8.0, tuple({name.split(".", 3)[-1] for name in modules}))
    rng = torch.Generator().manual_seed(0)
    shapes = {f"{KEY_PREFIX}{name}.{factor}.weight": factor for name in modules for factor in FACTORS}
    shared = {key: torch.randn(rank, width, generator=rng) for key, factor in shapes.items() if factor == "lora_A"}
    adapters = []
    for _ in range(4):
        tensors = {key: 0.1 * torch.randn(rank, width, generator=rng) for key in shapes}
        tensors = {key: tensor if "lora_A" in key else tensor.T.contiguous() for key, tensor in tensors.items()}
        adapters.append(LoraAdapter(spec, {**tensors, **(shared if shared_a else {})}))
    template = AdapterTemplate.from_adapters(adapters, Backbone("nobody/base"), 32)
    names = ["moods/run-0", "moods/run-1", "animals/run-0", "animals/run-1"]
    return ZooParams.write(folder, template, map(template.to_params, adapters), [0, 0, 1, 1], names, "{}")


def one_step(stage: AutoencoderStage | DenoiserStage, folder: Path) -> None:
    """One real step of the loop, with two samples; every parameter must move."""
    before = [parameter.detach().clone() for parameter in stage.module.parameters()]
    config = replace(stage.config.fit, batch_size=2, steps=1, precision="no")  # many CPUs only emulate the others
    AcceleratorState._reset_state()
    assert math.isfinite(_Run(stage, config, folder, Accelerator(mixed_precision=config.precision)).step(0))
    moved = [not torch.equal(old, new) for old, new in zip(before, stage.module.parameters(), strict=True)]
    assert sum(moved) > 0.8 * len(moved)
    assert all(torch.isfinite(parameter).all() for parameter in stage.module.parameters())


def test_all_recipes_are_tested() -> None:
    # test_text_to_image.py, test_module_codes.py, test_ask.py, test_image_bases.py
    elsewhere = {"pixart-mini", "minilm-large", "smollm2-tasks", "diffusers-styles"}
    assert {path.stem for path in RECIPES_FOLDER.glob("*.json")} == {*SHAPES, *elsewhere}


@pytest.mark.parametrize("name", SHAPES)
def test_recipes_parse_and_name_no_task_twice(name: str) -> None:
    recipe = read_recipe(name)
    if "collect" in recipe:
        config = parse(CollectConfig, recipe["collect"], "collect")
        assert len({*config.tasks, *config.unseen}) == len(config.tasks) + len(config.unseen)
        assert config.rank == SHAPES[name][2]
    assert parse(UNetConfig, recipe["unet"], "unet").fit.checkpoint_every <= 1000
    assert recipe["about"]


@pytest.mark.parametrize("name", SHAPES)
def test_recipes_build_their_networks_and_train(
    name: str, tiny_backbone: Backbone, tasks_folder: Path, styles_folder: Path, tmp_path: Path
) -> None:
    modules, width, rank, num_params, latent_shape, _ = SHAPES[name]
    recipe = read_recipe(name)
    shared_a = not recipe.get("collect", {"train_lora_a": True}).get("train_lora_a", False)
    data = random_zoo(modules, width, rank, shared_a, tmp_path / "params")
    assert data.matrix.shape == (4, num_params)
    assert data.template.layout.num_adapter_params == {36_864: 73_728, 40_960: 81_920}.get(num_params, num_params)

    if name == "paper-style-half":  # a step of the whole takes 20 s and 3 GB; its full size is checked below, on the meta device
        model = recipe["autoencoder"]["model"]
        model.update({entry: [width // 16 for width in model[entry]] for entry in ("encoder_channels", "decoder_channels")})
    autoencoder = AutoencoderStage(data, parse(AutoencoderConfig, recipe["autoencoder"], "autoencoder"))
    assert autoencoder.module.latent_shape == latent_shape
    one_step(autoencoder, tmp_path)
    autoencoder.module.eval()

    encoder = recipe["unet"].get("condition_encoder", {"type": "SentenceConditionEncoder"})
    condition: Any = "Is the remark kind?"
    tasks: Any = load_tasks(tasks_folder, ["moods", "animals"])
    if encoder["type"] == "ClipConditionEncoder":
        encoder = {**encoder, "backbone": None}
    elif encoder["type"] == "SentenceConditionEncoder":
        encoder = {**encoder, "backbone": tiny_backbone.to_json(), "embedding_dim": HIDDEN}
    else:
        condition, tasks = Image.new("RGB", (64, 64)), load_styles(styles_folder, ["embers", "lagoon"])
    section = {**recipe["unet"], "condition_encoder": encoder, "conditions_per_task": 2}
    config = parse(UNetConfig, section, "unet")
    bank = ConditionBank.build(tasks, config, tmp_path)
    unet = DenoiserStage(autoencoder.codec, data, bank, config, autoencoder.identity, autoencoder.latents())
    channels, length = latent_shape
    statistics = {"minilm-text-tasks": 2, "paper-language-half": 1, "reproduce-minilm": 2}.get(name, 0)
    assert unet.latents.shape == (4, channels, length + statistics)
    one_step(unet, tmp_path)

    pipe = unet.pipeline()
    pipe.set_progress_bar_config(disable=True)
    adapter = pipe(condition, num_inference_steps=1).adapter
    assert adapter.modules == tuple(sorted(modules))


def test_the_papers_style_adapters_fit_pixart_xl() -> None:
    """The whole of PixArt-XL-2-256, without weights: its modules are the 224 that the recipe names, 516,096 numbers."""
    with torch.device("meta"):
        transformer = PixArtTransformer2DModel(num_layers=28, sample_size=32, out_channels=8)
    collect = parse(CollectConfig, read_recipe("paper-style-half")["collect"], "collect")
    linears = target_linears(transformer, LoraSpec("base", collect.rank, collect.alpha, collect.target_modules))
    assert list(linears) == sorted(PIXART)
    assert sum(collect.rank * (linear.in_features + linear.out_features) for linear in linears.values()) == 516_096


def test_the_language_models_adapters_fit_smollm2() -> None:
    """The whole of SmolLM2-135M, without weights: its modules are the 90 that the recipe names; its variant has another base alone."""
    sizes = {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3}
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(vocab_size=49152, **sizes))
    recipe, of_hub = read_recipe("smollm2-tasks"), read_recipe("smollm2-tasks+hub")
    collect = parse(CollectConfig, recipe["collect"], "collect")
    linears = target_linears(model, LoraSpec("base", collect.rank, collect.alpha, collect.target_modules))
    assert list(linears) == sorted(LLAMA)
    assert sum(collect.rank * linear.out_features for linear in linears.values()) == 80_640
    assert Backbone.from_json(collect.base) == SMOLLM2
    assert (len(collect.tasks), len(collect.unseen)) == (60, 15)
    assert of_hub["collect"].pop("base")["repo_id"] == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert recipe["collect"].pop("base")
    assert of_hub == recipe


@pytest.mark.parametrize("name", ["paper-language-half", "paper-style-half"])
def test_the_papers_networks_have_their_shapes_and_the_sizes_that_the_recipes_state(name: str) -> None:
    *_, num_params, (channels, length), condition_dim = SHAPES[name]
    recipe = read_recipe(name)
    statistics = int(recipe["autoencoder"]["normalizer"] == "task")
    with torch.device("meta"):
        autoencoder = ParamAutoencoder(num_params, **recipe["autoencoder"]["model"])
        network = {name: value for name, value in recipe["unet"]["denoiser"].items() if name != "type"}
        unet = ParamUNet1D(channels, length + statistics, condition_dim, **network)
        latents = autoencoder.encode(torch.empty(2, num_params))
        noisy = torch.empty(2, channels, length + statistics)
        assert latents.shape == (2, channels, length)
        assert autoencoder.decode(latents).shape == (2, num_params)
        assert unet(noisy, 5, torch.empty(2, condition_dim)).sample.shape == noisy.shape
    sizes = [sum(parameter.numel() for parameter in network.parameters()) / 1e6 for network in (autoencoder, unet)]
    assert f"{sizes[0]:.1f} M / {sizes[1]:.1f} M parameters" in recipe["about"]
