"""Adapters on the positive side of classifier-free guidance alone, against guidance that is computed by hand."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import diffusers
import pytest
import tiny_pipelines
import torch
from conftest import make_adapter, make_bert
from diffusers import PixArtAlphaPipeline
from tiny_pipelines import WIDTH

from cond_pdiff.adapter import FACTORS, LoraAdapter
from cond_pdiff.errors import AdapterError
from cond_pdiff.guidance import CALLS, HALVES
from cond_pdiff.lora import KEY_PREFIX, LoraSpec, adapted_module, target_linears, update_shape

COUNT, STEPS, SCALE = 2, 3, 4.0


def adapter_for(pipe: Any, seed: int = 0) -> LoraAdapter:
    """A random adapter for the attention layers of a pipeline's denoiser, strong enough to be seen."""
    spec = LoraSpec("tiny", 2, 4.0, ("to_q", "to_k", "to_v", "to_out.0"))
    rng, tensors = torch.Generator().manual_seed(seed), {}
    for name, linear in target_linears(adapted_module(pipe), spec).items():
        out, columns = update_shape(linear)
        for factor, shape in zip(FACTORS, ((2, columns), (out, 2)), strict=True):
            tensors[f"{KEY_PREFIX}{name}.{factor}.weight"] = 0.3 * torch.randn(shape, generator=rng)
    return LoraAdapter(spec, tensors)


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# Each gives a call of the pipeline that makes latents, and by hand the denoiser's answer for one side, from its own kind of batch.


def unet(pipe: Any) -> tuple[dict[str, Any], torch.Tensor, Any]:
    prompts, negatives = drawn(COUNT, 5, WIDTH), drawn(COUNT, 5, WIDTH, seed=1)
    noise, both = drawn(COUNT, 4, 8, 8, seed=2), torch.cat([negatives, prompts])

    def ask(latents: torch.Tensor, step: torch.Tensor, positive: bool) -> torch.Tensor:
        return pipe.unet(torch.cat([latents] * 2), step, encoder_hidden_states=both).sample.chunk(2)[positive]

    return {"prompt_embeds": prompts, "negative_prompt_embeds": negatives}, noise, ask


def joint(pipe: Any) -> tuple[dict[str, Any], torch.Tensor, Any]:
    prompts, negatives = drawn(COUNT, 5, 2 * WIDTH), drawn(COUNT, 5, 2 * WIDTH, seed=1)
    pooled, others = drawn(COUNT, 2 * WIDTH, seed=3), drawn(COUNT, 2 * WIDTH, seed=4)

    def ask(latents: torch.Tensor, step: torch.Tensor, positive: bool) -> torch.Tensor:
        noisy = torch.cat([latents] * 2)
        given = {"encoder_hidden_states": torch.cat([negatives, prompts]), "pooled_projections": torch.cat([others, pooled])}
        return pipe.transformer(noisy, timestep=step.expand(len(noisy)), return_dict=False, **given)[0].chunk(2)[positive]

    call = {"prompt_embeds": prompts, "negative_prompt_embeds": negatives}
    return {**call, "pooled_prompt_embeds": pooled, "negative_pooled_prompt_embeds": others}, drawn(COUNT, 4, 8, 8, seed=2), ask


def twice(pipe: Any) -> tuple[dict[str, Any], torch.Tensor, Any]:
    prompts, negatives = drawn(COUNT, 5, WIDTH), drawn(COUNT, 5, WIDTH, seed=1)
    pooled, others = drawn(COUNT, WIDTH, seed=3), drawn(COUNT, WIDTH, seed=4)
    places, texts = pipe._prepare_latent_image_ids(COUNT, 8, 8, torch.device("cpu"), torch.float32), torch.zeros(5, 3)

    def ask(latents: torch.Tensor, step: torch.Tensor, positive: bool) -> torch.Tensor:
        given = {"encoder_hidden_states": prompts if positive else negatives, "pooled_projections": pooled if positive else others}
        noisy = {"hidden_states": latents, "timestep": step.expand(COUNT) / 1000, "img_ids": places, "txt_ids": texts}
        return pipe.transformer(**noisy, **given, return_dict=False)[0]

    side = 16 * pipe.vae_scale_factor
    call = {"prompt_embeds": prompts, "negative_prompt_embeds": negatives, "true_cfg_scale": SCALE, "height": side, "width": side}
    return {**call, "pooled_prompt_embeds": pooled, "negative_pooled_prompt_embeds": others}, drawn(COUNT, 64, 4, seed=2), ask


