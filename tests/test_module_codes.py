"""Codes of modules: what they lose, that parts have the bits of the whole, and generators made of them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import PROMPT, bits, interrupt_at, quiet, same, seeds, tiny_recipe
from safetensors.torch import load_file

from cond_pdiff import CondPDiffPipeline, LoraAdapter, ModuleBasis, ParamNormalizer, SegmentAutoencoder, TokenDenoiser
from cond_pdiff.codec import AdapterCodec, Autoencoder
from cond_pdiff.errors import CondPDiffError, HubError, TrainingError
from cond_pdiff.hub import Backbone, check_config_numbers
from cond_pdiff.layout import DecodedTensors, ParamLayout
from cond_pdiff.models import module_code
from cond_pdiff.models.module_code import MODULES_FILE
from cond_pdiff.training.config import AutoencoderConfig, CollectConfig, FitConfig, parse
from cond_pdiff.training.evaluate.measure import weights_sha256
from cond_pdiff.training.recipe import read_recipe
from cond_pdiff.training.stages import codec_stages, module_stage
from cond_pdiff.training.stages.codec_stages import CodecStage, codec_stage, register_codec_stage
from cond_pdiff.training.stages.train import train
from cond_pdiff.training.zoo.collect import collect
from cond_pdiff.training.zoo.params import ZooParams
from cond_pdiff.training.zoo.zoo import Zoo

FIT = FitConfig(steps=80, batch_size=8, learning_rate=5e-3, warmup_steps=2, ema_decay=0.9, checkpoint_every=20, log_every=1)
CODES: dict[str, AutoencoderConfig] = {
    "ModuleBasis": AutoencoderConfig({"type": "ModuleBasis", "width": 3}, normalizer="none"),
    "SegmentAutoencoder": AutoencoderConfig(
        {"type": "SegmentAutoencoder", "width": 4, "segment": 16, "hidden": 32, "depth": 1}, FIT, normalizer="none"
    ),
}


@pytest.fixture(scope="module")
def data(tiny_zoo: Path, tmp_path_factory: pytest.TempPathFactory) -> ZooParams:
    return ZooParams.load(Zoo(tiny_zoo), tmp_path_factory.mktemp("params") / "params")


@pytest.fixture(scope="module", params=CODES)
def stage(request: pytest.FixtureRequest, data: ZooParams, tmp_path_factory: pytest.TempPathFactory) -> CodecStage:
    """Trained on the tiny zoo's four adapters, in cells of 32 values, of which a module has several."""
    made = codec_stage(data, CODES[request.param])
    made.train(tmp_path_factory.mktemp("code"))
    return made


@pytest.fixture(autouse=True)
def _short_cells(monkeypatch: pytest.MonkeyPatch) -> None:
    set_cells(monkeypatch, 32)


def set_cells(monkeypatch: pytest.MonkeyPatch, numbers: int) -> None:
    for module in ("module_code", "module_basis", "segment_autoencoder"):
        monkeypatch.setattr(f"cond_pdiff.models.{module}.CELL", numbers)


# --- where modules are ---------------------------------------------------------------------------------------------------------


def test_spans_are_the_modules_of_the_flat_vector(data: ZooParams, monkeypatch: pytest.MonkeyPatch) -> None:
    layout = data.template.layout
    spans = layout.module_spans()
    assert [spans[0].start, *(span.stop for span in spans)] == [*(span.start for span in spans), layout.num_params]
    assert len(spans) == len({span.module for span in spans}) == 8
    assert {(span.layer, span.kind.rpartition("*.")[2]) for span in spans} == {
        ((layer,), kind)
        for layer in (0, 1)
        for kind in ("attention.self.query", "attention.self.key", "attention.self.value", "attention.output.dense")
    }
    monkeypatch.setattr("cond_pdiff.layout.MAX_SPAN", 40)
    parts = layout.module_spans()
    assert [part.stop - part.start for part in parts if part.module == spans[0].module] == [32, 32]
    assert parts[-1].stop == layout.num_params


