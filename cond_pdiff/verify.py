"""Verification of a generated adapter: it is made again from what it records of its making, and compared."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from cond_pdiff.adapter import LoraAdapter
from cond_pdiff.conditions.condition import Condition, Files, condition_kind
from cond_pdiff.errors import AdapterError
from cond_pdiff.hub import find_generator
from cond_pdiff.pipelines.generator_pipeline import BROKEN_GENERATOR
from cond_pdiff.pipelines.many import Request, decode_apart, denoise_many
from cond_pdiff.pipelines.pipeline_cond_pdiff import MAX_ADAPTERS, CondPDiffPipeline
from cond_pdiff.pipelines.provenance import build_scheduler, generator_source, machine_facts, package_versions, scheduler_settings

NEEDED = (
    *("generator", "condition", "seed", "candidate", "num_adapters", "generators"),
    *("num_inference_steps", "guidance_scale", "scheduler", "dtype", "versions"),
)
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


ROUNDING = {"float32": 1e-5, "float16": 1e-2, "bfloat16": 5e-2}
"""The largest difference that rounding explains in each dtype, in units of an adapter's largest number: about ten times the most that was
seen with one to four threads and with the plainest instruction set (1.2e-6, 1.2e-3, 4.4e-3). GPUs convolve float32 about as exactly as
float16."""
MAX_THREADS = 256
"""The largest recorded number of CPU threads that is tried."""


@dataclass(frozen=True)
class Verification:
    """The result of making an adapter again.

    Args:
        same: every bit of every tensor is the same.
        largest_difference: between two numbers, in units of the adapter's largest.
        rounding: the largest such difference that rounding explains: sums are taken in another order by other numbers of threads, other
            versions and other processors.
        changes: of versions, thread count, processor …: as it was when the adapter was made, and as it is now. Whatever differs.
        scheduler: settings that the adapter was made with, and the generator's own ones. Whatever differs; the recorded ones were used.
    """

    same: bool
    largest_difference: float
    rounding: float
    changes: Mapping[str, tuple[str, str]]
    scheduler: Mapping[str, tuple[str, str]]

    @property
    def only_rounding(self) -> bool:
        """Whether the adapter is what its generator makes, but for rounding (or to the bit)."""
        return self.largest_difference <= self.rounding

    def __str__(self) -> str:
        """Write the result as text for people."""
        if self.same:
            told = "the same bytes: the adapter is what its generator makes of its condition and seed"
        else:
            kind = "the same but for rounding" if self.only_rounding else "not the same"
            changes = "; ".join(f"{name} {then} then, {now} now" for name, (then, now) in self.changes.items())
            told = f"{kind}: numbers differ by up to {self.largest_difference:.2g} of the largest"
            told += f" ({changes or 'nothing recorded has changed'})"
        own = ", ".join(f"{name} {then}, not {now}" for name, (then, now) in self.scheduler.items())
        return told + (f"; with the scheduler that it records, which is not the generator's own ({own})" if own else "")


def verify(adapter: LoraAdapter, generator: str | Path | None = None, image: Files | None = None) -> Verification:
    """Generate an adapter again from its recorded generator, condition, seed and settings, and compare every tensor.

    That is done on the CPU, with the recorded scheduler and number of threads. Adapters of version 0.1.0 record neither.

    Args:
        generator: where the generator is now; default: by its recorded name and commit.
        image: the style image of a style adapter, or all of them, in any order; adapters keep their hashes only.

    Raises:
        AdapterError: the adapter does not record enough, or the generator is not the one that made it.
        ConditionError: the image is missing, or not the one that was shown.
        HubError: the generator is not to be had.
    """
    if "refined" in adapter.metadata:
        raise AdapterError("the adapter was refined after it was generated; only what a generator wrote can be made again")
    missing = [name for name in NEEDED if adapter.metadata.get(name) is None]
    if missing:
        raise AdapterError(f"the adapter does not record its {missing[0]}; only generated ones with a seed can be made again")
    try:
        return _compare(adapter, adapter.metadata, generator, image)
    except BROKEN_GENERATOR as error:
        raise AdapterError(f"what the adapter records of its making is malformed: {type(error).__name__}: {error}") from error


def _compare(adapter: LoraAdapter, facts: Mapping[str, Any], generator: str | Path | None, image: Files | None) -> Verification:
    source: Mapping[str, Any] = facts["generator"]
    name = generator if generator is not None else source["name"]
    folder = find_generator(name, **({"revision": source["revision"]} if source["revision"] and generator is None else {}))
    found = generator_source(name, folder)["sha256"]
    if found != source["sha256"]:
        raise AdapterError(f"{name} is not the generator that made this adapter: sha256 {found}, recorded {source['sha256']}")
    pipe = CondPDiffPipeline.from_pretrained(folder, dtype=DTYPES[facts["dtype"]])
    pipe.set_progress_bar_config(disable=True)
    own = scheduler_settings(pipe.scheduler)
    if "scheduler_config" in facts:
        pipe.scheduler = build_scheduler(facts["scheduler"], facts["scheduler_config"])
    elif own["scheduler"] != facts["scheduler"]:
        raise AdapterError(f"the adapter was made with a {facts['scheduler']}, but the generator has a {own['scheduler']}")
    recorded = dict(facts.get("machine", {}))
    with _threads(recorded.get("threads")):
        now = {**package_versions(), **machine_facts(torch.device("cpu"))}
        condition = condition_kind(facts["condition"]).from_json(facts["condition"], image)
        again = _again(pipe, condition, facts).scaled(facts.get("strength", 1.0))
    adapter.layout.validate(again.tensors)
    largest = max(float(tensor.abs().max()) for tensor in adapter.tensors.values())
    differences = [float((again.tensors[key] - tensor).abs().max()) for key, tensor in adapter.tensors.items()]
    then = {**facts["versions"], **recorded}
    return Verification(
        all(torch.equal(again.tensors[key], tensor) for key, tensor in adapter.tensors.items()),
        max(differences) / max(largest, 1e-12),
        max(ROUNDING[facts["dtype"]], 0 if recorded.get("device", "cpu") == "cpu" else ROUNDING["float16"]),
        _different(then, now, "unknown"),
        _different(_flat(facts), _flat(own), "the default") if "scheduler_config" in facts else {},
    )


def _again(pipe: CondPDiffPipeline, condition: Condition, facts: Mapping[str, Any]) -> LoraAdapter:
    """Generate the adapter, whatever examples say, and without the base model."""
    if "rows_at_once" in facts:  # it was made among others, on which it does not depend
        (made,) = denoise_many(pipe, [Request(condition, (facts["seed"],))], facts["num_inference_steps"], facts["guidance_scale"])
        return pipe.template.adapter_of(next(decode_apart(pipe, list(made.latents))))
    seeds = [torch.Generator().manual_seed(facts["seed"]) for _ in range(min(facts["num_adapters"], MAX_ADAPTERS))]
    params: torch.Tensor = pipe(
        condition,
        num_adapters=facts["num_adapters"],  # as many as then: the sums of a larger batch may round in another way
        generator=seeds if facts["generators"] == "each" else seeds[0],
        num_inference_steps=facts["num_inference_steps"],
        guidance_scale=facts["guidance_scale"],
        timesteps=facts.get("timesteps"),
        sigmas=facts.get("sigmas"),
        output_type="params",
    )
    return pipe.codec.to_adapter(params[facts["candidate"]])


@contextlib.contextmanager
def _threads(count: int | None) -> Iterator[None]:
    """Take sums by so many threads inside the block; by as many as ever if that is not known, or too many."""
    before = torch.get_num_threads()
    torch.set_num_threads(count if count is not None and count <= MAX_THREADS else before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _flat(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Join a scheduler's class and settings in one mapping."""
    return {"class": settings["scheduler"], **settings["scheduler_config"]}


def _different(then: Mapping[str, Any], now: Mapping[str, Any], missing: str) -> dict[str, tuple[str, str]]:
    pairs = {name: (str(then.get(name, missing)), str(now.get(name, missing))) for name in sorted({*then, *now})}
    return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}
