from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from cond_pdiff.errors import CondPDiffError
from cond_pdiff.models.param_autoencoder import ParamAutoencoder
from cond_pdiff.models.param_unet_1d import ParamUNet1D

# The paper's two halves and our default, small. Lengths that no stride divides are the usual case.
STYLE = {"encoder_channels": (4, 8, 6), "decoder_channels": (8, 4, 4), "kernel_size": 9, "stride": 2, "latent_dim": 12, "norm": "batch"}
LANGUAGE = {
    "encoder_channels": (4, 4), "decoder_channels": (4, 8), "kernel_size": 5, "stride": 5, "latent_dim": None, "norm": "instance",
    "encoder_activation": "tanh", "decoder_activation": "tanh",
}  # fmt: skip
DEFAULT = {
    "encoder_channels": (2, 4), "decoder_channels": (6, 3), "decoder_bottom_channels": 5, "latent_dim": 10, "encoder_activation": "silu",
}  # fmt: skip
AUTOENCODERS = {"style": STYLE, "language": LANGUAGE, "default": DEFAULT}
LENGTHS = [97, 100, 125, 128, 251]

ADD = {"sample_channels": 2, "sample_length": 7, "condition_dim": 5, "block_out_channels": (6, 8, 3), "embedding_dim": 16}
UNETS = {
    "style": ADD,
    "style, one channel": {**ADD, "sample_channels": 1, "sample_length": 13, "kernel_size": 5},
    "without bottom": {**ADD, "bottom_linear": False, "act_fn": "leaky_relu"},
    "final": {**ADD, "final_linear": True},
    "language": {**ADD, "condition_mode": "concat", "final_linear": True, "bottom_linear": False},
    "language with bottom": {**ADD, "condition_mode": "concat", "final_linear": True, "act_fn": "elu"},
}


def autoencoder(family: str, num_params: int = 97) -> ParamAutoencoder:
    torch.manual_seed(0)
    return ParamAutoencoder(num_params, **AUTOENCODERS[family]).eval()


def unet(kind: str) -> ParamUNet1D:
    torch.manual_seed(0)
    return ParamUNet1D(**UNETS[kind]).eval()


def values(batch: int, num_params: int = 97) -> torch.Tensor:
    return torch.randn(batch, num_params, generator=torch.Generator().manual_seed(1))


def unet_inputs(kind: str, batch: int = 4) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    rng, config = torch.Generator().manual_seed(2), UNETS[kind]
    sample = torch.randn(batch, config["sample_channels"], config["sample_length"], generator=rng)
    return sample, torch.tensor([0, 17, 400, 999])[:batch], torch.randn(batch, config["condition_dim"], generator=rng)


def without_gradient(model: torch.nn.Module) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.grad is None or not parameter.grad.abs().sum() > 0}


