from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import refused, seeds

from cond_pdiff import CondPDiffPipeline, LoraAdapter, TaskPrompt
from cond_pdiff.errors import AdapterError, ConditionError, HubError
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
    assert (result.largest_difference, result.versions) == (0, {})
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


def test_a_style_adapter_needs_its_picture(style_generator: Path, styles_folder: Path) -> None:
    pipe = CondPDiffPipeline.from_pretrained(style_generator)
    picture, other = (styles_folder / name / "style.png" for name in ("embers", "lagoon"))
    adapter = pipe(picture, generator=seeds(3)[0], num_inference_steps=3).adapter
    assert verify(adapter, style_generator, picture).same
    with pytest.raises(ConditionError, match="give the file"):
        verify(adapter, style_generator)
    with pytest.raises(ConditionError, match="is not the picture"):
        verify(adapter, style_generator, other)


def test_a_changed_number_is_noticed(made: LoraAdapter, tiny_generator: Path) -> None:
    key = next(key for key in made.tensors if "lora_B" in key)
    tensors = {name: tensor.clone() for name, tensor in made.tensors.items()}
    tensors[key][0, 0] += 0.01
    changed = replace(made, tensors=tensors, metadata={**made.metadata, "versions": {**made.metadata["versions"], "torch": "0.1"}})
    result = verify(changed, tiny_generator)
    assert not result.same
    assert 0 < result.largest_difference < 1
    assert f"torch 0.1 then, {torch.__version__} now" in str(result)


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
    "scheduler": (lambda facts: facts.update(scheduler="DDPMScheduler"), "made with a DDPMScheduler, but the generator has"),
}


@pytest.mark.parametrize(("change", "message"), CHANGES.values(), ids=CHANGES)
def test_what_is_recorded_must_make_sense(
    made: LoraAdapter, tiny_generator: Path, change: Callable[[dict[str, Any]], object], message: str
) -> None:
    facts = dict(made.metadata)
    change(facts)
    with pytest.raises(AdapterError, match=message):
        verify(replace(made, metadata=facts), tiny_generator)


def test_the_command_says_so_and_fails_for_another_adapter(run: Any, made: LoraAdapter, tiny_generator: Path, tmp_path: Path) -> None:
    done = run("verify", tmp_path / "made", "--generator", tiny_generator)
    assert (done.status, done.err) == (0, [])
    assert done.out[0].startswith("the same bytes")
    wrong = replace(made, metadata={**made.metadata, "seed": 77}).save(tmp_path / "wrong")
    refused(run("verify", wrong, "--generator", tiny_generator), "not the same: numbers differ by up to")
