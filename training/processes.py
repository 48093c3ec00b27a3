"""The processes that train together: which one this is, and what all of them must have alike."""

from __future__ import annotations

import atexit

import torch
from accelerate import PartialState
from accelerate.utils import broadcast, parse_flag_from_env, reduce
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm


def processes() -> PartialState:
    """Return this process of those a launcher started: each on a GPU if there are any, else (or by `ACCELERATE_USE_CPU`) on the CPU."""
    return PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available())


def from_main(tensor: torch.Tensor) -> torch.Tensor:
    """Return the main process's tensor, in every process; the shape must be the same in all."""
    state = processes()
    if state.num_processes == 1 or not tensor.numel():
        return tensor
    sent: torch.Tensor = broadcast(tensor.detach().to(state.device, copy=True).contiguous())
    return sent.to(tensor.device)


@torch.no_grad()
def take_from_main(module: nn.Module) -> None:
    """Give all weights and buffers of a module the main process's values."""
    if processes().num_processes > 1:
        for tensor in module.state_dict().values():
            tensor.copy_(from_main(tensor))


@torch.no_grad()
def average_norms(module: nn.Module) -> None:
    """Give running means and variances of batch norms, which each process has measured on its own samples, the processes' mean."""
    if processes().num_processes > 1:
        for norm in module.modules():
            if isinstance(norm, _BatchNorm) and norm.running_mean is not None and norm.running_var is not None:
                for running in (norm.running_mean, norm.running_var):
                    running.copy_(reduce(running.clone(), "mean"))


@atexit.register
def _leave() -> None:
    """Leave the process group once a process, not once a stage: who left cannot come back."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
