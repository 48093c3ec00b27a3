from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import refused, seeds, told
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    DPMSolverSinglestepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    UniPCMultistepScheduler,
)

from cond_pdiff import CondPDiffPipeline, LoraAdapter, TaskPrompt
from cond_pdiff.atomic import dump_json
from cond_pdiff.errors import AdapterError, ConditionError, HubError
from cond_pdiff.pipelines.provenance import build_scheduler, scheduler_settings
from cond_pdiff.verify import verify

PROMPT = TaskPrompt("Is the film good?", [("great film", "positive"), ("poor film", "negative")], ["positive", "negative"])


@pytest.fixture
def made(pipe: CondPDiffPipeline, tmp_path: Path) -> LoraAdapter:
    """As a user gets it: the chosen one of three, saved and loaded."""
    output = pipe(PROMPT, num_adapters=3, generator=seeds(4, 5, 6), num_inference_steps=4, guidance_scale=2.0)
    return LoraAdapter.load(output.adapters[2].save(tmp_path / "made"))


def test_a_generated_adapter_can_be_made_again(made: LoraAdapter, tiny_generator: Path) -> None:
    result = verify(made, tiny_generator)
    assert result.same
    assert (result.largest_difference, result.changes, result.scheduler) == (0, {}, {})
    assert "the same bytes" in str(result)
    assert made.metadata["generator"]["name"] == "generator"  # no path: adapters are given away


def test_one_rng_for_all_candidates_works_too_if_it_was_fresh(pipe: CondPDiffPipeline, tiny_generator: Path) -> None:
    rng = torch.Generator().manual_seed(9)
    first, second = (pipe(PROMPT, num_adapters=2, generator=rng, num_inference_steps=3) for _ in range(2))
    assert all(verify(adapter, tiny_generator).same for adapter in first.adapters)
    with pytest.raises(AdapterError, match="does not record its seed"):
        verify(second.adapters[0], tiny_generator)
    given = pipe(PROMPT, num_inference_steps=2, generator=seeds(1)[0], latents=torch.zeros_like(first.latents[:1]))
    assert given.adapter.metadata["seed"] is None
    assert verify(pipe(PROMPT, num_inference_steps=2).adapters[0], tiny_generator).same  # of a seed that was drawn


def test_steps_of_ones_own_choice_are_taken_again(pipe: CondPDiffPipeline, tiny_generator: Path) -> None:
    pipe.scheduler = DDPMScheduler.from_config(pipe.scheduler.config)
    adapter = pipe(PROMPT, num_inference_steps=5, timesteps=[900, 300, 20], generator=seeds(3)).adapters[0]
    assert verify(adapter, tiny_generator).same
    other = replace(adapter, metadata={**adapter.metadata, "timesteps": [900, 300, 21]})
    assert not verify(other, tiny_generator).same


def test_a_style_adapter_needs_its_picture(style_generator: Path, styles_folder: Path) -> None:
    pipe = CondPDiffPipeline.from_pretrained(style_generator)
    picture, other = (styles_folder / name / "style.png" for name in ("embers", "lagoon"))
    adapter = pipe(picture, generator=seeds(3)[0], num_inference_steps=3).adapter
    assert verify(adapter, style_generator, picture).same
    with pytest.raises(ConditionError, match="give the file"):
        verify(adapter, style_generator)
    with pytest.raises(ConditionError, match="is not the picture"):
        verify(adapter, style_generator, other)


def changed(adapter: LoraAdapter, amount: float, **facts: Any) -> LoraAdapter:
    """One number of the adapter is larger by `amount` of the largest."""
    key = next(key for key in adapter.tensors if "lora_B" in key)
    tensors = {name: tensor.clone() for name, tensor in adapter.tensors.items()}
    tensors[key][0, 0] += amount * max(float(tensor.abs().max()) for tensor in tensors.values())
    return replace(adapter, tensors=tensors, metadata={**adapter.metadata, **facts})


def test_a_changed_number_is_noticed(made: LoraAdapter, tiny_generator: Path) -> None:
    result = verify(changed(made, 0.001, versions={**made.metadata["versions"], "torch": "0.1"}), tiny_generator)
    assert not result.same
    assert not result.only_rounding
    assert 0.0009 < result.largest_difference < 0.0011
    assert str(result).startswith("not the same: numbers differ by up to 0.001 of the largest")
    assert f"torch 0.1 then, {torch.__version__} now" in str(result)


