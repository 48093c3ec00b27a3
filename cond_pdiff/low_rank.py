"""Weighted sums of tensors, and of products of two thin matrices, ΔW = B · A, which are never formed."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn


def weighted_sum(tensors: Sequence[torch.Tensor], weights: Sequence[float]) -> torch.Tensor:
    """Return Σ wᵢ tᵢ of tensors of one shape and dtype, added up in single precision at least.

    The sum of the weights is 1: equal tensors stay as they are.
    """
    first = tensors[0]
    if all(torch.equal(tensor, first) for tensor in tensors):
        return first
    total = torch.zeros_like(first, dtype=torch.promote_types(first.dtype, torch.float32))
    for tensor, weight in zip(tensors, weights, strict=True):
        total += weight * tensor.to(total.dtype)
    return total.to(first.dtype)


def weighted_product(
    factors: Sequence[tuple[torch.Tensor, torch.Tensor]], weights: Sequence[float], rank: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (A, B) of the best approximation of a given rank to Σ wᵢ Bᵢ Aᵢ, in the dtypes of the given factors.

    Args:
        factors: Aᵢ, shape `(rᵢ, in)`, and Bᵢ, shape `(out, rᵢ)`.
        weights: of each.
        rank: rows of A and columns of B; those beyond the rank of the sum are zero.
    """
    stacked_a, stacked_b = (torch.cat(parts, dim) for dim, parts in enumerate(zip(*factors, strict=True)))
    dtype = torch.promote_types(stacked_a.dtype, torch.float32)
    shares = torch.cat([torch.full((len(lora_a),), weight) for (lora_a, _), weight in zip(factors, weights, strict=True)])
    lora_a, lora_b = truncate(stacked_a.to(dtype), stacked_b.to(dtype) * shares.to(stacked_b.device, dtype), rank)
    return lora_a.to(stacked_a.dtype), lora_b.to(stacked_b.dtype)


def truncate(lora_a: torch.Tensor, lora_b: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (A, B) of the best approximation of a given rank to B · A (Eckart and Young).

    With B = Q_B R_B and Aᵀ = Q_A R_A, the singular values of B · A are those of the small R_B R_Aᵀ = U S Vᵀ. Half of each goes
    into either factor: B' = Q_B U √S and A' = √S Vᵀ Q_Aᵀ. The largest entry of each column of B' is positive, so that equal updates
    get equal factors. Costs O((out + in) · k²).

    Args:
        lora_a: shape `(k, in)`.
        lora_b: shape `(out, k)`.
        rank: rows of A' and columns of B'; those beyond the rank of B · A are zero.
    """
    (basis_b, upper_b), (basis_a, upper_a) = torch.linalg.qr(lora_b), torch.linalg.qr(lora_a.T)
    left, values, right = torch.linalg.svd(upper_b @ upper_a.T, full_matrices=False)
    root = values[:rank].sqrt()
    columns, rows = basis_b @ left[:, :rank] * root, root[:, None] * (right[:rank] @ basis_a.T)
    signs = columns.gather(0, columns.abs().argmax(0, keepdim=True)).sign()[0]
    missing = rank - len(root)
    return nn.functional.pad(rows * signs[:, None], (0, 0, 0, missing)), nn.functional.pad(columns * signs, (0, missing))
