from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import cond_pdiff
from cond_pdiff.models import long_maps, param_autoencoder
from cond_pdiff.models.long_maps import polyphase, run_on_long_maps
from cond_pdiff.models.param_autoencoder import LONG_ADAPTER, ParamAutoencoder
from cond_pdiff.training.recipe import read_recipe

BUNDLED = Path(cond_pdiff.__file__).parent / "bundled"
pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")  # only says that it copies


def decoded(model: ParamAutoencoder, latents: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Decode in use, and by the same layers as they are."""
    with torch.no_grad():
        hidden = latents / model.config.scaling_factor
        if model.from_latent is not None:
            hidden = model.from_latent(hidden[:, 0]).unflatten(1, (model.bottom_channels, model.bottom_length))
        return model.decode(latents), model.decoder(hidden)[:, 0]


def used(num_params: int, latent_batch: int = 3, **settings: Any) -> tuple[ParamAutoencoder, torch.Tensor]:
    """Make an autoencoder whose batch norms have seen something, in evaluation mode, and latents for it."""
    torch.manual_seed(0)
    model = ParamAutoencoder(num_params, **settings)
    with torch.no_grad():
        model(torch.randn(4, num_params))
    return model.eval(), torch.randn(latent_batch, *model.latent_shape)


@pytest.fixture
def everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let every adapter and every map be long."""
    monkeypatch.setattr(param_autoencoder, "LONG_ADAPTER", 0)
    monkeypatch.setattr(long_maps, "MAP_TO_WEIGHTS", 0)


@pytest.mark.parametrize("outputs", [1, 3, 20])
@pytest.mark.parametrize("stride", [1, 2, 3, 8])
@pytest.mark.parametrize("kernel", [1, 2, 5, 8, 9])
def test_polyphase_is_the_transposed_convolution(kernel: int, stride: int, outputs: int) -> None:
    rng = torch.Generator().manual_seed(0)
    if kernel < stride:  # an autoencoder refuses it
        return
    for padding in range((kernel - stride + 1) // 2 + 1):
        for extra in range(stride):
            for length, bias in ((1, True), (7, False), (34, True)):
                layer = nn.ConvTranspose1d(2, outputs, kernel, stride, padding, extra, bias=bias)
                hidden = torch.randn(2, 2, length, generator=rng)
                if (length - 1) * stride - 2 * padding + kernel + extra < 1:
                    continue
                expected = layer(hidden)
                made = polyphase(hidden, layer.weight, layer.bias, stride, padding, expected.shape[-1])
                torch.testing.assert_close(made, expected, atol=1e-5, rtol=0)


@pytest.mark.usefixtures("everywhere")
@pytest.mark.parametrize("norm", ["batch", "instance", "none"])
@pytest.mark.parametrize(("kernel_size", "stride"), [(9, 2), (9, 8), (5, 5), (4, 3), (8, 1), (2, 1), (1, 1)])
def test_long_forms_decode_as_the_layers_do(kernel_size: int, stride: int, norm: str) -> None:
    for activation in ("elu", "tanh", "silu"):
        for num_params, latent_dim in ((600, None), (601, 5), (607, None)):
            model, latents = used(
                num_params,
                encoder_channels=(2, 3),
                decoder_channels=(20, 3),
                kernel_size=kernel_size,
                stride=stride,
                latent_dim=latent_dim,
                norm=norm,
                decoder_activation=activation,
            )
            made, expected = decoded(model, latents)
            torch.testing.assert_close(made, expected, atol=1e-5 * float(expected.abs().max()), rtol=0)


@pytest.mark.usefixtures("everywhere")
@pytest.mark.parametrize("norm", ["batch", "instance", "none"])
def test_long_forms_of_a_batch_are_those_of_each(norm: str) -> None:
    model, latents = used(6000, 5, norm=norm)
    with torch.no_grad():
        single = torch.cat([model.decode(row[None]) for row in latents])
        torch.testing.assert_close(model.decode(latents), single, atol=1e-5, rtol=0)
        assert torch.pdist(single).min() > 1e-4
        model.at_once = 2
        torch.testing.assert_close(model.decode(latents), single, atol=1e-5, rtol=0)


def test_long_forms_are_for_long_adapters_in_use_alone() -> None:
    settings: dict[str, Any] = {"encoder_channels": (2, 2), "decoder_channels": (8, 4), "stride": 8, "latent_dim": None}
    for num_params, same_bits in ((LONG_ADAPTER, False), (LONG_ADAPTER - 1, True)):
        model, latents = used(num_params, 1, **settings)
        made, expected = decoded(model, latents)
        assert torch.equal(made, expected) == same_bits
        torch.testing.assert_close(made, expected, atol=1e-5, rtol=0)
    model, latents = used(LONG_ADAPTER, 1, **settings)
    _, expected = decoded(model, latents)
    trained = model.decode(latents)
    assert torch.equal(trained, expected)  # with gradients
    trained.square().sum().backward()
    assert all(parameter.grad is not None for parameter in model.decoder.parameters())
    with torch.no_grad():
        assert torch.equal(model.train().decode(latents), expected)
    made, expected = decoded(model.eval().to(torch.bfloat16), latents.bfloat16())
    assert torch.equal(made, expected)


@pytest.mark.parametrize("folder", sorted(BUNDLED.glob("*/autoencoder")), ids=lambda folder: folder.parent.name)
def test_bundled_generators_keep_their_bits(folder: Path) -> None:
    model = ParamAutoencoder.from_pretrained(folder)
    latents = torch.randn(2, *model.latent_shape, generator=torch.Generator().manual_seed(0))
    made, expected = decoded(model, latents)
    assert torch.equal(made, expected)


def test_the_papers_style_half_decodes_as_its_layers_do() -> None:
    torch.manual_seed(0)
    model = ParamAutoencoder(516_096, **read_recipe("paper-style-half")["autoencoder"]["model"]).eval()
    made, expected = decoded(model, torch.randn(1, *model.latent_shape))
    assert not torch.equal(made, expected)
    assert float((made - expected).abs().max()) < 1e-5 * float(expected.abs().max())


def test_a_map_shorter_than_its_weights_goes_through_the_layer_itself() -> None:
    layer = nn.ConvTranspose1d(64, 16, 9, 2, 4, 1)
    with torch.no_grad():
        for length, same_bits in ((64, True), (4096, False)):
            hidden = torch.randn(1, 64, length, generator=torch.Generator().manual_seed(0))
            made, expected = run_on_long_maps([layer], hidden), layer(hidden)
            assert torch.equal(made, expected) == same_bits
            torch.testing.assert_close(made, expected, atol=1e-5, rtol=0)
