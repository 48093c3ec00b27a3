from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from conftest import OTHER, PROMPT, quiet, same, seeds
from diffusers.models.modeling_utils import ModelMixin
from PIL import Image

from cond_pdiff import CondPDiffPipeline
from cond_pdiff.errors import ConditionError, CondPDiffError

MEASURED = ("normalizer", "condition_index", "condition_encoder")
"""Components of measured numbers, which are exact in every precision."""


def params(pipe: CondPDiffPipeline, condition: Any = PROMPT, **options: Any) -> torch.Tensor:
    """Params of candidates 0, 1, 2 unless told otherwise; each depends on its own seed only."""
    return pipe(condition, **{"num_adapters": 3, "generator": seeds(0, 1, 2), "output_type": "params", **options})


# --- what diffusers promises of a pipeline -----------------------------------------------------------------------------------


def test_saved_and_loaded_it_gives_the_same_bits(pipe: CondPDiffPipeline, tmp_path: Path) -> None:
    expected = params(pipe)
    pipe.save_pretrained(tmp_path / "copy")
    assert {path.suffix for path in (tmp_path / "copy").rglob("*") if path.is_file()} == {".json", ".md", ".safetensors"}
    for folder in (tmp_path / "copy", str(tmp_path / "copy")):
        assert torch.equal(params(quiet(CondPDiffPipeline.from_pretrained(folder))), expected)
    assert params(pipe).std() > 0


def test_diffusers_words_are_understood(pipe: CondPDiffPipeline) -> None:
    picture = Image.new("RGB", (64, 64))
    options = {"num_inference_steps": 1}
    wanted = pipe(PROMPT, output_type="params", generator=seeds(0), **options)
    assert torch.equal(pipe(prompt=PROMPT, output_type="pt", generator=seeds(0), **options), wanted)
    with pytest.raises(ConditionError, match="this generator reads a task description"):
        pipe(picture, **options)
    for image in (picture, "picture.png"):  # a path is a description, too
        with pytest.raises(ConditionError, match="this generator reads no image; give its condition as prompt="):
            pipe(image=image, **options)
    for given in ({}, {"condition": PROMPT, "prompt": PROMPT}, {"prompt": PROMPT, "image": picture}):
        with pytest.raises(ConditionError, match=r"give a condition: a prompt or an image, got (none|2) of them"):
            pipe(**given, **options)


@pytest.mark.parametrize("output_type", ["adapter", "params", "latent"])
def test_offloading_moves_every_network_and_ends_with_the_call(
    pipe: CondPDiffPipeline, monkeypatch: pytest.MonkeyPatch, output_type: str
) -> None:
    moved: list[str] = []

    class Recorder(ModelHook):
        def __init__(self, name: str) -> None:
            self.name = name

        def pre_forward(self, module: Any, *args: Any, **kwargs: Any) -> Any:
            moved.append(self.name)
            return args, kwargs

    freed: list[bool] = []
    monkeypatch.setattr(pipe, "maybe_free_model_hooks", lambda: freed.append(True))
    for name in ("unet", "autoencoder"):
        add_hook_to_module(getattr(pipe, name), Recorder(name))
    pipe(PROMPT, output_type=output_type)
    assert set(moved) == ({"unet"} if output_type == "latent" else {"unet", "autoencoder"})
    assert freed == [True]


def test_with_offloading_it_makes_the_same(pipe: CondPDiffPipeline) -> None:
    wanted = params(pipe)
    pipe.enable_model_cpu_offload(device="cpu")
    for _ in range(2):  # the sentence encoder has no parameters, by which accelerate tells where a network is
        assert torch.equal(params(pipe), wanted)


def test_saved_again_it_does_not_tell_where_it_was(tiny_generator: Path, tmp_path: Path) -> None:
    CondPDiffPipeline.from_pretrained(tiny_generator).save_pretrained(tmp_path)
    configs = [path.read_text(encoding="utf-8") for path in tmp_path.rglob("*.json")]
    assert len(configs) == 8
    assert not any(str(tiny_generator) in text or "_name_or_path" in text for text in configs)