# --- autoencoder -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_params", LENGTHS)
@pytest.mark.parametrize("family", AUTOENCODERS)
def test_autoencoder_shapes(family: str, num_params: int) -> None:
    model, params = autoencoder(family, num_params), values(3, num_params)
    latents = model.encode(params)
    channels, length = model.latent_shape
    assert latents.shape == (3, channels, length)
    assert channels == (4 if family == "language" else 1)
    assert length == (num_params // 25 if family == "language" else AUTOENCODERS[family]["latent_dim"])
    assert model.decode(latents).shape == params.shape
    assert torch.equal(model(params), model.decode(latents))


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")  # only says that it copies
@pytest.mark.parametrize("kernel_size", [4, 5, 7, 8])
@pytest.mark.parametrize("stride", [1, 3, 4])
def test_autoencoder_takes_any_kernel_of_at_least_the_stride(kernel_size: int, stride: int) -> None:
    for num_params in (96, 97, 98, 99):
        model = ParamAutoencoder(num_params, (2, 3), (3, 2), kernel_size=kernel_size, stride=stride, latent_dim=None)
        assert model(values(2, num_params)).shape == (2, num_params)


@pytest.mark.parametrize("family", AUTOENCODERS)
def test_autoencoder_batch_is_as_single_calls(family: str) -> None:
    model, params = autoencoder(family), values(5)
    torch.testing.assert_close(model.encode(params), torch.cat([model.encode(row[None]) for row in params]), atol=1e-5, rtol=0)
    torch.testing.assert_close(model(params), torch.cat([model(row[None]) for row in params]), atol=1e-5, rtol=0)
    assert torch.pdist(model(params)).min() > 1e-4


@pytest.mark.parametrize("family", AUTOENCODERS)
def test_autoencoder_gradients_reach_every_parameter(family: str) -> None:
    model = autoencoder(family).train()
    (model(values(4)) * values(4)).sum().backward()
    # A norm takes the mean away, and with it what the bias before it adds.
    norms = (torch.nn.BatchNorm1d, torch.nn.InstanceNorm1d)
    parts = {"encoder": model.encoder, "decoder": model.decoder}
    idle = {f"{name}.{i - 1}.bias" for name, part in parts.items() for i, layer in enumerate(part) if isinstance(layer, norms)}
    assert without_gradient(model) <= idle


@pytest.mark.parametrize("family", AUTOENCODERS)
def test_every_param_counts(family: str) -> None:
    model, params = autoencoder(family), values(1).requires_grad_()
    (gradient,) = torch.autograd.grad(model.encode(params).square().sum(), params)
    used = int((gradient != 0).sum())
    assert used == 97 if family == "default" else used >= 0.95 * 97


@pytest.mark.parametrize("family", AUTOENCODERS)
def test_autoencoder_save_and_load_is_bit_identical(family: str, tmp_path: Path) -> None:
    model, params = autoencoder(family).train(), values(4)
    model(params)  # moves the running statistics of batch norm
    model.eval().fit_scaling_factor(model.encode(params))
    model.save_pretrained(tmp_path)
    assert {path.suffix for path in tmp_path.iterdir()} == {".json", ".safetensors"}
    loaded = ParamAutoencoder.from_pretrained(tmp_path)
    assert dict(loaded.config).items() >= {"num_params": 97, "scaling_factor": model.config.scaling_factor}.items()
    assert torch.equal(loaded.encode(params), model.encode(params))
    assert torch.equal(loaded(params), model(params))


@pytest.mark.parametrize("family", AUTOENCODERS)
def test_scaling_factor_makes_unit_variance_and_leaves_the_decoder_alone(family: str) -> None:
    model, params = autoencoder(family), values(6)
    reconstruction = model(params)
    latents = model.fit_scaling_factor(model.encode(params))
    assert abs(latents.square().mean() - 1) < 1e-4
    torch.testing.assert_close(model.encode(params), latents)
    assert model.config.scaling_factor != 1
    torch.testing.assert_close(model(params), reconstruction, atol=1e-5, rtol=0)
    first = model.config.scaling_factor
    model.fit_scaling_factor(model.encode(params))
    assert model.config.scaling_factor == pytest.approx(first, rel=1e-5)


@pytest.mark.parametrize("family", AUTOENCODERS)
def test_a_large_batch_goes_through_the_autoencoder_in_parts(family: str) -> None:
    model, params = autoencoder(family).eval(), values(7)
    latents, reconstruction = model.encode(params), model(params)
    model.at_once = 3
    torch.testing.assert_close(model.encode(params), latents)
    torch.testing.assert_close(model(params), reconstruction)
    seen: list[int] = []
    model.encoder.register_forward_pre_hook(lambda _, inputs: seen.append(len(inputs[0])))
    model(params)
    model.train()(params)  # batch norm sees all of them
    assert seen == [3, 3, 1, 7]


def test_how_many_go_through_together_follows_from_the_widest_map() -> None:
    with torch.device("meta"):
        small, large = ParamAutoencoder(36_864), ParamAutoencoder(1_179_648, (4, 4, 4, 4), (4, 256, 256, 8), None, 5, 5, None)
    assert small.at_once == 227  # the decoder's last map but one has 4 x 36,864 numbers
    assert large.at_once == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"encoder_channels": (4, 4), "decoder_channels": (4,)}, "equally many stages, got 2 and 1"),
        ({"encoder_channels": (), "decoder_channels": ()}, "equally many stages, got 0 and 0"),
        ({"kernel_size": 3, "stride": 4}, "kernel of 3 with stride 4 would skip"),
        ({"stride": 0}, "use a stride from 1"),
        ({"latent_dim": None, "decoder_bottom_channels": 4}, "needs a linear bottleneck"),
        ({"num_params": 3}, "3 params are too few for 3 stages of stride 4"),
        ({"num_params": 0}, "0 params are too few"),
        ({"norm": "layer"}, r"norm must be one of.*'layer'"),
        ({"encoder_activation": "nonsense"}, r"no activation is called 'nonsense'.*silu"),
    ],
)
def test_autoencoder_refuses_settings(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(CondPDiffError, match=message):
        ParamAutoencoder(**{"num_params": 97, **arguments})


@pytest.mark.parametrize("family", AUTOENCODERS)
def test_autoencoder_refuses_other_shapes(family: str) -> None:
    model = autoencoder(family)
    channels, length = model.latent_shape
    for bad in (torch.zeros(2, 96), torch.zeros(97), torch.zeros(2, 1, 97)):
        with pytest.raises(CondPDiffError, match=r"expected values of shape \(batch, 97\), got"):
            model.encode(bad)
    for bad in (torch.zeros(2, channels, length + 1), torch.zeros(2, channels + 1, length), torch.zeros(2, channels * length)):
        with pytest.raises(CondPDiffError, match=rf"expected latents of shape \(batch, {channels}, {length}\), got"):
            model.decode(bad)
    with pytest.raises(CondPDiffError, match="not trained"):
        model.fit_scaling_factor(torch.full((2, channels, length), float("nan")))


# --- U-Net -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", UNETS)
def test_unet_shapes(kind: str) -> None:
    model = unet(kind)
    sample, timesteps, condition = unet_inputs(kind)
    output = model(sample, timesteps, condition)
    assert output.sample.shape == sample.shape
    assert output.sample.std() > 1e-3
    assert torch.equal(model(sample, timesteps, condition, return_dict=False)[0], output.sample)


@pytest.mark.parametrize("kind", UNETS)
def test_unet_batch_is_as_single_calls_each_at_its_timestep(kind: str) -> None:
    model, (sample, timesteps, condition) = unet(kind), unet_inputs(kind)
    together = model(sample, timesteps, condition).sample
    for timestep in (lambda i: timesteps[i], lambda i: int(timesteps[i]), lambda i: float(timesteps[i]), lambda i: timesteps[i : i + 1]):
        single = [model(sample[i : i + 1], timestep(i), condition[i : i + 1]).sample for i in range(4)]
        torch.testing.assert_close(together, torch.cat(single), atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", UNETS)
@pytest.mark.parametrize("what", ["timestep", "condition", "sample"])
def test_unet_depends_on_each_samples_own_inputs(kind: str, what: str) -> None:
    model, (sample, timesteps, condition) = unet(kind), unet_inputs(kind)
    before = model(sample, timesteps, condition).sample
    if what == "timestep":
        timesteps = torch.tensor([0, 17, 30, 999])
    else:
        changed = {"condition": condition, "sample": sample}[what]
        changed[2] += 1
    difference = (model(sample, timesteps, condition).sample - before).abs().amax(dim=(1, 2))
    assert difference[2] > 1e-4
    assert difference[[0, 1, 3]].max() < 1e-6


@pytest.mark.parametrize("kind", UNETS)
def test_unet_one_timestep_serves_the_whole_batch(kind: str) -> None:
    model, (sample, _, condition) = unet(kind), unet_inputs(kind)
    assert torch.equal(model(sample, 5, condition).sample, model(sample, torch.full((4,), 5), condition).sample)


@pytest.mark.parametrize("kind", UNETS)
def test_unet_gradients_reach_every_parameter(kind: str) -> None:
    model, (sample, timesteps, condition) = unet(kind), unet_inputs(kind)
    (model(sample, timesteps, condition).sample * sample.flip(0)).sum().backward()
    assert without_gradient(model) == set()


@pytest.mark.parametrize("kind", UNETS)
def test_unet_save_and_load_is_bit_identical(kind: str, tmp_path: Path) -> None:
    model, inputs = unet(kind), unet_inputs(kind)
    model.save_pretrained(tmp_path)
    assert {path.suffix for path in tmp_path.iterdir()} == {".json", ".safetensors"}
    loaded = ParamUNet1D.from_pretrained(tmp_path)
    assert torch.equal(loaded(*inputs).sample, model(*inputs).sample)
    assert {name: tensor.shape for name, tensor in loaded.state_dict().items()} == {n: t.shape for n, t in model.state_dict().items()}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"kernel_size": 4}, "kernel_size must be odd, got 4"),
        ({"condition_mode": "concat"}, "needs final_linear=True"),
        ({"condition_mode": "cross-attention"}, r"condition_mode must be one of.*'cross-attention'"),
        ({"act_fn": "nonsense"}, "no activation is called 'nonsense'"),
    ],
)
def test_unet_refuses_settings(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(CondPDiffError, match=message):
        ParamUNet1D(**{**ADD, **arguments})


@pytest.mark.parametrize("kind", ["style", "language"])
def test_unet_refuses_other_shapes(kind: str) -> None:
    model, (sample, timesteps, condition) = unet(kind), unet_inputs(kind)
    bad = [(sample[..., :-1], condition), (sample[:, :1], condition), (sample, condition[:, :-1]), (sample, condition[:-1])]
    for bad_sample, bad_condition in bad:
        with pytest.raises(CondPDiffError, match=r"expected a sample of shape \(batch, 2, 7\) and a condition of shape \(batch, 5\)"):
            model(bad_sample, timesteps, bad_condition)
    with pytest.raises(CondPDiffError, match="one for each of 4 samples, got 3"):
        model(sample, timesteps[:3], condition)