Case = tuple[Callable[[], Any], Callable[[Any], tuple[dict[str, Any], torch.Tensor, Any]]]
CASES: dict[str, Case] = {
    "halves of a U-Net": (tiny_pipelines.stable_diffusion, unet),
    "halves of a transformer": (tiny_pipelines.stable_diffusion_3, joint),
    "two calls": (partial(tiny_pipelines.flux, distilled=False), twice),
}


def by_pipeline(pipe: Any, call: dict[str, Any], noise: torch.Tensor) -> torch.Tensor:
    pipe.set_progress_bar_config(disable=True)
    guidance = {} if "true_cfg_scale" in call else {"guidance_scale": SCALE}
    return pipe(**{**guidance, **call}, latents=noise.clone(), num_inference_steps=STEPS, output_type="latent", return_dict=False)[0]


@torch.no_grad()
def by_hand(pipe: Any, ask: Any, noise: torch.Tensor, adapter: LoraAdapter, scale: float = 1.0) -> torch.Tensor:
    """Both sides of guidance, each from a run of its own, with the timesteps of a call that was made before."""
    steps, latents = pipe.scheduler.timesteps, noise.clone()
    if hasattr(pipe.scheduler, "_step_index"):
        pipe.scheduler._step_index = None
    for step in steps:
        negative = ask(latents, step, False)
        with adapter.attached(pipe, scale):
            positive = ask(latents, step, True)
        latents = pipe.scheduler.step(negative + SCALE * (positive - negative), step, latents, return_dict=False)[0]
    return latents


@pytest.mark.parametrize("name", CASES)
def test_the_negative_side_is_the_base_models_to_the_bit(name: str) -> None:
    make, given = CASES[name]
    pipe = make()
    call, noise, ask = given(pipe)
    adapter = adapter_for(pipe)
    plain = by_pipeline(pipe, call, noise)
    with adapter.attached(pipe, 0.7):
        both = by_pipeline(pipe, call, noise)
    with adapter.attached(pipe, 0.7, positive_only=True):
        positive = by_pipeline(pipe, call, noise)
    assert torch.equal(positive, by_hand(pipe, ask, noise, adapter, 0.7))
    assert not torch.equal(positive, both)
    assert not torch.equal(positive, plain)
    assert torch.equal(by_pipeline(pipe, call, noise), plain)
    assert not {"encode_prompt"} & set(vars(pipe))
    assert not {"cache_context", "forward"} & set(vars(adapted_module(pipe)))


@pytest.mark.parametrize("name", CASES)
def test_without_guidance_it_is_attached_as_ever(name: str) -> None:
    make, given = CASES[name]
    pipe = make()
    call, noise, _ = given(pipe)
    call = {name: value for name, value in call.items() if "negative" not in name}
    call |= {"true_cfg_scale" if "true_cfg_scale" in call else "guidance_scale": 1.0}
    noise[1] = noise[0]  # equal rows are no halves of guidance
    adapter = adapter_for(pipe)
    with adapter.attached(pipe):
        expected = by_pipeline(pipe, call, noise)
    with adapter.attached(pipe, positive_only=True):
        assert torch.equal(by_pipeline(pipe, call, noise), expected)


@pytest.mark.parametrize("name", CASES)
def test_several_adapters_have_their_own_sides(name: str) -> None:
    make, given = CASES[name]
    pipe = make()
    call, noise, _ = given(pipe)
    one, other = adapter_for(pipe), adapter_for(pipe, 1)
    with one.attached(pipe), other.attached(pipe, positive_only=True):
        mixed = by_pipeline(pipe, call, noise)
    first, second = other.attach(pipe, positive_only=True), one.attach(pipe, positive_only=True)
    both = by_pipeline(pipe, call, noise)
    first.detach()
    left = by_pipeline(pipe, call, noise)
    second.detach()
    with one.attached(pipe, positive_only=True):
        assert torch.equal(by_pipeline(pipe, call, noise), left)
    assert not torch.equal(mixed, both)
    assert not torch.equal(both, left)


