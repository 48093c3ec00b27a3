"""AdapterCodec: params to latents and back, in parts, with the statistics behind the code."""

from __future__ import annotations

from pathlib import Path
from typing import get_args

import pytest
import torch

from cond_pdiff import AdapterCodec, CondPDiffPipeline, ParamAutoencoder, ParamNormalizer
from cond_pdiff.codec import Autoencoder
from cond_pdiff.errors import CondPDiffError
from cond_pdiff.normalization import Mode
from cond_pdiff.training.reproduce.principal_code import PrincipalCode
from cond_pdiff.training.zoo.zoo import Zoo

CHANNELS = {"linear bottleneck": 8, "feature maps": None}
"""Of a small autoencoder: the size of its bottleneck, or None: the last feature map is the code."""


@pytest.fixture
def codec(pipe: CondPDiffPipeline) -> AdapterCodec:
    """Of the tiny generator."""
    return pipe.codec


@pytest.fixture
def params(codec: AdapterCodec, tiny_zoo: Path) -> torch.Tensor:
    """Of the tiny zoo's four adapters, and of three mixtures."""
    zoo = Zoo(tiny_zoo)
    rows = torch.stack([codec.to_params(run.adapter()) for name in zoo.task_names for run in zoo.runs(name)])
    return torch.cat([rows, rows[:3].lerp(rows[1:], 0.3)])


def small(codec: AdapterCodec, params: torch.Tensor, mode: Mode = "task", latent_dim: int | None = 8) -> AdapterCodec:
    """An untrained codec of the same adapters."""
    torch.manual_seed(0)
    autoencoder = ParamAutoencoder(params.shape[1], (4, 3), (8, 4), latent_dim=latent_dim).eval()
    made = AdapterCodec(codec.template, ParamNormalizer(mode, codec.template.layout.sizes), autoencoder)
    made.fit_normalizer(params.split(3))
    return made


def test_the_pipeline_sees_its_components_through_it(pipe: CondPDiffPipeline, params: torch.Tensor) -> None:
    codec = pipe.codec
    assert (codec.template, codec.normalizer, codec.autoencoder) == (pipe.template, pipe.normalizer, pipe.autoencoder)
    assert isinstance(codec.autoencoder, Autoencoder)
    latents = codec.encode(params)
    assert latents.shape[1:] == codec.latent_shape == (pipe.unet.config.sample_channels, pipe.unet.config.sample_length)
    assert codec.guided_length == pipe.unet.config.guided_length == codec.latent_shape[1] - 2
    assert torch.equal(pipe.decode(latents), codec.decode(latents))


@pytest.mark.parametrize("mode", get_args(Mode))
def test_there_and_back_nothing_is_lost_but_what_the_code_loses(codec: AdapterCodec, params: torch.Tensor, mode: Mode) -> None:
    """Principal components of all adapters lose nothing."""
    normalizer = ParamNormalizer(mode, codec.template.layout.sizes)
    normalizer.fit(params)
    whole = AdapterCodec(codec.template, normalizer, PrincipalCode.fit(normalizer, params.split(2), most=8))
    torch.testing.assert_close(whole.decode(whole.encode(params)), params, rtol=1e-3, atol=1e-5)
    assert whole.reconstruction_error(params.split(3)) < 1e-6


def test_an_adapter_comes_back_with_its_constants(codec: AdapterCodec, tiny_zoo: Path) -> None:
    adapter = Zoo(tiny_zoo).runs("moods")[0].adapter()
    again = codec.to_adapter(codec.to_params(adapter), {"task": "moods"})
    assert again.metadata["task"] == "moods"
    assert all(torch.equal(again.tensors[key], tensor) for key, tensor in adapter.tensors.items())


