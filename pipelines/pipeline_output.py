"""The output of CondPDiffPipeline, and its report."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from diffusers.utils import BaseOutput

from cond_pdiff.adapter import LoraAdapter
from cond_pdiff.conditions.condition import FREE_ANSWERS, Condition
from cond_pdiff.few_shot import Choice
from cond_pdiff.models.condition_encoder import EncoderReport
from cond_pdiff.models.condition_index import Neighbour


@dataclass(frozen=True)
class GenerationReport:
    """A report of what is known about a request and its candidates.

    Args:
        nearest: the most similar trained tasks, most similar first.
        in_distribution: is the request like what the generator was trained on?
        threshold: the similarity from which a request counts as in-distribution.
        condition: what the condition encoder read.
        labels: label names kept with the adapter; none for a style.
        labels_from: "prompt", "nearest trained task" (a prompt without labels that is in-distribution), "free answers" or "nowhere".
        choice: what the prompt's examples say of the candidates; None where there were none, or one candidate that brings a head.
    """

    nearest: tuple[Neighbour, ...]
    in_distribution: bool
    threshold: float
    condition: EncoderReport
    labels: tuple[str, ...]
    labels_from: str
    choice: Choice | None

    def to_json(self) -> dict[str, Any]:
        """Return a JSON-ready description."""
        return asdict(self)

    def facts(self) -> dict[str, str]:
        """Return what is told of it beside its place among what was trained, in words: title → fact."""
        told: dict[str, str] = {}
        if choice := self.choice:
            place, own = f"{choice.index + 1} of {len(choice.scores)}", choice.scores[choice.index].accuracy
            if choice.strength:
                beside = f" (base model {choice.base.accuracy:.0%})" if choice.base else ""
                told["chosen"] = f"{place}, accuracy {own:.0%} on the given examples{beside}"
            else:
                told["chosen"] = f"the base model, accuracy {choice.score.accuracy:.0%} on the given examples ({place}: {own:.0%})"
            if choice.gain:
                told["gain"] = str(choice.gain)
        if self.condition.cuts:
            told["note"] = self.condition.cuts
        if self.condition.condition_kind.names_classes:
            none = "none: answers are free" if self.labels_from == FREE_ANSWERS else "none known; name them when classifying"
            told["labels"] = f"{', '.join(self.labels)} (from the {self.labels_from})" if self.labels else none
        return told

    def __str__(self) -> str:
        noun = self.condition.condition_kind.noun
        where = "in distribution" if self.in_distribution else f"OUT OF DISTRIBUTION, unlike every trained {noun}"
        similarity = self.nearest[0].similarity if self.nearest else 0.0
        told = {
            "request": f"{where} (similarity {similarity:.2f}, threshold {self.threshold:.2f})",
            "nearest": ", ".join(f"{neighbour.task} {neighbour.similarity:.2f}" for neighbour in self.nearest),
            **self.facts(),
        }
        return "\n".join(f"{title:<10} {fact}" for title, fact in told.items())


@dataclass
class CondPDiffPipelineOutput(BaseOutput):
    """The adapters generated from one condition, with a report.

    Args:
        adapters: all candidates.
        chosen: index of the candidate that does best on the prompt's examples; 0 where there are none.
        report: see `GenerationReport`.
        latents: the denoised latents, shape `(num_adapters, channels, length)`.
        refined: what the chosen candidate has become by `refine_steps`; None without any, and then no field of the tuple.
    """

    adapters: list[LoraAdapter]
    chosen: int
    report: GenerationReport
    latents: torch.Tensor
    refined: LoraAdapter | None = None

    @property
    def adapter(self) -> LoraAdapter:
        """The refined adapter, if there is one.

        Else the chosen one, or the base model if the prompt's examples say so (see `Choice`), with the prototypes that suit it.
        """
        if self.refined is not None:
            return self.refined
        adapter, choice = self.adapters[self.chosen], self.report.choice
        if choice is None:
            return adapter
        facts: dict[str, Any] = {"strength": choice.strength}
        if choice.score.with_examples:
            facts["prototype_examples"] = adapter.metadata["condition"]["examples"]
        return replace(adapter.scaled(choice.strength), metadata={**adapter.metadata, **facts})

    def refinement(self, condition: Condition) -> dict[str, str]:
        """Return what `refine_steps` did on what this condition shows, in words, as `GenerationReport.facts`; nothing without any."""
        if self.refined is None:
            return {}
        taken = self.refined.metadata["refined"]
        tried = f" of {taken['of']}" if "of" in taken else ""
        start = f"from candidate {self.chosen + 1} of {len(self.adapters)}"
        return {"refined": f"{taken['steps']} steps{tried} on {condition.refined_on()}, {start}"}

    def save_adapter(self, folder: str | Path, overwrite: bool = False) -> Path:
        """Save the chosen adapter as a peft adapter folder (see `LoraAdapter.save`)."""
        return self.adapter.save(folder, overwrite)