def test_rounding_is_told_from_a_difference_with_its_cause(made: LoraAdapter, tiny_generator: Path) -> None:
    machine = {**made.metadata["machine"], "cpu_capability": "VSX"}
    result = verify(changed(made, 1e-6, machine=machine), tiny_generator)
    assert (result.same, result.only_rounding) == (False, True)
    now = torch.backends.cpu.get_cpu_capability()
    assert result.changes == {"cpu_capability": ("VSX", now)}
    assert str(result).startswith("the same but for rounding: numbers differ by up to ")
    assert f"cpu_capability VSX then, {now} now" in str(result)
    assert "nothing recorded has changed" in str(verify(changed(made, 1e-6), tiny_generator))
    elsewhere = changed(made, 1e-3, machine={**machine, "device": "NVIDIA H100"})  # whose convolutions round like float16
    assert verify(elsewhere, tiny_generator).only_rounding


@pytest.mark.parametrize("now", [1, 3])
def test_as_many_threads_as_then_are_used(pipe: CondPDiffPipeline, tiny_generator: Path, now: int) -> None:
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        adapter = pipe(PROMPT, generator=seeds(4), num_inference_steps=3).adapters[0]
        torch.set_num_threads(now)
        result = verify(adapter, tiny_generator)  # its facts of now are taken while it generates
        assert torch.get_num_threads() == now
        assert adapter.metadata["machine"]["threads"] == 2
        assert (result.same, result.changes) == (True, {})
        many = verify(changed(adapter, 1e-6, machine={**adapter.metadata["machine"], "threads": 10**9}), tiny_generator)
        assert many.changes == {"threads": ("1000000000", str(now))}
        assert torch.get_num_threads() == now
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("scheduler", "options", "told"),
    [
        (DPMSolverMultistepScheduler, {"solver_order": 1, "timestep_spacing": "trailing"}, "solver_order 1, not the default"),
        (DDIMScheduler, {"timestep_spacing": "trailing"}, "class DDIMScheduler, not DPMSolverMultistepScheduler"),
        (EulerAncestralDiscreteScheduler, {}, "class EulerAncestralDiscreteScheduler"),
    ],
)
def test_a_scheduler_that_was_swapped_is_used_again(
    pipe: CondPDiffPipeline, tiny_generator: Path, tmp_path: Path, scheduler: Any, options: dict[str, Any], told: str
) -> None:
    own = pipe(PROMPT, generator=seeds(4), num_inference_steps=3).adapters[0]
    pipe.scheduler = scheduler.from_config(pipe.scheduler.config, **options)
    made = pipe(PROMPT, generator=seeds(4), num_inference_steps=3).adapters[0]
    assert verify(replace(own, metadata=made.metadata), tiny_generator).only_rounding is False
    loaded = LoraAdapter.load(made.save(tmp_path / "made"))
    assert options.items() <= loaded.metadata["scheduler_config"].items()
    result = verify(loaded, tiny_generator)
    assert result.same
    assert told in str(result)
    assert f"{scheduler.__name__} (" in (tmp_path / "made" / "README.md").read_text()


@pytest.mark.parametrize(
    "scheduler",
    [
        *(DDIMScheduler(trained_betas=[0.1, 0.2], clip_sample=False), DDPMScheduler(variance_type="fixed_large")),
        *(EulerDiscreteScheduler(timestep_spacing="trailing"), HeunDiscreteScheduler(), UniPCMultistepScheduler(disable_corrector=[0, 1])),
        DPMSolverSinglestepScheduler.from_config(DDIMScheduler(beta_schedule="squaredcos_cap_v2").config),
    ],
    ids=lambda scheduler: type(scheduler).__name__,
)
def test_settings_of_a_scheduler_bring_it_back(scheduler: Any) -> None:
    recorded = json.loads(dump_json(scheduler_settings(scheduler)))
    again = build_scheduler(recorded["scheduler"], recorded["scheduler_config"])
    assert type(again) is type(scheduler)
    assert scheduler_settings(again) == recorded
    assert len(recorded["scheduler_config"]) <= 2  # no defaults
    for each in (scheduler, again):
        each.set_timesteps(2)
    assert torch.equal(again.timesteps, scheduler.timesteps)
    assert torch.equal(again.betas, scheduler.betas)