def test_model_index_names_the_public_places(tiny_generator: Path) -> None:
    index = json.loads((tiny_generator / "model_index.json").read_text())
    assert {name: value for name, value in index.items() if not name.startswith("_")} == {
        "autoencoder": ["cond_pdiff", "ParamAutoencoder"],
        "condition_encoder": ["cond_pdiff", "SentenceConditionEncoder"],
        "condition_index": ["cond_pdiff", "ConditionIndex"],
        "normalizer": ["cond_pdiff", "ParamNormalizer"],
        "scheduler": ["diffusers", "DPMSolverMultistepScheduler"],
        "template": ["cond_pdiff", "AdapterTemplate"],
        "unet": ["cond_pdiff", "ParamUNet1D"],
    }
    assert index["_class_name"] == "CondPDiffPipeline"


def test_components_make_another_pipeline(pipe: CondPDiffPipeline) -> None:
    assert torch.equal(params(quiet(CondPDiffPipeline(**pipe.components))), params(pipe))


def test_a_component_can_be_replaced_while_loading(pipe: CondPDiffPipeline, tiny_generator: Path) -> None:
    scheduler = diffusers.DDIMScheduler.from_config(pipe.scheduler.config)
    other = CondPDiffPipeline.from_pretrained(tiny_generator, scheduler=scheduler, unet=pipe.unet)
    assert other.scheduler is scheduler
    assert other.unet is pipe.unet


@pytest.mark.parametrize("name", ["DDIM", "EulerDiscrete", "DPMSolverMultistep", "UniPCMultistep", "DDPM", "EulerAncestralDiscrete", "LCM"])
def test_any_scheduler_and_each_candidate_depends_on_its_own_seed_only(pipe: CondPDiffPipeline, name: str) -> None:
    pipe.scheduler = getattr(diffusers, f"{name}Scheduler").from_config(pipe.scheduler.config)
    together = params(pipe)
    assert torch.isfinite(together).all()
    assert torch.pdist(together).min() > 1e-4
    assert torch.equal(params(pipe), together)
    alone = torch.cat([params(pipe, num_adapters=1, generator=[rng]) for rng in seeds(0, 1, 2)])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=0)


def test_a_batch_is_as_single_calls(pipe: CondPDiffPipeline) -> None:
    together = pipe(PROMPT, num_adapters=5, generator=seeds(*range(5)), guidance_scale=2.0)
    for seed, adapter in enumerate(together.adapters):
        alone = pipe(PROMPT, generator=seeds(seed)[0], guidance_scale=2.0).adapters[0]
        for key, tensor in alone.tensors.items():
            torch.testing.assert_close(adapter.tensors[key], tensor, atol=1e-5, rtol=0)
        assert adapter.metadata["seed"] == alone.metadata["seed"] == seed


@pytest.mark.parametrize("make", [list, tuple])
def test_generators_may_stand_in_any_sequence(pipe: CondPDiffPipeline, make: type) -> None:
    assert torch.equal(params(pipe, generator=make(seeds(0, 1, 2))), params(pipe))


def test_without_a_generator_the_global_seed_decides(pipe: CondPDiffPipeline) -> None:
    torch.manual_seed(3)
    first, second = params(pipe, generator=None), params(pipe, generator=None)
    torch.manual_seed(3)
    assert torch.equal(params(pipe, generator=None), first)
    assert not torch.equal(first, second)
    torch.manual_seed(3)
    adapter = pipe(PROMPT).adapters[0]
    again = pipe(PROMPT, generator=seeds(adapter.metadata["seed"])[0]).adapters[0]
    assert all(torch.equal(again.tensors[key], tensor) for key, tensor in adapter.tensors.items())
    assert len(repr(adapter)) < 300
    assert f"seed={adapter.metadata['seed']}" in repr(adapter)


def test_one_generator_serves_all_candidates(pipe: CondPDiffPipeline) -> None:
    first = params(pipe, generator=seeds(5)[0])
    assert torch.equal(params(pipe, generator=seeds(5)[0]), first)
    assert torch.pdist(first).min() > 1e-4


@pytest.mark.parametrize("change", [{"num_inference_steps": 3}, {"guidance_scale": 3.0}, {"guidance_scale": 0.0}, {"condition": OTHER}])
def test_settings_change_the_output(pipe: CondPDiffPipeline, change: dict[str, Any]) -> None:
    assert (params(pipe, **change) - params(pipe)).norm() > 1e-3 * params(pipe).norm()


