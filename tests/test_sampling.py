"""The sampling loop, on a problem whose denoiser is known exactly."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import diffusers.schedulers as schedulers
import pytest
import torch
from diffusers import DDPMScheduler
from torch import nn

from cond_pdiff import CondPDiffPipeline, TaskPrompt
from cond_pdiff.defaults import DEFAULT_STEPS
from cond_pdiff.errors import CondPDiffError
from cond_pdiff.hub import Backbone
from cond_pdiff.sampling import denoise, guided_prediction
from cond_pdiff.training.config import UNetConfig, parse
from cond_pdiff.training.stages.train import train

TRAINED = DDPMScheduler(num_train_timesteps=1000, beta_start=1e-4, beta_end=0.02, clip_sample=False)
SPREAD, COUNT = 0.8, 4000


class Gaussian(nn.Module):
    """The best possible prediction of the noise for latents from N(condition, spread²), of variance-preserving inputs."""

    def __init__(self, guided_length: int | None = None, spread: float = SPREAD) -> None:
        super().__init__()
        self.spread = spread
        self.config = SimpleNamespace(guided_length=guided_length)

    def forward(self, sample: torch.Tensor, timestep: torch.Tensor, condition: torch.Tensor) -> Any:
        level = torch.as_tensor(timestep, dtype=torch.float64)
        alphas = TRAINED.alphas_cumprod.double()
        below = alphas[level.floor().long()]
        alpha = torch.lerp(below, alphas[level.ceil().long()], level - level.floor())
        error = sample - alpha.sqrt() * condition[:, None]
        return SimpleNamespace(sample=((1 - alpha).sqrt() * error / (alpha * self.spread**2 + 1 - alpha)).to(sample.dtype))


def sample(scheduler: str, steps: int = DEFAULT_STEPS, spread: float = SPREAD, **settings: Any) -> torch.Tensor:
    rng = torch.Generator().manual_seed(0)
    noise = torch.randn(COUNT, 1, 2, generator=rng, dtype=torch.float64)
    condition = torch.ones(COUNT, 2, dtype=torch.float64)
    solver = getattr(schedulers, scheduler).from_config(TRAINED.config, **settings)
    return denoise(Gaussian(spread=spread), solver, noise, condition, steps, generator=rng)


@pytest.mark.parametrize(
    ("scheduler", "tolerance"),
    [
        *((name, 0.03) for name in ("DPMSolverMultistepScheduler", "UniPCMultistepScheduler", "HeunDiscreteScheduler")),
        *((name, 0.10) for name in ("DDIMScheduler", "EulerDiscreteScheduler")),
        ("DDPMScheduler", 0.1),
    ],
)
def test_every_scheduler_draws_from_the_distribution(scheduler: str, tolerance: float) -> None:
    latents = sample(scheduler, 50)
    assert latents.mean() == pytest.approx(1.0, abs=0.03)
    assert latents.std() == pytest.approx(SPREAD, rel=tolerance)


def test_the_default_number_of_steps_keeps_the_spread() -> None:
    many = sample("DPMSolverMultistepScheduler", 200).std()
    assert 0.97 < sample("DPMSolverMultistepScheduler").std() / many < 1.03
    assert sample("DPMSolverMultistepScheduler", 10).std() / many < 0.97


def test_exponential_noise_levels_keep_a_narrow_spread(pipe: CondPDiffPipeline) -> None:
    narrow = {"scheduler": "DPMSolverMultistepScheduler", "spread": 0.1}
    assert pipe.scheduler.config.use_exponential_sigmas
    assert 0.97 < sample(**narrow, use_exponential_sigmas=True).std() / 0.1 < 1.15
    assert sample(**narrow).std() / 0.1 < 0.8


@pytest.mark.parametrize("name", ["DPMSolverMultistepScheduler", "HeunDiscreteScheduler", "EulerDiscreteScheduler"])
def test_the_given_scheduler_is_stepped_and_begins_each_call_anew(name: str) -> None:
    scheduler = getattr(schedulers, name).from_config(TRAINED.config)
    noise, condition, seen = torch.randn(2, 1, 2, generator=torch.Generator().manual_seed(0)), torch.zeros(2, 2), []

    def stop(index: int, timestep: torch.Tensor, *tensors: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, bool]:
        seen.append(timestep)
        return *tensors, index < 1

    first = denoise(Gaussian(), scheduler, noise, condition, 3)
    timesteps = scheduler.timesteps.clone()
    denoise(Gaussian(), scheduler, noise, condition, 5, on_step=stop)
    assert seen == scheduler.timesteps[:2].tolist()
    assert torch.equal(denoise(Gaussian(), scheduler, noise, condition, 3), first)
    assert torch.equal(scheduler.timesteps, timesteps)


def test_guidance_leaves_what_stands_behind_the_guided_length() -> None:
    latents, timestep, condition = torch.randn(3, 1, 2), torch.tensor(500), torch.ones(3, 2)
    plain = guided_prediction(Gaussian(), latents, timestep, condition, 1.0)
    part = guided_prediction(Gaussian(guided_length=1), latents, timestep, condition, 3.0)
    whole = guided_prediction(Gaussian(), latents, timestep, condition, 3.0)
    assert torch.equal(part[..., 1], plain[..., 1])
    assert torch.equal(part[..., 0], whole[..., 0])
    assert not torch.equal(part[..., 0], plain[..., 0])


def test_a_step_may_change_what_comes_next_and_end_it() -> None:
    asked = []

    def on_step(index: int, timestep: Any, latents: torch.Tensor, condition: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, bool]:
        asked.append(index)
        return latents + 7, condition, index < 2

    rng = torch.Generator().manual_seed(0)
    latents = denoise(Gaussian(), TRAINED, torch.randn(4, 1, 2, generator=rng), torch.zeros(4, 2), 10, generator=rng, on_step=on_step)
    assert asked == [0, 1, 2]
    assert latents.mean() > 6


# --- guidance is a property of a generator -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def conditional(
    tiny_backbone: Backbone, tiny_zoo: Path, tasks_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> CondPDiffPipeline:
    """A generator that was never trained without a condition, as the paper's are not."""
    from conftest import tiny_recipe

    recipe = tiny_recipe(tiny_backbone)
    recipe["unet"]["cond_drop_prob"] = 0.0
    folder = train(recipe, tiny_zoo, tasks_folder, tmp_path_factory.mktemp("conditional"))
    return CondPDiffPipeline.from_pretrained(folder)