def test_factors_and_heads_belong_to_their_modules() -> None:
    keys = ("a.0.q.lora_A.weight", "a.0.q.lora_B.weight", "a.1.b.2.q.lora_B.weight", "head.bias", "head.weight")
    spans = ParamLayout(dict.fromkeys(keys, (2, 3))).module_spans()
    assert [(span.module, span.layer, span.kind, span.stop) for span in spans] == [
        ("a.0.q", (0,), "a.*.q", 12),
        ("a.1.b.2.q", (1, 2), "a.*.b.*.q", 18),
        ("head", (), "head", 30),
    ]


def test_denoisers_are_told_layers_and_modules(data: ZooParams, stage: CodecStage, monkeypatch: pytest.MonkeyPatch) -> None:
    assert stage.codec.token_places == {"token_layers": [0] * 4 + [1] * 4, "token_modules": [0, 1, 2, 3] * 2}
    monkeypatch.setattr("cond_pdiff.layout.MAX_SPAN", 40)
    made = codec_stage(data, CODES["ModuleBasis"]).codec.token_places
    assert made == {"token_layers": [0] * 8 + [1] * 8, "token_modules": [*range(8)] * 2}


# --- the basis -----------------------------------------------------------------------------------------------------------------


@pytest.fixture
def basis(data: ZooParams, tmp_path: Path) -> CodecStage:
    made = codec_stage(data, CODES["ModuleBasis"])
    made.train(tmp_path / "basis")
    return made


def test_all_directions_of_a_zoo_lose_nothing(basis: CodecStage, data: ZooParams) -> None:
    """Four adapters have three directions."""
    params = torch.cat(list(data.chunks()))
    latents = basis.latents()
    assert latents.shape == (4, 3, 8)
    torch.testing.assert_close(basis.codec.encode(params), latents, rtol=2e-3, atol=2e-3)  # directions are kept in half precision
    assert (basis.codec.decode(latents) - params).norm() < 1e-3 * params.norm()
    assert basis.lost() == pytest.approx(0, abs=1e-5)


def test_half_of_the_code_is_the_best_approximation_of_its_size(data: ZooParams, tmp_path: Path) -> None:
    made: Any = codec_stage(data, AutoencoderConfig({"type": "ModuleBasis", "width": 1}, normalizer="none"))
    made.train(tmp_path)
    centred = torch.cat(list(data.chunks()))
    centred = centred - centred.mean(0)
    kept = sum(float(torch.linalg.svdvals(centred[:, start:stop])[0] ** 2) for start, stop in made.module.spans)
    assert made.lost() == pytest.approx(1 - kept / float(centred.square().sum()), abs=1e-4)


def test_sums_of_codes_are_sums_of_updates(basis: CodecStage) -> None:
    codec, latents = basis.codec, basis.latents()
    made = codec.decode(latents)
    torch.testing.assert_close(codec.decode(0.3 * latents[:1] + 0.7 * latents[1:2])[0], 0.3 * made[0] + 0.7 * made[1])
    torch.testing.assert_close(codec.decode(2 * latents[:1] - latents[1:2])[0], 2 * made[0] - made[1])


def test_encoding_is_least_squares(basis: CodecStage, data: ZooParams) -> None:
    """What an adapter has beside the directions does not change its code."""
    params = data[torch.tensor([0])]
    away = torch.randn(1, params.shape[1], generator=torch.Generator().manual_seed(0))
    away = away - (basis.codec.decode(basis.codec.encode(params + away)) - basis.codec.decode(basis.codec.encode(params)))
    torch.testing.assert_close(basis.codec.encode(params + 0.1 * away), basis.codec.encode(params), rtol=0, atol=5e-3)