def test_guidance_of_zero_ignores_the_condition(pipe: CondPDiffPipeline) -> None:
    options = {"guidance_scale": 0, "num_inference_steps": 1, "output_type": "latent"}
    first, second = (pipe(prompt, generator=seeds(0), **options) for prompt in (PROMPT, OTHER))
    code = pipe.unet.config.guided_length
    torch.testing.assert_close(first[..., :code], second[..., :code])
    assert not torch.allclose(first[..., code:], second[..., code:])  # the statistics are not guided


def test_guidance_extrapolates_from_without_to_with_condition(pipe: CondPDiffPipeline) -> None:
    """One step of a first-order solver is linear in the prediction."""
    pipe.scheduler = diffusers.DDIMScheduler.from_config(pipe.scheduler.config)
    without, with_condition, doubled = (
        pipe(PROMPT, generator=seeds(0), guidance_scale=scale, num_inference_steps=1, output_type="latent") for scale in (0, 1, 2)
    )
    code = pipe.unet.config.guided_length
    torch.testing.assert_close(doubled[..., :code], (2 * with_condition - without)[..., :code], atol=1e-4, rtol=1e-4)
    assert not torch.allclose(without, with_condition, atol=1e-3)


def test_latents_replace_the_noise(pipe: CondPDiffPipeline) -> None:
    shape = pipe(PROMPT, output_type="latent").shape
    noise = torch.cat([torch.randn(shape, generator=rng) for rng in seeds(0, 1, 2)])
    before = noise.clone()
    assert torch.equal(params(pipe, generator=None, latents=noise), params(pipe))
    assert torch.equal(noise, before)
    assert torch.equal(params(pipe, generator=None, latents=noise.double()), params(pipe))


def test_output_types_fit_together(pipe: CondPDiffPipeline) -> None:
    options: dict[str, Any] = {"num_adapters": 2}
    output = pipe(PROMPT, generator=seeds(0, 1), **options)
    latents = pipe(PROMPT, generator=seeds(0, 1), output_type="latent", **options)
    flat = pipe(PROMPT, generator=seeds(0, 1), output_type="params", **options)
    assert torch.equal(output.latents, latents)
    assert torch.equal(pipe.decode(latents), flat)
    assert flat.shape == (2, pipe.template.layout.num_params)
    assert torch.equal(torch.stack([pipe.template.to_params(adapter) for adapter in output.adapters]), flat)
    fields = pipe(PROMPT, generator=seeds(0, 1), return_dict=False, **options)
    assert isinstance(fields, tuple)
    assert [same(*pair) for pair in zip(fields[0], output.adapters, strict=True)] == [True, True]
    assert fields[1:3] == (output.chosen, output.report)
    assert torch.equal(fields[3], latents)


def test_the_callback_sees_every_step_and_may_change_tensors(pipe: CondPDiffPipeline) -> None:
    calls = []

    def look(sender: Any, step: int, timestep: Any, tensors: dict[str, torch.Tensor]) -> None:
        assert sender is pipe
        calls.append((step, int(timestep), sorted(tensors)))

    names = ("latents", "condition_embeddings")
    untouched = params(pipe, num_inference_steps=4, callback_on_step_end=look, callback_on_step_end_tensor_inputs=names)
    assert [step for step, *_ in calls] == [0, 1, 2, 3]
    assert [timestep for _, timestep, _ in calls] == pipe.scheduler.timesteps.tolist() == [999, 602, 72, 0]
    assert {tuple(tensors) for *_, tensors in calls} == {tuple(sorted(names))}
    assert torch.equal(untouched, params(pipe, num_inference_steps=4))

    for name in names:

        def change(sender: Any, step: int, timestep: Any, tensors: dict[str, torch.Tensor], name: str = name) -> dict[str, torch.Tensor]:
            return {name: torch.zeros_like(tensors[name])} if step == 1 else {}

        changed = params(pipe, num_inference_steps=4, callback_on_step_end=change, callback_on_step_end_tensor_inputs=names)
        assert not torch.allclose(changed, untouched, atol=1e-5)