def test_a_generator_without_an_unconditional_branch_is_not_guided(conditional: CondPDiffPipeline) -> None:
    def params(**options: Any) -> torch.Tensor:
        return conditional("Is it good?", generator=torch.Generator().manual_seed(0), output_type="params", **options)

    assert (conditional.unet.config.unconditional, conditional.unet.config.guidance_scale) == (False, 1.0)
    assert torch.equal(params(), params(guidance_scale=1.0))
    for scale in (1.5, 0.0):
        with pytest.raises(CondPDiffError, match="never trained without a condition"):
            params(guidance_scale=scale)


def test_the_default_guidance_is_the_generators_own(pipe: CondPDiffPipeline) -> None:
    prompt = TaskPrompt("Is the remark kind?")
    made = pipe(prompt, generator=torch.Generator().manual_seed(0))
    assert made.adapter.metadata["guidance_scale"] == pipe.unet.config.guidance_scale == 1.5
    again = pipe(prompt, generator=torch.Generator().manual_seed(0), guidance_scale=1.5)
    assert torch.equal(made.latents, again.latents)


def test_the_size_of_an_update_is_not_guided(pipe: CondPDiffPipeline) -> None:
    """The zoo's statistics (normaliser `task`) decide it; at a guidance of 3 it used to be off by up to 9 %."""
    code = pipe.autoencoder.latent_shape[1]
    assert pipe.unet.config.guided_length == code

    def first_step(scale: float) -> torch.Tensor:
        rng = torch.Generator().manual_seed(0)
        return pipe("Is the remark kind?", guidance_scale=scale, num_inference_steps=1, generator=rng, output_type="latent")

    torch.testing.assert_close(first_step(1.0)[..., code:], first_step(3.0)[..., code:])
    assert (first_step(1.0) - first_step(3.0))[..., :code].abs().max() > 0.01


def test_the_papers_recipes_train_no_unconditional_branch() -> None:
    from cond_pdiff.training.recipe import read_recipe

    for name in ("paper-language-half", "paper-style-half"):
        assert parse(UNetConfig, read_recipe(name)["unet"], "unet").cond_drop_prob == 0
