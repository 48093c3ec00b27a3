"""Sharded training (FSDP): weights that are divided among the processes, and the way of tensors there and back.

Accelerate's own plugin does not shard on CPUs, and asks for the names of classes; torch's `fully_shard` needs neither.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator, Mapping

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from cond_pdiff.errors import TrainingError
from cond_pdiff.training.processes import processes, take_from_main


def shard(module: nn.Module, device: torch.device) -> nn.Module:
    """Return a copy of a module, on a device, of which each process holds a part: every weight is divided along its first dimension.

    All processes call it together. A process has the weights of a block (an entry of a `ModuleList`) whole while it computes with that
    block, and those outside of blocks during a whole step. The module's own weights are let go until `unshard` brings them back.

    Raises:
        TrainingError: torch cannot divide this module, which has weights without a dimension, for one.
    """
    take_from_main(module)
    mesh = init_device_mesh(device.type, (processes().num_processes,))
    # The blocks' outputs may be views; nothing here changes an output in place.
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor", UserWarning)
    try:
        divided = copy.deepcopy(module)
        for part in (*_blocks(divided), divided):  # the last takes what the others have left
            fully_shard(part, mesh=mesh)
    except (NotImplementedError, RuntimeError, TypeError, ValueError) as error:
        why = " ".join(str(error).split())
        raise TrainingError(f'a {type(module).__name__} cannot be sharded ({why}); set "sharded" to false') from error
    for parameter in module.parameters():
        parameter.data = parameter.new_empty(0)
    module.to(device)
    return divided


@torch.no_grad()
def unshard(divided: nn.Module, module: nn.Module) -> None:
    """Give a module, on the CPU, the whole weights and buffers of its sharded copy, in every process; all call it together."""
    module.to("cpu")
    parts = dict(divided.named_parameters())
    for name, parameter in module.named_parameters():
        parameter.data = _whole(parts[name].detach()).to("cpu")
    for own, buffer in zip(module.buffers(), divided.buffers(), strict=True):
        own.copy_(buffer)


def gather(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return tensors with those that are divided made whole, on the main process's CPU, one after the other; other processes get none.

    All processes call it together, with the same names in the same order.
    """
    kept = {}
    for name, tensor in tensors.items():
        whole = _whole(tensor)
        if processes().is_main_process:
            kept[name] = whole if whole is tensor else whole.to("cpu")
    return kept


def part_of(whole: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Return this process's part of a tensor, divided as `like` is; all of it where that is whole, or has another shape (step counts)."""
    if not isinstance(like, DTensor) or whole.shape != like.shape:
        return whole
    part = distribute_tensor(whole.to(like.device), like.device_mesh, like.placements, src_data_rank=None)
    return part.clone()  # not a view that keeps the whole


def _whole(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _blocks(module: nn.Module) -> Iterator[nn.Module]:
    """Yield the entries of the outermost lists of modules."""
    for child in module.children():
        if isinstance(module, nn.ModuleList) and not isinstance(child, (nn.ModuleList, nn.ModuleDict)):
            yield child
        else:
            yield from _blocks(child)