def test_pixart_tells_its_guidance_to_encode_prompt_only(text_to_image: PixArtAlphaPipeline) -> None:
    pipe, adapter = text_to_image, adapter_for(text_to_image)

    def make(scale: float) -> torch.Tensor:
        rng = torch.Generator().manual_seed(3)
        options = {"use_resolution_binning": False, "clean_caption": False, "output_type": "latent"}
        return pipe(["a red house", "a boat"], guidance_scale=scale, generator=rng, num_inference_steps=STEPS, **options).images

    plain = make(SCALE)
    noise = pipe.prepare_latents(2, 4, 64, 64, torch.float32, torch.device("cpu"), torch.Generator().manual_seed(3))
    with torch.no_grad():
        text, mask, negative, negative_mask = pipe.encode_prompt(["a red house", "a boat"], max_sequence_length=120)
    both, masks = torch.cat([negative, text]), torch.cat([negative_mask, mask])

    def ask(latents: torch.Tensor, step: torch.Tensor, positive: bool) -> torch.Tensor:
        given = {"encoder_hidden_states": both, "encoder_attention_mask": masks, "timestep": step.expand(4)}
        sizes = {"resolution": None, "aspect_ratio": None}
        made = pipe.transformer(torch.cat([latents] * 2), **given, added_cond_kwargs=sizes, return_dict=False)[0]
        return made.chunk(2)[positive]

    with adapter.attached(pipe, positive_only=True):
        positive = make(SCALE)
    pipe.scheduler.set_timesteps(STEPS)
    assert torch.equal(positive, by_hand(pipe, ask, noise, adapter))
    assert not torch.equal(positive, plain)
    with adapter.attached(pipe):
        expected = make(1.0)
    with adapter.attached(pipe, positive_only=True):
        assert torch.equal(make(1.0), expected)


def test_rows_that_are_no_halves_are_refused() -> None:
    pipe = tiny_pipelines.stable_diffusion_3()
    call, noise, _ = joint(pipe)
    with adapter_for(pipe).attached(pipe, positive_only=True):
        by_pipeline(pipe, call, noise)
        with pytest.raises(AdapterError, match="no two halves of guidance"), torch.no_grad():
            pipe.transformer(noise, timestep=torch.ones(COUNT), **dict(zip(
                ("encoder_hidden_states", "pooled_projections"), (call["prompt_embeds"], call["pooled_prompt_embeds"]), strict=True
            )))  # fmt: skip


def test_a_call_that_fails_leaves_no_side_behind() -> None:
    pipe = tiny_pipelines.flux(distilled=False)
    call, noise, ask = twice(pipe)
    adapter = adapter_for(pipe)
    by_pipeline(pipe, call, noise)
    with adapter.attached(pipe), torch.no_grad():
        expected = ask(noise, pipe.scheduler.timesteps[0], True)
    with adapter.attached(pipe, positive_only=True), torch.no_grad():
        by_pipeline(pipe, call, noise)
        assert torch.equal(ask(noise, pipe.scheduler.timesteps[0], True), expected)
        with pytest.raises((RuntimeError, TypeError, AttributeError)), pipe.transformer.cache_context("uncond"):
            pipe.transformer(hidden_states=noise, timestep=torch.ones(7), img_ids=None, txt_ids=None)
        assert torch.equal(ask(noise, pipe.scheduler.timesteps[0], True), expected)


def test_where_sides_cannot_be_told_it_is_refused(tmp_path: Path) -> None:
    flux, sd = tiny_pipelines.flux(distilled=False), tiny_pipelines.stable_diffusion()
    adapters = adapter_for(flux), adapter_for(sd)
    flux.transformer.register_to_config(guidance_embeds=True)
    sd.unet.register_to_config(time_cond_proj_dim=8)
    for pipe, adapter, entry in ((flux, adapters[0], "guidance_embeds"), (sd, adapters[1], "time_cond_proj_dim")):
        with pytest.raises(AdapterError, match=f"distilled into its denoiser \\({entry}\\)"):
            adapter.attach(pipe, positive_only=True)
        adapter.attach(pipe).detach()
    with pytest.raises(AdapterError, match=r"needs a diffusers pipeline .* got a UNet2DConditionModel"):
        adapters[1].attach(sd.unet, positive_only=True)
    bert = make_bert()
    with pytest.raises(AdapterError, match="got a BertModel"), make_adapter(bert, "tiny").attached(bert, positive_only=True):
        pass


@pytest.mark.parametrize("name", HALVES)
def test_pipelines_of_halves_put_the_negative_one_first(name: str) -> None:
    kind = getattr(diffusers, name)
    code = inspect.getsource(kind.__call__)
    assert "torch.cat([latents] * 2)" in code
    assert "torch.cat([negative_prompt_embeds, prompt_embeds]" in code
    assert "do_classifier_free_guidance" in inspect.signature(kind.encode_prompt).parameters


@pytest.mark.parametrize("name", CALLS)
def test_pipelines_of_two_calls_name_them(name: str) -> None:
    code = inspect.getsource(getattr(diffusers, name).__call__)
    assert 'transformer.cache_context("cond")' in code
    assert 'transformer.cache_context("uncond")' in code
