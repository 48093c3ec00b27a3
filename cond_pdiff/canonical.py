"""The canonical form of an adapter: equal updates get equal factors, whoever trained them."""

from __future__ import annotations

from dataclasses import replace

import torch

from cond_pdiff.adapter import FACTORS, LoraAdapter
from cond_pdiff.errors import AdapterError
from cond_pdiff.lora import KEY_PREFIX
from cond_pdiff.low_rank import truncate

NEGLIGIBLE = 1e-13
"""The share of the largest singular value below which another one is rounding of the float64 that all is computed in."""

Factors = tuple[torch.Tensor, torch.Tensor]


def canonical_factors(lora_a: torch.Tensor, lora_b: torch.Tensor, scaling: float = 1.0) -> Factors:
    """Return the one pair (A', B') of all pairs with the same scaling · B · A, in float64.

    With a QR of B and of Aᵀ and the SVD U S Vᵀ of the small matrix between them (`low_rank.truncate`), B' = Q_B U √S and A' = √S Vᵀ Q_Aᵀ.
    Singular values are in falling order, half of each in either factor, so both have entries of one size and an error in either costs
    alike; the largest entry of each column of B' is positive. Columns of no singular value are left out. Where two singular values are
    (nearly) equal, their two columns are (nearly) free to turn into each other: rounding then decides, and ΔW alone is kept. Costs
    O((out + in) · r²); nothing of the size out × in is formed.

    Args:
        lora_a: shape `(r, in)`; for a convolution `(r, in, height, width)`.
        lora_b: shape `(out, r)`; for a convolution `(out, r, 1, 1)`.
        scaling: alpha / r of the pair; 1 of the pair returned.

    Returns:
        A', shape `(k, in …)`, and B', shape `(out, k …)`; k ≤ r is the rank of B · A, 0 of an update that is nothing.
    """
    rows, columns = lora_a.flatten(1).double(), scaling * lora_b.flatten(1).double()
    new_a, new_b = truncate(rows, columns, len(rows))
    values = new_a.square().sum(1)  # the singular values, as half of each is in either factor
    kept = int((values > NEGLIGIBLE * values.amax().clamp_min(1e-300)).sum())
    return new_a[:kept].reshape(kept, *lora_a.shape[1:]), new_b[:, :kept].reshape(len(lora_b), kept, *lora_b.shape[2:])


def padded(factors: Factors, rank: int) -> Factors:
    """Return factors with rows of A and columns of B that are zero, up to `rank`; raise `AdapterError` if they have more.

    Args:
        factors: A, shape `(k, in …)`, and B, shape `(out, k …)`.
    """
    lora_a, lora_b = factors
    if len(lora_a) > rank:
        raise AdapterError(f"an update of rank {len(lora_a)} does not fit into rank {rank}; choose a rank of at least {len(lora_a)}")
    missing = rank - len(lora_a)
    rows = lora_a.new_zeros(missing, *lora_a.shape[1:])
    return torch.cat([lora_a, rows]), torch.cat([lora_b, lora_b.new_zeros(len(lora_b), missing, *lora_b.shape[2:])], 1)


def canonical(adapter: LoraAdapter, rank: int | None = None) -> LoraAdapter:
    """Return the adapter with the same ΔW (to 1e-6 of its size) whose factors are canonical, float32, with a scaling of 1.

    Heads stay as they are. Doing it twice changes nothing but rounding.

    Args:
        rank: of all modules, padded with zeros; default: the adapter's own.

    Raises:
        AdapterError: a module's update needs a larger rank.
    """
    rank = rank or adapter.spec.rank
    tensors = dict(adapter.tensors)
    for module in adapter.modules:
        keys = [f"{KEY_PREFIX}{module}.{factor}.weight" for factor in FACTORS]
        factors = canonical_factors(adapter.tensors[keys[0]], adapter.tensors[keys[1]], adapter.spec.scaling)
        tensors |= {key: tensor.float() for key, tensor in zip(keys, padded(factors, rank), strict=True)}
    return replace(adapter, spec=replace(adapter.spec, rank=rank, alpha=float(rank)), tensors=tensors)
