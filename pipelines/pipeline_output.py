"""What CondPDiffPipeline returns."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers.utils import BaseOutput

from cond_pdiff.adapter import LoraAdapter
from cond_pdiff.models.condition_encoders import ConditionReport
from cond_pdiff.models.condition_index import Neighbour
from cond_pdiff.models.style_encoders import StyleReport


@dataclass(frozen=True)
class CandidateScore:
    """How one candidate does on the examples of the prompt: accuracy (0 to 1) and cross-entropy (nats)."""

    accuracy: float
    loss: float


@dataclass(frozen=True)
class GenerationReport:
    """What is known about a request and its candidates.

    Args:
        nearest: the most similar trained tasks, most similar first.
        in_distribution: is the request like what the generator was trained on?
        threshold: the similarity from which a request counts as in-distribution.
        condition: what the condition encoder read.
        labels: label names kept with the adapter; none for a style.
        labels_from: "prompt", "nearest trained task" (a prompt without labels that is in-distribution), or "nowhere".
        scores: of the candidates on the prompt's examples; None where there were none, or only one candidate.
    """

    nearest: tuple[Neighbour, ...]
    in_distribution: bool
    threshold: float
    condition: ConditionReport | StyleReport
    labels: tuple[str, ...]
    labels_from: str
    scores: tuple[CandidateScore, ...] | None

    def to_json(self) -> dict[str, Any]:
        """A JSON-ready description."""
        return asdict(self)

    def __str__(self) -> str:
        where = "in distribution" if self.in_distribution else "OUT OF DISTRIBUTION, unlike every trained task"
        similarity = self.nearest[0].similarity if self.nearest else 0.0
        lines = [
            f"request    {where} (similarity {similarity:.2f}, threshold {self.threshold:.2f})",
            "nearest    " + ", ".join(f"{neighbour.task} {neighbour.similarity:.2f}" for neighbour in self.nearest),
        ]
        if self.scores:
            best = best_candidate(self.scores)
            lines.append(f"chosen     {best + 1} of {len(self.scores)}, accuracy {self.scores[best].accuracy:.0%} on the given examples")
        read = self.condition
        if isinstance(read, ConditionReport) and (read.examples_dropped or read.texts_cut):
            lines.append(f"note       {read.examples_dropped} examples dropped, {read.texts_cut} texts cut at {read.token_limit} tokens")
        if isinstance(read, ConditionReport):
            known = f"{', '.join(self.labels)} (from the {self.labels_from})" if self.labels else "none known; name them when classifying"
            lines.append(f"labels     {known}")
        return "\n".join(lines)


def best_candidate(scores: Sequence[CandidateScore]) -> int:
    """Index of the most accurate candidate, among equals the one with the least loss."""
    return min(range(len(scores)), key=lambda index: (-scores[index].accuracy, scores[index].loss))


@dataclass
class CondPDiffPipelineOutput(BaseOutput):
    """Adapters generated from one condition.

    Args:
        adapters: all candidates.
        chosen: index of the candidate that does best on the prompt's examples; 0 where there are none.
        report: see `GenerationReport`.
        latents: the denoised latents, shape `(num_adapters, channels, length)`.
    """

    adapters: list[LoraAdapter]
    chosen: int
    report: GenerationReport
    latents: torch.Tensor

    @property
    def adapter(self) -> LoraAdapter:
        """The chosen adapter."""
        return self.adapters[self.chosen]

    def save_adapter(self, folder: str | Path, overwrite: bool = False) -> Path:
        """Save the chosen adapter as a peft adapter folder (see `LoraAdapter.save`)."""
        return self.adapter.save(folder, overwrite)