def test_the_callback_may_interrupt_and_the_next_call_runs_through(pipe: CondPDiffPipeline) -> None:
    seen = []

    def stop(sender: Any, step: int, timestep: Any, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        seen.append(tensors["latents"])
        sender.interrupt = step == 1
        return tensors

    stopped = pipe(PROMPT, generator=seeds(0), callback_on_step_end=stop, output_type="latent")
    assert len(seen) == 2
    assert torch.equal(stopped, seen[1])
    half_done = pipe(PROMPT, generator=seeds(0), callback_on_step_end=stop).adapter
    assert half_done.metadata["seed"] is None  # a seed is a promise for `verify`
    assert pipe(PROMPT, generator=seeds(0)).adapter.metadata["seed"] == 0
    assert not pipe.interrupt


@pytest.mark.parametrize(("scale", "twice"), [(None, True), (1.0, False), (0.0, True)])
def test_a_callback_can_ask_how_it_is_guided(pipe: CondPDiffPipeline, scale: float | None, twice: bool) -> None:
    asked = []

    def look(sender: Any, step: int, timestep: Any, tensors: dict[str, torch.Tensor]) -> None:
        asked.append((sender.guidance_scale, sender.do_classifier_free_guidance))

    params(pipe, num_inference_steps=2, guidance_scale=scale, callback_on_step_end=look)
    assert asked == 2 * [(1.5 if scale is None else scale, twice)]


def test_steps_of_ones_own_choice(pipe: CondPDiffPipeline) -> None:
    pipe.scheduler = diffusers.EulerDiscreteScheduler.from_config(pipe.scheduler.config, use_exponential_sigmas=False)
    by_number = params(pipe, num_inference_steps=3)
    levels = pipe.scheduler.sigmas.tolist()
    assert len(levels) == 4
    assert (params(pipe, sigmas=levels) - by_number).norm() < 0.01 * by_number.norm()
    assert pipe(PROMPT, generator=seeds(0), sigmas=levels).adapter.metadata["num_inference_steps"] == 3
    assert (params(pipe, timesteps=[999, 500, 20]) - by_number).norm() > 0.02 * by_number.norm()
    assert pipe.scheduler.timesteps.tolist() == [999, 500, 20]
    facts = pipe(PROMPT, generator=seeds(0), timesteps=(999, 20)).adapter.metadata
    assert (facts["num_inference_steps"], facts["timesteps"]) == (2, [999, 20])
    assert "sigmas" not in facts


@pytest.mark.parametrize(
    ("scheduler", "steps"),
    [
        ("DDIM", {"timesteps": [999, 0]}),  # takes none
        ("DDIM", {"sigmas": [1.0, 0.1]}),
        ("DDPM", {"timesteps": [0, 999]}),  # rises
        ("DDPM", {"timesteps": [5000, 0]}),
        ("DPMSolverMultistep", {"timesteps": [999, 0]}),  # has exponential noise levels
    ],
)
def test_steps_that_the_scheduler_does_not_take_are_refused(pipe: CondPDiffPipeline, scheduler: str, steps: dict[str, Any]) -> None:
    pipe.scheduler = getattr(diffusers, f"{scheduler}Scheduler").from_config(pipe.scheduler.config)
    with pytest.raises(CondPDiffError, match=rf"the scheduler \({scheduler}Scheduler\) does not take these"):
        pipe(PROMPT, **steps)


def test_the_progress_bar_can_be_switched_off(pipe: CondPDiffPipeline, capfd: pytest.CaptureFixture[str]) -> None:
    params(pipe)
    assert capfd.readouterr() == ("", "")
    pipe.set_progress_bar_config(disable=False)
    params(pipe, num_inference_steps=7)
    assert "7/7" in capfd.readouterr().err
    pipe.scheduler = diffusers.HeunDiscreteScheduler.from_config(pipe.scheduler.config)
    params(pipe, num_inference_steps=7)
    assert "13/13" in capfd.readouterr().err


# --- precision ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float16, 0.01), (torch.bfloat16, 0.1), (torch.float64, 1e-5)])
@pytest.mark.parametrize("how", ["to", "load"])
def test_other_precisions_keep_constants_exact_and_give_float32(
    pipe: CondPDiffPipeline, tiny_generator: Path, dtype: torch.dtype, tolerance: float, how: str
) -> None:
    expected = pipe(PROMPT, num_adapters=2, generator=seeds(0, 1))
    measured = {name: {key: tensor.clone() for key, tensor in pipe.components[name].state_dict().items()} for name in MEASURED}
    other = pipe.to(dtype) if how == "to" else quiet(CondPDiffPipeline.from_pretrained(tiny_generator, dtype=dtype))
    assert other.unet.dtype == other.autoencoder.dtype == dtype
    for name, tensors in measured.items():
        assert all(torch.equal(tensor, tensors[key]) for key, tensor in other.components[name].state_dict().items())
    output = other(PROMPT, num_adapters=2, generator=seeds(0, 1))
    assert {adapter.tensors[key].dtype for adapter in output.adapters for key in adapter.tensors} == {torch.float32}
    constants = pipe.template.layout.constants
    assert constants == tuple(key for key in output.adapter.tensors if "lora_A" in key)
    for mine, theirs in zip(output.adapters, expected.adapters, strict=True):
        assert all(torch.equal(mine.tensors[key], theirs.tensors[key]) for key in constants)
        difference = pipe.template.to_params(mine) - pipe.template.to_params(theirs)
        assert difference.norm() < tolerance * pipe.template.to_params(theirs).norm()
    assert output.report.nearest[0].task == expected.report.nearest[0].task


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_moving_and_casting_says_nothing(
    pipe: CondPDiffPipeline, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(logging.getLogger("diffusers"), "propagate", True)
    pipe.to(dtype).to("cpu", dtype).to(device="cpu").to(dtype=dtype)
    assert pipe.unet.to(torch.device("cpu")).to("cpu", dtype=dtype).dtype == dtype
    assert caplog.messages == []
    ModelMixin.to(pipe.unet, dtype)
    assert "should be kept in float32" in caplog.text


# --- refusals ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        *(({"num_adapters": value}, "num_adapters must be a whole number from 1 to 1000") for value in (0, -1, 1001, 1.0, True, "2", None)),
        *(({"num_inference_steps": value}, "num_inference_steps must be a whole number from 1 to 1000") for value in (0, 1001, 2.5, None)),
        *(({"guidance_scale": value}, "guidance_scale must be a number from 0 to 100") for value in (-0.1, 101, float("nan"), "2", True)),
        ({"generator": seeds(0, 1)}, "got 2 generators for 1 adapters; give one each"),
        ({"generator": []}, "got 0 generators for 1 adapters"),
        *(({"generator": value}, r"generator must be a torch\.Generator") for value in (5, "x", [5], [None])),
        ({"latents": torch.zeros(1, 1, 3)}, r"latents must be a tensor of shape \(1, 1, 10\), got"),
        ({"latents": torch.zeros(2, 1, 10)}, r"latents must be a tensor of shape \(1, 1, 10\), got"),
        ({"latents": [0.0] * 10}, r"latents must be a tensor of shape \(1, 1, 10\), got list"),
        ({"latents": torch.full((1, 1, 10), float("nan"))}, "lora_B.weight' holds NaN"),
        ({"timesteps": [9, 3], "sigmas": [1.0, 0.1]}, "timesteps and sigmas both say which steps to take"),
        *(({"timesteps": value}, "timesteps must be a list of 1 to 1000 numbers") for value in ([], [5, -1], ["5"], 5, [True], [9] * 1001)),
        *(({"sigmas": value}, "sigmas must be a list of 1 to 1000 numbers") for value in ([], [float("nan")], [None])),
        *(({"output_type": value}, "output_type must be") for value in ("pil", "np", None)),
        ({"callback_on_step_end_tensor_inputs": ["unet"]}, "callbacks can have"),
        ({"condition": ""}, "the task description is empty"),
        ({"condition": "the " * 300}, "302 tokens; the condition encoder reads 256"),
        *(({"condition": value}, "this generator reads a task description") for value in (5, {"description": "x"})),
        ({"condition": None}, "give a condition: a prompt or an image, got none"),
        *(({"condition": value}, "one condition a call, please") for value in (["x"], ("x", "y"), [PROMPT])),
    ],
)
def test_bad_arguments_are_refused(pipe: CondPDiffPipeline, change: dict[str, Any], message: str) -> None:
    with pytest.raises(CondPDiffError, match=message):
        pipe(**{"condition": PROMPT, **change})


def test_a_refusal_of_the_condition_is_a_condition_error(pipe: CondPDiffPipeline) -> None:
    for condition in ("", "the " * 300, None, [PROMPT]):
        with pytest.raises(ConditionError):
            pipe(condition)