@pytest.mark.parametrize("latent_dim", CHANNELS.values(), ids=CHANNELS)
def test_parts_and_chunks_are_as_the_whole(codec: AdapterCodec, params: torch.Tensor, latent_dim: int | None) -> None:
    codec = small(codec, params, latent_dim=latent_dim)
    latents = codec.encode(params)
    made = codec.decode(latents)
    lost = codec.reconstruction_error([params])
    seen: list[int] = []
    codec.autoencoder.encoder.register_forward_pre_hook(lambda _, inputs: seen.append(len(inputs[0])))
    codec.autoencoder.decoder.register_forward_pre_hook(lambda _, inputs: seen.append(len(inputs[0])))
    codec.autoencoder.at_once = 3
    for given in (params, iter(params.split(5)), [params[:1], params[1:]]):
        torch.testing.assert_close(codec.encode(given), latents, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(codec.decode(latents), made, rtol=1e-4, atol=1e-6)
    assert codec.reconstruction_error(params.split(4)) == pytest.approx(lost, rel=1e-4)
    assert sum(seen) == 7 * (3 + 1 + 2)
    assert max(seen) == 3


@pytest.mark.parametrize(("mode", "latent_dim", "columns"), [("task", 8, 2), ("task", None, 1), ("soup", 8, 0), ("none", None, 0)])
def test_statistics_take_as_few_columns_as_hold_them(
    codec: AdapterCodec, params: torch.Tensor, mode: Mode, latent_dim: int | None, columns: int
) -> None:
    codec = small(codec, params, mode, latent_dim)
    channels, length = codec.autoencoder.latent_shape
    assert codec.guided_length == length
    assert codec.latent_shape == codec.encode(params).shape[1:] == (channels, length + columns)


def test_an_adapters_mean_and_size_come_back_however_lossy_the_code(codec: AdapterCodec, params: torch.Tensor) -> None:
    codec = small(codec, params)
    made = codec.decode(codec.encode(params))
    assert codec.reconstruction_error([params]) > 0.1
    torch.testing.assert_close(made.mean(1), params.mean(1), rtol=1e-3, atol=1e-6)
    torch.testing.assert_close(made.std(1), params.std(1), rtol=1e-3, atol=0)


def test_fitting_gives_the_code_unit_variance_and_leaves_the_statistics(codec: AdapterCodec, params: torch.Tensor) -> None:
    codec = small(codec, params)
    before, made = codec.encode(params), codec.decode(codec.encode(params))
    latents = codec.fit_scaling_factor(before)
    code, end = latents[..., : codec.guided_length], codec.guided_length
    assert float(code.detach().square().mean()) == pytest.approx(1, abs=1e-4)
    assert torch.equal(latents[..., end:], before[..., end:])
    torch.testing.assert_close(codec.encode(params), latents)
    torch.testing.assert_close(codec.decode(latents), made, rtol=1e-3, atol=1e-6)


def test_a_codec_that_is_not_fitted_says_so(codec: AdapterCodec, params: torch.Tensor) -> None:
    fresh = AdapterCodec(codec.template, ParamNormalizer("task", codec.template.layout.sizes), codec.autoencoder)
    with pytest.raises(CondPDiffError, match="has not been fitted"):
        fresh.encode(params)
    with pytest.raises(CondPDiffError, match="at least one adapter, none came"):
        fresh.fit_normalizer([])
    with pytest.raises(CondPDiffError, match=r"expected shape \(batch, \d+\)"):
        codec.encode(params[:, 1:])
    with pytest.raises(CondPDiffError, match=r"expected latents of shape"):
        codec.decode(codec.encode(params)[..., 1:])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_in_half_precision_it_takes_and_gives_float32(pipe: CondPDiffPipeline, params: torch.Tensor, dtype: torch.dtype) -> None:
    latents, made = pipe.codec.encode(params), pipe.codec.decode(pipe.codec.encode(params))
    codec = pipe.to(dtype).codec
    half = codec.encode(params)
    assert half.dtype == codec.decode(half).dtype == torch.float32
    assert (half - latents).norm() < 0.02 * latents.norm()
    assert (codec.decode(half.to(dtype)) - made).norm() < 0.05 * made.norm()


def test_gradients_flow_through_decoding(codec: AdapterCodec, params: torch.Tensor) -> None:
    latents = codec.encode(params).detach().requires_grad_()
    codec.decode(latents).square().sum().backward()
    assert bool(latents.grad.abs().sum() > 0)
