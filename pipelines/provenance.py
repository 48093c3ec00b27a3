"""The facts that decide an adapter's bits beside generator, condition and arguments: recorded with it, so that it can be made again."""

from __future__ import annotations

import hashlib
import inspect
import json
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import schedulers
from diffusers.schedulers.scheduling_utils import SchedulerMixin

from cond_pdiff.errors import AdapterError
from cond_pdiff.hub import check_config_numbers
from cond_pdiff.weights import weights_sha256


def package_versions() -> dict[str, str]:
    """Return the versions of the packages that decide an adapter's bits."""
    return {"cond_pdiff": version("cond-pdiff"), "diffusers": diffusers.__version__, "torch": torch.__version__}


def machine_facts(device: torch.device) -> dict[str, Any]:
    """Return what decides in which order sums are taken: the device, the calling thread's CPU threads and the instruction set."""
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "threads": torch.get_num_threads(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
    }


def generator_source(name: str | Path, folder: Path) -> dict[str, str | None]:
    """Say where a generator came from, for the adapters that it makes: name, commit, and the sha256 of all its JSON and weights.

    Of a local folder only the last part of the path is kept: adapters are given away, and paths name people.
    """
    digest = hashlib.sha256()
    for path in sorted(path for path in folder.rglob("*") if path.suffix in (".json", ".safetensors")):
        digest.update(f"{path.relative_to(folder).as_posix()} {weights_sha256([path])} ".encode())
    revision = folder.name if folder.parent.name == "snapshots" else None
    return {"name": Path(name).name if Path(name).is_dir() else str(name), "revision": revision, "sha256": digest.hexdigest()}


def scheduler_settings(scheduler: Any) -> dict[str, Any]:
    """Return class and settings of a scheduler as adapters record them: JSON-ready, only those that are not the class's defaults."""
    defaults = {name: parameter.default for name, parameter in inspect.signature(type(scheduler)).parameters.items()}
    config = json.loads(scheduler.to_json_string())  # also of classes that the settings once were for
    changed = {name: value for name, value in sorted(config.items()) if name in defaults and value != defaults[name]}
    return {"scheduler": type(scheduler).__name__, "scheduler_config": changed}


def generation_settings(
    scheduler: Any,
    dtype: torch.dtype,
    device: torch.device,
    generator: torch.Generator | Sequence[torch.Generator],
    source: Mapping[str, str | None] | None,
) -> dict[str, Any]:
    """Return how a call has made its adapters, beside its arguments.

    That is: scheduler, precision, random generators, generator, machine and versions.
    """
    return {
        **scheduler_settings(scheduler),
        "dtype": str(dtype).removeprefix("torch."),
        "generators": "each" if isinstance(generator, Sequence) else "one",
        "generator": source,
        "machine": machine_facts(device),
        "versions": package_versions(),
    }


def build_scheduler(name: str, config: Mapping[str, Any]) -> Any:
    """Build the scheduler that `scheduler_settings` describes.

    Raises:
        AdapterError: diffusers has no such scheduler.
        HubError: a number is so large that it would take all memory.
    """
    found = getattr(schedulers, name, None)
    if not (isinstance(found, type) and issubclass(found, SchedulerMixin)):
        raise AdapterError(f"the adapter was made with a {name!r:.80}, which is no scheduler of diffusers")
    check_config_numbers("scheduler_config.json", config, "the adapter's scheduler_config")
    return found(**config)


def recorded_seeds(generator: torch.Generator | Sequence[torch.Generator] | None, count: int) -> list[int | None]:
    """Return the seed behind each candidate; None where it is not known, as when the RNG has been used before."""
    if generator is None:
        return [None] * count
    seeds = [_seed(rng) for rng in (generator if isinstance(generator, Sequence) else [generator])]
    return seeds if isinstance(generator, Sequence) else seeds * count


def _seed(rng: torch.Generator) -> int | None:
    fresh = torch.Generator(rng.device).manual_seed(rng.initial_seed())
    return rng.initial_seed() if torch.equal(rng.get_state(), fresh.get_state()) else None
