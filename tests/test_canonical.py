from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from conftest import make_bert

from cond_pdiff import LoraAdapter
from cond_pdiff.canonical import canonical, canonical_factors, padded
from cond_pdiff.errors import AdapterError
from cond_pdiff.lora import KEY_PREFIX, LoraSpec


def pair(seed: int, rank: int, rows: int = 20, columns: int = 12) -> tuple[torch.Tensor, torch.Tensor]:
    rng = torch.Generator().manual_seed(seed)
    return torch.randn(rank, columns, generator=rng), torch.randn(rows, rank, generator=rng)


def product(factors: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    return factors[1].double().flatten(1) @ factors[0].double().flatten(1)


def error(found: torch.Tensor, right: torch.Tensor) -> float:
    return float((found.double() - right.double()).norm() / right.double().norm())


def rotated(adapter: LoraAdapter, seed: int) -> LoraAdapter:
    """The same update, in other factors."""
    turn = torch.randn(adapter.spec.rank, adapter.spec.rank, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    turned = {
        key: (turn @ flat if ".lora_A." in key else flat @ torch.linalg.inv(turn)).float().reshape(tensor.shape)
        for key, tensor in adapter.tensors.items()
        for flat in [tensor.double().flatten(1)]
    }
    return replace(adapter, tensors=turned)


def test_the_update_is_kept_and_its_rotation_is_gone(tiny_adapter: LoraAdapter) -> None:
    made = canonical(tiny_adapter)
    assert made.spec.scaling == 1
    other = canonical(rotated(tiny_adapter, 3))
    for module in tiny_adapter.modules:
        assert error(made.delta(module), tiny_adapter.delta(module)) < 1e-6
        for mine, theirs in zip(made.factors(module), other.factors(module), strict=True):
            assert error(theirs, mine) < 1e-4
    again = canonical(made)
    assert all(error(again.tensors[key], tensor) < 1e-6 for key, tensor in made.tensors.items())
    assert not torch.allclose(rotated(tiny_adapter, 3).tensors[key := next(iter(made.tensors))], tiny_adapter.tensors[key])


def test_factors_are_ordered_balanced_and_signed() -> None:
    lora_a, lora_b = canonical_factors(*pair(0, 5), scaling=0.25)
    assert error(product((lora_a, lora_b)), 0.25 * product(pair(0, 5))) < 1e-12
    torch.testing.assert_close(lora_a @ lora_a.T, lora_b.T @ lora_b, atol=1e-9, rtol=1e-9)  # diagonal, and as large
    values = lora_a.square().sum(1)
    assert bool((values.diff() <= 0).all())
    assert bool((lora_b.gather(0, lora_b.abs().argmax(0, keepdim=True)) > 0).all())


def test_ranks_are_padded_with_zeros_and_never_cut() -> None:
    lora_a, lora_b = pair(1, 2)
    twice = torch.cat([lora_a, lora_a]), torch.cat([lora_b, lora_b], 1)  # of rank 2, in factors of rank 4
    factors = canonical_factors(*twice)
    assert factors[0].shape == (2, 12)
    for found, right in zip(factors, canonical_factors(lora_a, lora_b, 2.0), strict=True):
        torch.testing.assert_close(found, right)
    wide = padded(factors, 6)
    assert (wide[0].shape, wide[1].shape) == ((6, 12), (20, 6))
    assert float(wide[0][2:].abs().max() + wide[1][:, 2:].abs().max()) == 0
    with pytest.raises(AdapterError, match="an update of rank 2 does not fit into rank 1; choose a rank of at least 2"):
        padded(factors, 1)
    nothing = canonical_factors(torch.randn(3, 12), torch.zeros(20, 3))
    assert nothing[0].shape == (0, 12)
    assert float(padded(nothing, 2)[1].abs().max()) == 0


def test_equal_singular_values_keep_the_update() -> None:
    """Their columns are free to turn into each other, and do; what they do together is one thing."""
    lora_a, lora_b = torch.eye(3, 12), torch.eye(20, 3)
    turn = torch.linalg.qr(torch.randn(3, 3, generator=torch.Generator().manual_seed(0)))[0]
    for factors in ((lora_a, lora_b), (turn @ lora_a, lora_b @ turn.T)):
        assert error(product(canonical_factors(*factors)), lora_b @ lora_a) < 1e-6


def test_convolutions_keep_their_kernels() -> None:
    rng = torch.Generator().manual_seed(0)
    down, up = torch.randn(4, 6, 3, 3, generator=rng), torch.randn(10, 4, 1, 1, generator=rng)
    name = f"{KEY_PREFIX}resnets.0.conv1"
    spec = LoraSpec(None, 4, 2.0, ("conv1",), None)
    adapter = LoraAdapter(spec, {f"{name}.lora_A.weight": down, f"{name}.lora_B.weight": up})
    made = canonical(adapter, rank=6)
    assert made.tensors[f"{name}.lora_A.weight"].shape == (6, 6, 3, 3)
    assert made.tensors[f"{name}.lora_B.weight"].shape == (10, 6, 1, 1)
    assert error(made.delta("resnets.0.conv1"), adapter.delta("resnets.0.conv1")) < 1e-6
    pixels = torch.randn(2, 6, 8, 8, generator=rng)
    small, large = (
        torch.nn.functional.conv2d(torch.nn.functional.conv2d(pixels, each.tensors[f"{name}.lora_A.weight"], padding=1),
                                   each.spec.scaling * each.tensors[f"{name}.lora_B.weight"])
        for each in (adapter, made)
    )  # fmt: skip
    torch.testing.assert_close(large, small, atol=1e-4, rtol=1e-4)
    mean = LoraAdapter.mean([made, canonical(rotated(adapter, 1), rank=6)])
    assert error(mean.delta("resnets.0.conv1"), adapter.delta("resnets.0.conv1")) < 1e-5
    with pytest.raises(AdapterError, match="does not fit rank 4"):
        LoraAdapter(spec, {f"{name}.lora_A.weight": down, f"{name}.lora_B.weight": torch.randn(10, 4, 3, 3)})


def test_nothing_of_the_update_s_size_is_formed() -> None:
    """A ΔW of 200,000 × 200,000 numbers would take 320 gigabytes."""
    rng = torch.Generator().manual_seed(0)
    lora_a, lora_b = torch.randn(2, 200_000, generator=rng), torch.randn(200_000, 2, generator=rng)
    new_a, new_b = canonical_factors(lora_a, lora_b)
    rows = torch.arange(0, 200_000, 20_000)
    torch.testing.assert_close((new_b[rows] @ new_a[:, rows]).float(), lora_b[rows] @ lora_a[:, rows], atol=1e-4, rtol=1e-4)


def test_an_attached_canonical_adapter_does_the_same(tiny_adapter: LoraAdapter) -> None:
    model, tokens = make_bert(), torch.tensor([[2, 9, 12, 3]])
    outputs = []
    for adapter in (tiny_adapter, canonical(tiny_adapter, rank=3)):
        with adapter.attached(model), torch.no_grad():
            outputs.append(model(tokens).last_hidden_state)
    torch.testing.assert_close(outputs[1], outputs[0], atol=1e-5, rtol=1e-4)
