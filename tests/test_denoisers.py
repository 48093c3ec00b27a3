"""Another denoiser than the paper's: named by a recipe, trained, saved, loaded and sampled, without a line of the library changed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from column_denoiser import ColumnDenoiser
from conftest import PROMPT, quiet, seeds, tiny_recipe
from diffusers import DDIMScheduler

from cond_pdiff import CondPDiffPipeline, ParamUNet1D
from cond_pdiff.component import COMPONENTS, Component
from cond_pdiff.errors import CondPDiffError, HubError
from cond_pdiff.hub import Backbone
from cond_pdiff.models.denoisers import DENOISERS, Denoiser, register_denoiser
from cond_pdiff.sampling import denoise, guided_prediction
from cond_pdiff.training.stages.train import train

CHANNELS, LENGTH, DIM = 2, 5, 6


@pytest.fixture(scope="module")
def generator(tiny_backbone: Backbone, tiny_zoo: Path, tasks_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A generator with a `ColumnDenoiser`. Only to be read."""
    recipe = tiny_recipe(tiny_backbone)
    recipe["unet"] |= {"denoiser": {"type": "ColumnDenoiser", "width": 8}}
    for stage in ("autoencoder", "unet"):
        recipe[stage]["fit"]["steps"] = 20
    return train(recipe, tiny_zoo, tasks_folder, tmp_path_factory.mktemp("token"))


@pytest.fixture
def denoiser() -> ColumnDenoiser:
    torch.manual_seed(0)
    return ColumnDenoiser(CHANNELS, LENGTH, DIM, guided_length=3).eval()


def params(pipe: CondPDiffPipeline, **options: Any) -> torch.Tensor:
    return quiet(pipe)(PROMPT, num_adapters=2, generator=seeds(0, 1), output_type="params", **options)


def test_a_recipe_names_it_and_its_run_remembers(generator: Path) -> None:
    assert json.loads((generator / "model_index.json").read_text())["unet"] == ["cond_pdiff", "ColumnDenoiser"]
    identity = json.loads((generator.parent / "unet" / "run.json").read_text())["identity"]
    assert identity["config"]["model"] == {"type": "ColumnDenoiser", "width": 8}
    rows = [json.loads(line)["loss"] for line in (generator.parent / "unet" / "metrics.jsonl").read_text().splitlines()]
    assert rows[-1] < rows[0]


def test_it_is_loaded_generates_and_is_saved(generator: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    pipe = CondPDiffPipeline.from_pretrained(generator)
    assert isinstance(pipe.unet, ColumnDenoiser)
    assert isinstance(pipe.unet, Denoiser)
    assert (pipe.unet.config.unconditional, pipe.unet.config.guidance_scale) == (True, 1.5)
    assert pipe.unet.config.guided_length == pipe.codec.guided_length
    made = params(pipe)
    assert not torch.equal(made, params(pipe, guidance_scale=1.0))
    assert len(pipe(PROMPT, num_adapters=2, generator=seeds(0, 1)).adapters) == 2
    pipe.save_pretrained(tmp_path)
    assert torch.equal(params(CondPDiffPipeline.from_pretrained(tmp_path)), made)
    assert torch.equal(params(CondPDiffPipeline.from_pretrained(generator, unet=pipe.unet)), made)
    assert "Expected types" not in capfd.readouterr().err


def test_one_that_nobody_registered_is_refused(generator: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(COMPONENTS, "ColumnDenoiser")
    monkeypatch.delattr("cond_pdiff.ColumnDenoiser", raising=False)
    with pytest.raises(HubError, match="ColumnDenoiser"):
        CondPDiffPipeline.from_pretrained(generator)


def test_tokens_behind_the_mask_change_nothing(denoiser: ColumnDenoiser) -> None:
    noise, condition = torch.randn(3, CHANNELS, LENGTH), torch.randn(3, 4, DIM)
    mask = torch.tensor([[True, True, False, False], [True] * 4, [False] * 4])
    scheduler = DDIMScheduler()

    def made(condition: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        with torch.no_grad():
            return denoise(denoiser, scheduler, noise, condition, 3, 2.0, condition_mask=mask)

    masked = made(condition, mask)
    other = torch.where(mask[..., None], condition, 7.0)
    torch.testing.assert_close(made(other, mask), masked)
    assert not torch.allclose(made(other, None), made(condition, None))
    torch.testing.assert_close(masked[1], made(condition, None)[1])


@pytest.mark.parametrize("shape", [(DIM,), (4, DIM)])
def test_guidance_leads_away_from_zeros_in_both_shapes(denoiser: ColumnDenoiser, shape: tuple[int, ...]) -> None:
    latents, timestep, condition = torch.randn(3, CHANNELS, LENGTH), torch.tensor(500), torch.randn(3, *shape)
    mask = torch.ones(3, 4, dtype=torch.bool) if len(shape) == 2 else None
    if mask is not None:
        mask[0, 2:] = False
    masks = {} if mask is None else {"condition_mask": mask}
    with torch.no_grad():
        without = denoiser(latents, timestep, torch.zeros_like(condition), **masks).sample
        with_condition = denoiser(latents, timestep, condition, **masks).sample
        for scale in (0.0, 1.0, 2.0):
            guided = guided_prediction(denoiser, latents, timestep, condition, scale, mask)
            torch.testing.assert_close(guided[..., :3], torch.lerp(without, with_condition, scale)[..., :3])
            torch.testing.assert_close(guided[..., 3:], with_condition[..., 3:])


def test_what_is_no_denoiser_is_not_registered() -> None:
    class NoGuidance(Component):
        def __init__(self, sample_channels: int, sample_length: int, condition_dim: int) -> None: ...

    class OtherSizes(Component):
        def __init__(self, channels: int, unconditional: bool, guidance_scale: float, guided_length: int | None) -> None: ...

    for strange in (NoGuidance, OtherSizes):
        with pytest.raises(CondPDiffError, match=r"made with sample_channels, sample_length, condition_dim first, and with unconditional"):
            register_denoiser(strange)
    impostor = type("ParamUNet1D", (ColumnDenoiser,), {"__module__": "column_denoiser"})
    with pytest.raises(CondPDiffError, match="there is a component ParamUNet1D already; give that of column_denoiser another name"):
        register_denoiser(impostor)
    assert register_denoiser(ColumnDenoiser) is ColumnDenoiser
    assert {"ParamUNet1D": ParamUNet1D, "ColumnDenoiser": ColumnDenoiser}.items() <= DENOISERS.items()
    assert not {"NoGuidance", "OtherSizes"} & DENOISERS.keys()
