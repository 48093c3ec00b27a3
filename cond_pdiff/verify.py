"""Make a generated adapter again from what it records of its making, and compare."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from cond_pdiff.adapter import LoraAdapter
from cond_pdiff.conditioning import StyleImage, TaskPrompt
from cond_pdiff.errors import AdapterError, ConditionError
from cond_pdiff.hub import find_generator, generator_source
from cond_pdiff.pipelines.pipeline_cond_pdiff import MAX_ADAPTERS, CondPDiffPipeline
from cond_pdiff.pipelines.pipeline_output import package_versions

NEEDED = (
    *("generator", "condition", "seed", "candidate", "num_adapters", "generators"),
    *("num_inference_steps", "guidance_scale", "scheduler", "dtype", "versions"),
)
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Verification:
    """What came of it.

    Args:
        same: every bit of every tensor is the same.
        largest_difference: between two numbers, in units of the adapter's largest.
        versions: recorded and present ones of the packages whose versions differ.
    """

    same: bool
    largest_difference: float
    versions: Mapping[str, tuple[str, str]]

    def __str__(self) -> str:
        """For people."""
        if self.same:
            return "the same bytes: the adapter is what its generator makes of its condition and seed"
        other = "; ".join(f"{name} {then} then, {now} now" for name, (then, now) in self.versions.items())
        return f"not the same: numbers differ by up to {self.largest_difference:.2g} of the largest" + (f" ({other})" if other else "")


def verify(adapter: LoraAdapter, generator: str | Path | None = None, image: str | Path | None = None) -> Verification:
    """Generate an adapter again from its recorded generator, condition, seed and settings, and compare every tensor.

    Args:
        generator: where the generator is now; default: by its recorded name and commit.
        image: the style image of a style adapter; adapters keep its hash only.

    Raises:
        AdapterError: the adapter does not record enough, or the generator is not the one that made it.
        ConditionError: the image is missing, or not the one that was shown.
        HubError: the generator is not to be had.
    """
    if "refined" in adapter.metadata:
        raise AdapterError("the adapter was refined on examples after it was generated; only what a generator wrote can be made again")
    missing = [name for name in NEEDED if adapter.metadata.get(name) is None]
    if missing:
        raise AdapterError(f"the adapter does not record its {missing[0]}; only generated ones with a seed can be made again")
    try:
        return _compare(adapter, adapter.metadata, generator, image)
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, RuntimeError) as error:
        raise AdapterError(f"what the adapter records of its making is malformed: {type(error).__name__}: {error}") from error


def _compare(adapter: LoraAdapter, facts: Mapping[str, Any], generator: str | Path | None, image: str | Path | None) -> Verification:
    source: Mapping[str, Any] = facts["generator"]
    name = generator if generator is not None else source["name"]
    folder = find_generator(name, **({"revision": source["revision"]} if source["revision"] and generator is None else {}))
    found = generator_source(name, folder)["sha256"]
    if found != source["sha256"]:
        raise AdapterError(f"{name} is not the generator that made this adapter: sha256 {found}, recorded {source['sha256']}")
    pipe = CondPDiffPipeline.from_pretrained(folder, dtype=DTYPES[facts["dtype"]])
    pipe.set_progress_bar_config(disable=True)
    if type(pipe.scheduler).__name__ != facts["scheduler"]:
        raise AdapterError(f"the adapter was made with a {facts['scheduler']}, but the generator has a {type(pipe.scheduler).__name__}")
    seeds = [torch.Generator().manual_seed(facts["seed"]) for _ in range(min(facts["num_adapters"], MAX_ADAPTERS))]
    params = pipe(
        _condition(facts["condition"], image),
        num_adapters=facts["num_adapters"],  # as many as then: the sums of a larger batch may round in another way
        generator=seeds if facts["generators"] == "each" else seeds[0],
        num_inference_steps=facts["num_inference_steps"],
        guidance_scale=facts["guidance_scale"],
        output_type="params",  # whatever examples say, and without the base model
    )
    again = pipe.template.to_adapter(params[facts["candidate"]]).scaled(facts.get("strength", 1.0))
    adapter.layout.validate(again.tensors)
    largest = max(float(tensor.abs().max()) for tensor in adapter.tensors.values())
    differences = [float((again.tensors[key] - tensor).abs().max()) for key, tensor in adapter.tensors.items()]
    now = package_versions()
    versions = {package: (str(then), now.get(package, "none")) for package, then in facts["versions"].items()}
    return Verification(
        all(torch.equal(again.tensors[key], tensor) for key, tensor in adapter.tensors.items()),
        max(differences) / max(largest, 1e-12),
        {package: pair for package, pair in versions.items() if pair[0] != pair[1]},
    )


def _condition(recorded: Mapping[str, Any], image: str | Path | None) -> TaskPrompt | StyleImage:
    if "image_sha256" not in recorded:
        return TaskPrompt.from_json(recorded)
    if image is None:
        raise ConditionError("the adapter was made from a picture, of which it keeps the hash only; give the file (--image)")
    shown = StyleImage.open(image)
    if shown.sha256 != recorded["image_sha256"]:
        raise ConditionError(f"{image} is not the picture that the adapter was made from (their pixels have other hashes)")
    return shown