def test_adapters_of_the_first_release_record_less(made: LoraAdapter, tiny_generator: Path) -> None:
    facts = {name: fact for name, fact in made.metadata.items() if name not in ("scheduler_config", "machine")}
    old = replace(made, metadata=facts)
    assert verify(old, tiny_generator).same
    assert f"threads unknown then, {torch.get_num_threads()} now" in str(verify(changed(old, 0.1), tiny_generator))
    with pytest.raises(AdapterError, match="made with a DDPMScheduler, but the generator has a DPM"):
        verify(replace(old, metadata={**facts, "scheduler": "DDPMScheduler"}), tiny_generator)


def test_another_generator_is_refused(made: LoraAdapter, tiny_generator: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(tiny_generator, tmp_path / "other"))
    assert verify(made, other).same
    config = other / "scheduler" / "scheduler_config.json"
    config.write_text(config.read_text() + "\n")
    with pytest.raises(AdapterError, match="is not the generator that made this adapter: sha256"):
        verify(made, other)
    with pytest.raises(HubError):
        verify(made, tmp_path / "nowhere")


CHANGES: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "no generator": (lambda facts: facts.update(generator=None), "does not record its generator"),
    "no condition": (lambda facts: facts.pop("condition"), "does not record its condition"),
    "generator a list": (lambda facts: facts.update(generator=[1]), "malformed"),
    "candidate beyond": (lambda facts: facts.update(candidate=7), "malformed"),
    "dtype": (lambda facts: facts.update(dtype="nn"), "malformed: KeyError: 'nn'"),
    "seed": (lambda facts: facts.update(seed="x"), "malformed"),
    "scheduler": (lambda facts: facts.update(scheduler="DiffusionPipeline"), "with a 'DiffusionPipeline', which is no scheduler"),
    "scheduler a list": (lambda facts: facts.update(scheduler=[1]), "malformed"),
    "setting": (lambda facts: facts.update(scheduler_config={"solver": 1}), "malformed: TypeError"),
    "settings": (lambda facts: facts.update(scheduler_config=[1]), "malformed"),
    "large setting": (lambda facts: facts.update(scheduler_config={"num_train_timesteps": 10**9}), "number 1000000000 is too large"),
    "machine": (lambda facts: facts.update(machine="x"), "malformed"),
    "threads": (lambda facts: facts["machine"].update(threads="x"), "malformed"),
    "no threads": (lambda facts: facts["machine"].update(threads=0), "malformed"),
}


@pytest.mark.parametrize(("change", "message"), CHANGES.values(), ids=CHANGES)
def test_what_is_recorded_must_make_sense(
    made: LoraAdapter, tiny_generator: Path, change: Callable[[dict[str, Any]], object], message: str
) -> None:
    facts = copy.deepcopy(dict(made.metadata))
    change(facts)
    with pytest.raises((AdapterError, HubError), match=message):
        verify(replace(made, metadata=facts), tiny_generator)


def test_the_command_says_so_and_fails_for_another_adapter(run: Any, made: LoraAdapter, tiny_generator: Path, tmp_path: Path) -> None:
    done = run("verify", tmp_path / "made", "--generator", tiny_generator)
    assert (done.status, done.err) == (0, [])
    assert done.out[0].startswith("the same bytes")
    rounded = run("verify", changed(made, 1e-6).save(tmp_path / "rounded"), "--generator", tiny_generator)
    assert (rounded.status, rounded.err) == (0, [])
    assert rounded.out[0].startswith("the same but for rounding")
    wrong = replace(made, metadata={**made.metadata, "seed": 77}).save(tmp_path / "wrong")
    refused(run("verify", wrong, "--generator", tiny_generator), "not the same: numbers differ by up to")
    facts = told(run("verify", tmp_path / "made", "--generator", tiny_generator, "--json"))
    assert (facts["same"], facts["only_rounding"], facts["largest_difference"], facts["changes"]) == (True, True, 0.0, {})
    done = run("verify", wrong, "--generator", tiny_generator, "--json")
    assert (done.status, done.err) == (1, [])
    assert not json.loads("\n".join(done.out))["only_rounding"]