def test_the_same_zoo_gives_the_same_bytes(data: ZooParams, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for folder in ("first", "second"):
        codec_stage(data, CODES["ModuleBasis"]).train(tmp_path / folder)
    assert bits(tmp_path / "first") == bits(tmp_path / "second")
    monkeypatch.setattr(module_stage, "NUMBERS_AT_ONCE", 24)  # six columns at a time
    codec_stage(data, CODES["ModuleBasis"]).train(tmp_path / "third")
    first, third = (load_file(tmp_path / folder / MODULES_FILE) for folder in ("first", "third"))
    for key, value in first.items():
        torch.testing.assert_close(third[key], value, rtol=5e-3, atol=5e-3)


def test_a_module_that_is_equal_in_all_adapters_has_nothing_to_tell(data: ZooParams, tmp_path: Path) -> None:
    start, stop = [(span.start, span.stop) for span in data.template.layout.module_spans()][1]
    rows = torch.cat(list(data.chunks()))
    rows[:, start:stop] = 0.5
    alike = ZooParams.write(tmp_path / "params", data.template, rows, data.tasks.tolist(), data.names, "{}")
    made = codec_stage(alike, CODES["ModuleBasis"])
    made.train(tmp_path / "basis")
    assert float(made.latents()[:, :, 1].abs().max()) == 0
    assert torch.equal(made.codec.decode(torch.randn(1, 3, 8))[:, start:stop], torch.full((1, stop - start), 0.5))


def test_an_adapter_that_is_not_finite_is_named(data: ZooParams, tmp_path: Path) -> None:
    rows = torch.cat(list(data.chunks()))
    rows[2, 5] = float("nan")
    broken = ZooParams.write(tmp_path / "params", data.template, rows, data.tasks.tolist(), data.names, "{}")
    with pytest.raises(TrainingError, match=rf"{data.names[2]} holds NaN or infinite values"):
        codec_stage(broken, CODES["ModuleBasis"]).train(tmp_path / "basis")
    assert not [*(tmp_path / "basis").glob("*")]


# --- both ----------------------------------------------------------------------------------------------------------------------


def test_they_are_autoencoders_whose_parts_have_the_bits_of_the_whole(stage: CodecStage, data: ZooParams) -> None:
    code: Any = stage.codec.autoencoder
    assert isinstance(code, Autoencoder)
    with torch.no_grad():
        latents = stage.codec.encode(data[torch.arange(4)])
        assert latents.shape[1:] == stage.codec.latent_shape == code.latent_shape
        whole = stage.codec.decode(latents)
        for start, stop in ((0, 1), (5, 31), (31, 65), (60, 200), (0, whole.shape[1])):
            assert torch.equal(code.decode_part(latents, start, stop), whole[:, start:stop])
        assert torch.equal(torch.cat([stage.codec.decode(row[None]) for row in latents]), whole)
        assert torch.equal(torch.cat([stage.codec.encode(data[torch.tensor([index])]) for index in range(4)]), latents)
        for made, params in zip(stage.codec.decode_tensors(latents), whole, strict=True):
            assert isinstance(made, DecodedTensors)
            assert list(made) == list(data.template.layout.shapes)
            assert all(torch.equal(made[key], tensor) for key, tensor in data.template.to_tensors(params).items())
    assert stage.lost() < 0.9


def test_gradients_flow_into_the_code(stage: CodecStage) -> None:
    latents = torch.randn(2, *stage.codec.latent_shape, requires_grad=True)
    stage.codec.decode(latents).square().sum().backward()
    assert latents.grad is not None
    assert bool((latents.grad != 0).any())


def test_scales_make_the_latents_of_one_size(stage: CodecStage) -> None:
    before = stage.latents()
    made = stage.codec.decode(before)
    latents = stage.codec.fit_scaling_factor(before)
    assert float(latents.square().mean()) == pytest.approx(1, abs=1e-4)
    torch.testing.assert_close(stage.latents(), latents, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(stage.codec.decode(latents), made, rtol=1e-4, atol=1e-6)


def test_training_of_segments_resumes_with_the_same_bits(
    data: ZooParams, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage = codec_stage(data, CODES["SegmentAutoencoder"])
    stage.train(tmp_path / "whole")
    rows = [json.loads(line)["loss"] for line in (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()]
    assert sum(rows[-20:]) < 0.9 * sum(rows[:20])
    with monkeypatch.context() as patch:
        interrupt_at(patch, "cond_pdiff.training.stages.loop._Run.step", 31)
        with pytest.raises(KeyboardInterrupt):
            codec_stage(data, CODES["SegmentAutoencoder"]).train(tmp_path / "halves")
    codec_stage(data, CODES["SegmentAutoencoder"]).train(tmp_path / "halves")
    assert bits(tmp_path / "halves") == bits(tmp_path / "whole")


@pytest.mark.parametrize(
    ("model", "settings", "message"),
    [
        ({"type": "ModuleBasis"}, {}, 'ModuleBasis has a mean and scales of its own: "normalizer": "none"'),
        ({"type": "ModuleBasis"}, {"normalizer": "none", "fit": FIT}, 'computed, there is nothing to "fit"'),
        ({"type": "ModuleBasis", "width": 0}, {"normalizer": "none"}, "a width of at least 1"),
        ({"type": "ModuleBasis", "breadth": 3}, {"normalizer": "none"}, "unexpected keyword argument 'breadth'"),
        ({"type": "SegmentAutoencoder", "segment": 1000}, {"normalizer": "none"}, "segment must divide"),
        ({"type": "Nothing"}, {}, r"type must be one of \['ModuleBasis', 'ParamAutoencoder', 'SegmentAutoencoder'\], got 'Nothing'"),
    ],
)
def test_settings_that_do_not_fit_are_refused(data: ZooParams, model: dict[str, Any], settings: dict[str, Any], message: str) -> None:
    with pytest.raises(CondPDiffError, match=message):
        codec_stage(data, AutoencoderConfig(model, **settings))


def test_a_folder_of_other_data_is_refused(data: ZooParams, tmp_path: Path) -> None:
    codec_stage(data, CODES["ModuleBasis"]).train(tmp_path)
    with pytest.raises(TrainingError, match="was made with other settings or data"):
        codec_stage(data.part([0, 1, 2]), CODES["ModuleBasis"]).train(tmp_path)


def test_another_codec_can_be_made_known(data: ZooParams, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(codec_stages, "CODEC_STAGES", dict(codec_stages.CODEC_STAGES))
    made: list[AutoencoderConfig] = []

    def make(given: ZooParams, config: AutoencoderConfig) -> Any:
        made.append(config)
        return given

    register_codec_stage("Mine", make)
    register_codec_stage("Mine", make)
    assert codec_stage(data, AutoencoderConfig({"type": "Mine"})) is data  # type: ignore[comparison-overlap]
    with pytest.raises(CondPDiffError, match="there is an autoencoder ModuleBasis already"):
        register_codec_stage("ModuleBasis", make)


def test_a_code_that_was_not_fitted_and_wrong_shapes_are_refused(basis: CodecStage) -> None:
    fresh = ModuleBasis([(0, 4), (4, 6)], 2)
    with pytest.raises(CondPDiffError, match="this ModuleBasis has not been fitted to a zoo"):
        fresh.decode(torch.zeros(1, 2, 2))
    for spans in ([(0, 4), (5, 6)], [(1, 4)], [], [(0, 0)]):
        with pytest.raises(CondPDiffError, match="spans that begin at 0 and follow each other"):
            ModuleBasis(spans, 2)
    with pytest.raises(CondPDiffError, match=r"expected latents of shape \(batch, 3, 8\)"):
        basis.codec.autoencoder.decode(torch.zeros(1, 2, 8))
    with pytest.raises(CondPDiffError, match=r"expected values of shape"):
        basis.codec.autoencoder.encode(torch.zeros(1, 7))
    normalizer = ParamNormalizer("batch", basis.codec.template.layout.sizes)
    with pytest.raises(CondPDiffError, match="needs the normaliser's mode 'none', got 'batch'"):
        AdapterCodec(basis.codec.template, normalizer, basis.codec.autoencoder)


# --- a generator of them -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=CODES)
def generator(
    request: pytest.FixtureRequest, tiny_backbone: Backbone, tiny_zoo: Path, tasks_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A generator of the tiny zoo with a code of modules and a `TokenDenoiser`. Only to be read."""
    recipe = tiny_recipe(tiny_backbone)
    fit = {**recipe["autoencoder"]["fit"], "steps": 12}
    recipe["autoencoder"] = {"model": CODES[request.param].model, "normalizer": "none"}
    if request.param == "SegmentAutoencoder":
        recipe["autoencoder"]["fit"] = fit
    recipe["unet"]["denoiser"] = {"type": "TokenDenoiser", "width": 16, "depth": 1, "heads": 2}
    recipe["unet"]["fit"]["steps"] = 20
    return train(recipe, tiny_zoo, tasks_folder, tmp_path_factory.mktemp("modules"))


def test_a_generator_is_loaded_and_makes_adapters_a_tensor_at_a_time(generator: Path, tmp_path: Path) -> None:
    pipe = quiet(CondPDiffPipeline.from_pretrained(generator))
    assert isinstance(pipe.unet, TokenDenoiser)
    assert (pipe.unet.config.token_layers, pipe.unet.config.token_modules) == ([0] * 4 + [1] * 4, [0, 1, 2, 3] * 2)
    output = pipe(PROMPT.description, num_adapters=2, generator=seeds(0, 1))
    params = pipe(PROMPT.description, num_adapters=2, generator=seeds(0, 1), output_type="params")
    for adapter, row in zip(output.adapters, params, strict=True):
        assert isinstance(adapter.tensors, DecodedTensors)
        assert same(adapter, pipe.codec.to_adapter(row))
    folder = output.save_adapter(tmp_path / "adapter")
    assert same(LoraAdapter.load(folder), output.adapter)
    torch.testing.assert_close(pipe(PROMPT.description, generator=seeds(1), output_type="params")[0], params[1])
    first, second = (pipe(PROMPT.description, generator=seeds(0)).save_adapter(tmp_path / name) for name in ("first", "second"))
    assert bits(first) == bits(second)


def test_with_examples_it_chooses_and_acts(generator: Path) -> None:
    pipe = quiet(CondPDiffPipeline.from_pretrained(generator))
    output = pipe(PROMPT, num_adapters=2, generator=seeds(0, 1))
    assert output.report.choice is not None
    base = pipe.base_model()
    with output.adapters[0].attached(base.model):
        assert base.embed(["the good film"]).shape == (1, 32)


def test_it_is_saved_with_its_file(generator: Path, tmp_path: Path) -> None:
    pipe = quiet(CondPDiffPipeline.from_pretrained(generator))
    pipe.save_pretrained(tmp_path / "copy")
    again = quiet(CondPDiffPipeline.from_pretrained(tmp_path / "copy"))
    made = pipe(PROMPT, generator=seeds(0), output_type="params")
    assert torch.equal(again(PROMPT, generator=seeds(0), output_type="params"), made)
    pipe.save_pretrained(generator)  # onto itself
    assert torch.equal(quiet(CondPDiffPipeline.from_pretrained(generator))(PROMPT, generator=seeds(0), output_type="params"), made)
    assert weights_sha256(again) == weights_sha256(pipe)
    pipe.autoencoder.register_to_config(file_sha256="another")
    assert weights_sha256(again) != weights_sha256(pipe)
    half = quiet(CondPDiffPipeline.from_pretrained(generator, dtype=torch.float16))
    assert (half(PROMPT, generator=seeds(0), output_type="params") - made).norm() < 0.05 * made.norm()


@pytest.mark.parametrize("damage", ["missing", "cut", "another"])
def test_a_file_that_is_not_the_generators_is_refused(generator: Path, tmp_path: Path, damage: str) -> None:
    folder = shutil.copytree(generator, tmp_path / "generator")
    path = folder / "autoencoder" / MODULES_FILE
    data = path.read_bytes()
    path.unlink()
    if damage == "cut":
        path.write_bytes(data[:-4])
    elif damage == "another":
        ModuleBasis([(0, 4)], 1).write_file(path, {"mean": (torch.float32, (4,))}, [torch.zeros(4)])
    expected = "is of adapters with 4 numbers" if damage == "another" else "is missing or damaged"
    with pytest.raises(HubError, match=expected):
        CondPDiffPipeline.from_pretrained(folder)


@pytest.mark.parametrize("name", ["minilm-large", "minilm-large+segments"])
def test_the_recipes_for_large_adapters_run(
    name: str, tiny_backbone: Backbone, tasks_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_cells(monkeypatch, module_code.CELL * 512)  # as it is
    recipe = read_recipe(name)
    assert parse(CollectConfig, recipe["collect"], "collect").rank == 256
    short = {"rank": 4, "alpha": 4.0, "steps": 2, "multitask_steps": 1, "metric_rows": 4, "base": tiny_backbone.to_json()}
    zoo = collect(parse(CollectConfig, {**recipe["collect"], **short}, "collect"), tasks_folder, tmp_path / "zoo")
    encoder = {"type": "SentenceConditionEncoder", "backbone": tiny_backbone.to_json(), "embedding_dim": 32}
    recipe["unet"] |= {"condition_encoder": encoder, "conditions_per_task": 2}
    for section in (recipe["autoencoder"], recipe["unet"]):
        if "fit" in section:
            section["fit"]["steps"] = 2
    pipe = quiet(CondPDiffPipeline.from_pretrained(train(recipe, zoo.folder, tasks_folder, tmp_path / "run")))
    assert pipe.template.layout.num_params == pipe.template.layout.num_adapter_params == 2 * 4 * (4 * 64 + 2 * 96)
    assert len(pipe("Is the remark kind?", num_inference_steps=2).adapter.modules) == 12


# --- the denoiser --------------------------------------------------------------------------------------------------------------


def test_tokens_differ_by_their_layer_and_module() -> None:
    torch.manual_seed(0)
    denoiser = TokenDenoiser(2, 4, 3, width=8, depth=1, heads=2, token_layers=[0, 0, 1, 1], token_modules=[0, 1, 0, 1]).eval()
    assert (denoiser.layer_embedding.num_embeddings, denoiser.module_embedding.num_embeddings) == (2, 2)
    torch.nn.init.normal_(denoiser.to_sample)
    sample, condition = torch.randn(3, 2, 4), torch.randn(3, 3)
    made = denoiser(sample, torch.tensor([1, 500, 999]), condition).sample
    assert made.shape == sample.shape
    torch.testing.assert_close(made[1:2], denoiser(sample[1:2], 500, condition[1:2], return_dict=False)[0])
    assert not torch.allclose(made, denoiser(sample, torch.tensor([1, 500, 999]), 0 * condition).sample)
    with torch.no_grad():
        denoiser.layer_embedding.weight[1] += torch.randn(8)
    assert not torch.allclose(made, denoiser(sample, torch.tensor([1, 500, 999]), condition).sample)


def test_what_does_not_fit_the_denoiser_is_refused() -> None:
    for settings in ({"width": 9, "heads": 2}, {"depth": 0}, {"heads": 0}):
        with pytest.raises(CondPDiffError, match="width a multiple of heads"):
            TokenDenoiser(2, 4, 3, **settings)
    with pytest.raises(CondPDiffError, match="the layer and the module of each of 4 tokens, got 3, 4"):
        TokenDenoiser(2, 4, 3, token_layers=[0, 0, 1])
    with pytest.raises(CondPDiffError, match="expected a sample of shape"):
        TokenDenoiser(2, 4, 3, width=8)(torch.zeros(1, 2, 3), 1, torch.zeros(1, 3))


def test_cells_are_as_long_as_promised() -> None:
    assert module_code.CELL == 32  # as these tests set it
    with pytest.raises(CondPDiffError, match="segment must divide 32"):
        SegmentAutoencoder([(0, 64)], segment=24)


def test_adapters_of_many_numbers_are_no_danger_to_memory() -> None:
    settings = {"spans": [[0, 10**9]], "width": 64}
    check_config_numbers("config.json", settings, "config.json")
    with pytest.raises(HubError, match="the number 1000000000 is too large"):
        check_config_numbers("config.json", {**settings, "width": 10**9}, "config.json")
