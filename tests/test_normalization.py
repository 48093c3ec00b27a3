from __future__ import annotations

from pathlib import Path

import pytest
import torch

from cond_pdiff.errors import CondPDiffError
from cond_pdiff.normalization import ParamNormalizer, extra_length, join_statistics, split_statistics

SIZES = (6, 10, 24)
MODES = ["none", "batch", "task", "tensor", "soup"]


def zoo(seed: int = 0, count: int = 9) -> torch.Tensor:
    """Params whose tensors and adapters have means and sizes of their own, shape `(count, 40)`."""
    rng = torch.Generator().manual_seed(seed)
    size = torch.tensor([0.01, 0.1, 1.0]).repeat_interleave(torch.tensor(SIZES)) * torch.linspace(0.5, 2, count)[:, None]
    return (torch.randn(count, sum(SIZES), generator=rng) + 0.3) * size


def fitted(mode: str) -> ParamNormalizer:
    normalizer = ParamNormalizer(mode, SIZES)
    normalizer.fit(zoo())
    return normalizer


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("seed", [0, 1])
def test_denormalize_inverts_normalize(mode: str, seed: int) -> None:
    normalizer, params = fitted(mode), zoo(seed)
    values, statistics = normalizer.normalize(params)
    assert values.shape == params.shape
    assert statistics.shape == (len(params), normalizer.num_statistics)
    assert normalizer.num_statistics == (2 if mode == "task" else 0)
    torch.testing.assert_close(normalizer.denormalize(values, statistics), params, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("mode", MODES)
def test_a_zoo_may_come_in_chunks(mode: str) -> None:
    normalizer, params = ParamNormalizer(mode, SIZES), zoo() + 5.0  # far from zero, where sums of squares would cancel
    normalizer.fit(params.split(4))
    whole = ParamNormalizer(mode, SIZES)
    whole.fit(params)
    for name, tensor in whole.state_dict().items():
        torch.testing.assert_close(normalizer.state_dict()[name], tensor, rtol=1e-6, atol=1e-7)
    with pytest.raises(CondPDiffError, match="at least one adapter"):
        ParamNormalizer(mode, SIZES).fit([])


def test_task_mode_standardises_every_adapter_and_its_statistics() -> None:
    values, statistics = fitted("task").normalize(zoo())
    torch.testing.assert_close(values.mean(1), torch.zeros(9), atol=1e-5, rtol=0)
    torch.testing.assert_close(values.std(1, correction=0), torch.ones(9), atol=1e-4, rtol=0)
    torch.testing.assert_close(statistics.mean(0), torch.zeros(2), atol=1e-5, rtol=0)
    torch.testing.assert_close(statistics.std(0, correction=0), torch.ones(2), atol=1e-4, rtol=0)


def test_batch_mode_standardises_the_zoo_and_tensor_mode_every_tensor() -> None:
    values, _ = fitted("batch").normalize(zoo())
    assert abs(values.mean()) < 1e-5
    assert abs(values.std(correction=0) - 1) < 1e-4
    for piece in fitted("tensor").normalize(zoo())[0].split(list(SIZES), dim=1):
        assert abs(piece.mean()) < 1e-5
        assert abs(piece.std(correction=0) - 1) < 1e-4


def test_soup_mode_takes_the_soup_away_and_standardises_every_tensor() -> None:
    normalizer, params = fitted("soup"), zoo(0)
    values, _ = normalizer.normalize(params)
    torch.testing.assert_close(values.mean(0), torch.zeros(sum(SIZES)), atol=1e-5, rtol=0)
    for piece in values.split(SIZES, dim=1):
        torch.testing.assert_close(piece.square().mean(), torch.tensor(1.0))
    torch.testing.assert_close(normalizer.denormalize(torch.zeros(1, sum(SIZES)), torch.zeros(1, 0))[0], params.mean(0))


def test_none_mode_changes_nothing() -> None:
    assert torch.equal(fitted("none").normalize(zoo())[0], zoo())


def test_task_mode_brings_a_lossy_reconstruction_back_to_its_size() -> None:
    normalizer, params = fitted("task"), zoo()
    values, statistics = normalizer.normalize(params)
    shrunk = normalizer.denormalize(0.3 * values + 0.1, statistics)
    torch.testing.assert_close(shrunk, params, atol=1e-5, rtol=1e-5)


def test_the_soup_is_not_what_zero_decodes_to_in_task_mode() -> None:
    normalizer, params = fitted("task"), zoo()
    soup = params.mean(0, keepdim=True)
    for statistics in (torch.zeros(1, 2), normalizer.normalize(soup)[1]):
        from_zero = normalizer.denormalize(torch.zeros_like(soup), statistics)
        assert from_zero.std() < 1e-6
        assert (from_zero - soup).norm() > 0.5 * soup.norm()


@pytest.mark.parametrize("mode", MODES)
def test_equal_params_give_finite_values(mode: str) -> None:
    normalizer = ParamNormalizer(mode, SIZES)
    params = torch.full((3, sum(SIZES)), 0.25)
    normalizer.fit(params)
    values, statistics = normalizer.normalize(params)
    assert torch.isfinite(values).all()
    assert torch.isfinite(statistics).all()
    torch.testing.assert_close(normalizer.denormalize(values, statistics), params, atol=1e-5, rtol=0)


@pytest.mark.parametrize("mode", MODES)
def test_save_and_load_is_bit_identical(mode: str, tmp_path: Path) -> None:
    normalizer = fitted(mode)
    normalizer.save_pretrained(tmp_path)
    loaded = ParamNormalizer.from_pretrained(tmp_path)
    assert {path.suffix for path in tmp_path.iterdir()} == {".json", ".safetensors"}
    assert loaded.config.mode == mode
    assert tuple(loaded.config.tensor_sizes) == SIZES
    for name, tensor in normalizer.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
    for ours, theirs in zip(normalizer.normalize(zoo(3)), loaded.normalize(zoo(3)), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_statistics_are_exact_in_every_precision(mode: str, dtype: torch.dtype, tmp_path: Path) -> None:
    normalizer, exact = fitted(mode), fitted(mode)
    values, statistics = exact.normalize(zoo(3))
    for cast in (lambda: normalizer.to(dtype), lambda: normalizer.to("cpu", dtype), normalizer.half, normalizer.bfloat16, normalizer.float):
        cast()
        assert torch.equal(normalizer.denormalize(values, statistics), exact.denormalize(values, statistics))
    normalizer.save_pretrained(tmp_path)
    loaded = ParamNormalizer.from_pretrained(tmp_path, dtype=dtype)
    assert torch.equal(loaded.denormalize(values, statistics), exact.denormalize(values, statistics))
    assert {tensor.device.type for tensor in normalizer.to("meta", dtype).state_dict().values()} == {"meta"}


@pytest.mark.parametrize(("count", "channels"), [(2, 1), (2, 2), (2, 3), (3, 2), (5, 4), (0, 3)])
def test_statistics_join_and_split(count: int, channels: int) -> None:
    rng = torch.Generator().manual_seed(0)
    code, statistics = torch.randn(4, channels, 7, generator=rng), torch.randn(4, count, generator=rng)
    latents = join_statistics(code, statistics)
    assert latents.shape == (4, channels, 7 + extra_length(count, channels))
    back_code, back_statistics = split_statistics(latents, count)
    assert torch.equal(back_code, code)
    assert torch.equal(back_statistics, statistics)


@pytest.mark.parametrize("params", [torch.zeros(0, 40), torch.zeros(40), torch.zeros(3, 39), torch.zeros(2, 3, 40)])
def test_fit_refuses_other_shapes(params: torch.Tensor) -> None:
    with pytest.raises(CondPDiffError, match=r"expected params of shape \(n, 40\)"):
        ParamNormalizer("batch", SIZES).fit(params)


@pytest.mark.parametrize("mode", MODES)
def test_other_refusals(mode: str) -> None:
    fresh, normalizer = ParamNormalizer(mode, SIZES), fitted(mode)
    none = torch.zeros(3, normalizer.num_statistics)
    with pytest.raises(CondPDiffError, match="not been fitted"):
        fresh.normalize(zoo())
    with pytest.raises(CondPDiffError, match="not been fitted"):
        fresh.denormalize(torch.zeros(3, 40), none)
    with pytest.raises(CondPDiffError, match=r"expected shape \(batch, 40\), got \(3, 41\)"):
        normalizer.normalize(torch.zeros(3, 41))
    with pytest.raises(CondPDiffError, match=r"expected shape \(batch, 40\)"):
        normalizer.denormalize(torch.zeros(40), none)
    with pytest.raises(CondPDiffError, match=r"expected statistics of shape"):
        normalizer.denormalize(torch.zeros(3, 40), torch.zeros(3, 1))


def test_unknown_mode_is_refused() -> None:
    with pytest.raises(CondPDiffError, match=r"mode must be one of.*'zscore'"):
        ParamNormalizer("zscore", SIZES)  # type: ignore[arg-type]
