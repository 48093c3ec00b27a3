"""Distances between adapters in ΔW, for task-identification accuracy (routing) and novelty.

Heads do not count: what a head's numbers mean depends on the ΔW below it, there is no common zero to measure them from, and a head
of a few thousand numbers of size one would drown the update.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from cond_pdiff.adapter import LoraAdapter


def delta_gram(left: Sequence[LoraAdapter], right: Sequence[LoraAdapter]) -> torch.Tensor:
    """Return the inner products of whole updates, Σ over modules of ⟨ΔW_i, ΔW_j⟩, shape `(len(left), len(right))`.

    ⟨B₁A₁, B₂A₂⟩ = sum((B₁ᵀB₂) ∘ (A₁A₂ᵀ)), so no ΔW is ever formed.
    """
    total = torch.zeros(len(left), len(right), dtype=torch.float64)
    scale = left[0].spec.scaling * right[0].spec.scaling
    for module in left[0].modules:
        a_left, b_left = (torch.stack(factors).float() for factors in zip(*(x.factors(module) for x in left), strict=True))
        a_right, b_right = (torch.stack(factors).float() for factors in zip(*(x.factors(module) for x in right), strict=True))
        inputs = torch.einsum("iks,jls->ijkl", a_left, a_right)
        outputs = torch.einsum("iok,jol->ijkl", b_left, b_right)
        total += scale * (inputs * outputs).sum((2, 3)).double()
    return total


class ZooSpace:
    """All adapters of a zoo's trained tasks, ready for distances.

    Args:
        adapters: of the zoo.
        tasks: the task of each.
    """

    def __init__(self, adapters: Sequence[LoraAdapter], tasks: Sequence[str]) -> None:
        self.adapters, self.tasks = list(adapters), list(tasks)
        self.norms = _norms(self.adapters)

    def distances(self, adapters: Sequence[LoraAdapter]) -> torch.Tensor:
        """Return ‖ΔW − ΔW_zoo‖ for every pair, shape `(len(adapters), len(zoo))`."""
        squared = _norms(adapters)[:, None].square() + self.norms.square() - 2 * delta_gram(adapters, self.adapters)
        return squared.clamp_min(0).sqrt()

    def nearest(self, adapters: Sequence[LoraAdapter]) -> list[tuple[int, float]]:
        """Return (index of the nearest zoo adapter, distance to it in units of its own ‖ΔW‖) of each adapter; the latter is the novelty.

        The nearest is that of the smallest distance, not of the smallest number of these: that would favour large adapters.
        """
        values, indices = self.distances(adapters).min(1)
        return list(zip(indices.tolist(), (values / self.norms[indices]).tolist(), strict=True))


def _norms(adapters: Sequence[LoraAdapter]) -> torch.Tensor:
    """Return ‖ΔW‖ of each adapter, shape `(len(adapters),)`."""
    return torch.tensor([float(delta_gram([x], [x])) for x in adapters], dtype=torch.float64).sqrt()


def common_errors(first: torch.Tensor, second: torch.Tensor, targets: torch.Tensor) -> float | None:
    """Return the share of the rows that either of two predictions gets wrong which both get wrong; None if neither errs.

    1 means the same errors, as memorisation (a copy of the adapter) makes them.
    """
    wrong_first, wrong_second = first != targets, second != targets
    either = int((wrong_first | wrong_second).sum())
    return int((wrong_first & wrong_second).sum()) / either if either else None
